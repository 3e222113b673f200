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
//! first of the file is the one that counts (Istio: the oldest), even when it says UNSET. A policy with a
//! selector holds in its own namespace only; in the root namespace too it selects only workloads of that
//! namespace.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use crate::{directory::Workload, identity::SpiffeId, yaml::Mistakes};

mod peer_authentication;

/// What a workload takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Plaintext is expected; authenticated flows pass too.
    Disable,
    /// Both plaintext and authenticated flows.
    Permissive,
    /// Authenticated flows only.
    Strict,
}

/// The modes of one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modes {
    /// Mode of every port that is not in `ports`.
    pub default: Mode,
    /// Ports with a mode of their own, as the application listens on them.
    pub ports: BTreeMap<u16, Mode>,
}

impl Modes {
    /// The mode of a port.
    #[must_use]
    pub fn at(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

/// All policies known at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policies {
    mesh: Setting,
    namespaces: HashMap<Arc<str>, Setting>,
    /// Policies with a selector, by namespace, in the order of the file.
    selecting: HashMap<Arc<str>, Vec<Selecting>>,
}

/// What one policy says about the mode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Setting {
    /// UNSET or left out: the next wider scope holds.
    #[default]
    Inherit,
    Set(Mode),
}

impl Setting {
    fn or(self, wider: Mode) -> Mode {
        match self {
            Self::Inherit => wider,
            Self::Set(mode) => mode,
        }
    }
}

/// A policy for the workloads that have all of `labels`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Selecting {
    labels: BTreeMap<String, String>,
    mode: Setting,
    ports: BTreeMap<u16, Setting>,
}

impl Selecting {
    fn selects(&self, workload: &Workload) -> bool {
        self.labels.iter().all(|(name, value)| workload.labels.get(name) == Some(value))
    }
}

impl Policies {
    /// Parses a file of PeerAuthentication documents; policies without a selector in `root_namespace` hold
    /// mesh-wide. An empty file leaves every workload at Istio's default, PERMISSIVE.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text. A kind that is not supported is one: a policy that is skipped would let
    /// through what it denies.
    pub fn parse(text: &str, file: &Path, root_namespace: &str) -> Result<Self, Mistakes> {
        peer_authentication::parse(text, file, root_namespace)
    }

    /// The mode of the mesh: what holds where nothing narrower does.
    #[must_use]
    pub fn mesh_default(&self) -> Mode {
        self.mesh.or(Mode::Permissive)
    }

    /// The modes that hold for a workload.
    #[must_use]
    pub fn modes(&self, workload: &Workload) -> Modes {
        let mesh = self.mesh_default();
        let namespace = self.namespaces.get(&workload.namespace).map_or(mesh, |setting| setting.or(mesh));
        let selecting = self.selecting.get(&workload.namespace);
        match selecting.and_then(|list| list.iter().find(|policy| policy.selects(workload))) {
            None => Modes { default: namespace, ports: BTreeMap::new() },
            Some(policy) => {
                let default = policy.mode.or(namespace);
                let ports = policy.ports.iter().map(|(port, setting)| (*port, setting.or(default))).collect();
                Modes { default, ports }
            }
        }
    }
}

/// How a flow came, and who sent it where that was proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'a> {
    /// Through a tunnel, from the identity in the peer's certificate.
    Tunnel(&'a SpiffeId),
    /// From an enrolled pod of this node, handed over inside the agent; the identity is the directory's for
    /// the pod's cgroup.
    SameNode(&'a SpiffeId),
    /// From the node's own addresses: the kubelet's probes.
    Node,
    /// In clear, from anybody.
    Plaintext,
}

/// What happens to a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It reaches the workload.
    Allow,
    /// It is reset.
    Deny(DenyReason),
}

/// Why policy denies a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// It came in clear to a port in STRICT.
    PlaintextInStrict,
}

impl DenyReason {
    /// Stable name for logs and metric labels.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::PlaintextInStrict => "plaintext_in_strict",
        }
    }
}

/// Whether a flow from `source` may reach `port` of a workload with these modes.
///
/// | source | Disable | Permissive | Strict |
/// |---|---|---|---|
/// | Tunnel, SameNode (authenticated) | allow | allow | allow |
/// | Node (probes) | allow | allow | allow |
/// | Plaintext | allow | allow | deny |
#[must_use]
pub fn decide(modes: &Modes, port: u16, source: &Source<'_>) -> Verdict {
    match (source, modes.at(port)) {
        (Source::Tunnel(_) | Source::SameNode(_) | Source::Node, _) => Verdict::Allow,
        (Source::Plaintext, Mode::Disable | Mode::Permissive) => Verdict::Allow,
        (Source::Plaintext, Mode::Strict) => Verdict::Deny(DenyReason::PlaintextInStrict),
    }
}

#[cfg(test)]
mod tests;
