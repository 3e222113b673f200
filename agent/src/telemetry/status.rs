//! The agent's state at one moment, as data: what `/status` answers and `tacit status` prints.
//!
//! It is a wire format between an agent and the operator's command, which may be of another version: fields
//! are added, never renamed. Values are plain text and numbers, with the unit in the name; times are RFC
//! 3339.

mod render;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

pub use render::render;

/// Flows listed in a status, a number; beyond it they are counted only. Some 400 bytes each.
pub const FLOWS_LISTED_MAX: usize = 1000;
/// Ranges of the mesh listed in a status, a number; beyond it they are counted only.
pub const RANGES_LISTED_MAX: usize = 100;
/// 9999-12-31T23:59:59Z, the last second RFC 3339 can write, in seconds since 1970.
const RFC3339_LAST: u64 = 253_402_300_799;

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
    /// Whether it takes new flows.
    pub state: AgentState,
    /// The pods of this node.
    pub pods: Vec<PodStatus>,
    /// The kernel programs in force.
    pub programs: Vec<ProgramStatus>,
    /// What the kernel decided, by reason.
    pub kernel: Vec<KernelCounter>,
    /// What the guard did beside counting verdicts.
    #[serde(default)]
    pub guard: GuardStatus,
    /// Which addresses are of the mesh.
    #[serde(default)]
    pub mesh: MeshStatus,
    /// Who is in no range of the mesh: what pods of this node send there goes in clear.
    #[serde(default)]
    pub uncovered: UncoveredStatus,
    /// Who signs certificates.
    #[serde(default)]
    pub issuer: IssuerStatus,
    /// The certificates held.
    pub certificates: Vec<CertificateStatus>,
    /// Where configuration comes from.
    pub sources: Vec<SourceStatus>,
    /// Flows that are open.
    pub flows: FlowsStatus,
    /// Tunnel sessions kept for reuse.
    pub pool: PoolStatus,
}

impl Status {
    /// Why the agent is not ready; empty when it is: it takes flows, or would as soon as another agent ends, and every pod that was there has been looked at. A
    /// pod that waits is no reason: it may not have been started yet, and it is covered meanwhile.
    #[must_use]
    pub fn unready(&self) -> Vec<String> {
        match self.state {
            AgentState::Ready | AgentState::StandingBy => Vec::new(),
            state => {
                let missing = self.sources.iter().filter(|source| source.loads == 0);
                let why = missing.filter_map(|source| source.last_error.clone());
                std::iter::once(format!("agent is {state}")).chain(why).collect()
            }
        }
    }
}

/// Who signs certificates.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct IssuerStatus {
    /// `embedded` for the agent itself, else the address of the authority.
    pub address: String,
    /// When the authority last answered, a refusal too.
    pub last_answer: Option<Timestamp>,
    /// How far this node's clock is ahead of the authority's; below 0 when behind, absent when never measured.
    pub clock_ahead_ms: Option<i64>,
}

/// Whether the agent takes new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// Not yet.
    Starting,
    /// Not yet: another agent does, and this one takes over when that one ends.
    StandingBy,
    /// It does.
    Ready,
    /// No more: it lets open flows end.
    Draining,
}

impl fmt::Display for AgentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::StandingBy => "standing by",
            Self::Ready => "ready",
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
    /// What it may send in clear into the mesh: `nothing`, `udp`, `all but udp` or `everything`.
    #[serde(default)]
    pub in_clear: String,
    /// Host ends of its links that are guarded, each with how; empty where only its sockets are.
    #[serde(default)]
    pub guarded_links: Vec<String>,
    /// Why the kernel rejected the configured policy; the pod is STRICT at all ports until it accepts. `None` while the
    /// configured policy is in force.
    #[serde(default)]
    pub policy_not_applied: Option<String>,
    /// Whether it is protected.
    pub state: PodState,
    /// Its live flows, in both directions.
    pub flows: u64,
}

/// Whether a pod is protected.
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
    /// Where its link is pinned; `None` when it goes with the agent.
    pub pinned: Option<String>,
}

/// One reason for which the kernel decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelCounter {
    /// A stable name: the metric's label.
    pub name: String,
    /// What was decided and why.
    pub help: String,
    /// How often, since the programs were loaded.
    pub value: u64,
}

/// What the guard did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuardStatus {
    /// Connections in clear from before enrolment that were reset, since the agent started.
    pub resets_at_enrolment: u64,
    /// What was dropped, most packets first; the least recently seen kinds are forgotten beyond 4,096.
    pub drops: Vec<DropStatus>,
}

/// The ranges of the mesh that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MeshStatus {
    /// How many are configured.
    pub configured: u64,
    /// How many were found in the cluster beside those.
    pub detected: u64,
    /// All of them, joined where two make one; at most 100.
    pub ranges: Vec<String>,
}

/// Who should be in a range of the mesh and is not.
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
             for example {example}: what pods of this node send there goes in clear"
        )
    }
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
    /// How many.
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
    /// When it was last renewed; `None` when it still is the first one.
    pub last_renewal: Option<Timestamp>,
    /// Renewals that failed since the agent started.
    pub renewal_failures: u64,
    /// The last failure, `None` once a renewal succeeded after it.
    pub last_error: Option<String>,
}

/// One source of configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// What it holds.
    pub kind: SourceKind,
    /// Its file.
    pub file: String,
    /// When the content in force was loaded.
    pub loaded_at: Timestamp,
    /// Contents taken since the agent started.
    pub loads: u64,
    /// Contents refused since the agent started.
    pub refusals: u64,
    /// Why the last content was refused, `None` when it was taken.
    pub last_error: Option<String>,
    /// For how long what is in force may be outdated; 0 when it is not.
    #[serde(default)]
    pub stale_seconds: u64,
    /// Policies that cannot be read and deny what they select, a line each.
    #[serde(default)]
    pub unreadable: Vec<String>,
}

/// What a source of configuration holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// Workloads.
    Directory,
    /// Modes and policies.
    Policy,
}

impl SourceKind {
    /// A stable name for metrics and tables.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Policy => "policy",
        }
    }
}

/// The open flows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FlowsStatus {
    /// How many there are.
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
    /// Which end is here: `source` or `destination`.
    pub reporter: String,
    /// Who opened it.
    pub source: PartyStatus,
    /// Who accepted it.
    pub destination: PartyStatus,
    /// `mutual_tls`, `same_node` or `plaintext`.
    pub security: String,
    /// The key exchange group of its tunnel.
    pub key_exchange: Option<String>,
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

/// A moment, to the second, between 1970 and 9999; one outside is moved to the nearer end. RFC 3339 as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    unix_seconds: u64,
}

impl Timestamp {
    /// Seconds since 1970.
    #[must_use]
    pub fn unix_seconds(self) -> u64 {
        self.unix_seconds
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self { unix_seconds: since.as_secs().min(RFC3339_LAST) }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(self.unix_seconds).map_err(|_| fmt::Error)?;
        let time = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| fmt::Error)?;
        f.write_str(&time.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Timestamp {
    type Err = time::error::Parse;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let seconds = OffsetDateTime::parse(text, &Rfc3339)?.unix_timestamp();
        Ok(Self { unix_seconds: u64::try_from(seconds).unwrap_or(0).min(RFC3339_LAST) })
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests;
