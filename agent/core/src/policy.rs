//! Modes and policy: may this flow reach that workload? Pure: no clock, no I/O, no logging.
//!
//! Modes are Istio's, from PeerAuthentication objects of `security.istio.io`. The narrowest scope that says
//! something holds:
//!
//! ```text
//! port (portLevelMtls) > workload (selector) > namespace > mesh (root namespace) > PERMISSIVE
//! ```
//!
//! UNSET and a left-out mode say nothing, the next wider scope holds. Of several policies of one scope the
//! first is the one that counts (Istio: the oldest), even when it says UNSET. A PeerAuthentication with a
//! selector holds in its own namespace only; in the root namespace too it selects only workloads of that
//! namespace.
//!
//! A flow that the mode lets in meets the AuthorizationPolicies that select its workload: all that do, from the
//! workload's namespace and from the root namespace, whose policies select workloads of every namespace. What they say
//! is in `authorization`, how objects are read in `object`, how a verdict is put in words in `explain`.
//!
//! The policies of each namespace are a part of their own (`namespace`), with a share of its own (`share`). A source replaces
//! the parts of the namespaces that changed. Copies share all other parts.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use crate::{
    cow_map::CowMap,
    directory::Workload,
    refusal::RefusalReason,
    shares::{Capacity, POLICIES, POLICY_BYTES, POLICY_LOOKUPS, Share, ShareUse},
    spiffe::{SpiffeId, TrustDomain},
    yaml::Mistakes,
};

mod authorization;
pub mod explain;
mod metadata;
mod namespace;
mod object;
mod peer_authentication;
mod reduced;
mod share;

pub use authorization::{
    Authorization, AuthorizationDecision, AuthorizationPolicy, Match, UnmatchedPolicies,
    reduced::{Listed, ReducedAction, ReducedMatch, ReducedPolicy, ReducedRules, ReducedScope, TextMatch},
};
pub use object::{Origin, PolicyKind, PolicyObject};
pub use reduced::{ReducedListing, ReducedNamespace, ReducedStrictness};
pub use share::PolicyUsage;
pub use tacit_abi::Mode;

use namespace::NamespacePolicies;
use reduced::ReducedPolicies;

/// The modes of one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modes {
    /// Mode of every port that is not in `ports`.
    pub default: Mode,
    /// Ports with a mode of their own, as the application listens on them.
    pub ports: BTreeMap<u16, Mode>,
}

impl Modes {
    /// Returns the ports whose mode differs from that of all others.
    pub fn exceptions(&self) -> impl Iterator<Item = (u16, Mode)> {
        self.ports.iter().map(|(port, mode)| (*port, *mode)).filter(|(_, mode)| *mode != self.default)
    }

    /// The mode of a port.
    #[must_use]
    pub fn at(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }

    fn raise(&mut self, minimum: ModeSetting) {
        self.default = minimum.raise(self.default);
        self.ports.values_mut().for_each(|mode| *mode = minimum.raise(*mode));
    }
}

/// All policies known at one time. A clone shares its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policies {
    root_namespace: Arc<str>,
    /// Those of the root namespace, and those whose namespace cannot be read. They hold everywhere.
    root: Arc<NamespacePolicies>,
    /// Those of the other namespaces that have any.
    namespaces: CowMap<Arc<str>, Arc<NamespacePolicies>>,
    /// Namespaces whose policies are not applied, and why.
    not_applied: BTreeMap<Arc<str>, Arc<str>>,
    /// No policy sets a mode below this one.
    minimum: ModeSetting,
    /// Other names of the mesh's own trust domain.
    aliases: Arc<[TrustDomain]>,
    /// The policies of a source that reduces them. There are no others then.
    reduced: Option<Box<ReducedPolicies>>,
}

impl Default for Policies {
    fn default() -> Self {
        Self::empty("")
    }
}

/// The mode in one policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ModeSetting {
    /// UNSET or left out: the next wider scope holds.
    #[default]
    Inherit,
    Set(Mode),
}

impl ModeSetting {
    fn or(self, wider: Mode) -> Mode {
        match self {
            Self::Inherit => wider,
            Self::Set(mode) => mode,
        }
    }

    /// Returns `mode`, or this one if it is stricter.
    fn raise(self, mode: Mode) -> Mode {
        match self {
            Self::Inherit => mode,
            Self::Set(minimum) => mode.max(minimum),
        }
    }
}

/// Returns true if a workload has all of `labels`.
fn selects(labels: &BTreeMap<String, String>, workload: &Workload) -> bool {
    labels.iter().all(|(name, value)| workload.labels.get(name) == Some(value.as_str()))
}

