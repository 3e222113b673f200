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

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use crate::{directory::Workload, refusal::RefusalReason, spiffe::SpiffeId, yaml::Mistakes};

mod authorization;
pub mod explain;
mod metadata;
mod object;
mod peer_authentication;

pub use authorization::{
    Authorization, AuthorizationDecision, AuthorizationPolicy, Match, UnmatchedPolicies,
};
pub use object::{Origin, PolicyKind, PolicyObject};
pub use tacit_abi::Mode;

use authorization::Attachment;
use object::{ParsedPolicy, ScopedAuthorization};
use peer_authentication::PeerAuthentication;

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

/// All policies known at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policies {
    mesh: ModeSetting,
    namespaces: HashMap<Arc<str>, ModeSetting>,
    /// Policies with a selector, by namespace, in the order of the file.
    selecting: HashMap<Arc<str>, Vec<SelectorPolicy>>,
    /// Namespaces that are STRICT whatever else says, the root namespace for all of them: of a PeerAuthentication there it
    /// cannot be read whom it selects, or what it says to all.
    strict: HashSet<Arc<str>>,
    strict_everywhere: bool,
    /// No policy sets a mode below this one.
    minimum: ModeSetting,
    /// Those of the root namespace, which select in every namespace.
    authorizing_everywhere: Vec<ScopedAuthorization>,
    authorizing: HashMap<Arc<str>, Vec<ScopedAuthorization>>,
    notes: Vec<String>,
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

/// A policy for the workloads that have all of `labels`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SelectorPolicy {
    labels: BTreeMap<String, String>,
    mode: ModeSetting,
    ports: BTreeMap<u16, ModeSetting>,
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

    /// All policies of a source that knows objects one by one, oldest first: of two PeerAuthentications of one scope the
    /// first counts.
    #[must_use]
    pub fn of(objects: &[PolicyObject], root_namespace: &str) -> Self {
        let mut policies = Self::default();
        let mut mesh = None;
        for object in objects {
            match &*object.0 {
                ParsedPolicy::PeerAuthentication(policy) => {
                    policies.add_modes(policy, &mut mesh, root_namespace)
                }
                ParsedPolicy::Authorization(policy) => policies.add_authorizing(policy, root_namespace),
            }
        }
        policies.mesh = mesh.unwrap_or_default();
        policies.strict_everywhere = policies.strict.contains(root_namespace);
        policies
    }

    /// The same policies, none of which sets a mode below `minimum`.
    #[must_use]
    pub fn with_minimum(self, minimum: Mode) -> Self {
        Self { minimum: ModeSetting::Set(minimum), ..self }
    }

    fn add_modes(
        &mut self,
        policy: &PeerAuthentication,
        mesh: &mut Option<ModeSetting>,
        root_namespace: &str,
    ) {
        let PeerAuthentication { namespace, labels, mode, ports, unreadable } = policy.clone();
        if unreadable && labels.is_empty() {
            self.strict.insert(namespace);
        } else if !labels.is_empty() {
            self.selecting.entry(namespace).or_default().push(SelectorPolicy { labels, mode, ports });
        } else if *namespace == *root_namespace {
            mesh.get_or_insert(mode);
        } else {
            self.namespaces.entry(namespace).or_insert(mode);
        }
    }

    fn add_authorizing(&mut self, policy: &ScopedAuthorization, root_namespace: &str) {
        self.notes.extend(policy.notes.iter().cloned());
        if policy.attachment == Attachment::Elsewhere {
            return;
        }
        match &policy.namespace {
            Some(namespace) if **namespace != *root_namespace => {
                self.authorizing.entry(Arc::clone(namespace)).or_default().push(policy.clone());
            }
            _ => self.authorizing_everywhere.push(policy.clone()),
        }
    }

    /// Returns notes for authors of policies: rules that never match, or that match more than their text suggests.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The authorization policies that select a workload.
    #[must_use]
    pub fn authorization(&self, workload: &Workload) -> Authorization {
        let own = self.authorizing.get(&workload.namespace).into_iter().flatten();
        let all = self.authorizing_everywhere.iter().chain(own);
        let selecting = all.filter(|policy| selects(&policy.labels, workload));
        Authorization::new(selecting.map(|policy| Arc::clone(&policy.policy)).collect())
    }

    /// The mode of the mesh: what holds where nothing narrower does.
    #[must_use]
    pub fn mesh_default(&self) -> Mode {
        self.minimum.raise(self.written_mesh_default())
    }

    fn written_mesh_default(&self) -> Mode {
        if self.strict_everywhere { Mode::Strict } else { self.mesh.or(Mode::Permissive) }
    }

    /// Returns true if a workload or a port somewhere may be STRICT.
    #[must_use]
    pub fn may_be_strict(&self) -> bool {
        let strict = ModeSetting::Set(Mode::Strict);
        let selecting = || self.selecting.values().flatten();
        self.mesh_default() == Mode::Strict
            || !self.strict.is_empty()
            || self.namespaces.values().any(|setting| *setting == strict)
            || selecting().any(|policy| policy.mode == strict || policy.ports.values().any(|s| *s == strict))
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
        let mesh = self.written_mesh_default();
        if self.strict_everywhere || self.strict.contains(&workload.namespace) {
            return Modes { default: Mode::Strict, ports: BTreeMap::new() };
        }
        let namespace = self.namespaces.get(&workload.namespace).map_or(mesh, |setting| setting.or(mesh));
        let selecting = self.selecting.get(&workload.namespace);
        match selecting.and_then(|list| list.iter().find(|policy| selects(&policy.labels, workload))) {
            None => Modes { default: namespace, ports: BTreeMap::new() },
            Some(policy) => {
                let default = policy.mode.or(namespace);
                let ports = policy.ports.iter().map(|(port, setting)| (*port, setting.or(default))).collect();
                Modes { default, ports }
            }
        }
    }
}

/// The way by which a flow arrived, with the identity that its source proved. It does not change while the flow is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlowSource {
    /// Through a tunnel, from the identity in the peer's certificate.
    Tunnel(SpiffeId),
    /// From an enrolled pod of this node, handed over inside the agent; the identity is the directory's for
    /// the pod's cgroup.
    SameNode(SpiffeId),
    /// From a process of the node itself, such as a probe of the kubelet. The node's address is no proof of it.
    Node,
    /// Plaintext, without a proven identity.
    Plaintext,
}

impl FlowSource {
    /// Returns the proven identity, if the source proved one.
    #[must_use]
    pub fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Self::Tunnel(identity) | Self::SameNode(identity) => Some(identity),
            Self::Node | Self::Plaintext => None,
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

/// Decides if a flow may reach a workload with these modes and policies.
///
/// | source | Disable | Permissive | Strict |
/// |---|---|---|---|
/// | Tunnel, SameNode (authenticated) | policies | policies | policies |
/// | Node (probes) | allow | allow | allow |
/// | Plaintext | policies | policies | deny |
#[must_use]
pub fn decide<'p>(modes: &Modes, authorization: &'p Authorization, flow: &Flow) -> PolicyVerdict<'p> {
    match (&flow.source, modes.at(flow.destination.port())) {
        (FlowSource::Node, _) => return PolicyVerdict::Allow,
        (FlowSource::Plaintext, Mode::Strict) => return PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict),
        (FlowSource::Plaintext, Mode::Disable | Mode::Permissive)
        | (FlowSource::Tunnel(_) | FlowSource::SameNode(_), _) => {}
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
