//! One rule of an AuthorizationPolicy, and the attributes of a flow that it matches.

use std::net::IpAddr;

use super::matching::{Blocks, Patterns, PortSet, ServiceAccounts, ValueMatch, ValueSet};
use crate::{
    policy::{Flow, FlowSource},
    spiffe::{SpiffeId, TrustDomain},
};

/// Matches a flow that one of its sources, one of its operations and all of its conditions match; an empty list of
/// sources or operations matches any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    sources: Vec<SourceMatch>,
    operations: Vec<OperationMatch>,
    conditions: Vec<Condition>,
    /// All of them must match, each by one of its alternatives. Only reduced policies have some.
    clauses: Vec<Clause>,
    reach: Applicability,
}

/// Alternatives, of which one must match with all of its conditions. No alternative matches any flow.
pub(super) type Clause = Vec<Vec<Condition>>;

/// The applicability of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Applicability {
    Evaluated,
    /// An ALLOW rule with a field that needs HTTP.
    NeverMatches,
}

/// `from.source`: all of its fields must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SourceMatch {
    pub(super) principals: ValueMatch<Patterns>,
    pub(super) namespaces: ValueMatch<Patterns>,
    pub(super) service_accounts: ValueMatch<ServiceAccounts>,
    pub(super) trust_domains: ValueMatch<Patterns>,
    pub(super) blocks: ValueMatch<Blocks>,
}

/// `to.operation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OperationMatch {
    pub(super) ports: ValueMatch<PortSet>,
}

/// One entry of `when`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Condition {
    SourceIp(ValueMatch<Blocks>),
    SourceNamespace(ValueMatch<Patterns>),
    SourceAccount(ValueMatch<ServiceAccounts>),
    SourcePrincipal(ValueMatch<Patterns>),
    SourceTrustDomain(ValueMatch<Patterns>),
    DestinationIp(ValueMatch<Blocks>),
    DestinationPort(ValueMatch<PortSet>),
}

/// In principals, this stands for the mesh's own trust domain, whatever that is called, as Istio has it. An identity of a federated
/// trust domain has its own name only.
const OWN_DOMAIN: &str = "cluster.local";

/// The attributes of a flow that rules match.
pub(super) struct FlowAttributes<'a> {
    identity: Option<&'a SpiffeId>,
    /// The identity as policies write it, without `spiffe://`: by its trust domain. If that is the mesh's own, by its aliases and by
    /// [`OWN_DOMAIN`] too.
    principals: Vec<String>,
    /// The trust domain and its aliases.
    trust_domains: Vec<&'a str>,
    /// Of a federated trust domain.
    is_federated: bool,
    /// A rule that says nothing of trust domains means the namespaces and accounts of the mesh's own.
    is_own_meant: bool,
    client: IpAddr,
    server: IpAddr,
    port: u16,
}

impl<'a> FlowAttributes<'a> {
    /// `aliases` are other names of the mesh's own trust domain.
    pub(super) fn of(flow: &'a Flow, aliases: &'a [TrustDomain]) -> Self {
        let identity = flow.source.identity();
        let is_federated = matches!(flow.source, FlowSource::Federated(_));
        let mut trust_domains: Vec<&str> = identity.iter().map(|id| id.trust_domain().as_str()).collect();
        if identity.is_some() && !is_federated {
            trust_domains.extend(aliases.iter().map(TrustDomain::as_str));
        }
        let principals = identity.map_or_else(Vec::new, |id| {
            let of = |domain: &str| format!("{domain}/ns/{}/sa/{}", id.namespace(), id.service_account());
            let stands_for_own = !is_federated && !trust_domains.contains(&OWN_DOMAIN);
            let domains = trust_domains.iter().copied().chain(stands_for_own.then_some(OWN_DOMAIN));
            domains.map(of).collect()
        });
        Self {
            identity,
            principals,
            trust_domains,
            is_federated,
            is_own_meant: false,
            client: flow.client.to_canonical(),
            server: flow.destination.ip().to_canonical(),
            port: flow.destination.port(),
        }
    }

    /// Returns the attributes for ALLOW rules, see [`FlowAttributes::names_hold`].
    pub(super) fn in_allow_rules(self) -> Self {
        Self { is_own_meant: true, ..self }
    }

    fn has_principal(&self, patterns: &Patterns) -> bool {
        self.principals.iter().any(|principal| patterns.matches(principal))
    }

    /// Returns true if a condition on namespaces or accounts holds. `has` reports whether an identity has a value of a list.
    ///
    /// Two trust domains may have the same names. If the rule does not say which domain it means (`by_domain`), a source of a federated
    /// domain satisfies no such condition of an ALLOW rule. In other rules it has the names that are listed, and is never one that a rule
    /// leaves out, so that they deny more.
    fn names_hold<S: ValueSet>(
        &self,
        by_domain: bool,
        names: &ValueMatch<S>,
        has: impl Fn(&S, &SpiffeId) -> bool,
    ) -> bool {
        let has_one_of = |list: &S| self.identity.is_some_and(|identity| has(list, identity));
        if by_domain || !self.is_federated {
            return names.holds(has_one_of);
        }
        if self.is_own_meant { names.is_absent() } else { names.holds_any(has_one_of) }
    }

