//! `tacit.yaml`: the configuration of a node agent, read once at start.
//!
//! Every field with unit, default and effect is in `deploy/config.schema.json`, which a test keeps in step
//! with this file. All mistakes are reported together. Relative paths are relative to the folder of the
//! configuration file. The directory and policy files named here are read and watched by others.

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tacit_core::{
    directory::mesh_range,
    policy::Mode,
    spiffe::TrustDomain,
    yaml::{self, Fields, Mistakes, Value},
};
use tacit_identity::{istio::IstioConfig, spire::SpireConfig};
use tacit_kernel::PlaintextDestination;
use tacit_sources::{
    directory::Options as DirectoryOptions,
    file::{self, LoadError},
    policy::Options as PolicyOptions,
    roots::ConfigMapKey,
};

mod clear;
mod cni;
mod crl;
mod issuer;
pub mod istiod;
mod kubernetes;
mod trust;

use crate::cni::CniConfig;
use clear::clear_destination;
pub use crl::CrlConfig;
use istiod::IstiodConfig;
pub use trust::FederationConfig;

const FIELDS: [&str; 27] = [
    "trustDomain",
    "trustDomainAliases",
    "federation",
    "node",
    "podsCgroup",
    "meshRanges",
    "serviceRanges",
    "directory",
    "policy",
    "rootNamespace",
    "minimumMode",
    "issuer",
    "crl",
    "pinPath",
    "statePath",
    "socket",
    "cni",
    "metrics",
    "health",
    "successorTimeout",
    "drainTimeout",
    "tunnelTimeout",
    "heartbeatTimeout",
    "unnamedPodTimeout",
    "allowClear",
    "workers",
    "busyPollMicroseconds",
];

/// Environment variable that names the node where the file does not: a DaemonSet's file is the same on all nodes.
const NODE_NAME: &str = "NODE_NAME";
const ROOT_NAMESPACE: &str = "istio-system";
/// Default of `pinPath`.
pub const PIN_PATH: &str = "/sys/fs/bpf/tacit";
const STATE_PATH: &str = "/var/lib/tacit";
/// Values of `minimumMode`. The first one, the default, raises nothing.
const MINIMUM_MODES: [(&str, Mode); 3] =
    [("DISABLE", Mode::Disable), ("PERMISSIVE", Mode::Permissive), ("STRICT", Mode::Strict)];
const SOCKET: &str = "/run/tacit/agent.sock";
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15020);
const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15022);
/// A pod that replaces a deleted one stands by some 3 s later, if its image is there.
const SUCCESSOR_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than five minutes and an uninstallation seems stuck.
const SUCCESSOR_TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(300);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than ten minutes and a node's shutdown is held up more than any flow is worth.
const DRAIN_TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(600);
/// As long as Linux repeats what is not acknowledged (`net.ipv4.tcp_retries2`), rounded down.
const TUNNEL_TIMEOUT: Duration = Duration::from_secs(900);
/// Below a second a lost packet would look like a dead peer; beyond the default the kernel gives up first.
const TUNNEL_TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(900);
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// Below a second a busy node would look dead; a minute is the most that strict pods should wait for a refusal.
const HEARTBEAT_TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);
/// The API server knows a pod before the kubelet does, and the directory is at most 17 s behind, measured with 10,000 pods made
/// at once.
const UNNAMED_POD_TIMEOUT: Duration = Duration::from_secs(60);
/// Below a second every pod would pass before the directory has it; an hour is the longest that a pod should be cut off.
const UNNAMED_POD_TIMEOUT_RANGE: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(3600);
/// Limit of destinations that accept plaintext of strict pods: each takes an entry in a kernel map of fixed size.
const ALLOW_CLEAR_MAX: usize = 256;
/// Most ranges of a list: each takes an entry in a kernel map of fixed size, and a cluster has a handful.
const RANGES_MAX: usize = 256;
/// Most worker threads: beyond the cores of any node, and a typing mistake should not start millions.
const WORKERS_MAX: usize = 256;
/// An answer from another node of the same rack takes 100 to 200 us.
const BUSY_POLL_DEFAULT_US: u64 = 200;
const BUSY_POLL_MAX_US: u64 = 1000;
/// Longest path of a unix socket, in bytes (`sun_path` in unix(7), with its closing zero).
const SOCKET_MAX_BYTES: usize = 107;

