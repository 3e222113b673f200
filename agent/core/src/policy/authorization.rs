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

use super::Flow;
use crate::spiffe::SpiffeId;

mod matching;
pub(super) mod parse;

use matching::{Blocks, Patterns, PortSet, ServiceAccounts, ValueMatch};

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
    principals: ValueMatch<Patterns>,
    namespaces: ValueMatch<Patterns>,
    service_accounts: ValueMatch<ServiceAccounts>,
    trust_domains: ValueMatch<Patterns>,
    blocks: ValueMatch<Blocks>,
}

/// `to.operation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct OperationMatch {
    ports: ValueMatch<PortSet>,
}

/// One entry of `when`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Condition {
    SourceIp(ValueMatch<Blocks>),
    SourceNamespace(ValueMatch<Patterns>),
    SourceAccount(ValueMatch<ServiceAccounts>),
    SourcePrincipal(ValueMatch<Patterns>),
    SourceTrustDomain(ValueMatch<Patterns>),
    DestinationIp(ValueMatch<Blocks>),
    DestinationPort(ValueMatch<PortSet>),
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

    fn has_principal(&self, patterns: &Patterns) -> bool {
        self.principals.iter().any(|principal| patterns.matches(principal))
    }

    fn has_namespace(&self, patterns: &Patterns) -> bool {
        self.identity.is_some_and(|identity| patterns.matches(identity.namespace()))
    }

    /// [`OWN_DOMAIN`] is no alias here: a policy that names a trust domain means that domain.
    fn has_trust_domain(&self, patterns: &Patterns) -> bool {
        self.identity.is_some_and(|id| patterns.matches(&id.trust_domain().to_string()))
    }

    fn has_account(&self, accounts: &ServiceAccounts) -> bool {
        self.identity.is_some_and(|identity| accounts.has(identity))
    }
}

impl SourceMatch {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        self.principals.holds(|patterns| flow.has_principal(patterns))
            && self.namespaces.holds(|patterns| flow.has_namespace(patterns))
            && self.service_accounts.holds(|accounts| flow.has_account(accounts))
            && self.trust_domains.holds(|patterns| flow.has_trust_domain(patterns))
            && self.blocks.holds(|blocks| blocks.contain(flow.client))
    }

    /// Returns which field asks for one of a list, if no other field asks for anything.
    fn only_list(&self) -> Option<usize> {
        let fields = [
            (self.principals.is_absent(), self.principals.is_one_of()),
            (self.namespaces.is_absent(), self.namespaces.is_one_of()),
            (self.service_accounts.is_absent(), self.service_accounts.is_one_of()),
            (self.trust_domains.is_absent(), self.trust_domains.is_one_of()),
            (self.blocks.is_absent(), self.blocks.is_one_of()),
        ];
        let mut asking = fields.iter().enumerate().filter(|(_, (is_absent, _))| !is_absent);
        match (asking.next(), asking.next()) {
            (Some((field, (_, true))), None) => Some(field),
            _ => None,
        }
    }

    fn widen(&mut self, other: Self) {
        self.principals.widen(other.principals);
        self.namespaces.widen(other.namespaces);
        self.service_accounts.widen(other.service_accounts);
        self.trust_domains.widen(other.trust_domains);
        self.blocks.widen(other.blocks);
    }

    fn lookups(&self) -> usize {
        self.principals.lookups()
            + self.namespaces.lookups()
            + self.service_accounts.lookups()
            + self.trust_domains.lookups()
            + self.blocks.lookups()
    }
}

/// Joins the sources that only ask for one of a list of the same field. A flow matches the joined source if the flow matches
/// one of them.
fn joined_sources(sources: Vec<SourceMatch>) -> Vec<SourceMatch> {
    let mut joined: Vec<SourceMatch> = Vec::new();
    // The place of the source that asks for each field.
    let mut places: [Option<usize>; 5] = [None; 5];
    for source in sources {
        let Some(field) = source.only_list() else {
            joined.push(source);
            continue;
        };
        match places[field] {
            Some(place) => joined[place].widen(source),
            None => {
                places[field] = Some(joined.len());
                joined.push(source);
            }
        }
    }
    joined
}

