//! Starts the agent, step by step. The order of the steps matters: a comment states the reason where another order would also
//! compile.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use tacit_core::{directory::Directory, policy::Policies};
use tacit_identity::{
    issuer::{EmbeddedIssuer, Issuer},
    istio::IstioIssuer,
    manager::Identities,
    root::EmbeddedRootError,
};
use tacit_kernel::{Kernel, SuccessorLock, VerifierLog, cgroup::Cgroup, host, netns::HostNetns};
use tacit_sources::reload::Watched;

use crate::{
    app::{
        AppError, Signals,
        admin_servers::AdminServers,
        agent::Agent,
        report::Report,
        sources::Sources,
        state::{Event, State},
        succession::{self, Succession},
        system,
        tasks::{Tasks, refresh_node},
    },
    config::{Config, IssuerConfig},
    enrol::{Enroller, Serve, publish_mesh_default},
    mesh::Mesh,
    proxy::{Proxy, accept, dialer::Dialer, snapshots::Snapshots, workers::Workers},
    telemetry::Telemetry,
};

/// Starts the agent. Returns `None` if a signal arrived before it served.
pub(super) async fn start(
    config: &Config,
    verifier_log: &VerifierLog,
    stands_by: bool,
    signals: &mut Signals,
) -> Result<Option<Agent>, AppError> {
    let started = Instant::now();
    let node = Node::open(config)?;
    let sources = Sources::open(config).await?;
    // Before programs: an agent that cannot be looked at should not touch the kernel.
    let operator = Operator::open(config, started, &sources, stands_by).await?;
    let Some(complete) = signals.before(sources.complete()).await else { return Ok(None) };
    let (directory, policies) = complete?;
    let identities = Arc::new(Identities::start(issuer(config)?));
    let pins = async {
        if stands_by {
            let prepare = || Kernel::prepare(&config.pin_path, &node.pods_cgroup, verifier_log);
            let stands_by = || operator.state.apply(Event::StandsBy);
            succession::stand_by(config, &directory, &identities, prepare, stands_by).await
        } else {
            succession::first(&config.pin_path)
        }
    };
    let Some(succession) = signals.before(pins).await else { return Ok(None) };
    let (kernel, successor_lock) = open_kernel(&node, verifier_log, succession?)?;
    let mesh = fill_maps(config, &kernel, &directory, &policies)?;
    let snapshots = Snapshots { directory, policies, mesh, identities };
    let proxy = proxy(config, &node, &kernel, snapshots, operator.telemetry.clone())?;
    Ok(Some(serve(config, node, kernel, proxy, operator, successor_lock)))
}

/// The parts of the node that the agent works with.
struct Node {
    /// How many files this process may have open.
    descriptors: u64,
    /// The node's own network namespace.
    host: Arc<HostNetns>,
    /// The cgroup that holds all pods.
    pods_cgroup: Cgroup,
}

impl Node {
    fn open(config: &Config) -> Result<Self, AppError> {
        let descriptors = host::raise_descriptor_limit().map_err(system("raise the limit of open files"))?;
        let host = HostNetns::current().map_err(system("open the node's network namespace"))?;
        Ok(Self { descriptors, host: Arc::new(host), pods_cgroup: Cgroup::open(&config.pods_cgroup)? })
    }
}

/// The parts of the agent that the operator can look at, from the first step on.
struct Operator {
    started: Instant,
    telemetry: Telemetry,
    state: State,
    servers: AdminServers,
}

