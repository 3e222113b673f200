//! Builds policies from API objects, one change at a time. Pure.
//!
//! Objects of a list are merged into the store. Objects that the list did not contain are removed at its end, so there are
//! never fewer policies than in the cluster. Updates of fields that are not read, for example the status, are not published.
//!
//! Each namespace has a share of the policies. Texts beyond the share are not parsed and not kept. When they have room again, a
//! new list of the namespace is requested.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tacit_core::{
    policy::{Origin, Policies, PolicyKind, PolicyObject, PolicyUsage},
    yaml::Mistakes,
};

use super::{
    NotApplied,
    document::{Document, Metadata},
};
use crate::kubernetes::{self, InvalidObjects, Problem, reported};

/// Maximum number of reported mistakes of one policy.
const MISTAKES_MAX: usize = 5;

/// A change in the cluster.
pub(super) type Change = kubernetes::Change<PolicyKind, Document>;
/// A message about the cluster.
pub(super) type Update = kubernetes::Update<PolicyKind, Document>;
/// PolicyKind, namespace and name.
type Key = (PolicyKind, String, String);

/// A finding for the author of a policy.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// A warning, for example about a rule that never matches.
    Warning(String),
    Invalid(InvalidPolicy),
}

/// An invalid policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InvalidPolicy {
    pub(super) kind: PolicyKind,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) version: String,
    /// The mistakes, their effect, and the remedy.
    pub(super) message: String,
}

impl InvalidPolicy {
    /// Returns kind, namespace and name.
    pub(super) fn name(&self) -> String {
        format!("{} {}/{}", self.kind.name(), self.namespace, self.name)
    }
}

/// All policies of the cluster.
#[derive(Debug)]
pub(super) struct PolicyStore {
    root_namespace: Arc<str>,
    policies: Policies,
    /// The policies of each namespace. Those without a namespace are in the root namespace.
    namespaces: BTreeMap<String, NamespaceRecord>,
    /// Policies seen in the current list.
    seen: HashMap<PolicyKind, HashSet<Key>>,
    listed: BTreeSet<PolicyKind>,
    /// The errors of the invalid policies.
    invalid: BTreeMap<Key, String>,
    refused: u64,
    /// Namespaces whose policies have changed since the last publication.
    changed: BTreeSet<String>,
    /// True if a list was completed for the first time since the last publication.
    is_new: bool,
    /// Namespaces whose policies that were not read have room now.
    needs_list: BTreeSet<String>,
    logged: NotApplied,
    /// Number of times that the policies of a namespace were built, for the tests.
    #[cfg(test)]
    builds: usize,
}

/// The policies of a namespace.
#[derive(Debug, Default)]
struct NamespaceRecord {
    policies: BTreeMap<Key, PolicyRecord>,
    /// Of all policies, also of those that were not read.
    bytes: usize,
    /// Number of policies that were not read, because the namespace exceeds its share.
    unread: usize,
}

#[derive(Debug, PartialEq, Eq)]
struct PolicyRecord {
    created: String,
    bytes: usize,
    /// `None` if the policy was not read.
    object: Option<PolicyObject>,
}

impl NamespaceRecord {
    fn usage(&self) -> PolicyUsage {
        PolicyUsage { objects: self.policies.len() as u64, bytes: self.bytes as u64, lookups: 0 }
    }

    fn remove(&mut self, key: &Key) -> Option<PolicyRecord> {
        let removed = self.policies.remove(key)?;
        self.bytes -= removed.bytes;
        self.unread -= usize::from(removed.object.is_none());
        Some(removed)
    }

    fn insert(&mut self, key: Key, record: PolicyRecord) {
        self.bytes += record.bytes;
        self.unread += usize::from(record.object.is_none());
        self.policies.insert(key, record);
    }
}

impl PolicyStore {
    pub(super) fn new(root_namespace: Arc<str>) -> Self {
        Self {
            policies: Policies::empty(&root_namespace),
            root_namespace,
            namespaces: BTreeMap::new(),
            seen: HashMap::new(),
            listed: BTreeSet::new(),
            invalid: BTreeMap::new(),
            refused: 0,
            changed: BTreeSet::new(),
            is_new: true,
            needs_list: BTreeSet::new(),
            logged: NotApplied::default(),
            #[cfg(test)]
            builds: 0,
        }
    }

