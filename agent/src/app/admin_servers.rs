//! The admin servers of the agent. They answer before directory and policies are complete, so that it can be seen what an agent
//! waits for.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tacit_core::policy::explain::{ExplainError, Explanation, WorkloadRef};
use tacit_sources::reload::ReloadState;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinHandle,
    time::interval,
};
use tokio_util::sync::CancellationToken;

use crate::{
    app::{
        AppError,
        report::{Report, source},
        state::State,
    },
    config::Config,
    telemetry::{
        Telemetry, admin,
        status::{
            AgentState, FlowsStatus, GuardStatus, IssuerStatus, MeshStatus, NodeStateStatus, NodesStatus,
            PoolStatus, SourceKind, Status, UncoveredStatus, UnnamedStatus,
        },
    },
};

/// Between two looks whether a port is free.
const PORT_PAUSE: Duration = Duration::from_millis(200);
/// Looks of an agent that serves before it warns: 30 s. The agent before it closes its ports within 12 s.
const LOOKS_MAX: u32 = 150;

/// The running servers.
pub(super) struct AdminServers {
    socket: PathBuf,
    shown: Arc<Shown>,
    task: JoinHandle<()>,
    stop: CancellationToken,
}

/// The state that the servers report.
struct Shown {
    node: String,
    trust_domain: String,
    started: Instant,
    sources: Vec<(SourceKind, watch::Receiver<ReloadState>)>,
    state: State,
    node_state: watch::Receiver<NodeStateStatus>,
    /// Set when there is more to see than that.
    report: OnceLock<Arc<Report>>,
}

impl AdminServers {
    /// Opens them; `sources` may not be complete. An agent that may stand by takes the ports as soon as the agent that has them
    /// lets them go. No agent ends because of the health port: every process of the node's network could take it first.
    pub(super) async fn open(
        config: &Config,
        started: Instant,
        sources: Vec<(SourceKind, watch::Receiver<ReloadState>)>,
        telemetry: Telemetry,
        (state, node_state): (State, watch::Receiver<NodeStateStatus>),
        may_stand_by: bool,
    ) -> Result<Self, AppError> {
        let operator = admin::bind_operator(&config.socket)?;
        let metrics = match Port::open(config.metrics).await {
            Ok(Port { listener: Err(source), .. }) if !may_stand_by => Err(source),
            opened => opened,
        };
        let metrics = metrics.map_err(|source| AppError::Metrics { address: config.metrics, source })?;
        let health = Port::open(config.health).await;
        let health = health.map_err(|source| AppError::Health { address: config.health, source })?;
        let shown = Arc::new(Shown {
            node: config.node.to_string(),
            trust_domain: config.trust_domain.to_string(),
            started,
            sources,
            state,
            node_state,
            report: OnceLock::new(),
        });
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(shown.clone(), operator, (metrics, health), telemetry, stop.clone()));
        Ok(Self { socket: config.socket.clone(), shown, task, stop })
    }

    /// From now on this is what can be seen.
    pub(super) fn show(&self, report: Arc<Report>) {
        // There is one report.
        let _ = self.shown.report.set(report);
    }

    /// Ends the servers and removes the operator's socket.
    pub(super) async fn close(self) {
        self.stop.cancel();
        // An error of it was logged, and the agent ends anyway.
        let _ = self.task.await;
        remove_socket(&self.socket);
    }
}

/// Removes the operator's socket, so that its absence shows that no agent listens.
pub(super) fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(%error, path = %path.display(), "operator socket not removed");
    }
}

/// A port of the node, which one agent of the node has.
struct Port {
    address: SocketAddr,
    /// The error is that another process has the port.
    listener: io::Result<TcpListener>,
}

impl Port {
    /// # Errors
    /// Any error but a port that another process has.
    async fn open(address: SocketAddr) -> io::Result<Self> {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => Err(error),
            listener => Ok(Self { address, listener }),
        }
    }

    /// Waits until no other process has the port. Warns if this agent serves, so that no other agent has it.
    async fn listener(self, state: &State) -> TcpListener {
        let Self { address, mut listener } = self;
        // Nothing tells when a port is free.
        let mut tick = interval(PORT_PAUSE);
        let mut looks = 0;
        loop {
            match listener {
                Ok(listener) => return listener,
                Err(error) => {
                    looks += u32::from(state.current() == AgentState::Ready);
                    if looks == LOOKS_MAX {
                        tracing::warn!(%address, %error, "another process has this port: configure another one, or end the process");
                    }
                }
            }
            tick.tick().await;
            listener = TcpListener::bind(address).await;
        }
    }
}

async fn serve(
    shown: Arc<Shown>,
    operator: UnixListener,
    (metrics, health): (Port, Port),
    telemetry: Telemetry,
    stop: CancellationToken,
) {
    let asked = shown.clone();
    let explain: admin::ExplainSource = Arc::new(move |from, to, port| asked.explain(from, to, port));
    let state = shown.state.clone();
    let is_ready: admin::ReadySource = Arc::new(move || state.current().is_ready());
    let state = shown.state.clone();
    let source: admin::StatusSource = Arc::new(move || shown.status());
    let for_metrics = source.clone();
    let serve_metrics = async {
        let listener = metrics.listener(&state).await;
        admin::serve_metrics(listener, for_metrics, telemetry, std::future::pending()).await;
    };
    let serve_health = async {
        let listener = health.listener(&state).await;
        admin::serve_health(listener, is_ready, std::future::pending()).await;
    };
    let serve_operator = admin::serve_operator(operator, source, explain, std::future::pending());
    tokio::select! {
        _ = async { tokio::join!(serve_metrics, serve_health, serve_operator) } => {}
        () = stop.cancelled() => {}
    }
}

impl Shown {
    fn explain(&self, from: &WorkloadRef, to: &WorkloadRef, port: u16) -> Result<Explanation, ExplainError> {
        self.report.get().ok_or(ExplainError::Starting)?.explain(from, to, port)
    }

    fn status(&self) -> Status {
        if let Some(report) = self.report.get() {
            return report.status(self.state.current());
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.clone(),
            trust_domain: self.trust_domain.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            state: self.state.current(),
            pods: Vec::new(),
            programs: Vec::new(),
            connect_hooks: Vec::new(),
            kernel: Vec::new(),
            exceptions: Vec::new(),
            guard: GuardStatus::default(),
            node_state: self.node_state.borrow().clone(),
            cni: None,
            announced: None,
            unnamed: UnnamedStatus::default(),
            mesh: MeshStatus::default(),
            uncovered: UncoveredStatus::default(),
            nodes: NodesStatus::default(),
            issuer: IssuerStatus::default(),
            certificates: Vec::new(),
            revocation_lists: Vec::new(),
            sources: self.sources.iter().map(|(kind, state)| source(*kind, &state.borrow())).collect(),
            flows: FlowsStatus::default(),
            pool: PoolStatus::default(),
            shares: Vec::new(),
        }
    }
}
