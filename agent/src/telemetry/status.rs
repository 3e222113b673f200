//! The agent's state at one moment, as data: what `/status` answers and `tacit status` prints.
//!
//! It is a wire format between an agent and the operator's command, which may be of another version: fields
//! are added, never renamed. Values are plain text and numbers, with the unit in the name; times are RFC
//! 3339.

mod connection;
mod exceptions;
mod render;
mod revocation;
mod timestamp;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use tacit_core::shares::{self, ShareUse};

pub use connection::{ConnectionStatus, RejectionStatus, ResourcesStatus};
pub use exceptions::ExceptionStatus;
pub use render::render;
pub use revocation::RevocationListStatus;
pub use timestamp::Timestamp;

/// Flows listed in a status, a number; beyond it they are counted only. Some 400 bytes each.
pub const FLOWS_LISTED_MAX: usize = 1000;
/// Ranges of the mesh listed in a status, a number; beyond it they are counted only.
pub const RANGES_LISTED_MAX: usize = 100;

/// The whole agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// The node it serves.
    pub node: String,
    /// The trust domain of its identities.
    pub trust_domain: String,
    /// Its process id.
    pub pid: u32,
    /// Since it started.
    pub uptime_seconds: u64,
    /// The agent's state: does it take new flows?
    pub state: AgentState,
    /// The pods of this node.
    pub pods: Vec<PodStatus>,
    /// The kernel programs in force.
    pub programs: Vec<ProgramStatus>,
    /// The programs at the connect hooks of pods, in the order in which they run.
    #[serde(default)]
    pub connect_hooks: Vec<HookProgramStatus>,
    /// The kernel's decisions, counted by reason.
    pub kernel: Vec<CounterStatus>,
    /// Plaintext of and to held pods that the kernel programs let pass.
    #[serde(default)]
    pub exceptions: Vec<ExceptionStatus>,
    /// Actions of the guard beside counting verdicts.
    #[serde(default)]
    pub guard: GuardStatus,
    /// State that the agent keeps for its start after a reboot.
    #[serde(default)]
    pub node_state: NodeStateStatus,
    /// The CNI plugin of the node; `None` if the configuration has none.
    #[serde(default)]
    pub cni: Option<CniStatus>,
    /// Pods that the agent announces to others; `None` if the configuration has none.
    #[serde(default)]
    pub announced: Option<AnnounceStatus>,
    /// Pods that no source names.
    #[serde(default)]
    pub unnamed: UnnamedStatus,
    /// The ranges of the mesh.
    #[serde(default)]
    pub mesh: MeshStatus,
    /// Pods and services outside the mesh's ranges. Pods of this node send plaintext to them.
    #[serde(default)]
    pub uncovered: UncoveredStatus,
    /// Services at nodes that the kernel lacks.
    #[serde(default)]
    pub nodes: NodesStatus,
    /// The issuer of certificates.
    #[serde(default)]
    pub issuer: IssuerStatus,
    /// The certificates held.
    pub certificates: Vec<CertificateStatus>,
    /// The revocation lists that certificates of peers are checked against.
    #[serde(default)]
    pub revocation_lists: Vec<RevocationListStatus>,
    /// The sources of configuration.
    pub sources: Vec<SourceStatus>,
    /// Flows that are open.
    pub flows: FlowsStatus,
    /// Tunnel sessions kept for reuse.
    pub pool: PoolStatus,
    /// Use of the shared resources by their holders.
    #[serde(default)]
    pub shares: Vec<ShareStatus>,
}

impl Status {
    /// The reasons for which the agent is not ready; empty when it is: it takes flows, or would as soon as another agent ends, and every pod that was there has been looked at. A
    /// pod that waits is no reason: it may not have been started yet, and it is covered meanwhile.
    #[must_use]
    pub fn unready(&self) -> Vec<String> {
        match self.state {
            state if state.is_ready() => Vec::new(),
            state => {
                let missing = self.sources.iter().filter(|source| source.loads == 0);
                let why = missing.filter_map(|source| source.last_error.clone());
                std::iter::once(format!("agent is {state}")).chain(why).collect()
            }
        }
    }
}