/// The configuration of a node agent. All paths are ready to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Root under which identities are compared.
    pub trust_domain: TrustDomain,
    /// Other names of the own trust domain, at most 64.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Trust domains with roots of their own, at most 64.
    pub federation: Vec<FederationConfig>,
    /// This node's name, as the directory writes it.
    pub node: Arc<str>,
    /// The cgroup v2 directory that holds all pods of the node. It is searched for if there is none here.
    pub pods_cgroup: Option<PathBuf>,
    /// Addresses of the mesh, at most 256 ranges, none only where the directory detects them; a connection to any other
    /// address is left alone.
    pub mesh_ranges: Vec<IpNet>,
    /// Virtual addresses of services; at most 256 ranges, none where there are no services.
    pub service_ranges: Vec<IpNet>,
    /// Source of the directory.
    pub directory: DirectorySource,
    /// Source of the policies.
    pub policy: PolicySource,
    /// Namespace whose policies hold mesh-wide.
    pub root_namespace: Arc<str>,
    /// No policy sets a mode below this one.
    pub minimum_mode: Mode,
    /// Issuer of certificates.
    pub issuer: IssuerConfig,
    /// Revocation lists for the certificates of peers. Without them none is taken for revoked.
    pub crl: Option<CrlConfig>,
    /// Folder on a bpffs where programs, maps and links are pinned.
    pub pin_path: PathBuf,
    /// Folder of the operator in which the agent makes a private one, for its start after a reboot.
    pub state_path: PathBuf,
    /// The operator's unix socket.
    pub socket: PathBuf,
    /// The CNI plugin of the node. Without it the agent leaves the node's CNI folders alone.
    pub cni: Option<CniConfig>,
    /// Address of Prometheus metrics and readiness.
    pub metrics: SocketAddr,
    /// Loopback address of readiness for the kubelet, with another port than `metrics`.
    pub health: SocketAddr,
    /// Time for which an agent that may have a successor serves on after SIGTERM, until one stands by; 0 s to 5 min.
    pub successor_timeout: Duration,
    /// Time that live flows get to end at shutdown, 0 s to 10 min.
    pub drain_timeout: Duration,
    /// Silence of a peer after which its flows end, 1 s to 15 min.
    pub tunnel_timeout: Duration,
    /// Silence of the agent from which on the kernel decides by mode alone, 1 s to 1 min.
    pub heartbeat_timeout: Duration,
    /// Time for which a pod that no source names is held to STRICT where that is the mode of the mesh, 1 s to 1 h.
    pub unnamed_pod_timeout: Duration,
    /// Destinations to which strict pods may send plaintext, at most 256; each use is counted.
    pub allow_clear: Vec<PlaintextDestination>,
    /// Threads that carry flows, 1 to 256; `None` is one for each core that the agent may run on.
    pub workers: Option<NonZeroUsize>,
    /// Longest time that a worker polls for the next bytes of a quick exchange, up to 1 ms; zero turns polling off.
    pub busy_poll: Duration,
}

/// A source of configuration that is watched for changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source<K, I> {
    /// A file.
    File(PathBuf),
    /// The API of Kubernetes.
    Kubernetes(K),
    /// istiod.
    Istiod(I),
}

/// Source of the directory: the addresses of workloads.
pub type DirectorySource = Source<DirectoryOptions, Box<IstiodConfig>>;
/// Source of the policies.
pub type PolicySource = Source<PolicyOptions, ()>;

/// Issuer of certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IssuerConfig {
    /// The agent itself, with a root key in a folder.
    Embedded {
        /// Folder of the root key and certificate, made on first run.
        directory: PathBuf,
        /// Lifetime of a leaf certificate, 10 s to 30 d.
        leaf_lifetime: Duration,
    },
    /// An authority that speaks Istio's CA API, and where its roots are published.
    Istio(IstioConfig, Option<ConfigMapKey>),
    /// The SPIRE agent of the node.
    Spire(SpireConfig),
}

