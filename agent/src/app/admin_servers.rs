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
            FlowsStatus, GuardStatus, IssuerStatus, MeshStatus, NodeStateStatus, NodesStatus, PoolStatus,
            SourceKind, Status, UncoveredStatus, UnnamedStatus,
        },
    },
};

/// Between two looks whether the port of the metrics is free.
const PORT_PAUSE: Duration = Duration::from_millis(200);

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
    /// Opens them; `sources` may not be complete. An agent that may stand by takes the port of the metrics as soon as the
    /// agent that has it lets it go.
    pub(super) async fn open(
        config: &Config,
        started: Instant,
        sources: Vec<(SourceKind, watch::Receiver<ReloadState>)>,
        telemetry: Telemetry,
        (state, node_state): (State, watch::Receiver<NodeStateStatus>),
        may_stand_by: bool,
    ) -> Result<Self, AppError> {
        let operator = admin::bind_operator(&config.socket)?;
        let metrics = match TcpListener::bind(config.metrics).await {
            Ok(listener) => Metrics::Listener(listener),
            Err(error) if may_stand_by && error.kind() == io::ErrorKind::AddrInUse => {
                Metrics::TakenBy(config.metrics)
            }
            Err(source) => return Err(AppError::Metrics { address: config.metrics, source }),
        };
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
        let task = tokio::spawn(serve(shown.clone(), operator, metrics, telemetry, stop.clone()));
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

/// The port of the metrics.
enum Metrics {
    Listener(TcpListener),
    /// By another agent at this address.
    TakenBy(SocketAddr),
}

impl Metrics {
    async fn listener(self) -> TcpListener {
        let address = match self {
            Self::Listener(listener) => return listener,
            Self::TakenBy(address) => address,
        };
        // Nothing tells when a port is free.
        let mut tick = interval(PORT_PAUSE);
        loop {
            tick.tick().await;
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(error) => tracing::debug!(%address, %error, "no metrics yet"),
            }
        }
    }
}

async fn serve(
    shown: Arc<Shown>,
    operator: UnixListener,
    metrics: Metrics,
    telemetry: Telemetry,
    stop: CancellationToken,
) {
    let asked = shown.clone();
    let explain: admin::ExplainSource = Arc::new(move |from, to, port| asked.explain(from, to, port));
    let source: admin::StatusSource = Arc::new(move || shown.status());
    let for_metrics = source.clone();
    let serve_metrics = async {
        tokio::select! {
            listener = metrics.listener() => {
                admin::serve_metrics(listener, for_metrics, telemetry, stop.cancelled()).await;
            }
            () = stop.cancelled() => {}
        }
    };
    tokio::join!(serve_metrics, admin::serve_operator(operator, source, explain, stop.cancelled()),);
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
            guard: GuardStatus::default(),
            node_state: self.node_state.borrow().clone(),
            cni: None,
            unnamed: UnnamedStatus::default(),
            mesh: MeshStatus::default(),
            uncovered: UncoveredStatus::default(),
            nodes: NodesStatus::default(),
            issuer: IssuerStatus::default(),
            certificates: Vec::new(),
            sources: self.sources.iter().map(|(kind, state)| source(*kind, &state.borrow())).collect(),
            flows: FlowsStatus::default(),
            pool: PoolStatus::default(),
            shares: Vec::new(),
        }
    }
}
