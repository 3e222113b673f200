//! Puts the agent together, runs it until a signal, and takes it down in good order. Imported by `main` only.

use std::{
    io,
    net::SocketAddr,
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tacit_core::{
    directory::{Directory, Ranges},
    policy::Policies,
};
use tacit_identity::{
    issuer::{EmbeddedIssuer, Issuer},
    istio::IstioIssuer,
    manager::Identities,
    root::EmbeddedRootError,
};
use tacit_kernel::{
    Kernel, KernelError, SuccessorLock, VerifierLog, cgroup::Cgroup, events, host, netns::HostNetns, probe,
    socket::Listeners,
};
use tacit_sources::{
    directory::{CgroupLayout, LocalNode},
    file::LoadError,
    kubernetes::OpenError,
    reload::{Opening, Watched},
};
use tacit_tunnel::Session;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::{Config, IssuerConfig, Source},
    enrol::{Enroller, Pod, Pods, Serve, kernel_mode},
    mesh::Mesh,
    proxy::{
        Parts, Proxy, accept_loop,
        drain::{Drain, Drained},
        inbound, outbound,
        workers::Workers,
    },
    telemetry::{
        Telemetry, admin,
        status::{SourceKind, UncoveredStatus},
    },
};

mod admin_servers;
mod node_addresses;
mod report;
mod succession;

use admin_servers::AdminServers;
use report::Report;
use succession::{Ending, hand_over};

/// How often the node's own addresses are read again and idle sessions are thrown out.
const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// When so many connections have come or gone, memory that is left over is given back: that of their handshakes, some
/// 30 KiB each, or all that they had.
const MANY: usize = 1000;

/// Heartbeats within the time after which the kernel takes the agent for dead: a few may be late or lost.
const BEATS_WITHIN_TIMEOUT: u32 = 6;

