//! Starts the agent, runs it until a signal, and shuts it down in good order. Imported by `main` only.
//!
//! | module | content |
//! |---|---|
//! | `start` | the steps of the start, in their order |
//! | `cover` | the pods are covered before a source is asked |
//! | `node_state` | what is kept for the start after a reboot |
//! | `attachment` | notices that the pods' cgroup is another one |
//! | `agent` | an agent that serves, and its end |
//! | `succession` | one agent follows another on a node |
//! | `state` | the watched state that status and readiness show |
//! | `tasks` | control tasks: enrolment, upkeep, heartbeat |
//! | `sources` | opens directory and policies |
//! | `watchdog` | ends an agent that is stuck |
//! | `admin_servers`, `report` | the servers of the operator, and the status that they show |

use std::{future::Future, io, net::SocketAddr};

use tacit_core::spiffe::TrustDomain;
use tacit_identity::root::EmbeddedRootError;
use tacit_kernel::{KernelError, VerifierLog, probe};
use tacit_sources::{file::LoadError, kubernetes::KubernetesError};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    app::{agent::Agent, watchdog::Watchdog},
    config::Config,
    telemetry::admin,
};

mod admin_servers;
mod agent;
mod announce;
mod attachment;
mod cover;
mod kernel_shares;
mod node_addresses;
mod node_state;
mod pod_uids;
mod report;
mod sandboxes;
mod sources;
mod start;
mod state;
mod succession;
mod tasks;
mod watchdog;

/// Runs the agent with `config` until SIGTERM or SIGINT, then drains. To be called on a tokio runtime. With `stands_by` it
/// waits for the end of an agent that serves this node, and takes over from it; else that is an error.
///
/// # Errors
/// [`AppError`] when the agent cannot start. Once it runs, nothing that a peer, a pod or a file does ends it.
pub async fn run(config: Config, verifier_log: VerifierLog, stands_by: bool) -> Result<Ended, AppError> {
    // First of all: a kernel that cannot do it is left as it was.
    probe::require(&config.pin_path).map_err(KernelError::from)?;
    let mut signals = Signals::listen()?;
    let watchdog = Watchdog::start().map_err(system("start the watchdog"))?;
    match start::start(&config, &verifier_log, stands_by, (&mut signals, &watchdog)).await? {
        Started::Serving(agent) => {
            let served = async {
                tokio::select! {
                    () = agent.must_attach_again() => Served::Detached,
                    () = agent.has_failed() => Served::Failed,
                }
            };
            // None if a signal has come, also a moment later: its end must not get lost.
            let served = signals.before(served).await;
            if served == Some(Served::Detached) && signals.before(std::future::ready(())).await.is_some() {
                return Ok(Ended::StartAgain);
            }
            if served == Some(Served::Failed) {
                // Another agent of the node takes over, or this one is started again.
                drop(watchdog);
                agent.shut_down().await;
                return Err(AppError::TaskFailed);
            }
            // From here on whoever sent the signal waits for the end.
            drop(watchdog);
            if stands_by {
                // A second signal ends the wait.
                signals.before(agent.await_successor(config.successor_timeout)).await;
            }
            agent.shut_down().await;
            Ok(Ended::ByRequest)
        }
        Started::Ended(ended) => {
            admin_servers::remove_socket(&config.socket);
            Ok(ended)
        }
    }
}

/// The end of [`run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// A signal asked for it.
    ByRequest,
    /// The pods' cgroup is another one. The process has to start again, at once and as it is: no pod is captured.
    StartAgain,
}

/// The reason for which an agent serves no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    /// Its programs are not attached to the pods' cgroup.
    Detached,
    /// A task that it cannot do without has failed.
    Failed,
}

/// The result of a start.
enum Started {
    Serving(Box<Agent>),
    /// Before it served.
    Ended(Ended),
}

/// The signals that end the agent.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self, AppError> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(system("listen for SIGTERM"))?,
            interrupt: signal(SignalKind::interrupt()).map_err(system("listen for SIGINT"))?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Runs `work` to its end. Returns `None` if a signal arrives first, or has arrived.
    async fn before<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.received() => None,
            done = work => Some(done),
        }
    }
}

/// A reason for which the agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A file could not be read or holds mistakes.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The API of Kubernetes cannot be used at all.
    #[error("{field}.kubernetes: {source}")]
    Kubernetes {
        /// The field of the configuration.
        field: &'static str,
        /// The error.
        #[source]
        source: KubernetesError,
    },
    /// The API that has the authority's roots cannot be used at all.
    #[error("issuer.istio.rootConfigMap: {0}")]
    RootConfigMap(#[source] KubernetesError),
    /// The revocation lists could not be read. Nobody's certificate is taken without them.
    #[error("crl.file: {0}")]
    RevocationLists(#[source] LoadError),
    /// The roots of a federated trust domain could not be read.
    #[error("federation: rootFile of {trust_domain}: {source}")]
    FederatedRoots {
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The error.
        #[source]
        source: LoadError,
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
    /// The health address cannot be had.
    #[error("health {address}: {source}")]
    Health {
        /// The configured address.
        address: SocketAddr,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The operator's socket cannot be had.
    #[error("socket: {0}")]
    Socket(#[from] admin::BindError),
    /// A task has panicked, or could not go on. The log has the error.
    #[error("a task of the agent has failed")]
    TaskFailed,
    /// The system did not give what every process gets.
    #[error("{what}: {source}")]
    System {
        /// The resource that the system did not provide.
        what: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
}

impl AppError {
    /// Returns the exit code of the process for this error: 78 (`EX_CONFIG`) if no restart can help, else 1.
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