    /// Applies one change; returns new findings.
    pub(super) fn apply_change(&mut self, change: Change) -> Vec<Finding> {
        match change {
            Change::Listing(kind) => _ = self.seen.insert(kind, HashSet::new()),
            Change::Applied(document) => return self.apply(document),
            Change::Deleted(document) => self.delete(&key(&document)),
            Change::Listed(kind) => {
                let seen = self.seen.remove(&kind).unwrap_or_default();
                let known = self.namespaces.values().flat_map(|namespace| namespace.policies.keys());
                let gone = known.filter(|key| key.0 == kind && !seen.contains(key));
                let gone: Vec<Key> = gone.cloned().collect();
                gone.iter().for_each(|key| self.delete(key));
                // Those of which something is unread are looked at once the list is whole.
                let with_unread = self.namespaces.iter().filter(|(_, namespace)| namespace.unread > 0);
                self.changed.extend(with_unread.map(|(name, _)| name.clone()));
                self.is_new |= self.listed.insert(kind);
            }
        }
        Vec::new()
    }

    /// Returns all policies if both resources were listed and something has changed since the last call. Only the policies of
    /// changed namespaces are built again.
    pub(super) fn take_changed(&mut self) -> Option<Policies> {
        let is_complete = self.listed.len() == PolicyKind::ALL.len();
        if !is_complete || self.changed.is_empty() && !self.is_new {
            return None;
        }
        self.is_new = false;
        for namespace in std::mem::take(&mut self.changed) {
            self.build(&namespace);
        }
        Some(self.policies.clone())
    }

    fn build(&mut self, namespace: &str) {
        #[cfg(test)]
        {
            self.builds += 1;
        }
        let Some(known) = self.namespaces.get(namespace) else {
            return self.policies.set_namespace(namespace, &[]);
        };
        let usage = known.usage();
        if known.unread > 0 || usage.excess().is_some() {
            // A list that is under way may bring them.
            if usage.excess().is_none() && self.seen.is_empty() {
                self.needs_list.insert(namespace.to_owned());
            }
            return self.policies.refuse_namespace(namespace, usage);
        }
        // Istio's order: by age, then by name.
        let mut all: Vec<(&Key, &PolicyRecord)> = known.policies.iter().collect();
        all.sort_by(|(a, x), (b, y)| (&x.created, &a.2, &a.1).cmp(&(&y.created, &b.2, &b.1)));
        let objects: Vec<&PolicyObject> =
            all.into_iter().filter_map(|(_, known)| known.object.as_ref()).collect();
        self.policies.set_namespace(namespace, &objects);
    }

