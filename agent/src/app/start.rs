//! Starts the agent, step by step. The order of the steps matters: a comment states the reason where another order would also
//! compile.

use std::{
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use tacit_core::{directory::Directory, policy::Policies, shares::Capacity};
use tacit_identity::{
    issuer::{EmbeddedIssuer, Issuer},
    istio::{IstioIssuer, PublishedRoots},
    manager::Identities,
    peer_trust::{FederatedDomain, PeerTrust, TrustDomains},
    revocation::{Revocation, RevocationCheck, RevocationLists},
    spire::SpireIssuer,
};
use tacit_kernel::{
    Kernel, KernelError, SuccessorLock, VerifierLog,
    cgroup::{self, Cgroup},
    host,
    netns::HostNetns,
};
use tacit_sources::{
    directory::{AnnounceState, Announcer},
    kubernetes::KubernetesError,
    reload::Watched,
    roots::{ConfigMapKey, ConfigMapReader},
};
use tokio::sync::watch;

use crate::{
    app::{
        AppError, Ended, Signals, Started,
        admin_servers::AdminServers,
        agent::Agent,
        announce::announce,
        attachment::Attachment,
        cover::{Cover, kept_state},
        node_state::{self, Kept},
        pod_uids,
        report::Report,
        sandboxes::{self, Sandboxes},
        sources::{Complete, Sources},
        state::{Event, State},
        succession::{self, Succession},
        system,
        tasks::{Tasks, refresh_node},
        watchdog::Watchdog,
    },
    cni,
    config::{Config, IssuerConfig, Source},
    control_state::{FederatedRoots, Snapshots},
    enrol::{Answer, Enroller, Serve, publish_mesh_default},
    mesh::Mesh,
    proxy::{Proxy, accept, dialer::Dialer, workers::Workers},
    telemetry::{
        Telemetry,
        status::{CniStatus, NodeStateStatus},
    },
};

/// Starts the agent. It ends before it serves if a signal arrives, or if the pods' cgroup is another one meanwhile.
pub(super) async fn start(
    config: &Config,
    verifier_log: &VerifierLog,
    stands_by: bool,
    (signals, watchdog): (&mut Signals, &Watchdog),
) -> Result<Started, AppError> {
    let started = Instant::now();
    let node = Node::open(config)?;
    let (kept, mut node_state) = kept_state(config);
    // First of all: a source may not answer for long, and after a reboot nothing else covers the pods.
    let cover = cover(config, &node, verifier_log, stands_by, (&kept, &mut node_state))?;
    if let (Some(_), Some(cni)) = (&cover, &config.cni) {
        cni::restore(cni, &sandboxes::socket(&config.state_path));
    }
    let mut sources = Sources::open(config, node.pods_cgroup.path()).await?;
    let announcer = sources.take_announcer();
    let operator = Operator::open(config, started, &sources, node_state, stands_by).await?;
    watchdog.started();
    let attachment = Attachment::new(config, node.pods_cgroup.path());
    let complete = async {
        let Some(cover) = &cover else { return Some(sources.complete().await) };
        tokio::select! {
            complete = cover.while_waiting(sources.complete()) => Some(complete),
            () = attachment.lost(&cover.kernel, &operator.state) => None,
        }
    };
    let Some(complete) = signals.before(complete).await else { return Ok(Started::Ended(Ended::ByRequest)) };
    let Some(complete) = complete else { return Ok(Started::Ended(Ended::StartAgain)) };
    let Complete { directory, policies, revocation, federation } = complete?;
    let trust = Arc::new(peer_trust(config, revocation.as_deref(), &federation));
    let identities = Arc::new(Identities::trusting(issuer(config, &directory).await?, trust));
    let kernel = async {
        let Some(cover) = cover else {
            let prepare = || Kernel::prepare(&config.pin_path, &node.pods_cgroup, verifier_log);
            let stands_by = || operator.state.apply(Event::StandsBy);
            let (pods, known) = (node.pods_cgroup.path(), (&*directory, &*identities));
            let succession = succession::stand_by(config, pods, known, prepare, stands_by);
            let succession = succession.await?;
            if attachment.has_moved() {
                return Ok(None);
            }
            return open_kernel(&node, verifier_log, succession).map(Some);
        };
        Ok::<_, AppError>(Some((cover.kernel, None)))
    };
    let Some(kernel) = signals.before(kernel).await else { return Ok(Started::Ended(Ended::ByRequest)) };
    let Some((kernel, successor_lock)) = kernel? else { return Ok(Started::Ended(Ended::StartAgain)) };
    let mesh = fill_maps(config, &kernel, &directory, &policies)?;
    let snapshots = Snapshots { directory, policies, mesh, identities, revocation, federation };
    let proxy = proxy(config, &node, &kernel, snapshots, operator.telemetry.clone())?;
    let agent = serve(config, (node, attachment), kernel, proxy, operator, (kept, successor_lock, announcer));
    Ok(Started::Serving(Box::new(agent)))
}

/// Covers the pods, or returns `None` if another agent does and this one may stand by.
fn cover(
    config: &Config,
    node: &Node,
    verifier_log: &VerifierLog,
    stands_by: bool,
    state: (&Kept, &mut NodeStateStatus),
) -> Result<Option<Cover>, AppError> {
    match succession::first(&config.pin_path) {
        Ok((lock, _)) => Ok(Some(Cover::open(config, &node.pods_cgroup, verifier_log, lock, state)?)),
        Err(KernelError::Locked { .. }) if stands_by => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The parts of the node that the agent works with.
struct Node {
    /// Limit of open files of this process.
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
        let pods_cgroup = config.pods_cgroup.as_deref().map_or_else(cgroup::pods, Cgroup::open)?;
        tracing::info!(path = %pods_cgroup.path().display(), "the cgroup of all pods");
        Ok(Self { descriptors, host: Arc::new(host), pods_cgroup })
    }
}

/// The parts of the agent that the operator can look at, from the first step on.
struct Operator {
    started: Instant,
    telemetry: Telemetry,
    state: State,
    node_state: watch::Sender<NodeStateStatus>,
    servers: AdminServers,
}

impl Operator {
    async fn open(
        config: &Config,
        started: Instant,
        sources: &Sources,
        node_state: NodeStateStatus,
        stands_by: bool,
    ) -> Result<Self, AppError> {
        let (telemetry, state) = (Telemetry::new(), State::default());
        let node_state = watch::Sender::new(node_state);
        let (shown, counted) = (sources.states(), telemetry.clone());
        let watched = (state.clone(), node_state.subscribe());
        let servers = AdminServers::open(config, started, shown, counted, watched, stands_by).await?;
        Ok(Self { started, telemetry, state, node_state, servers })
    }
}

/// Returns what peers are held to beside the roots.
fn peer_trust(
    config: &Config,
    revocation: Option<&Watched<RevocationLists>>,
    federation: &[FederatedRoots],
) -> PeerTrust {
    let revocation = match (&config.crl, revocation) {
        (Some(crl), Some(lists)) => {
            RevocationCheck::Lists(Arc::new(Revocation::new(lists.subscribe(), crl.unknown)))
        }
        _ => RevocationCheck::Off,
    };
    let federated = federation
        .iter()
        .map(|domain| FederatedDomain { name: domain.trust_domain.clone(), roots: domain.roots.subscribe() });
    PeerTrust { revocation, domains: TrustDomains::new(config.trust_domain_aliases.clone(), federated) }
}

async fn issuer(config: &Config, directory: &Watched<Directory>) -> Result<Issuer, AppError> {
    match &config.issuer {
        IssuerConfig::Embedded { directory, leaf_lifetime } => {
            let issuer = EmbeddedIssuer::open(directory, &config.trust_domain, *leaf_lifetime)?;
            Ok(Issuer::Embedded(issuer))
        }
        IssuerConfig::Istio(istio, roots) => {
            let issuer = IstioIssuer::new(istio.clone());
            let Some(at) = roots else { return Ok(Issuer::Istio(issuer)) };
            let kubeconfig = match &config.directory {
                Source::Kubernetes(options) => options.kubeconfig.as_deref(),
                Source::Istiod(istiod) => istiod.local.kubeconfig.as_deref(),
                Source::File(_) => None,
            };
            let published = published_roots(kubeconfig, at).await.map_err(AppError::RootConfigMap)?;
            Ok(Issuer::Istio(issuer.with_published_roots(published)))
        }
        IssuerConfig::Spire(spire) => {
            let pods = pod_uids::follow(directory.subscribe(), config.node.clone());
            Ok(Issuer::Spire(SpireIssuer::new(spire.clone(), config.trust_domain.clone(), pods)))
        }
    }
}

/// Returns a reader of the roots in a ConfigMap.
pub(super) async fn published_roots(
    kubeconfig: Option<&Path>,
    at: &ConfigMapKey,
) -> Result<PublishedRoots, KubernetesError> {
    let reader = ConfigMapReader::open(kubeconfig, at).await?;
    Ok(Box::new(move || {
        let reader = reader.clone();
        Box::pin(async move { reader.read().await })
    }))
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
    let mesh = Mesh::start(kernel.clone(), &directory.current(), &config.allow_clear)?;
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
    let capacity = Capacity { descriptors: node.descriptors };
    let proxy = Arc::new(Proxy::new(snapshots, dialer, workers, telemetry, capacity, config.tunnel_timeout));
    accept::serve_held(&proxy, kernel.held_rings()?);
    accept::serve_watches(&proxy);
    Ok(proxy)
}

/// One thread for each core that this process may use.
fn cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Starts the control tasks.
fn serve(
    config: &Config,
    (node, attachment): (Node, Attachment),
    kernel: Arc<Kernel>,
    proxy: Arc<Proxy>,
    operator: Operator,
    (kept, successor_lock, announcer): (Kept, Option<SuccessorLock>, Option<Announcer>),
) -> Agent {
    let Operator { started, state, node_state, servers, .. } = operator;
    let shown = (started, node_state.subscribe());
    let cni = config
        .cni
        .as_ref()
        .map(|cni| watch::Sender::new(CniStatus { is_enabled: cni.is_enabled, ..CniStatus::default() }));
    let shown_cni = cni.as_ref().map(watch::Sender::subscribe);
    let announced = announcer.is_some().then(|| watch::Sender::new(AnnounceState::default()));
    let shown_announced = announced.as_ref().map(watch::Sender::subscribe);
    let extras = (shown_cni, shown_announced);
    let report = Report::new(config, node.pods_cgroup.path(), kernel.clone(), proxy.clone(), shown, extras);
    let report = Arc::new(report);
    state.apply(Event::TakesOver);
    servers.show(report.clone());
    let descriptors = node.descriptors;
    let enroller = enroller(config, &kernel, node, &proxy, &state, successor_lock);
    let on_disk = match kept {
        Kept::State(state) => Some(state),
        Kept::Nothing | Kept::Unusable(_) => None,
    };
    let Snapshots { directory, policies, .. } = proxy.snapshots.clone();
    let folder = node_state::folder(&config.state_path);
    let cni = keep_cni(
        config,
        cni,
        Sandboxes {
            kernel: kernel.clone(),
            pods_cgroup: report.pods_cgroup().to_owned(),
            directory: Arc::clone(&directory),
            node: Arc::clone(&config.node),
            state: state.clone(),
            failed: proxy.workers_failed().clone(),
        },
    );
    let keeper = node_state::keep(folder, on_disk, directory, policies, node_state);
    let announce = announce(announcer, proxy.clone(), announced);
    let keeper = async move { tokio::join!(keeper, cni, announce).0 };
    let tasks = Tasks::spawn(&kernel, &proxy, &report, (enroller, keeper), config.heartbeat_timeout);
    tracing::info!(node = %config.node, trust_domain = %config.trust_domain, descriptors, "agent runs");
    let (pin_path, drain_timeout) = (config.pin_path.clone(), config.drain_timeout);
    Agent { kernel, proxy, state, servers, tasks, pin_path, drain_timeout, attachment }
}

/// Answers the CNI plugin and keeps it on the node, if the configuration says so.
fn keep_cni(
    config: &Config,
    status: Option<watch::Sender<CniStatus>>,
    sandboxes: Sandboxes,
) -> impl Future<Output = ()> + Send + use<> {
    let socket = sandboxes::socket(&config.state_path);
    let wanted = config.cni.clone().zip(status);
    // The plugin of an earlier configuration asks too.
    let may_be_asked =
        wanted.is_some() || matches!(config.directory, Source::Kubernetes(_) | Source::Istiod(_));
    async move {
        let answers = async {
            if may_be_asked {
                sandboxes.serve(socket.clone()).await;
            }
        };
        let keeps = async {
            if let Some((cni, status)) = wanted {
                cni::keep(cni, socket.clone(), status).await;
            }
        };
        tokio::join!(answers, keeps);
        std::future::pending().await
    }
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
    let answering = proxy.clone();
    let serve: Serve = Arc::new(move |pod, listeners| accept::serve_pod(&serving, &pod, listeners));
    let answer: Answer = Arc::new(move |pod, listener| accept::answer_peers(&answering, &pod, listener));
    Enroller {
        kernel: kernel.clone(),
        host: node.host,
        node: config.node.clone(),
        snapshots: proxy.snapshots.clone(),
        telemetry: proxy.telemetry.clone(),
        takes_over,
        pods_cgroup: node.pods_cgroup,
        unnamed_pod_timeout: config.unnamed_pod_timeout,
        table: proxy.pods.clone(),
        published: proxy.pods_published.clone(),
        rechecks: proxy.rechecks.clone(),
        serve,
        answer,
        reconciled: Arc::new(move || {
            state.apply(Event::Reconciled);
            // The previous agent may end now.
            drop(successor_lock.lock().unwrap_or_else(PoisonError::into_inner).take());
        }),
    }
}
