//! The policies of one namespace, ready for lookups. Pure.
//!
//! They are built once for each change of the namespace's objects. Policies that exceed the share of their namespace are not
//! applied: the workloads are STRICT, and every connection to them is denied.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    AuthorizationPolicy, Mode, ModeSetting, Modes, PolicyObject, PolicyUsage,
    authorization::Attachment,
    object::{ParsedPolicy, ScopedAuthorization},
    peer_authentication::PeerAuthentication,
    selects,
};
use crate::directory::Workload;

/// The policies of a namespace.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct NamespacePolicies {
    /// The mode of the first policy without selector.
    mode: Option<ModeSetting>,
    /// Policies with a selector, in order.
    selecting: Vec<SelectorPolicy>,
    /// The places of those policies in the list, by one label that they select.
    by_label: HashMap<Label, Vec<usize>>,
    /// STRICT whatever else is configured: it cannot be read whom a PeerAuthentication selects, or what it configures for all.
    pub(super) is_strict: bool,
    authorizing: Vec<ScopedAuthorization>,
    pub(super) notes: Vec<String>,
    /// Why the policies are not applied.
    pub(super) not_applied: Option<Arc<str>>,
    /// The used part of the namespace's share.
    pub(super) usage: PolicyUsage,
}

/// Name and value of a label.
type Label = (String, String);

/// A policy for the workloads that have all of `labels`.
#[derive(Debug, PartialEq, Eq)]
struct SelectorPolicy {
    labels: BTreeMap<String, String>,
    mode: ModeSetting,
    ports: BTreeMap<u16, ModeSetting>,
}

impl NamespacePolicies {
    /// Builds the policies from objects, oldest first.
    pub(super) fn of(namespace: &str, objects: &[&PolicyObject]) -> Self {
        let usage = objects.iter().map(|object| object.usage()).sum::<PolicyUsage>();
        if let Some(why) = usage.excess() {
            return Self::not_applied(namespace, usage, &why);
        }
        let mut policies = Self { usage, ..Self::default() };
        for object in objects {
            match object.parsed() {
                ParsedPolicy::PeerAuthentication(policy) => policies.add_modes(policy),
                ParsedPolicy::Authorization(policy) => policies.add_authorizing(policy),
            }
        }
        policies
    }

    /// Denies everything to the workloads of the namespace.
    pub(super) fn not_applied(namespace: &str, usage: PolicyUsage, why: &str) -> Self {
        let policy = AuthorizationPolicy::not_applied(namespace, why.to_owned());
        let deny = ScopedAuthorization {
            namespace: Some(namespace.into()),
            labels: BTreeMap::new(),
            attachment: Attachment::Workloads,
            policy: Arc::new(policy),
            notes: Vec::new(),
        };
        Self {
            is_strict: true,
            authorizing: vec![deny],
            not_applied: Some(why.into()),
            usage,
            ..Self::default()
        }
    }

    /// Returns true if there is no policy.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn add_modes(&mut self, policy: &PeerAuthentication) {
        let PeerAuthentication { namespace: _, labels, mode, ports, unreadable } = policy.clone();
        let Some((name, value)) = labels.first_key_value() else {
            if unreadable {
                self.is_strict = true;
            } else {
                self.mode.get_or_insert(mode);
            }
            return;
        };
        self.by_label.entry((name.clone(), value.clone())).or_default().push(self.selecting.len());
        self.selecting.push(SelectorPolicy { labels, mode, ports });
    }

    fn add_authorizing(&mut self, policy: &ScopedAuthorization) {
        self.notes.extend(policy.notes.iter().cloned());
        if policy.attachment == Attachment::Workloads {
            self.authorizing.push(policy.clone());
        }
    }

    /// The authorization policies that select a workload.
    pub(super) fn authorizing(&self, workload: &Workload) -> impl Iterator<Item = &Arc<AuthorizationPolicy>> {
        let selecting = self.authorizing.iter().filter(|policy| selects(&policy.labels, workload));
        selecting.map(|policy| &policy.policy)
    }

    /// The mode without a selector. Returns `wider` if nothing is configured.
    pub(super) fn mode_or(&self, wider: Mode) -> Mode {
        if self.is_strict { Mode::Strict } else { self.mode.unwrap_or_default().or(wider) }
    }

    /// Returns true if a workload or a port may be STRICT by one of these policies.
    pub(super) fn may_be_strict(&self) -> bool {
        let strict = ModeSetting::Set(Mode::Strict);
        let selects_strict = |policy: &SelectorPolicy| {
            policy.mode == strict || policy.ports.values().any(|port| *port == strict)
        };
        self.is_strict || self.mode == Some(strict) || self.selecting.iter().any(selects_strict)
    }

    /// The modes of a workload of this namespace in a mesh with the mode `mesh`.
    pub(super) fn modes(&self, workload: &Workload, mesh: Mode) -> Modes {
        let namespace = self.mode_or(mesh);
        let policy = if self.is_strict { None } else { self.first_selecting(workload) };
        let Some(policy) = policy else { return Modes { default: namespace, ports: BTreeMap::new() } };
        let default = policy.mode.or(namespace);
        let ports = policy.ports.iter().map(|(port, setting)| (*port, setting.or(default))).collect();
        Modes { default, ports }
    }

    /// The first policy that selects a workload. Only policies for one of its labels are looked at.
    fn first_selecting(&self, workload: &Workload) -> Option<&SelectorPolicy> {
        if self.selecting.is_empty() {
            return None;
        }
        let of_label = |(name, value): (&str, &str)| {
            let places = self.by_label.get(&(name.to_owned(), value.to_owned()))?;
            places.iter().copied().find(|place| selects(&self.selecting[*place].labels, workload))
        };
        workload.labels.iter().filter_map(of_label).min().map(|place| &self.selecting[place])
    }
}
