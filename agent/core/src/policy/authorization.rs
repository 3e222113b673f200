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

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::Flow;
use crate::spiffe::SpiffeId;

mod matching;
pub(super) mod parse;

use matching::{Pattern, ServiceAccount, ValueMatch};

/// One policy that selects workloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// `namespace/name`, for people.
    id: String,
    action: Action,
    enforcement: Enforcement,
    rules: Vec<Rule>,
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
}

/// The enforcement of a policy. A dry run is logged and decides nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Enforcement {
    Enforced,
    DryRun,
}

/// Matches a flow that one of its sources, one of its operations and all of its conditions match; an empty list of
/// sources or operations matches any.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    sources: Vec<SourceMatch>,
    operations: Vec<OperationMatch>,
    conditions: Vec<Condition>,
    reach: Applicability,
}

/// The applicability of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Applicability {
    Evaluated,
    /// An ALLOW rule with a field that needs HTTP.
    NeverMatches,
}

/// `from.source`: all of its fields must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct SourceMatch {
    principals: ValueMatch<Pattern>,
    namespaces: ValueMatch<Pattern>,
    service_accounts: ValueMatch<ServiceAccount>,
    trust_domains: ValueMatch<Pattern>,
    blocks: ValueMatch<IpNet>,
}

/// `to.operation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct OperationMatch {
    ports: ValueMatch<u16>,
}

/// One entry of `when`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Condition {
    SourceIp(ValueMatch<IpNet>),
    SourceNamespace(ValueMatch<Pattern>),
    SourceAccount(ValueMatch<ServiceAccount>),
    SourcePrincipal(ValueMatch<Pattern>),
    SourceTrustDomain(ValueMatch<Pattern>),
    DestinationIp(ValueMatch<IpNet>),
    DestinationPort(ValueMatch<u16>),
}

/// In principals, this stands for the mesh's own trust domain, whatever that is called, as Istio has it. Identities of other
/// trust domains do not come here: the tunnel refuses them.
const OWN_DOMAIN: &str = "cluster.local";

/// The attributes of a flow that rules match.
struct FlowAttributes<'a> {
    identity: Option<&'a SpiffeId>,
    /// The identity as policies write it, without `spiffe://`: by its trust domain, and by [`OWN_DOMAIN`].
    principals: Vec<String>,
    client: IpAddr,
    server: IpAddr,
    port: u16,
}

impl<'a> FlowAttributes<'a> {
    fn of(flow: &'a Flow) -> Self {
        let identity = flow.source.identity();
        let principals = identity.map_or_else(Vec::new, |id| {
            let of = |domain: &str| format!("{domain}/ns/{}/sa/{}", id.namespace(), id.service_account());
            let own = id.trust_domain().to_string();
            if own == OWN_DOMAIN { vec![of(&own)] } else { vec![of(&own), of(OWN_DOMAIN)] }
        });
        Self {
            identity,
            principals,
            client: flow.client.to_canonical(),
            server: flow.destination.ip().to_canonical(),
            port: flow.destination.port(),
        }
    }

    fn has_principal(&self, pattern: &Pattern) -> bool {
        self.principals.iter().any(|principal| pattern.matches(principal))
    }

    fn has_namespace(&self, pattern: &Pattern) -> bool {
        self.identity.is_some_and(|identity| pattern.matches(identity.namespace()))
    }

    /// [`OWN_DOMAIN`] is no alias here: a policy that names a trust domain means that domain.
    fn has_trust_domain(&self, pattern: &Pattern) -> bool {
        self.identity.is_some_and(|id| pattern.matches(&id.trust_domain().to_string()))
    }

    fn has_account(&self, account: &ServiceAccount) -> bool {
        self.identity.is_some_and(|identity| account.is(identity))
    }
}

impl SourceMatch {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        self.principals.holds(|pattern| flow.has_principal(pattern))
            && self.namespaces.holds(|pattern| flow.has_namespace(pattern))
            && self.service_accounts.holds(|account| flow.has_account(account))
            && self.trust_domains.holds(|pattern| flow.has_trust_domain(pattern))
            && self.blocks.holds(|block| block.contains(&flow.client))
    }
}

impl OperationMatch {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        self.ports.holds(|port| *port == flow.port)
    }
}