/// Why the agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A file could not be read or holds mistakes.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The API of Kubernetes cannot be used at all.
    #[error("{field}.kubernetes: {source}")]
    Kubernetes {
        /// What was to come from it.
        field: &'static str,
        /// The error.
        #[source]
        source: OpenError,
    },
    /// The issuer could not be opened.
    #[error("issuer: {0}")]
    Issuer(#[from] EmbeddedRootError),
    /// The kernel side could not be loaded or attached.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The metrics address cannot be had.
    #[error("metrics {address}: {source}")]
    Metrics {
        /// The configured address.
        address: SocketAddr,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The operator's socket cannot be had.
    #[error("socket: {0}")]
    Socket(#[from] admin::BindError),
    /// The system did not give what every process gets.
    #[error("{what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
}

impl AppError {
    /// What the process ends with: 78 (`EX_CONFIG`) when no restart can help, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Kernel(error) => error.exit_code(),
            _ => 1,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> AppError {
    move |source| AppError::System { what, source }
}

/// Runs the agent with `config` until SIGTERM or SIGINT, then drains. To be called on a tokio runtime. With `stands_by` it
/// waits for the end of an agent that serves this node, and takes over from it; else that is an error.
///
/// # Errors
/// [`AppError`] when the agent cannot start. Once it runs, nothing that a peer, a pod or a file does ends it.
pub async fn run(config: Config, verifier_log: VerifierLog, stands_by: bool) -> Result<(), AppError> {
    // First of all: a kernel that cannot do it is left as it was.
    probe::require(&config.pin_path).map_err(KernelError::from)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system("listen for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("listen for SIGINT"))?;
    let started = Instant::now();
    let descriptors = host::raise_descriptor_limit().map_err(system("raise the limit of open files"))?;
    let host = Arc::new(HostNetns::current().map_err(system("open the node's network namespace"))?);
    let pods_cgroup = Cgroup::open(&config.pods_cgroup)?;
    let (directory, policies) = (open_directory(&config).await?, open_policies(&config).await?);
    let sources = vec![(SourceKind::Directory, directory.states()), (SourceKind::Policy, policies.states())];
    let telemetry = Telemetry::new();
    // AdminServers before programs: an agent that cannot be looked at should not touch the kernel.
    let servers = AdminServers::open(&config, started, sources, telemetry.clone(), stands_by).await?;
    let (directory, policies) = tokio::select! {
        complete = async { tokio::join!(directory.complete(), policies.complete()) } => complete,
        () = wait_for(&mut terminate, &mut interrupt) => {
            remove_socket(&config.socket);
            return Ok(());
        }
    };
    let ended = |field| move || AppError::Kubernetes { field, source: OpenError::Ended };
    let directory = Arc::new(directory.ok_or_else(ended("directory"))?);
    let policies = Arc::new(policies.ok_or_else(ended("policy"))?);
    let identities = Arc::new(Identities::start(issuer(&config)?));
    let succession = async {
        match stands_by {
            true => {
                let prepare = || Kernel::prepare(&config.pin_path, &pods_cgroup, &verifier_log);
                succession::stand_by(&config, &directory, &identities, prepare, || servers.stand_by()).await
            }
            false => succession::first(&config.pin_path),
        }
    };
    let (claim, follows) = tokio::select! {
        succession = succession => succession?,
        () = wait_for(&mut terminate, &mut interrupt) => {
            remove_socket(&config.socket);
            return Ok(());
        }
    };
    let (turn, prepared) = follows.unzip();
    let kernel = Arc::new(Kernel::open(claim, &pods_cgroup, &verifier_log, prepared)?);
    let mesh = Arc::new(Mesh::start(kernel.clone(), &directory.current())?);
    kernel.maps.set_plaintext_destinations(&config.allow_clear)?;
    refresh_node(&kernel, &directory.current())?;
    beat(&kernel, config.heartbeat_timeout, &policies)?;

    let workers = Workers::start(config.workers.unwrap_or_else(cores), config.busy_poll)
        .map_err(system("start the threads that carry flows"))?;
    let path = Arc::new(Proxy::new(Parts {
        trust_domain: config.trust_domain.clone(),
        workers,
        kernel,
        host,
        directory,
        policies,
        identities,
        table: Arc::new(ArcSwap::from_pointee(Pods::default())),
        telemetry,
        drain: Drain::default(),
        mesh,
    }));
    let report = Arc::new(Report::new(&config, path.clone(), started));
    servers.show(report.clone());
    let settle = path.drain.stop.child_token();
    let enroller = enroller(&config, &path, pods_cgroup, &report, turn);
    let mut enrolment = Some(tokio::spawn(enroller.run(settle.clone())));
    let keeper = tokio::spawn(housekeeping(path.clone(), report.clone()));
    let ranges = tokio::spawn(path.mesh.clone().keep(path.directory.clone()));
    let mut heart = Some(tokio::spawn(heartbeat(path.clone(), config.heartbeat_timeout)));
    let watched = path.kernel.clone();
    let listener = tokio::spawn(async move { events::forward(&watched).await });
    tracing::info!(node = %config.node, trust_domain = %config.trust_domain, descriptors, "agent runs");

    wait_for(&mut terminate, &mut interrupt).await;
    let ending = hand_over(&path.kernel, &config.pin_path, async || {
        settle.cancel();
        keeper.abort();
        ranges.abort();
        if let Some(enrolment) = enrolment.take() {
            // An error of it was logged.
            let _ = enrolment.await;
        }
    });
    let ending = ending.await.unwrap_or_else(|error| {
        tracing::error!(%error, "ending as if no agent stood by");
        Ending::Alone(None)
    });
    let mut servers = Some(servers);
    if ending.is_taken_over() {
        stop_beating(&mut heart).await;
        // The next agent waits for the port of the metrics.
        close(&mut servers, &config.socket).await;
    }
    tracing::info!(limit = ?config.drain_timeout, "draining: no new flows, open ones may finish");
    report.drains();
    let linger = if ending.is_taken_over() { succession::LINGER } else { Duration::ZERO };
    match path.drain.run(config.drain_timeout, linger).await {
        Drained::Finished => tracing::info!("drained"),
        Drained::Cut(tasks) => tracing::warn!(tasks, "drain deadline passed; the rest was reset"),
    }
    path.pool().clear_where(|_, _| true).into_iter().for_each(Session::close);
    keeper.abort();
    ranges.abort();
    listener.abort();
    stop_beating(&mut heart).await;
    let last_word = match &ending {
        Ending::Alone(_) => path.kernel.maps.clear_heartbeat(),
        Ending::TakenOver(_) => path.kernel.maps.remove_agent(path.kernel.cgroup),
    };
    if let Err(error) = last_word {
        tracing::error!(%error, "the kernel takes this agent for alive until it is noticed otherwise");
    }
    if let Some(enrolment) = enrolment {
        // An error of it was logged, and the agent ends anyway.
        let _ = enrolment.await;
    }
    close(&mut servers, &config.socket).await;
    Ok(())
}

/// Awaited, so that no beat follows: neither this agent's last word nor those of the next one.
async fn stop_beating(heart: &mut Option<JoinHandle<()>>) {
    if let Some(heart) = heart.take() {
        heart.abort();
        let _ = heart.await;
    }
}

async fn close(servers: &mut Option<AdminServers>, socket: &Path) {
    if let Some(servers) = servers.take() {
        servers.close().await;
        remove_socket(socket);
    }
}

/// One thread for each core that this process may use.
fn cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// The directory. It is used once it is complete: what an earlier agent left for pods that are not in it would be removed.
async fn open_directory(config: &Config) -> Result<Opening<Directory>, AppError> {
    let domain = config.trust_domain.clone();
    let ranges = Arc::new(Ranges::configured(&config.captured_ranges()));
    match &config.directory {
        Source::File(file) => {
            let named = file.clone();
            let parse = move |text: &str| {
                Directory::parse(text, &named, &domain).map(|known| known.within(ranges.clone()))
            };
            Ok(Watched::open(file, parse)?.into())
        }
        Source::Kubernetes(options) => {
            let local_node = LocalNode {
                node: config.node.clone(),
                trust_domain: domain,
                cgroups: CgroupLayout::of(&config.pods_cgroup),
                ranges,
            };
            let opened = tacit_sources::directory::open(options, local_node).await;
            opened.map_err(|source| AppError::Kubernetes { field: "directory", source })
        }
    }
}

/// The policies. They are used once all are known: one that is missing would let through what it denies.
async fn open_policies(config: &Config) -> Result<Opening<Policies>, AppError> {
    let root = config.root_namespace.clone();
    match &config.policy {
        Source::File(file) => {
            let named = file.clone();
            Ok(Watched::open(file, move |text| {
                let policies = Policies::parse(text, &named, &root)?;
                for note in policies.notes() {
                    tracing::warn!(file = %named.display(), "{note}");
                }
                Ok(policies)
            })?
            .into())
        }
        Source::Kubernetes(options) => {
            let opened = tacit_sources::policy::open(options, root).await;
            opened.map_err(|source| AppError::Kubernetes { field: "policy", source })
        }
    }
}

fn issuer(config: &Config) -> Result<Issuer, EmbeddedRootError> {
    match &config.issuer {
        IssuerConfig::Embedded { directory, leaf_lifetime } => {
            EmbeddedIssuer::open(directory, &config.trust_domain, *leaf_lifetime).map(Issuer::Embedded)
        }
        IssuerConfig::Istio(istio) => Ok(Issuer::Istio(IstioIssuer::new(istio.clone()))),
    }
}

fn enroller(
    config: &Config,
    path: &Arc<Proxy>,
    pods_cgroup: Cgroup,
    report: &Arc<Report>,
    turn: Option<SuccessorLock>,
) -> Enroller {
    let (serving, ready) = (path.clone(), report.clone());
    let takes_over = turn.is_some();
    let turn = Mutex::new(turn);
    let serve: Serve = Arc::new(move |pod, listeners| serve_pod(&serving, &pod, listeners));
    Enroller {
        kernel: path.kernel.clone(),
        host: path.host.clone(),
        node: config.node.clone(),
        mesh: path.mesh.clone(),
        telemetry: path.telemetry.clone(),
        takes_over,
        pods_cgroup,
        directory: path.directory.clone(),
        policies: path.policies.clone(),
        identities: path.identities.clone(),
        table: path.table.clone(),
        serve,
        reconciled: Arc::new(move || {
            ready.is_ready();
            // The last agent may end now.
            drop(turn.lock().unwrap_or_else(PoisonError::into_inner).take());
        }),
    }
}

fn serve_pod(path: &Arc<Proxy>, pod: &Arc<Pod>, listeners: Listeners) {
    let Listeners { capture, plaintext, tunnel } = listeners;
    accept_loop(path, pod, capture, outbound::handle);
    accept_loop(path, pod, tunnel, inbound::tunnel);
    accept_loop(path, pod, plaintext, inbound::plaintext);
}

/// Tells the kernel that this agent lives, for as long as its tasks are run: an agent that is stuck is as good as dead.
/// Pins that were deleted are made again, or the agent's end would take the programs with it.
async fn heartbeat(path: Arc<Proxy>, timeout: Duration) {
    let mut tick = interval(timeout / BEATS_WITHIN_TIMEOUT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Err(error) = beat(&path.kernel, timeout, &path.policies) {
            tracing::error!(%error, "no heartbeat: the kernel decides by mode alone");
        }
        let restored = path.kernel.programs().restore_pins();
        match restored {
            Ok(0) => {}
            Ok(pins) => tracing::warn!(pins, "pins were deleted under this agent, and are made again"),
            Err(error) => {
                tracing::error!(%error, "deleted pins cannot be made again: this agent's end would leave its pods uncovered")
            }
        }
    }
}

fn beat(kernel: &Kernel, timeout: Duration, policies: &Watched<Policies>) -> Result<(), KernelError> {
    kernel.maps.set_heartbeat(timeout, kernel_mode(policies.current().mesh_default()))
}

/// Keeps the node's addresses true, and sessions from staying beyond their time.
async fn housekeeping(path: Arc<Proxy>, report: Arc<Report>) {
    let mut tick = interval(HOUSEKEEPING);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut trimmed_at = 0;
    let mut told = UncoveredStatus::default();
    loop {
        tick.tick().await;
        let uncovered = report.uncovered();
        if uncovered != told && uncovered.example.is_some() {
            tracing::warn!("{uncovered}");
        }
        told = uncovered;
        let connections = path.drain.tasks.len();
        if connections.abs_diff(trimmed_at) > MANY {
            trimmed_at = connections;
            host::release_memory();
        }
        if let Err(error) = refresh_node(&path.kernel, &path.directory.current()) {
            tracing::error!(%error, "the node's own addresses may be outdated: probes from new ones are refused under STRICT");
        }
        close_unused(&path);
    }
}

/// Closes sessions that idled too long, and those of pods that are gone: they would keep the pods' namespaces alive.
fn close_unused(path: &Proxy) {
    let table = path.table.load();
    let mut unused = path.pool().expire(Instant::now());
    unused.extend(path.pool().clear_where(|key, _| !table.pods.iter().any(|pod| pod.cgroup == key.pod)));
    unused.into_iter().for_each(Session::close);
}

fn refresh_node(kernel: &Kernel, directory: &Directory) -> Result<(), KernelError> {
    let listed = host::addresses().map_err(|e| KernelError::Map { map: "NODE", problem: e.to_string() })?;
    let sources = node_addresses::node_addresses(listed, directory);
    kernel.refresh_node_hardware()?;
    kernel.maps.set_node(&sources)
}

async fn wait_for(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(%error, path = %path.display(), "operator socket not removed");
    }
}