impl Operator {
    async fn open(
        config: &Config,
        started: Instant,
        sources: &Sources,
        stands_by: bool,
    ) -> Result<Self, AppError> {
        let (telemetry, state) = (Telemetry::new(), State::default());
        let (shown, counted, watched) = (sources.states(), telemetry.clone(), state.clone());
        let servers = AdminServers::open(config, started, shown, counted, watched, stands_by).await?;
        Ok(Self { started, telemetry, state, servers })
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

/// Attaches the programs, or takes over those of the previous agent.
fn open_kernel(
    node: &Node,
    verifier_log: &VerifierLog,
    (pin_lock, follows): Succession,
) -> Result<(Arc<Kernel>, Option<SuccessorLock>), AppError> {
    let (successor_lock, prepared) = follows.unzip();
    let kernel = Kernel::open(pin_lock, &node.pods_cgroup, verifier_log, prepared)?;
    Ok((Arc::new(kernel), successor_lock))
}

/// Fills the maps of the whole node. The heartbeat comes last, because the programs rely on the agent from then on.
fn fill_maps(
    config: &Config,
    kernel: &Arc<Kernel>,
    directory: &Watched<Directory>,
    policies: &Watched<Policies>,
) -> Result<Arc<Mesh>, AppError> {
    let mesh = Mesh::start(kernel.clone(), &directory.current())?;
    kernel.maps.set_plaintext_destinations(&config.allow_clear)?;
    refresh_node(kernel, &directory.current())?;
    publish_mesh_default(kernel, &policies.current())?;
    kernel.maps.beat(config.heartbeat_timeout)?;
    Ok(Arc::new(mesh))
}

fn proxy(
    config: &Config,
    node: &Node,
    kernel: &Arc<Kernel>,
    snapshots: Snapshots,
    telemetry: Telemetry,
) -> Result<Arc<Proxy>, AppError> {
    let workers = Workers::start(config.workers.unwrap_or_else(cores), config.busy_poll)
        .map_err(system("start the threads that carry flows"))?;
    let dialer = Dialer::new(kernel.clone(), node.host.clone());
    let proxy = Arc::new(Proxy::new(snapshots, dialer, workers, telemetry));
    accept::serve_held(&proxy, kernel.held_rings()?);
    Ok(proxy)
}

/// One thread for each core that this process may use.
fn cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Starts the control tasks.
fn serve(
    config: &Config,
    node: Node,
    kernel: Arc<Kernel>,
    proxy: Arc<Proxy>,
    operator: Operator,
    successor_lock: Option<SuccessorLock>,
) -> Agent {
    let Operator { started, state, servers, .. } = operator;
    let report = Arc::new(Report::new(config, kernel.clone(), proxy.clone(), started));
    state.apply(Event::TakesOver);
    servers.show(report.clone());
    let descriptors = node.descriptors;
    let enroller = enroller(config, &kernel, node, &proxy, &state, successor_lock);
    let tasks = Tasks::spawn(&kernel, &proxy, &report, enroller, config.heartbeat_timeout);
    tracing::info!(node = %config.node, trust_domain = %config.trust_domain, descriptors, "agent runs");
    let (pin_path, drain_timeout) = (config.pin_path.clone(), config.drain_timeout);
    Agent { kernel, proxy, state, servers, tasks, pin_path, drain_timeout }
}

/// The previous agent waits for `successor_lock` before it ends. The lock is released after the first look at all pods.
fn enroller(
    config: &Config,
    kernel: &Arc<Kernel>,
    node: Node,
    proxy: &Arc<Proxy>,
    state: &State,
    successor_lock: Option<SuccessorLock>,
) -> Enroller {
    let (serving, state) = (proxy.clone(), state.clone());
    let takes_over = successor_lock.is_some();
    let successor_lock = Mutex::new(successor_lock);
    let serve: Serve = Arc::new(move |pod, listeners| accept::serve_pod(&serving, &pod, listeners));
    let snapshots = proxy.snapshots.clone();
    Enroller {
        kernel: kernel.clone(),
        host: node.host,
        node: config.node.clone(),
        mesh: snapshots.mesh,
        telemetry: proxy.telemetry.clone(),
        takes_over,
        pods_cgroup: node.pods_cgroup,
        directory: snapshots.directory,
        policies: snapshots.policies,
        identities: snapshots.identities,
        table: proxy.pods.clone(),
        serve,
        reconciled: Arc::new(move || {
            state.apply(Event::Reconciled);
            // The previous agent may end now.
            drop(successor_lock.lock().unwrap_or_else(PoisonError::into_inner).take());
        }),
    }
}
