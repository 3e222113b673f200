//! The operator's doors. They are open before directory and policies are complete, so that it can be seen what an agent
//! waits for.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    AppError,
    report::{Report, source},
};
use crate::{
    config::Config,
    policy::explain::{End, ExplainError, Explanation},
    reload::ReloadState,
    telemetry::{
        Telemetry, admin,
        status::{
            AgentState, FlowsStatus, GuardStatus, IssuerStatus, MeshStatus, PoolStatus, SourceKind, Status,
            UncoveredStatus,
        },
    },
};

/// Open doors.
pub(super) struct Doors {
    shown: Arc<Shown>,
    task: JoinHandle<()>,
    stop: CancellationToken,
}

/// What can be seen through them.
struct Shown {
    node: String,
    trust_domain: String,
    started: Instant,
    sources: Vec<(SourceKind, watch::Receiver<ReloadState>)>,
    /// Set when there is more to see than that.
    report: OnceLock<Arc<Report>>,
}

impl Doors {
    /// Opens them; `sources` may not be complete.
    pub(super) async fn open(
        config: &Config,
        started: Instant,
        sources: Vec<(SourceKind, watch::Receiver<ReloadState>)>,
        telemetry: Telemetry,
    ) -> Result<Self, AppError> {
        let operator = admin::bind_operator(&config.socket)?;
        let metrics = TcpListener::bind(config.metrics)
            .await
            .map_err(|source| AppError::Metrics { address: config.metrics, source })?;
        let shown = Arc::new(Shown {
            node: config.node.to_string(),
            trust_domain: config.trust_domain.to_string(),
            started,
            sources,
            report: OnceLock::new(),
        });
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(shown.clone(), operator, metrics, telemetry, stop.clone()));
        Ok(Self { shown, task, stop })
    }

    /// From now on this is what can be seen.
    pub(super) fn show(&self, report: Arc<Report>) {
        // There is one report.
        let _ = self.shown.report.set(report);
    }

    pub(super) async fn close(self) {
        self.stop.cancel();
        // An error of it was logged, and the agent ends anyway.
        let _ = self.task.await;
    }
}

async fn serve(
    shown: Arc<Shown>,
    operator: UnixListener,
    metrics: TcpListener,
    telemetry: Telemetry,
    stop: CancellationToken,
) {
    let asked = shown.clone();
    let explain: admin::ExplainSource = Arc::new(move |from, to, port| asked.explain(from, to, port));
    let source: admin::StatusSource = Arc::new(move || shown.status());
    tokio::join!(
        admin::serve_metrics(metrics, source.clone(), telemetry, stop.cancelled()),
        admin::serve_operator(operator, source, explain, stop.cancelled()),
    );
}

impl Shown {
    fn explain(&self, from: &End, to: &End, port: u16) -> Result<Explanation, ExplainError> {
        self.report.get().ok_or(ExplainError::Starting)?.explain(from, to, port)
    }

    fn status(&self) -> Status {
        if let Some(report) = self.report.get() {
            return report.status();
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.clone(),
            trust_domain: self.trust_domain.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            state: AgentState::Starting,
            pods: Vec::new(),
            programs: Vec::new(),
            kernel: Vec::new(),
            guard: GuardStatus::default(),
            mesh: MeshStatus::default(),
            uncovered: UncoveredStatus::default(),
            issuer: IssuerStatus::default(),
            certificates: Vec::new(),
            sources: self.sources.iter().map(|(kind, state)| source(*kind, &state.borrow())).collect(),
            flows: FlowsStatus::default(),
            pool: PoolStatus::default(),
        }
    }
}
