//! Builds policies from API objects, one change at a time. Pure.
//!
//! Objects of a list are merged into the store. Objects that the list did not contain are removed at its end, so there are
//! never fewer policies than in the cluster. Updates of fields that are not read, for example the status, are not published.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tacit_core::{
    policy::{Origin, Policies, PolicyKind, PolicyObject},
    yaml::Mistakes,
};

use super::document::{Document, Metadata};
use crate::kubernetes::{self, InvalidObjects, Problem, reported};

/// Maximum number of reported mistakes of one policy.
const MISTAKES_MAX: usize = 5;

/// A change in the cluster.
pub(super) type Change = kubernetes::Change<PolicyKind, Document>;
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
    known: BTreeMap<Key, PolicyRecord>,
    /// Policies seen in the current list.
    seen: HashMap<PolicyKind, HashSet<Key>>,
    listed: BTreeSet<PolicyKind>,
    refused: u64,
    changed: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct PolicyRecord {
    created: String,
    object: PolicyObject,
    /// The error, if the policy is invalid.
    message: Option<String>,
}

impl PolicyStore {
    pub(super) fn new(root_namespace: Arc<str>) -> Self {
        Self {
            root_namespace,
            known: BTreeMap::new(),
            seen: HashMap::new(),
            listed: BTreeSet::new(),
            refused: 0,
            changed: true,
        }
    }

    /// Applies one change; returns new findings.
    pub(super) fn apply_change(&mut self, change: Change) -> Vec<Finding> {
        match change {
            Change::Listing(kind) => _ = self.seen.insert(kind, HashSet::new()),
            Change::Applied(document) => return self.apply(document),
            Change::Deleted(document) => {
                self.changed |= self.known.remove(&key(&document)).is_some();
            }
            Change::Listed(kind) => {
                let seen = self.seen.remove(&kind).unwrap_or_default();
                let before = self.known.len();
                self.known.retain(|key, _| key.0 != kind || seen.contains(key));
                self.changed |= self.known.len() != before;
                self.changed |= self.listed.insert(kind);
            }
        }
        Vec::new()
    }

    /// Returns all policies if both resources were listed and something has changed since the last call.
    pub(super) fn take_changed(&mut self) -> Option<Policies> {
        if self.listed.len() < PolicyKind::ALL.len() || !std::mem::take(&mut self.changed) {
            return None;
        }
        // Istio's order: by age, then by name.
        let mut all: Vec<(&Key, &PolicyRecord)> = self.known.iter().collect();
        all.sort_by(|(a, x), (b, y)| (&x.created, &a.2, &a.1).cmp(&(&y.created, &b.2, &b.1)));
        let objects: Vec<PolicyObject> = all.into_iter().map(|(_, known)| known.object.clone()).collect();
        Some(Policies::of(&objects, &self.root_namespace))
    }

    /// Returns the invalid policies.
    pub(super) fn invalid_objects(&self) -> InvalidObjects {
        let listed = self.known.iter().filter_map(|((kind, namespace, name), known)| {
            let line = format!("{} {namespace}/{name}: {}", kind.name(), known.message.as_ref()?);
            Some(Problem { owner: namespace.clone(), line })
        });
        let problems: Vec<Problem> = listed.collect();
        let (mut list, more) = reported(&problems);
        if more > 0 {
            list.push(format!("and {more} more; `kubectl get events -A` shows those of the last hour"));
        }
        InvalidObjects { list, total: self.refused }
    }

    fn apply(&mut self, document: Document) -> Vec<Finding> {
        let key = key(&document);
        if let Some(seen) = self.seen.get_mut(&document.kind) {
            seen.insert(key.clone());
        }
        let Document { kind, metadata, text } = document;
        let namespace = Some(metadata.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        let origin = Origin { name: &metadata.name, namespace, kind: Some(kind) };
        let (object, mistakes) = PolicyObject::read(&text, origin);
        let message = mistakes.map(|mistakes| message(kind, &mistakes));
        let known = PolicyRecord { created: metadata.creation_timestamp.clone(), object, message };
        if self.known.get(&key) == Some(&known) {
            return Vec::new();
        }
        self.changed = true;
        let findings = match &known.message {
            Some(message) => {
                self.refused += 1;
                vec![Finding::Invalid(refused(kind, metadata, message.clone()))]
            }
            None => {
                let alone = Policies::of(std::slice::from_ref(&known.object), &self.root_namespace);
                alone.notes().iter().cloned().map(Finding::Warning).collect()
            }
        };
        self.known.insert(key, known);
        findings
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