impl Config {
    /// Reads and parses the file at `path`.
    ///
    /// # Errors
    /// [`LoadError`]: unreadable, or all mistakes in it.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        // Absolute, so that the paths stay right whatever the working directory becomes.
        let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let node = std::env::var(NODE_NAME).ok();
        let folder = file.parent().unwrap_or(Path::new("."));
        file::load(path, |text| Self::parse_in(text, path, folder, node.as_deref()))
    }

    /// Parses the text of `file`; relative paths are relative to the folder of `file`.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text.
    pub fn parse(text: &str, file: &Path) -> Result<Self, Mistakes> {
        Self::parse_in(text, file, file.parent().unwrap_or(Path::new(".")), None)
    }

    /// Returns the ranges of the connect hooks and the guard: addresses of pods and of services. Services count as
    /// mesh, because plaintext to a service would arrive at a pod as plaintext.
    #[must_use]
    pub fn captured_ranges(&self) -> Vec<IpNet> {
        [&self.mesh_ranges[..], &self.service_ranges].concat()
    }

    /// `node_name` stands for an absent `node`.
    fn parse_in(text: &str, file: &Path, folder: &Path, node_name: Option<&str>) -> Result<Self, Mistakes> {
        yaml::decode(text, file, |root| Self::decode(root, folder, node_name))
    }

    /// Decodes all fields before the first `?`, so that the mistakes of each one are recorded.
    fn decode(root: &Value<'_>, folder: &Path, node_name: Option<&str>) -> Option<Self> {
        let f = &mut root.fields(&FIELDS)?;
        let trust_domain = f.required("trustDomain", "the SPIFFE trust domain, such as cluster.local");
        let trust_domain = trust_domain.and_then(|value| value.parse(TrustDomain::parse));
        let own = trust_domain.as_ref();
        let aliases = f.or("trustDomainAliases", Vec::new(), |value| trust::aliases(value, own));
        let named = (own, aliases.as_deref().unwrap_or_default());
        let federation = f.or("federation", Vec::new(), |value| trust::federation(value, named, folder));
        let node = self::node(f, root, node_name);
        let pods_cgroup = f.or("podsCgroup", None, |v| absolute(v).map(Some));
        let mesh_ranges = mesh_ranges(f, root);
        let service_ranges = f.or("serviceRanges", Vec::new(), ranges);
        let of_istiod = |value: &Value<'_>, folder: &Path| istiod::directory(value, folder).map(Box::new);
        let directory = source(f, "directory", folder, (kubernetes::directory, of_istiod));
        let policy = source(f, "policy", folder, (kubernetes::policy, istiod::policy));
        let policy = policy.filter(|policy| shares_connection(policy, root));
        let issuer = f.required("issuer", "{embedded: {directory: issuer}}");
        let issuer = issuer.and_then(|value| issuer::decode(&value, folder));
        let crl = f.or("crl", None, |value| crl::decode(value, folder).map(Some));
        let root_namespace = f.or("rootNamespace", ROOT_NAMESPACE.into(), |v| v.name().map(Arc::from));
        let minimum_mode = f.or("minimumMode", MINIMUM_MODES[0].1, |v| v.choice(&MINIMUM_MODES));
        let state_path: Option<PathBuf> = f.or("statePath", STATE_PATH.into(), absolute);
        let cni =
            f.or("cni", None, |v| cni::decode(v, state_path.as_deref().unwrap_or(Path::new("/"))).map(Some));
        let pin_path = f.or("pinPath", PIN_PATH.into(), absolute);
        let socket = f.or("socket", SOCKET.into(), |v| socket_path(v, folder));
        let metrics = f.or("metrics", METRICS, Value::listen_address);
        let health = self::health(f, root, metrics);
        let successor_timeout =
            f.or("successorTimeout", SUCCESSOR_TIMEOUT, |v| v.duration(SUCCESSOR_TIMEOUT_RANGE));
        let drain_timeout = f.or("drainTimeout", DRAIN_TIMEOUT, |v| v.duration(DRAIN_TIMEOUT_RANGE));
        let tunnel_timeout = f.or("tunnelTimeout", TUNNEL_TIMEOUT, |v| v.duration(TUNNEL_TIMEOUT_RANGE));
        let heartbeat_timeout =
            f.or("heartbeatTimeout", HEARTBEAT_TIMEOUT, |v| v.duration(HEARTBEAT_TIMEOUT_RANGE));
        let unnamed_pod_timeout =
            f.or("unnamedPodTimeout", UNNAMED_POD_TIMEOUT, |v| v.duration(UNNAMED_POD_TIMEOUT_RANGE));
        let allow_clear = f.or("allowClear", Vec::new(), allow_clear);
        let workers = f.or("workers", None, |v| v.parse(workers).map(Some));
        let busy_poll_us = f.or("busyPollMicroseconds", BUSY_POLL_DEFAULT_US, |v| v.parse(busy_poll_us));
        Some(Self {
            trust_domain_aliases: aliases?,
            federation: federation?,
            trust_domain: trust_domain?,
            node: node?,
            pods_cgroup: pods_cgroup?,
            mesh_ranges: mesh_ranges?,
            service_ranges: service_ranges?,
            directory: directory?,
            policy: policy?,
            root_namespace: root_namespace?,
            minimum_mode: minimum_mode?,
            issuer: issuer?,
            crl: crl?,
            pin_path: pin_path?,
            state_path: state_path?,
            socket: socket?,
            cni: cni?,
            metrics: metrics?,
            health: health?,
            successor_timeout: successor_timeout?,
            drain_timeout: drain_timeout?,
            tunnel_timeout: tunnel_timeout?,
            heartbeat_timeout: heartbeat_timeout?,
            unnamed_pod_timeout: unnamed_pod_timeout?,
            allow_clear: allow_clear?,
            workers: workers?,
            busy_poll: Duration::from_micros(busy_poll_us?),
        })
    }
}