impl Policies {
    /// Parses a file of PeerAuthentication and AuthorizationPolicy documents; policies in `root_namespace` hold
    /// mesh-wide. An empty file leaves every workload at Istio's default, PERMISSIVE, and allows every flow.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text. A kind that is not supported is one: a policy that is skipped would let
    /// through what it denies.
    pub fn parse(text: &str, file: &Path, root_namespace: &str) -> Result<Self, Mistakes> {
        object::parse(text, file, root_namespace)
    }

    /// No policies, of a mesh with this root namespace.
    #[must_use]
    pub fn empty(root_namespace: &str) -> Self {
        Self {
            root_namespace: root_namespace.into(),
            root: Arc::default(),
            namespaces: CowMap::default(),
            not_applied: BTreeMap::new(),
            minimum: ModeSetting::Inherit,
            aliases: Arc::default(),
            reduced: None,
        }
    }

    /// No policies yet of a source that reduces them, for the workloads of `node`.
    #[must_use]
    pub fn reduced(root_namespace: &str, node: Arc<str>) -> Self {
        Self { reduced: Some(Box::new(ReducedPolicies::new(node))), ..Self::empty(root_namespace) }
    }

    /// Replaces the reduced policies of a namespace, or denies everything to its workloads if the policies exceed its share. In the
    /// root namespace that concerns all workloads. Other sources have no reduced policies.
    pub fn set_reduced_namespace(&mut self, namespace: Arc<str>, mut policies: ReducedNamespace) {
        let excess = policies.usage.excess();
        match &excess {
            Some(why) => _ = self.not_applied.insert(Arc::clone(&namespace), why.as_str().into()),
            None => _ = self.not_applied.remove(&namespace),
        }
        if let Some(why) = excess {
            policies.scoped = vec![ReducedPolicy::not_applied(&namespace, ReducedScope::Namespace, &why)];
        }
        if let Some(reduced) = &mut self.reduced {
            reduced.set_namespace(namespace, policies);
        }
    }

    /// Replaces the reduced policies that hold for all workloads.
    pub fn set_reduced_global(&mut self, mut policies: Vec<ReducedPolicy>) {
        if let Some(why) = self.not_applied.get(&self.root_namespace) {
            let refused = ReducedPolicy::not_applied(&self.root_namespace, ReducedScope::Global, why);
            policies.push(refused);
        }
        if let Some(reduced) = &mut self.reduced {
            reduced.set_global(policies);
        }
    }

    /// Sets the modes that reduced policies show for the mesh as a whole.
    pub fn set_reduced_strictness(&mut self, strictness: ReducedStrictness) {
        if let Some(reduced) = &mut self.reduced {
            reduced.set_strictness(strictness);
        }
    }

    /// All policies of a source that knows objects one by one, oldest first: of two PeerAuthentications of one scope the
    /// first counts.
    #[must_use]
    pub fn of(objects: &[PolicyObject], root_namespace: &str) -> Self {
        let mut by_namespace: BTreeMap<&str, Vec<&PolicyObject>> = BTreeMap::new();
        for object in objects {
            by_namespace.entry(object.namespace().unwrap_or(root_namespace)).or_default().push(object);
        }
        let mut policies = Self::empty(root_namespace);
        for (namespace, objects) in by_namespace {
            policies.set_namespace(namespace, &objects);
        }
        policies
    }

    /// The same policies, none of which sets a mode below `minimum`.
    #[must_use]
    pub fn with_minimum(self, minimum: Mode) -> Self {
        Self { minimum: ModeSetting::Set(minimum), ..self }
    }

    /// The same policies, in which other names of the mesh's own trust domain stand for it.
    #[must_use]
    pub fn with_aliases(self, aliases: Arc<[TrustDomain]>) -> Self {
        Self { aliases, ..self }
    }

    /// Replaces the policies of a namespace, oldest first. If they exceed the namespace's share they are not applied.
    pub fn set_namespace(&mut self, namespace: &str, objects: &[&PolicyObject]) {
        self.set(namespace, NamespacePolicies::of(namespace, objects));
    }

    /// Denies everything to the workloads of a namespace whose source has not read all policies, because they exceed the
    /// namespace's share. In the root namespace that concerns all workloads.
    pub fn refuse_namespace(&mut self, namespace: &str, usage: PolicyUsage) {
        let why = usage.excess().unwrap_or_else(|| "not all of its policies were read".to_owned());
        self.set(namespace, NamespacePolicies::not_applied(namespace, usage, &why));
    }

    fn set(&mut self, namespace: &str, policies: NamespacePolicies) {
        let name: Arc<str> = namespace.into();
        match &policies.not_applied {
            Some(why) => _ = self.not_applied.insert(Arc::clone(&name), Arc::clone(why)),
            None => _ = self.not_applied.remove(&name),
        }
        if *name == *self.root_namespace {
            self.root = Arc::new(policies);
        } else if policies.is_empty() {
            self.namespaces.remove(namespace);
        } else {
            self.namespaces.insert(name, Arc::new(policies));
        }
    }