impl Condition {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        match self {
            Self::SourceIp(blocks) => blocks.holds(|block| block.contains(&flow.client)),
            Self::SourceNamespace(patterns) => patterns.holds(|pattern| flow.has_namespace(pattern)),
            Self::SourceAccount(accounts) => accounts.holds(|account| flow.has_account(account)),
            Self::SourcePrincipal(patterns) => patterns.holds(|pattern| flow.has_principal(pattern)),
            Self::SourceTrustDomain(patterns) => patterns.holds(|pattern| flow.has_trust_domain(pattern)),
            Self::DestinationIp(blocks) => blocks.holds(|block| block.contains(&flow.server)),
            Self::DestinationPort(ports) => ports.holds(|port| *port == flow.port),
        }
    }
}

impl Rule {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        let from = self.sources.is_empty() || self.sources.iter().any(|source| source.matches(flow));
        let to =
            self.operations.is_empty() || self.operations.iter().any(|operation| operation.matches(flow));
        self.reach == Applicability::Evaluated
            && from
            && to
            && self.conditions.iter().all(|when| when.matches(flow))
    }
}

impl AuthorizationPolicy {
    /// A policy that could not be read. It denies all that it selects.
    pub(super) fn unreadable(id: String, why: String) -> Self {
        let enforcement = Enforcement::Enforced;
        Self { id, action: Action::Unreadable(why), enforcement, rules: Vec::new() }
    }

    fn matching(&self, flow: &FlowAttributes<'_>) -> Option<Match<'_>> {
        let rule = match self.action {
            Action::Custom | Action::Unreadable(_) => None,
            Action::Allow | Action::Deny | Action::Audit => {
                Some(self.rules.iter().position(|rule| rule.matches(flow))?)
            }
        };
        Some(Match { policy: self, rule })
    }

    fn denies(&self) -> bool {
        matches!(self.action, Action::Deny | Action::Custom | Action::Unreadable(_))
    }

    fn action(&self) -> &'static str {
        match self.action {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
            Action::Audit => "AUDIT",
            Action::Custom => "CUSTOM",
            Action::Unreadable(_) => "unreadable",
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

/// ALLOW policies of which no rule matched; displayed as the list of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmatchedPolicies<'p>(Vec<&'p AuthorizationPolicy>);

impl fmt::Display for UnmatchedPolicies<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|policy| policy.id.as_str()).collect();
        write!(f, "{}", names.join(", "))
    }
}

/// The policies that select one workload, mesh-wide ones first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authorization(Vec<Arc<AuthorizationPolicy>>);

impl Authorization {
    pub(super) fn new(policies: Vec<Arc<AuthorizationPolicy>>) -> Self {
        Self(policies)
    }

    /// Returns true if no policy selects the workload. Then no flow needs a check.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `namespace/name` of every policy, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|policy| policy.id.as_str())
    }

    /// Evaluates the policies for a flow.
    #[must_use]
    pub fn evaluate(&self, flow: &Flow) -> AuthorizationDecision<'_> {
        if self.is_empty() {
            return AuthorizationDecision::Unrestricted;
        }
        let flow = FlowAttributes::of(flow);
        let enforced = || self.0.iter().filter(|policy| policy.enforcement == Enforcement::Enforced);
        let denied = enforced().filter(|policy| policy.denies()).find_map(|policy| policy.matching(&flow));
        if let Some(by) = denied {
            return AuthorizationDecision::Denied(by);
        }
        let allows: Vec<_> =
            enforced().filter(|policy| policy.action == Action::Allow).map(|p| &**p).collect();
        if allows.is_empty() {
            return AuthorizationDecision::Unrestricted;
        }
        match allows.iter().find_map(|policy| policy.matching(&flow)) {
            Some(by) => AuthorizationDecision::Allowed(by),
            None => AuthorizationDecision::NotAllowed(UnmatchedPolicies(allows)),
        }
    }

    /// AUDIT policies, and policies of a dry run, that match a flow.
    #[must_use]
    pub fn audits(&self, flow: &Flow) -> Vec<Match<'_>> {
        let is_watched = |policy: &&Arc<AuthorizationPolicy>| {
            policy.action == Action::Audit || policy.enforcement == Enforcement::DryRun
        };
        let watched: Vec<_> = self.0.iter().filter(is_watched).collect();
        if watched.is_empty() {
            return Vec::new();
        }
        let flow = FlowAttributes::of(flow);
        watched.into_iter().filter_map(|policy| policy.matching(&flow)).collect()
    }
}

#[cfg(test)]
mod tests;