/// Decodes `meshRanges`. A file as directory names no ranges, so the field is required. The Kubernetes API reports the ranges of
/// nodes and pods, so the field is optional.
fn mesh_ranges(fields: &mut Fields<'_>, root: &Value<'_>) -> Option<Vec<IpNet>> {
    let detects =
        |directory: &Value<'_>| ["kubernetes", "istiod"].iter().any(|of| directory.peek(of).is_some());
    if root.peek("directory").is_some_and(|directory| detects(&directory)) {
        return fields.or("meshRanges", Vec::new(), ranges);
    }
    let what = "the ranges of pod addresses, such as [10.77.0.0/16]; they are detected with a directory from kubernetes or istiod alone";
    let value = fields.required("meshRanges", what)?;
    if value.items()?.is_empty() {
        value.refuse("the list is empty, nothing would be protected: write the ranges of pod addresses");
    }
    ranges(&value)
}

fn ranges(value: &Value<'_>) -> Option<Vec<IpNet>> {
    let items = value.items()?;
    if items.len() > RANGES_MAX {
        value.refuse(format_args!("{} ranges: join them to at most {RANGES_MAX}", items.len()));
    }
    // Not collected to an `Option`: that would stop at the first mistake.
    let ranges: Vec<_> = items.iter().map(|item| item.parse(mesh_range)).collect();
    ranges.into_iter().collect()
}

fn allow_clear(value: &Value<'_>) -> Option<Vec<PlaintextDestination>> {
    let items = value.items()?;
    if items.len() > ALLOW_CLEAR_MAX {
        value.refuse(format_args!("{} destinations: write at most {ALLOW_CLEAR_MAX}", items.len()));
    }
    let destinations: Vec<_> = items.iter().map(|item| item.parse(clear_destination)).collect();
    destinations.into_iter().collect()
}

fn node(fields: &mut Fields<'_>, root: &Value<'_>, node_name: Option<&str>) -> Option<Arc<str>> {
    match node_name.filter(|_| root.peek("node").is_none_or(|value| value.is_null())) {
        None => {
            let what = format!("this node's name, as the directory has it, or set {NODE_NAME}");
            fields.required("node", &what)?.name().map(Arc::from)
        }
        Some(name) if yaml::is_object_name(name) => Some(Arc::from(name)),
        Some(name) => {
            root.refuse(format_args!("{NODE_NAME}={name:?} is no name of a node: set it from spec.nodeName"));
            None
        }
    }
}