    /// The policies of a workload's own namespace, if there are any.
    fn own(&self, namespace: &str) -> Option<&Arc<NamespacePolicies>> {
        if *namespace == *self.root_namespace { Some(&self.root) } else { self.namespaces.get(namespace) }
    }

    /// Returns true if the same policies hold for the workloads of a namespace as in `other`, of which this is a changed copy
    /// or the reverse. It compares pointers and the minimum only.
    #[must_use]
    pub fn is_same_for(&self, namespace: &str, other: &Self) -> bool {
        let is_same = match (self.own(namespace), other.own(namespace)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        let is_same_reduced = match (&self.reduced, &other.reduced) {
            (Some(one), Some(other)) => one.is_same_for(namespace, other),
            (one, other) => one.is_none() && other.is_none(),
        };
        is_same && is_same_reduced && Arc::ptr_eq(&self.root, &other.root) && self.minimum == other.minimum
    }

    /// Returns notes for authors of policies: rules that never match, or that match more than their text suggests.
    #[must_use]
    pub fn notes(&self) -> Vec<&str> {
        let parts = std::iter::once(&self.root).chain(self.namespaces.values());
        parts.flat_map(|part| &part.notes).map(String::as_str).collect()
    }

    /// Namespaces whose policies are not applied because they exceed their share, and why. Connections to their workloads are
    /// denied.
    pub fn not_applied(&self) -> impl Iterator<Item = (&str, &str)> {
        self.not_applied.iter().map(|(namespace, why)| (&**namespace, &**why))
    }

    /// Returns the use of the shares of policies. A refused use is a namespace whose policies are not applied.
    #[must_use]
    pub fn share_uses(&self) -> [ShareUse<String>; 3] {
        let root = (!self.root.is_empty()).then_some((&self.root_namespace, &self.root));
        let reduced = self.reduced.iter().flat_map(|reduced| reduced.namespaces.iter());
        let reduced = reduced.map(|(name, part)| (&**name, part.usage));
        let parts = self.namespaces.iter().chain(root).map(|(name, part)| (&**name, part.usage));
        let parts: Vec<(&str, PolicyUsage)> = parts.chain(reduced).collect();
        let row = |share: &Share, units: fn(&PolicyUsage) -> u64| {
            let fullest = parts.iter().map(|(name, usage)| (units(usage), *name)).max();
            let fullest = fullest.filter(|(units, _)| *units > 0);
            ShareUse {
                resource: share.resource,
                // The bound is the same on every node.
                bounds: share.bounds(Capacity { descriptors: 0 }),
                used: parts.iter().map(|(_, usage)| units(usage)).sum(),
                fullest: fullest.map(|(units, name)| (name.to_owned(), units)),
                refused: parts.iter().filter(|(_, usage)| units(usage) > share.fixed()).count() as u64,
            }
        };
        [
            row(&POLICIES, |usage| usage.objects),
            row(&POLICY_BYTES, |usage| usage.bytes),
            row(&POLICY_LOOKUPS, |usage| usage.lookups),
        ]
    }

    /// Returns why the policies that hold for the workloads of a namespace are not applied. `None` if they are.
    #[must_use]
    pub fn why_not_applied(&self, namespace: &str) -> Option<&str> {
        let why = self.not_applied.get(&*self.root_namespace).or_else(|| self.not_applied.get(namespace));
        why.map(|why| &**why)
    }

    /// The authorization policies that select a workload.
    #[must_use]
    pub fn authorization(&self, workload: &Workload) -> Authorization {
        if let Some(reduced) = &self.reduced {
            return reduced.authorization(workload, Arc::clone(&self.aliases));
        }
        let is_root = *workload.namespace == *self.root_namespace;
        let own = if is_root { None } else { self.own(&workload.namespace) };
        let parts = std::iter::once(&self.root).chain(own);
        let selecting = parts.flat_map(|part| part.authorizing(workload));
        Authorization::new(selecting.map(Arc::clone).collect(), Arc::clone(&self.aliases))
    }

    /// The mode of the mesh: what holds where nothing narrower does.
    #[must_use]
    pub fn mesh_default(&self) -> Mode {
        self.minimum.raise(self.written_mesh_default())
    }

    fn written_mesh_default(&self) -> Mode {
        if self.reduced.as_ref().is_some_and(|reduced| reduced.strictness().mesh) {
            return Mode::Strict;
        }
        self.root.mode_or(Mode::Permissive)
    }

    /// Returns true if a workload or a port somewhere may be STRICT.
    #[must_use]
    pub fn may_be_strict(&self) -> bool {
        let mut parts = std::iter::once(&self.root).chain(self.namespaces.values());
        let reduced = self.reduced.as_ref().is_some_and(|reduced| reduced.strictness().anywhere);
        self.mesh_default() == Mode::Strict || reduced || parts.any(|part| part.may_be_strict())
    }

    /// The modes that hold for a workload.
    #[must_use]
    pub fn modes(&self, workload: &Workload) -> Modes {
        let mut modes = self.written_modes(workload);
        modes.raise(self.minimum);
        modes
    }

    /// Returns true if the minimum raises a mode that the policies set for a workload.
    #[must_use]
    pub fn is_raised(&self, workload: &Workload) -> bool {
        self.modes(workload) != self.written_modes(workload)
    }

    /// The modes that the policies set for a workload, without the minimum.
    #[must_use]
    pub fn written_modes(&self, workload: &Workload) -> Modes {
        if let Some(reduced) = &self.reduced {
            return reduced.modes(workload);
        }
        let mesh = self.written_mesh_default();
        if self.root.is_strict {
            return Modes { default: Mode::Strict, ports: BTreeMap::new() };
        }
        match self.own(&workload.namespace) {
            Some(own) => own.modes(workload, mesh),
            None => Modes { default: mesh, ports: BTreeMap::new() },
        }
    }
}

/// The way by which a flow arrived, with the identity that its source proved. It does not change while the flow is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlowSource {
    /// Through a tunnel, from the identity in the peer's certificate. It is of the mesh's own trust domain.
    Tunnel(SpiffeId),
    /// Through a tunnel, from an identity of a federated trust domain.
    Federated(SpiffeId),
    /// From an enrolled pod of this node, handed over inside the agent; the identity is the directory's for
    /// the pod's cgroup.
    SameNode(SpiffeId),
    /// Plaintext, without a proven identity.
    Plaintext,
}

