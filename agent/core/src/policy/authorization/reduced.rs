//! Policies as istiod reduces them for L4 proxies: `istio.security.Authorization`, without its encoding.
//!
//! ```text
//! a policy matches if one of its rules does        rules are the fields `rules` (earlier `groups`)
//! a rule matches if all of its clauses do          a rule without clauses matches any flow
//! a clause matches if one of its matches does      a clause without matches matches any flow
//! a match holds if all of its fields do            each field has a list and a negated list
//! ```
//! A match without any field is what is left of a condition that needs HTTP. It always holds in a DENY policy and never in an
//! ALLOW policy, and so does a match with a condition of a kind that is not known here.
//!
//! istiod sends no modes. A workload in STRICT lists DENY policies for sources without a principal. [`UnprovenDenial`] derives
//! the mode from the shape of the policies, not from their names.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;

use super::{
    Action, AuthorizationPolicy, Enforcement,
    matching::{Pattern, ServiceAccount, ValueMatch},
    rule::{Applicability, Clause, Condition, Rule},
};
use crate::policy::PolicyUsage;

/// Most ports of one DENY policy that are looked at one by one. A pod can have 128 modes of its own. A policy that names more counts
/// as one that denies plaintext at all ports.
const PORTS_MAX: usize = 1024;

/// The workloads for which a reduced policy holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReducedScope {
    /// All workloads of the mesh.
    Global,
    /// The workloads of its namespace.
    Namespace,
    /// The workloads that list it.
    Listed,
}

/// The action of a reduced policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReducedAction {
    /// Flows that match are allowed.
    Allow,
    /// Flows that match are denied.
    Deny,
}

/// A text that a list has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextMatch {
    /// The text itself.
    Exact(String),
    /// Texts that begin with it.
    Prefix(String),
    /// Texts that end with it.
    Suffix(String),
    /// Any text that is not empty.
    Presence,
}

impl TextMatch {
    fn pattern(self) -> Pattern {
        match self {
            Self::Exact(text) => Pattern::Exact(text),
            Self::Prefix(text) if !text.is_empty() => Pattern::Prefix(text),
            Self::Suffix(text) if !text.is_empty() => Pattern::Suffix(text),
            Self::Prefix(_) | Self::Suffix(_) | Self::Presence => Pattern::Present,
        }
    }
}

/// A list of which one must match, and a list of which none may. An empty list asks for nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed<T> {
    /// One of these.
    pub any: Vec<T>,
    /// None of these.
    pub none: Vec<T>,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { any: Vec::new(), none: Vec::new() }
    }
}

impl<T> Listed<T> {
    fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }
}

/// A match of a clause.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReducedMatch {
    /// Namespace of the source.
    pub namespaces: Listed<TextMatch>,
    /// Namespace and name of the source's service account.
    pub service_accounts: Listed<(String, String)>,
    /// Principal of the source, without `spiffe://`.
    pub principals: Listed<TextMatch>,
    /// Address of the source.
    pub source_ips: Listed<IpNet>,
    /// Address of the destination.
    pub destination_ips: Listed<IpNet>,
    /// Port of the destination.
    pub destination_ports: Listed<u16>,
    /// True if there is a condition of a kind that is not known here.
    pub has_unknown: bool,
}

impl ReducedMatch {
    fn conditions(self) -> Vec<Condition> {
        let texts = |list: Listed<TextMatch>| {
            let patterns = |texts: Vec<TextMatch>| texts.into_iter().map(TextMatch::pattern).collect();
            (!list.is_empty()).then(|| ValueMatch::of(patterns(list.any), patterns(list.none)))
        };
        let accounts = |list: Vec<(String, String)>| {
            list.into_iter().map(|(namespace, name)| ServiceAccount { namespace, name }).collect()
        };
        let blocks = |list: Listed<IpNet>| (!list.is_empty()).then(|| ValueMatch::of(list.any, list.none));
        let service_accounts = self.service_accounts;
        let service_accounts = (!service_accounts.is_empty())
            .then(|| ValueMatch::of(accounts(service_accounts.any), accounts(service_accounts.none)));
        let ports = self.destination_ports;
        let ports = (!ports.is_empty()).then(|| ValueMatch::of(ports.any, ports.none));
        let all = [
            texts(self.namespaces).map(Condition::SourceNamespace),
            service_accounts.map(Condition::SourceAccount),
            texts(self.principals).map(Condition::SourcePrincipal),
            blocks(self.source_ips).map(Condition::SourceIp),
            blocks(self.destination_ips).map(Condition::DestinationIp),
            ports.map(Condition::DestinationPort),
        ];
        all.into_iter().flatten().collect()
    }
}

/// The rules of a reduced policy: rules of clauses of matches.
pub type ReducedRules = Vec<Vec<Vec<ReducedMatch>>>;

/// A policy as istiod reduces it for L4 proxies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReducedPolicy {
    /// The workloads for which it holds.
    pub scope: ReducedScope,
    policy: Arc<AuthorizationPolicy>,
    unproven: UnprovenDenial,
    /// Bytes of its message.
    bytes: usize,
}