/// The issuer of certificates.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct IssuerStatus {
    /// `embedded` for the agent itself, `spire:` and the socket's path for SPIRE, else the address of the authority.
    pub address: String,
    /// Time of the authority's last answer, a refusal too. Of SPIRE, the time of the latest bundles.
    pub last_answer: Option<Timestamp>,
    /// Clock skew in milliseconds: above 0 if this node's clock is ahead of the authority's, below 0 if behind, absent
    /// if never measured.
    pub clock_ahead_ms: Option<i64>,
}

/// The agent's state: does it take new flows?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// Not yet.
    Starting,
    /// Not yet: another agent does, and this one takes over when that one ends.
    StandingBy,
    /// It does.
    Ready,
    /// Its programs are not attached to the pods' cgroup, so nothing of any pod is captured. It waits for the cgroup and starts again.
    Detached,
    /// No more: it lets open flows end.
    Draining,
}

impl AgentState {
    /// Returns true if the agent takes flows, or would as soon as another agent ends.
    #[must_use]
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Ready | Self::StandingBy)
    }
}

impl fmt::Display for AgentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::StandingBy => "standing by",
            Self::Ready => "ready",
            Self::Detached => "detached from the pods' cgroup",
            Self::Draining => "draining",
        })
    }
}

/// One pod of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its cgroup's path.
    pub cgroup: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its SPIFFE id.
    pub identity: String,
    /// Its mTLS mode where no port says otherwise.
    pub mode: String,
    /// The mode of ports that say otherwise.
    pub port_modes: BTreeMap<u16, String>,
    /// Authorization policies that select it, as `namespace/name`.
    #[serde(default)]
    pub policies: Vec<String>,
    /// The plaintext that it may send into the mesh: `nothing`, `udp`, `all but udp` or `everything`.
    #[serde(default)]
    pub in_clear: String,
    /// Host ends of its links that are guarded, each with how; empty where only its sockets are.
    #[serde(default)]
    pub guarded_links: Vec<String>,
    /// The kernel's reason to reject the configured policy; the pod is STRICT at all ports until it accepts. `None` while the
    /// configured policy is in force.
    #[serde(default)]
    pub policy_not_applied: Option<String>,
    /// True if `minimumMode` raised one of the modes.
    #[serde(default)]
    pub raised_by_minimum: bool,
    /// True if rules of the pod rewrite what arrives. Peers reach it as plaintext where its mode and policies admit that.
    #[serde(default)]
    pub rewrites_arrivals: bool,
    /// Its state: is it protected?
    pub state: PodState,
    /// Its live flows, in both directions.
    pub flows: u64,
}

/// The state of a pod: is it protected?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// It is.
    Enrolled,
    /// Not yet, for this reason.
    Waiting(String),
    /// Never, for this reason.
    LeftAlone(String),
}

/// One kernel program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Its name.
    pub name: String,
    /// The cgroup, network namespace or link it is attached to.
    pub attached_to: String,
    /// Its id in the kernel.
    pub id: u32,
    /// The path of its pinned link; `None` for a program that is detached when the agent ends.
    pub pinned: Option<String>,
}

/// A program at a connect hook of pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookProgramStatus {
    /// The hook: `connect4` or `connect6`.
    pub hook: String,
    /// Its id in the kernel.
    pub id: u32,
    /// Its name in the kernel, of at most 15 bytes.
    pub name: String,
    /// True if it is Tacit's.
    pub is_tacit: bool,
}

/// One reason for which the kernel decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterStatus {
    /// A stable name: the metric's label.
    pub name: String,
    /// The decision and its reason.
    pub help: String,
    /// Number of such decisions since the programs were loaded.
    pub value: u64,
}

/// Actions of the guard.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuardStatus {
    /// Plaintext connections from before enrolment that were reset, since the agent started.
    pub resets_at_enrolment: u64,
    /// The dropped packets, most first. Of each pod the least recently seen kinds are evicted beyond 32.
    pub drops: Vec<DropStatus>,
}