impl FlowSource {
    /// Returns the proven identity, if the source proved one.
    #[must_use]
    pub fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Self::Tunnel(identity) | Self::Federated(identity) | Self::SameNode(identity) => Some(identity),
            Self::Plaintext => None,
        }
    }
}

/// A flow that wants to reach a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// The way by which it arrived, and its identity.
    pub source: FlowSource,
    /// Address it comes from.
    pub client: IpAddr,
    /// The workload's address, and the port of its application.
    pub destination: SocketAddr,
}

/// The decision on a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyVerdict<'p> {
    /// It reaches the workload.
    Allow,
    /// It is reset.
    Deny(PolicyDenial<'p>),
}

/// A policy's reason to deny a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyDenial<'p> {
    /// It came as plaintext to a port in STRICT.
    PlaintextInStrict,
    /// A policy denies it.
    DeniedBy(Match<'p>),
    /// Policies say who is allowed, and it is not among them.
    NotAllowed(UnmatchedPolicies<'p>),
}

impl PolicyDenial<'_> {
    /// Returns the reason for which the flow is refused.
    #[must_use]
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::PlaintextInStrict => RefusalReason::PlaintextInStrict,
            Self::DeniedBy(_) => RefusalReason::DeniedByPolicy,
            Self::NotAllowed(_) => RefusalReason::NotAllowedByPolicy,
        }
    }
}

impl fmt::Display for PolicyDenial<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PlaintextInStrict => f.write_str("plaintext to a port in STRICT"),
            Self::DeniedBy(by) => write!(f, "denied by {by}"),
            Self::NotAllowed(policies) => write!(f, "no rule allows it of ALLOW {policies}"),
        }
    }
}

/// Decides if a flow may reach a workload with these modes and policies. Flows of the node's own processes, such as probes, do
/// not come here: the kernel proves and admits them.
///
/// | source | Disable | Permissive | Strict |
/// |---|---|---|---|
/// | Tunnel, Federated, SameNode (authenticated) | policies | policies | policies |
/// | Plaintext | policies | policies | deny |
#[must_use]
pub fn decide<'p>(modes: &Modes, authorization: &'p Authorization, flow: &Flow) -> PolicyVerdict<'p> {
    match (&flow.source, modes.at(flow.destination.port())) {
        (FlowSource::Plaintext, Mode::Strict) => return PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict),
        (FlowSource::Plaintext, Mode::Disable | Mode::Permissive)
        | (FlowSource::Tunnel(_) | FlowSource::Federated(_) | FlowSource::SameNode(_), _) => {}
    }
    match authorization.evaluate(flow) {
        AuthorizationDecision::Unrestricted | AuthorizationDecision::Allowed(_) => PolicyVerdict::Allow,
        AuthorizationDecision::Denied(by) => PolicyVerdict::Deny(PolicyDenial::DeniedBy(by)),
        AuthorizationDecision::NotAllowed(policies) => {
            PolicyVerdict::Deny(PolicyDenial::NotAllowed(policies))
        }
    }
}

#[cfg(test)]
mod tests;