/// The ports at which policies deny every source that proves no identity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::policy) struct UnprovenDenial {
    /// At every port that is not in `ports`.
    pub(in crate::policy) elsewhere: bool,
    pub(in crate::policy) ports: BTreeMap<u16, bool>,
}

impl UnprovenDenial {
    const EVERYWHERE: Self = Self { elsewhere: true, ports: BTreeMap::new() };

    fn of(rules: &[Rule]) -> Self {
        let at = |port| rules.iter().any(|rule| rule.matches_unproven(port));
        let mut ports = BTreeMap::new();
        for port in rules.iter().flat_map(Rule::named_ports) {
            if ports.len() == PORTS_MAX && !ports.contains_key(&port) {
                return Self::EVERYWHERE;
            }
            ports.entry(port).or_insert_with(|| at(Some(port)));
        }
        Self { elsewhere: at(None), ports }
    }

    pub(in crate::policy) fn at(&self, port: u16) -> bool {
        self.ports.get(&port).copied().unwrap_or(self.elsewhere)
    }

    fn is_anywhere(&self) -> bool {
        self.elsewhere || self.ports.values().any(|denies| *denies)
    }
}

impl ReducedPolicy {
    /// Returns the policy `id`, which is `namespace/name`. `bytes` is the length of its message.
    #[must_use]
    pub fn new(
        id: String,
        (scope, action): (ReducedScope, ReducedAction),
        is_dry_run: bool,
        rules: ReducedRules,
        bytes: usize,
    ) -> Self {
        let rules: Vec<Rule> = rules.into_iter().map(|rule| reduced_rule(rule, action)).collect();
        let (action, enforcement) = match (action, is_dry_run) {
            (ReducedAction::Allow, true) => (Action::Allow, Enforcement::DryRun),
            (ReducedAction::Deny, true) => (Action::Deny, Enforcement::DryRun),
            (ReducedAction::Allow, false) => (Action::Allow, Enforcement::Enforced),
            (ReducedAction::Deny, false) => (Action::Deny, Enforcement::Enforced),
        };
        let unproven = match (&action, enforcement) {
            (Action::Deny, Enforcement::Enforced) => UnprovenDenial::of(&rules),
            _ => UnprovenDenial::default(),
        };
        Self {
            scope,
            policy: Arc::new(AuthorizationPolicy::new(id, action, enforcement, rules)),
            unproven,
            bytes,
        }
    }

    /// Returns the policy that stands in for one that cannot be read. It denies everything.
    #[must_use]
    pub fn unreadable(id: String, scope: ReducedScope, why: String) -> Self {
        let policy = Arc::new(AuthorizationPolicy::unreadable(id, why));
        Self { scope, policy, unproven: UnprovenDenial::EVERYWHERE, bytes: 0 }
    }

    /// Returns the policy that denies everything because the policies of `namespace` are not applied.
    pub(in crate::policy) fn not_applied(namespace: &str, scope: ReducedScope, why: &str) -> Self {
        let policy = Arc::new(AuthorizationPolicy::not_applied(namespace, why.to_owned()));
        Self { scope, policy, unproven: UnprovenDenial::EVERYWHERE, bytes: 0 }
    }

    /// The part of its namespace's share that the policy uses.
    #[must_use]
    pub fn usage(&self) -> PolicyUsage {
        PolicyUsage { objects: 1, bytes: self.bytes as u64, lookups: self.policy.lookups() as u64 }
    }

    /// Returns true if the policy denies every source without an identity at ports that no list names, as a STRICT
    /// PeerAuthentication does.
    #[must_use]
    pub fn is_strict(&self) -> bool {
        self.unproven.elsewhere
    }

    /// Returns true if the policy denies every source without an identity at some port.
    #[must_use]
    pub fn is_strict_somewhere(&self) -> bool {
        self.unproven.is_anywhere()
    }

    pub(in crate::policy) fn policy(&self) -> &Arc<AuthorizationPolicy> {
        &self.policy
    }

    pub(in crate::policy) fn unproven(&self) -> &UnprovenDenial {
        &self.unproven
    }
}

fn reduced_rule(clauses: Vec<Vec<ReducedMatch>>, action: ReducedAction) -> Rule {
    let mut reach = Applicability::Evaluated;
    let clauses: Vec<Clause> = clauses
        .into_iter()
        .map(|matches| {
            let asked = !matches.is_empty();
            let evaluated = matches.into_iter().filter_map(|one| {
                let has_unknown = one.has_unknown;
                let conditions = one.conditions();
                let is_evaluated = !has_unknown && !conditions.is_empty();
                (action == ReducedAction::Deny || is_evaluated).then_some(conditions)
            });
            let clause: Clause = evaluated.collect();
            if asked && clause.is_empty() {
                reach = Applicability::NeverMatches;
            }
            clause
        })
        .collect();
    Rule::of_clauses(clauses, reach)
}

#[cfg(test)]
mod tests;