    /// Returns true if principals that the source must have tell its trust domain from the mesh's own.
    fn is_domain_meant(&self, principals: &Patterns) -> bool {
        self.identity.is_some_and(|id| {
            !principals.matches(&format!("{OWN_DOMAIN}/ns/{}/sa/{}", id.namespace(), id.service_account()))
        })
    }

    /// [`OWN_DOMAIN`] is no alias here: a policy that names a trust domain means that domain.
    fn has_trust_domain(&self, patterns: &Patterns) -> bool {
        self.trust_domains.iter().any(|domain| patterns.matches(domain))
    }
}

impl SourceMatch {
    fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        let by_domain = flow.is_federated
            && (self.trust_domains.asks()
                || self.principals.asks()
                    && self.principals.holds_any(|principals| flow.is_domain_meant(principals)));
        self.principals.holds(|patterns| flow.has_principal(patterns))
            && flow.names_hold(by_domain, &self.namespaces, |list, id| list.matches(id.namespace()))
            && flow.names_hold(by_domain, &self.service_accounts, ServiceAccounts::has)
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
            Self::SourceNamespace(names) => {
                flow.names_hold(false, names, |list, id| list.matches(id.namespace()))
            }
            Self::SourceAccount(accounts) => flow.names_hold(false, accounts, ServiceAccounts::has),
            Self::SourcePrincipal(patterns) => patterns.holds(|patterns| flow.has_principal(patterns)),
            Self::SourceTrustDomain(patterns) => patterns.holds(|patterns| flow.has_trust_domain(patterns)),
            Self::DestinationIp(blocks) => blocks.holds(|blocks| blocks.contain(flow.server)),
            Self::DestinationPort(ports) => ports.holds(|ports| ports.has(flow.port)),
        }
    }

    /// Returns true if the condition holds for every source without an identity. What an address decides does not.
    fn holds_unproven(&self, port: Option<u16>) -> bool {
        match self {
            Self::SourceIp(blocks) | Self::DestinationIp(blocks) => blocks.is_absent(),
            Self::SourceNamespace(texts) | Self::SourcePrincipal(texts) | Self::SourceTrustDomain(texts) => {
                texts.holds(|_| false)
            }
            Self::SourceAccount(accounts) => accounts.holds(|_| false),
            Self::DestinationPort(ports) => ports.holds(|ports| port.is_some_and(|port| ports.has(port))),
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
    pub(super) fn new(
        sources: Vec<SourceMatch>,
        operations: Vec<OperationMatch>,
        conditions: Vec<Condition>,
        reach: Applicability,
    ) -> Self {
        let (sources, operations) = (joined_sources(sources), joined_operations(operations));
        Self { sources, operations, conditions, clauses: Vec::new(), reach }
    }

    /// Returns the rule of a reduced policy.
    pub(super) fn of_clauses(clauses: Vec<Clause>, reach: Applicability) -> Self {
        Self { clauses, ..Self::new(Vec::new(), Vec::new(), Vec::new(), reach) }
    }

    /// Returns the number of lookups of one match. A rule without any field is one.
    pub(super) fn lookups(&self) -> usize {
        let sources: usize = self.sources.iter().map(SourceMatch::lookups).sum();
        let operations: usize = self.operations.iter().map(|operation| operation.ports.lookups()).sum();
        let conditions: usize = self.conditions.iter().map(Condition::lookups).sum();
        let clauses = self.clauses.iter().flatten().flatten().map(Condition::lookups);
        1 + sources + operations + conditions + clauses.sum::<usize>()
    }

    /// Returns true if the clauses match every flow to `port` whose source proves no identity, whatever its addresses. `None` is a
    /// port that no list names.
    pub(super) fn matches_unproven(&self, port: Option<u16>) -> bool {
        let holds = |alternative: &Vec<Condition>| alternative.iter().all(|when| when.holds_unproven(port));
        let clause = |clause: &Clause| clause.is_empty() || clause.iter().any(holds);
        self.reach == Applicability::Evaluated && self.clauses.iter().all(clause)
    }

    /// Returns the ports that the clauses name.
    pub(super) fn named_ports(&self) -> impl Iterator<Item = u16> {
        let conditions = self.clauses.iter().flatten().flatten();
        conditions.flat_map(|condition| match condition {
            Condition::DestinationPort(ports) => ports.lists().flat_map(PortSet::iter).collect(),
            _ => Vec::new(),
        })
    }

    pub(super) fn matches(&self, flow: &FlowAttributes<'_>) -> bool {
        let from = self.sources.is_empty() || self.sources.iter().any(|source| source.matches(flow));
        let to =
            self.operations.is_empty() || self.operations.iter().any(|operation| operation.matches(flow));
        self.reach == Applicability::Evaluated
            && from
            && to
            && self.conditions.iter().all(|when| when.matches(flow))
            && self.clauses.iter().all(|clause| {
                let matches =
                    |alternative: &Vec<Condition>| alternative.iter().all(|when| when.matches(flow));
                clause.is_empty() || clause.iter().any(matches)
            })
    }
}