/// State that the agent keeps for its start after a reboot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeStateStatus {
    /// The folder.
    pub folder: String,
    /// Origin of the mode and ranges that applied at this start until the sources answered.
    pub origin: String,
    /// The reason for which the kept state could not be used at this start; `None` once another state is in its place.
    pub read_error: Option<String>,
    /// The error of the last write of the state; `None` once it was.
    pub write_error: Option<String>,
}

/// The CNI plugin, with which pods wait for the agent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CniStatus {
    /// False: the agent takes the plugin out of the configurations.
    pub is_enabled: bool,
    /// The CNI configuration that names it; `None` if none does.
    pub configuration: Option<String>,
    /// The error of the last look at the node's CNI folders.
    pub error: Option<String>,
}

/// Pods that the agent announces by an annotation (`directory.kubernetes.announce`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AnnounceStatus {
    /// Number of announced pods of this node.
    pub pods: u64,
    /// Number of pods whose annotation must be written or removed.
    pub pending: u64,
    /// Patches that the API accepted since the agent started.
    pub patches: u64,
    /// Patches that failed since the agent started. Each is repeated.
    pub failures: u64,
    /// The last failure; `None` once no pod is pending.
    pub last_error: Option<String>,
}

/// Cgroups of pods that no source names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UnnamedStatus {
    /// Number of those held to STRICT now; 0 unless STRICT is the mode of the mesh.
    pub held: u64,
    /// Number of those left alone, because the limit has passed.
    pub left_alone: u64,
    /// Time for which each is held while the directory is up to date.
    pub limit_seconds: u64,
    /// The cgroup of one of them.
    pub example: Option<String>,
}

/// The ranges of the mesh that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MeshStatus {
    /// Number of configured ranges.
    pub configured: u64,
    /// Number of further ranges that were detected in the cluster.
    pub detected: u64,
    /// All of them, joined where two make one; at most 100.
    pub ranges: Vec<String>,
}

/// Pods and services that should be in a range of the mesh and are in none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UncoveredStatus {
    /// Enrolled pods of any node.
    pub pods: u64,
    /// Services of enrolled pods.
    pub services: u64,
    /// One of them, with its address.
    pub example: Option<String>,
}

impl fmt::Display for UncoveredStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pods, services, example } = self;
        let example = example.as_deref().unwrap_or("none");
        write!(
            f,
            "{pods} enrolled pods and {services} of their services are in no range of meshRanges or serviceRanges, and in none that was detected, \
             for example {example}: traffic of this node's pods to them is plaintext"
        )
    }
}

/// Tables of services at nodes that the kernel does not have whole.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodesStatus {
    /// Why the kernel lacks addresses of nodes. STRICT pods reach no port from 30000 to 32767 outside the mesh until it has
    /// them. `None` if it has all.
    pub addresses_not_applied: Option<String>,
    /// Why the kernel lacks ports of load balancers at nodes. STRICT pods reach no port of a node until it has them. `None` if it
    /// has all.
    pub ports_not_applied: Option<String>,
}

/// Packets of one kind that the guard dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropStatus {
    /// The pod as `namespace/name`, or the id of its cgroup where it is not known.
    pub pod: String,
    /// The other end; `::` where the packet did not say.
    pub remote: IpAddr,
    /// Number of the IP protocol; 0 where the packet did not say.
    pub protocol: u8,
    /// The verdict's name, as in `kernel`.
    pub reason: String,
    /// Number of packets.
    pub packets: u64,
}

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// The SPIFFE id it proves.
    pub identity: String,
    /// Its serial number, in hex.
    pub serial: String,
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until.
    pub not_after: Timestamp,
    /// Until it expires; negative when it has.
    pub seconds_left: i64,
    /// Time of the last renewal; `None` when it still is the first one.
    pub last_renewal: Option<Timestamp>,
    /// Renewals that failed since the agent started.
    pub renewal_failures: u64,
    /// The last failure, `None` once a renewal succeeded after it.
    pub last_error: Option<String>,
}

