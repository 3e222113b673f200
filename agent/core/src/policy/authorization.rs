//! AuthorizationPolicy of `security.istio.io`, as an L4 proxy can keep it: which policies select a workload, and what
//! they say about one flow.
//!
//! ```text
//! any CUSTOM or unreadable policy, or a DENY rule that matches ─> deny
//! no ALLOW policy selects the workload                        ─> allow
//! any ALLOW rule matches                                      ─> allow
//! else                                                        ─> deny
//! ```
//! AUDIT policies and those of a dry run (annotation `istio.io/dry-run`) decide nothing; their matches are told.
//!
//! An L4 proxy cannot evaluate fields that need HTTP: hosts, methods, paths, request principals, headers, remote IPs,
//! SNI. An ALLOW rule with such a field never matches. Other rules ignore the field, so they match more flows. Both
//! are more restrictive than the policy's text, and both follow Istio's rules for ztunnel
//! (pilot/pkg/serviceregistry/kube/controller/ambient/authorization.go). A CUSTOM policy needs an external provider.
//! istiod does not pass it to ztunnel, so ztunnel allows flows that the provider might deny. Tacit denies all flows
//! that the policy selects, as Istio's sidecars do without the provider. A policy with `targetRefs` belongs to a
//! waypoint or gateway and selects no workload.
//!
//! A source without a proven identity matches no principal, namespace, service account or trust domain; so it matches every negation.

use std::{fmt, sync::Arc};

use super::Flow;
use crate::spiffe::TrustDomain;

mod matching;
pub(super) mod parse;
pub(super) mod reduced;
mod rule;

use rule::{FlowAttributes, Rule};

/// One policy that selects workloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// `namespace/name`, for people.
    id: String,
    action: Action,
    enforcement: Enforcement,
    rules: Vec<Rule>,
    /// Number of lookups of one decision, at most.
    lookups: usize,
}

/// The owner of the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attachment {
    /// Workloads, those that it selects.
    Workloads,
    /// A waypoint's or gateway's.
    Elsewhere,
}

/// The effect of a policy on a flow that matches.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Allow,
    Deny,
    Audit,
    /// Asks a provider that is not there: all is denied.
    Custom,
    /// The policy could not be read, and why: all is denied.
    Unreadable(String),
    /// The policies of a namespace are not applied, and why: all is denied.
    NotApplied(String),
}

/// The enforcement of a policy. A dry run is logged and decides nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Enforcement {
    Enforced,
    DryRun,
}

impl AuthorizationPolicy {
    fn new(id: String, action: Action, enforcement: Enforcement, rules: Vec<Rule>) -> Self {
        let lookups = 1 + rules.iter().map(Rule::lookups).sum::<usize>();
        Self { id, action, enforcement, rules, lookups }
    }

    /// A policy that could not be read. It denies all that it selects.
    pub(super) fn unreadable(id: String, why: String) -> Self {
        Self::new(id, Action::Unreadable(why), Enforcement::Enforced, Vec::new())
    }

    /// The policy in force instead of the policies of a namespace that are not applied. It denies all.
    pub(super) fn not_applied(namespace: &str, why: String) -> Self {
        Self::new(format!("{namespace}/*"), Action::NotApplied(why), Enforcement::Enforced, Vec::new())
    }

    /// Returns the number of lookups of one decision, at most.
    pub(super) fn lookups(&self) -> usize {
        self.lookups
    }

    fn matching(&self, flow: &FlowAttributes<'_>) -> Option<Match<'_>> {
        let rule = match self.action {
            Action::Custom | Action::Unreadable(_) | Action::NotApplied(_) => None,
            Action::Allow | Action::Deny | Action::Audit => {
                Some(self.rules.iter().position(|rule| rule.matches(flow))?)
            }
        };
        Some(Match { policy: self, rule })
    }

    fn denies(&self) -> bool {
        matches!(self.action, Action::Deny | Action::Custom | Action::Unreadable(_) | Action::NotApplied(_))
    }

    fn action(&self) -> &'static str {
        match self.action {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
            Action::Audit => "AUDIT",
            Action::Custom => "CUSTOM",
            Action::Unreadable(_) => "unreadable",
            Action::NotApplied(_) => "not applied",
        }
    }
}

/// A policy that matched a flow, and by which of its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match<'p> {
    policy: &'p AuthorizationPolicy,
    /// Index of the rule; `None` when the policy as a whole decides.
    rule: Option<usize>,
}

impl Match<'_> {
    /// `namespace/name` of the policy.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy.id
    }
}