    /// Returns the namespaces, once, whose policies that were not read have room now, so that a list is required.
    pub(super) fn take_needs_list(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.needs_list)
    }

    /// Returns a warning for each namespace whose policies are not applied since the last call.
    pub(super) fn warnings(&mut self) -> Vec<String> {
        self.logged.warnings(&self.policies)
    }

    /// Returns the invalid policies.
    pub(super) fn invalid_objects(&self) -> InvalidObjects {
        let listed = self.invalid.iter().map(|((kind, namespace, name), message)| {
            let line = format!("{} {namespace}/{name}: {message}", kind.name());
            Problem { owner: namespace.clone(), line }
        });
        let problems: Vec<Problem> = listed.collect();
        let (mut list, more) = reported(&problems);
        if more > 0 {
            list.push(format!("and {more} more; `kubectl get events -A` shows those of the last hour"));
        }
        InvalidObjects { list, total: self.refused }
    }

    /// The namespace in which a policy holds.
    fn scope<'a>(&'a self, key: &'a Key) -> &'a str {
        if key.1.is_empty() { &self.root_namespace } else { &key.1 }
    }

    fn delete(&mut self, key: &Key) {
        let scope = self.scope(key).to_owned();
        let Some(namespace) = self.namespaces.get_mut(&scope) else { return };
        if namespace.remove(key).is_none() {
            return;
        }
        if namespace.policies.is_empty() {
            self.namespaces.remove(&scope);
        }
        self.invalid.remove(key);
        self.changed.insert(scope);
    }

    fn apply(&mut self, document: Document) -> Vec<Finding> {
        let key = key(&document);
        if let Some(seen) = self.seen.get_mut(&document.kind) {
            seen.insert(key.clone());
        }
        let scope = self.scope(&key).to_owned();
        let namespace = self.namespaces.entry(scope.clone()).or_default();
        let before = namespace.remove(&key);
        let bytes = document.text.len();
        let PolicyUsage { objects, bytes: used, .. } = namespace.usage();
        let usage = PolicyUsage { objects: objects + 1, bytes: used + bytes as u64, lookups: 0 };
        let created = document.metadata.creation_timestamp.clone();
        if usage.excess().is_some() {
            let is_known = before.is_some_and(|known| known.object.is_none() && known.bytes == bytes);
            // Its text is not kept: a list gets it again.
            namespace.insert(key.clone(), PolicyRecord { created, bytes, object: None });
            self.invalid.remove(&key);
            if !is_known {
                self.changed.insert(scope);
            }
            return Vec::new();
        }
        let Document { kind, metadata, text } = document;
        let origin = Some(metadata.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        let origin = Origin { name: &metadata.name, namespace: origin, kind: Some(kind) };
        let (object, mistakes) = PolicyObject::read(&text, origin);
        let message = mistakes.map(|mistakes| message(kind, &mistakes));
        let is_known = before
            .is_some_and(|known| known.created == created && known.object.as_ref() == Some(&object))
            && self.invalid.get(&key) == message.as_ref();
        let notes = object.notes().iter().cloned().map(Finding::Warning).collect();
        namespace.insert(key.clone(), PolicyRecord { created, bytes, object: Some(object) });
        // The same policy in a shorter text can make room for those that were not read.
        if is_known && namespace.unread == 0 {
            return Vec::new();
        }
        self.changed.insert(scope);
        match message {
            Some(message) => {
                self.refused += 1;
                self.invalid.insert(key, message.clone());
                vec![Finding::Invalid(refused(kind, metadata, message))]
            }
            None => {
                self.invalid.remove(&key);
                notes
            }
        }
    }
}

/// Removes changes of a policy that a later change of the batch replaces, so that one version of the policy is parsed. The batch
/// of a namespace that changes its policies without a pause then costs no more than the namespace's share.
pub(super) fn drop_replaced(batch: &mut Vec<Update>) {
    let mut later = HashSet::new();
    let mut kept: Vec<bool> = batch.iter().rev().map(|update| is_kept(update, &mut later)).collect();
    batch.retain(|_| kept.pop().unwrap_or(true));
}

/// `later` has the policies that later updates of the batch change.
fn is_kept(update: &Update, later: &mut HashSet<Key>) -> bool {
    match update {
        Update::Change(Change::Applied(document) | Change::Deleted(document)) => later.insert(key(document)),
        // The end of a list removes the policies that came before its begin and not between the two.
        Update::Change(Change::Listing(kind) | Change::Listed(kind)) => {
            later.retain(|(of, ..)| of != kind);
            true
        }
        Update::Fresh(_) | Update::Failed(..) => true,
    }
}

fn key(document: &Document) -> Key {
    let Metadata { namespace, name, .. } = &document.metadata;
    (document.kind, namespace.clone(), name.clone())
}

fn refused(kind: PolicyKind, metadata: Metadata, message: String) -> InvalidPolicy {
    let Metadata { name, namespace, uid, resource_version: version, .. } = metadata;
    InvalidPolicy { kind, namespace, name, uid, version, message }
}

fn message(kind: PolicyKind, mistakes: &Mistakes) -> String {
    let listed: Vec<String> = mistakes.list.iter().take(MISTAKES_MAX).map(|mistake| mistake.text()).collect();
    let more = match mistakes.list.len().saturating_sub(MISTAKES_MAX) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let effect = match kind {
        PolicyKind::PeerAuthentication => "is STRICT for",
        PolicyKind::AuthorizationPolicy => "denies every connection to",
    };
    format!(
        "{}{more}. Until the policy is corrected, it {effect} the workloads that it selects, or all workloads of its namespace if its selector is invalid.",
        listed.join("; ")
    )
}

#[cfg(test)]
mod tests;