/// One source of configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its content.
    pub kind: SourceKind,
    /// Its file.
    pub file: String,
    /// Time at which the content in force was loaded.
    pub loaded_at: Timestamp,
    /// Contents taken since the agent started.
    pub loads: u64,
    /// Contents refused since the agent started.
    pub refusals: u64,
    /// The mistakes of the last content; `None` if it was taken.
    pub last_error: Option<String>,
    /// For how long what is in force may be outdated; 0 when it is not.
    #[serde(default)]
    pub stale_seconds: u64,
    /// Policies that cannot be read and deny what they select, a line each.
    #[serde(default)]
    pub unreadable: Vec<String>,
    /// The connection to istiod, if the source has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<ConnectionStatus>,
}

/// The content of a source of configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// Workloads.
    Directory,
    /// Modes and policies.
    Policy,
    /// Revocation lists.
    Crl,
    /// Roots of a federated trust domain.
    Federation,
}

impl SourceKind {
    /// A stable name for metrics and tables.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Policy => "policy",
            Self::Crl => "crl",
            Self::Federation => "federation",
        }
    }
}

/// The open flows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FlowsStatus {
    /// Number of open flows.
    pub live: u64,
    /// Connections of pods whose `connect()` waits for the destination.
    #[serde(default)]
    pub opening: u64,
    /// The newest, at most [`FLOWS_LISTED_MAX`].
    pub list: Vec<FlowStatus>,
}

/// One open flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowStatus {
    /// The end that is here: `source` or `destination`.
    pub reporter: String,
    /// The client.
    pub source: PartyStatus,
    /// The server.
    pub destination: PartyStatus,
    /// `mutual_tls`, `same_node` or `plaintext`.
    pub security: String,
    /// The key exchange group of its tunnel.
    pub key_exchange: Option<String>,
    /// The wire format of its tunnel: `tacit/1.1`, `tacit/1` or `h2`.
    pub wire: Option<String>,
    /// The trace id both agents log, in hex.
    pub trace: Option<String>,
    /// Since it opened.
    pub age_seconds: u64,
    /// Payload from source to destination.
    pub sent_bytes: u64,
    /// Payload from destination to source.
    pub received_bytes: u64,
}

/// One end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartyStatus {
    /// Its address as the applications see it.
    pub address: SocketAddr,
    /// `namespace/name`.
    pub workload: Option<String>,
    /// The SPIFFE id proven for this flow.
    pub identity: Option<String>,
}

/// Tunnel sessions kept for reuse.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Sessions that carry no flow now.
    pub idle_sessions: u64,
}

/// A shared resource, and the holder that uses most of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShareStatus {
    /// A stable name: the metric's label.
    pub resource: String,
    /// The counted units, in words.
    pub counts: String,
    /// Units of all holders.
    pub used: u64,
    /// Most units of all holders; absent where there is no such bound.
    pub limit: Option<u64>,
    /// The kind of holder: `pod`, `source`, `source_at_pod`, `namespace` or `object`.
    pub holder: String,
    /// The holder with the most units; absent while nobody has any.
    pub fullest: Option<String>,
    /// Units of that holder.
    pub fullest_used: u64,
    /// Most units of one holder.
    pub holder_limit: u64,
    /// The fullest holder gets no further unit.
    pub full: bool,
    /// Uses that were refused, or made to give way, since the agent started.
    pub refused: u64,
}

impl ShareStatus {
    /// Returns the status of a use, with the words of its row.
    #[must_use]
    pub fn of(usage: ShareUse<String>) -> Self {
        let (row, full) = (shares::of(usage.resource), usage.is_full());
        let (fullest, fullest_used) = usage.fullest.unzip();
        Self {
            resource: usage.resource.to_owned(),
            counts: row.map_or_else(String::new, |row| row.counts.to_owned()),
            used: usage.used,
            limit: (usage.bounds.total != u64::MAX).then_some(usage.bounds.total),
            holder: row.map_or("", |row| row.holder.label()).to_owned(),
            fullest,
            fullest_used: fullest_used.unwrap_or_default(),
            holder_limit: usage.bounds.each,
            full,
            refused: usage.refused,
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