impl fmt::Display for Match<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AuthorizationPolicy { id, action, enforcement, .. } = self.policy;
        if *enforcement == Enforcement::DryRun {
            f.write_str("dry run of ")?;
        }
        match (action, self.rule) {
            (Action::Custom, _) => {
                write!(f, "CUSTOM policy {id}, whose provider is not supported: it denies all it selects")
            }
            (Action::Unreadable(why), _) => {
                write!(f, "policy {id}, which could not be read and so denies all it selects ({why})")
            }
            (Action::NotApplied(why), _) => {
                write!(f, "policies {id}, which are not applied, so that all is denied ({why})")
            }
            (_, Some(index)) => write!(f, "rule {} of {} policy {id}", index + 1, self.policy.action()),
            (_, None) => write!(f, "{} policy {id}", self.policy.action()),
        }
    }
}

/// The result of authorization for a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthorizationDecision<'p> {
    /// No ALLOW policy selects the workload, and no other policy denies: allowed.
    Unrestricted,
    /// An ALLOW rule matches.
    Allowed(Match<'p>),
    /// Denied by this.
    Denied(Match<'p>),
    /// ALLOW policies select the workload, and none of their rules matches: denied.
    NotAllowed(UnmatchedPolicies<'p>),
}

/// ALLOW policies of which no rule matched; displayed as the list of the first names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmatchedPolicies<'p>(&'p Authorization);

/// Maximum number of policies that a message names. Thousands may select a workload.
const NAMES_MAX: usize = 4;
/// Maximum number of policies that a status lists for each workload.
const LISTED_MAX: usize = 50;

impl fmt::Display for UnmatchedPolicies<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = self.0.allowing().map(|policy| policy.id.as_str());
        let first: Vec<&str> = names.by_ref().take(NAMES_MAX).collect();
        write!(f, "{}", first.join(", "))?;
        match names.count() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// The policies that select one workload, mesh-wide ones first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authorization {
    policies: Vec<Arc<AuthorizationPolicy>>,
    /// Other names of the mesh's own trust domain.
    aliases: Arc<[TrustDomain]>,
}

impl Authorization {
    pub(super) fn new(policies: Vec<Arc<AuthorizationPolicy>>, aliases: Arc<[TrustDomain]>) -> Self {
        Self { policies, aliases }
    }

    /// Returns true if no policy selects the workload. Then no flow needs a check.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Number of policies.
    #[must_use]
    pub fn len(&self) -> usize {
        self.policies.len()
    }

    /// `namespace/name` of every policy, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.policies.iter().map(|policy| policy.id.as_str())
    }

    /// Returns the number of lookups of one decision, at most.
    #[must_use]
    pub fn lookups(&self) -> usize {
        self.policies.iter().map(|policy| policy.lookups()).sum()
    }

    /// The first names, for people, with the number of the others.
    #[must_use]
    pub fn first_names(&self) -> Vec<String> {
        let mut names = self.names();
        let mut first: Vec<String> = names.by_ref().take(LISTED_MAX).map(str::to_owned).collect();
        let more = names.count();
        first.extend((more > 0).then(|| format!("and {more} more")));
        first
    }

    /// Evaluates the policies for a flow.
    #[must_use]
    pub fn evaluate(&self, flow: &Flow) -> AuthorizationDecision<'_> {
        if self.is_empty() {
            return AuthorizationDecision::Unrestricted;
        }
        let flow = FlowAttributes::of(flow, &self.aliases);
        let denied =
            self.enforced().filter(|policy| policy.denies()).find_map(|policy| policy.matching(&flow));
        if let Some(by) = denied {
            return AuthorizationDecision::Denied(by);
        }
        let mut allowing = self.allowing().peekable();
        if allowing.peek().is_none() {
            return AuthorizationDecision::Unrestricted;
        }
        let flow = flow.in_allow_rules();
        match allowing.find_map(|policy| policy.matching(&flow)) {
            Some(by) => AuthorizationDecision::Allowed(by),
            None => AuthorizationDecision::NotAllowed(UnmatchedPolicies(self)),
        }
    }

    fn enforced(&self) -> impl Iterator<Item = &AuthorizationPolicy> {
        self.policies
            .iter()
            .map(|policy| &**policy)
            .filter(|policy| policy.enforcement == Enforcement::Enforced)
    }

    fn allowing(&self) -> impl Iterator<Item = &AuthorizationPolicy> {
        self.enforced().filter(|policy| policy.action == Action::Allow)
    }

    /// AUDIT policies, and policies of a dry run, that match a flow.
    #[must_use]
    pub fn audits(&self, flow: &Flow) -> Vec<Match<'_>> {
        let is_watched = |policy: &&Arc<AuthorizationPolicy>| {
            policy.action == Action::Audit || policy.enforcement == Enforcement::DryRun
        };
        let watched: Vec<_> = self.policies.iter().filter(is_watched).collect();
        if watched.is_empty() {
            return Vec::new();
        }
        let flow = FlowAttributes::of(flow, &self.aliases);
        watched.into_iter().filter_map(|policy| policy.matching(&flow)).collect()
    }
}

#[cfg(test)]
mod tests;