/// Decodes `health`. It is on the loopback alone, because anybody who reaches it may ask.
fn health(fields: &mut Fields<'_>, root: &Value<'_>, metrics: Option<SocketAddr>) -> Option<SocketAddr> {
    let health = fields.or("health", HEALTH, |value| {
        let address = value.listen_address()?;
        if !address.ip().is_loopback() {
            value.refuse(format_args!(
                "{address} is no loopback address: write 127.0.0.1:{port} or \"[::1]:{port}\"",
                port = address.port()
            ));
            return None;
        }
        Some(address)
    })?;
    if metrics.is_some_and(|metrics| metrics.port() == health.port()) {
        root.refuse(format_args!(
            "health: port {} is that of metrics: write another port for one of them",
            health.port()
        ));
        return None;
    }
    Some(health)
}

/// Returns false, with a mistake, for policies from istiod without a directory from there: workloads name the policies that select
/// them.
fn shares_connection(policy: &PolicySource, root: &Value<'_>) -> bool {
    let is_there = root.peek("directory").is_some_and(|directory| directory.peek("istiod").is_some());
    if matches!(policy, Source::Istiod(())) && !is_there {
        root.refuse("policy: {istiod: {}} uses the connection of the directory: write `directory: {istiod: {address: ..}}`");
        return false;
    }
    true
}

/// `{file: <path>}`, `{kubernetes: {..}}` or `{istiod: {..}}`.
fn source<K, I>(
    fields: &mut Fields<'_>,
    name: &str,
    folder: &Path,
    (kubernetes, istiod): (impl Fn(&Value<'_>, &Path) -> Option<K>, impl Fn(&Value<'_>, &Path) -> Option<I>),
) -> Option<Source<K, I>> {
    let what = format!("{{file: {name}.yaml}}, {{kubernetes: {{}}}} or {{istiod: {{..}}}}");
    let value = fields.required(name, &what)?;
    let mut fields = value.fields(&["file", "kubernetes", "istiod"])?;
    match (fields.optional("file"), value.peek("kubernetes"), value.peek("istiod")) {
        (Some(file), None, None) => Some(Source::File(folder.join(file.text()?))),
        (None, Some(options), None) => kubernetes(&options, folder).map(Source::Kubernetes),
        (None, None, Some(options)) => istiod(&options, folder).map(Source::Istiod),
        (None, None, None) => {
            value.refuse(format_args!("nothing in it: write {what}"));
            None
        }
        _ => {
            value.refuse("more than one of `file`, `kubernetes` and `istiod`: leave one");
            None
        }
    }
}

fn absolute(value: &Value<'_>) -> Option<PathBuf> {
    let path = Path::new(value.text()?);
    if !path.is_absolute() {
        value.refuse(format_args!("{path:?} is relative: write the whole path, beginning with /"));
        return None;
    }
    if path.components().any(|component| component == Component::ParentDir) {
        value.refuse(format_args!("{path:?} has a `..`: write the path without it"));
        return None;
    }
    // Without double or closing slashes, so that paths can be compared.
    Some(path.components().collect())
}

fn socket_path(value: &Value<'_>, folder: &Path) -> Option<PathBuf> {
    let path = folder.join(value.text()?);
    let len = path.as_os_str().len();
    if len > SOCKET_MAX_BYTES {
        value.refuse(format_args!(
            "{path:?} has {len} bytes, a unix socket's path at most {SOCKET_MAX_BYTES}: write a shorter one"
        ));
        return None;
    }
    Some(path)
}

fn busy_poll_us(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number <= BUSY_POLL_MAX_US);
    number.ok_or_else(|| format!("no number of microseconds: write 0 (never) to {BUSY_POLL_MAX_US}"))
}

fn workers(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse().ok().filter(|number: &NonZeroUsize| number.get() <= WORKERS_MAX);
    number.ok_or_else(|| {
        format!("no number of threads: write 1 to {WORKERS_MAX}, or leave it out for one per core")
    })
}

#[cfg(test)]
mod tests;
