//! From objects of the API to policies, one change at a time. Pure.
//!
//! A list is merged into what is known, and what it did not hold is removed at its end: there are never fewer policies than
//! the cluster has. A change of an object that changes nothing that is read of it (its status) is not published.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tacit_core::{
    policy::{Origin, Policies, PolicyKind, PolicyObject},
    yaml::Mistakes,
};

use super::document::{Document, Metadata};
use crate::kubernetes::{self, Complaints};

/// Unreadable policies that are shown with all that is wrong; more are counted.
const SHOWN_MAX: usize = 20;
/// Mistakes of one policy that are told: an author corrects the first ones first.
const MISTAKES_MAX: usize = 5;

/// What happened in the cluster.
pub(super) type Change = kubernetes::Change<PolicyKind, Document>;
/// Kind, namespace and name.
type Key = (PolicyKind, String, String);

/// What an author should know.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// A rule that never matches, or matches more than it says.
    Noted(String),
    Refused(Refused),
}

/// A policy that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) kind: PolicyKind,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) version: String,
    /// What is wrong, what follows from it, and what to do.
    pub(super) message: String,
}

impl Refused {
    /// Its kind and whole name.
    pub(super) fn name(&self) -> String {
        format!("{} {}/{}", self.kind.name(), self.namespace, self.name)
    }
}

/// All policies that are known.
#[derive(Debug)]
pub(super) struct Store {
    root_namespace: Arc<str>,
    known: BTreeMap<Key, Known>,
    /// Those seen in a list that is under way.
    seen: HashMap<PolicyKind, HashSet<Key>>,
    listed: BTreeSet<PolicyKind>,
    refused: u64,
    changed: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Known {
    created: String,
    object: PolicyObject,
    /// Why it cannot be read.
    message: Option<String>,
}

impl Store {
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

    /// Takes one change; answers what its author should know that was not told before.
    pub(super) fn take(&mut self, change: Change) -> Vec<Finding> {
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

    /// All policies when both kinds were listed and something has changed since this was last asked.
    pub(super) fn news(&mut self) -> Option<Policies> {
        if self.listed.len() < PolicyKind::ALL.len() || !std::mem::take(&mut self.changed) {
            return None;
        }
        // Istio's order: of one age, the name decides.
        let mut all: Vec<(&Key, &Known)> = self.known.iter().collect();
        all.sort_by(|(a, x), (b, y)| (&x.created, &a.2, &a.1).cmp(&(&y.created, &b.2, &b.1)));
        let objects: Vec<PolicyObject> = all.into_iter().map(|(_, known)| known.object.clone()).collect();
        Some(Policies::of(&objects, &self.root_namespace))
    }

    /// The policies that cannot be read.
    pub(super) fn complaints(&self) -> Complaints {
        let told = self.known.iter().filter_map(|((kind, namespace, name), known)| {
            Some(format!("{} {namespace}/{name}: {}", kind.name(), known.message.as_ref()?))
        });
        let mut list: Vec<String> = told.collect();
        if let Some(more) = list.len().checked_sub(SHOWN_MAX).filter(|more| *more > 0) {
            list.truncate(SHOWN_MAX);
            list.push(format!("and {more} more: kubectl get events -A shows those of the last hour"));
        }
        Complaints { list, total: self.refused }
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
        let known = Known { created: metadata.creation_timestamp.clone(), object, message };
        if self.known.get(&key) == Some(&known) {
            return Vec::new();
        }
        self.changed = true;
        let findings = match &known.message {
            Some(message) => {
                self.refused += 1;
                vec![Finding::Refused(refused(kind, metadata, message.clone()))]
            }
            None => {
                let alone = Policies::of(std::slice::from_ref(&known.object), &self.root_namespace);
                alone.notes().iter().cloned().map(Finding::Noted).collect()
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

fn refused(kind: PolicyKind, metadata: Metadata, message: String) -> Refused {
    let Metadata { name, namespace, uid, resource_version: version, .. } = metadata;
    Refused { kind, namespace, name, uid, version, message }
}

fn message(kind: PolicyKind, mistakes: &Mistakes) -> String {
    let told: Vec<String> = mistakes.list.iter().take(MISTAKES_MAX).map(|mistake| mistake.text()).collect();
    let more = match mistakes.list.len().saturating_sub(MISTAKES_MAX) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let effect = match kind {
        PolicyKind::PeerAuthentication => "is STRICT for",
        PolicyKind::AuthorizationPolicy => "denies every connection to",
    };
    format!(
        "{}{more}. Until it is corrected, it {effect} the workloads that it selects, or all of its namespace where its selector cannot be read.",
        told.join("; ")
    )
}

#[cfg(test)]
mod tests;