/// Joins the operations that only ask for one of a list of ports.
fn joined_operations(operations: Vec<OperationMatch>) -> Vec<OperationMatch> {
    let (lists, mut joined): (Vec<_>, Vec<_>) =
        operations.into_iter().partition(|operation| operation.ports.is_one_of());
    joined.extend(lists.into_iter().reduce(|mut all, more| {
        all.ports.widen(more.ports);
        all
    }));
    joined
}

impl OperationMatch {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        self.ports.holds(|ports| ports.has(flow.port))
    }
}

impl Condition {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        match self {
            Self::SourceIp(blocks) => blocks.holds(|blocks| blocks.contain(flow.client)),
            Self::SourceNamespace(patterns) => patterns.holds(|patterns| flow.has_namespace(patterns)),
            Self::SourceAccount(accounts) => accounts.holds(|accounts| flow.has_account(accounts)),
            Self::SourcePrincipal(patterns) => patterns.holds(|patterns| flow.has_principal(patterns)),
            Self::SourceTrustDomain(patterns) => patterns.holds(|patterns| flow.has_trust_domain(patterns)),
            Self::DestinationIp(blocks) => blocks.holds(|blocks| blocks.contain(flow.server)),
            Self::DestinationPort(ports) => ports.holds(|ports| ports.has(flow.port)),
        }
    }

    fn lookups(&self) -> usize {
        match self {
            Self::SourceIp(blocks) | Self::DestinationIp(blocks) => blocks.lookups(),
            Self::SourceNamespace(patterns)
            | Self::SourcePrincipal(patterns)
            | Self::SourceTrustDomain(patterns) => patterns.lookups(),
            Self::SourceAccount(accounts) => accounts.lookups(),
            Self::DestinationPort(ports) => ports.lookups(),
        }
    }
}

impl Rule {
    fn new(
        sources: Vec<SourceMatch>,
        operations: Vec<OperationMatch>,
        conditions: Vec<Condition>,
        reach: Applicability,
    ) -> Self {
        let (sources, operations) = (joined_sources(sources), joined_operations(operations));
        Self { sources, operations, conditions, reach }
    }

    /// Returns the number of lookups of one match. A rule without any field is one.
    fn lookups(&self) -> usize {
        let sources: usize = self.sources.iter().map(SourceMatch::lookups).sum();
        let operations: usize = self.operations.iter().map(|operation| operation.ports.lookups()).sum();
        let conditions: usize = self.conditions.iter().map(Condition::lookups).sum();
        1 + sources + operations + conditions
    }

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

    /// Number of policies.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// `namespace/name` of every policy, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|policy| policy.id.as_str())
    }

    /// Returns the number of lookups of one decision, at most.
    #[must_use]
    pub fn lookups(&self) -> usize {
        self.0.iter().map(|policy| policy.lookups()).sum()
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
        let flow = FlowAttributes::of(flow);
        let denied =
            self.enforced().filter(|policy| policy.denies()).find_map(|policy| policy.matching(&flow));
        if let Some(by) = denied {
            return AuthorizationDecision::Denied(by);
        }
        let mut allowing = self.allowing().peekable();
        if allowing.peek().is_none() {
            return AuthorizationDecision::Unrestricted;
        }
        match allowing.find_map(|policy| policy.matching(&flow)) {
            Some(by) => AuthorizationDecision::Allowed(by),
            None => AuthorizationDecision::NotAllowed(UnmatchedPolicies(self)),
        }
    }

    fn enforced(&self) -> impl Iterator<Item = &AuthorizationPolicy> {
        self.0.iter().map(|policy| &**policy).filter(|policy| policy.enforcement == Enforcement::Enforced)
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
