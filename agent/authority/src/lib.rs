//! The certificate authority of Tacit. It implements Istio's CA API. Agents of Tacit, ztunnel and other clients can use it, and
//! agents of Tacit can also use istiod or istio-csr.
//!
//! ```text
//!  agent ── CreateCertificate (gRPC, TLS) ──> server ── service ─┬─ authn: the node of the caller, and its pods
//!                                                                ├─ request: one identity, proven key
//!                                                                └─ signer: intermediate, key in memory
//!  store (Secret or folder): root <── reconciler ── rotation ──> signer, bundle (ConfigMap or file)
//! ```
//!
//! | module | content |
//! |---|---|
//! | `config` | `authority.yaml` |
//! | `server`, `connection_limit`, `service` | connections, their limit per address, and the handling of a request |
//! | `authn` | the identity and the node of a caller, and the pods of that node |
//! | `request`, `rate_limit`, `rotation` | pure decisions: content of a request, rate of a caller, steps of a root rotation |
//! | `root`, `signer` | creates and reads certificates |
//! | `store`, `bundle`, `reconciler` | storage of root and bundle, and the task that keeps both current |
//! | `status` | the state for metrics and readiness |
//!
//! Replicas share only the store. Agents create the keys of workloads, so the authority never sees them. The intermediate's key
//! never leaves its process. The caller of [`Authority`] serves metrics and readiness.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod authn;
mod bundle;
pub mod config;
mod connection_limit;
mod counters;
mod rate_limit;
mod reconciler;
mod refusal;
mod request;
mod root;
mod rotation;
mod server;
mod service;
mod signer;
pub mod status;
mod store;

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use arc_swap::ArcSwapOption;
use kube::{Api, Client};
use tacit_core::error_chain::format_chain;
use tacit_sources::file::LoadError;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use authn::{Authenticator, Kubernetes};
use bundle::Bundle;
use config::{Agents, BundleTarget, Config, RootStorage};
use counters::Counters;
use reconciler::{Live, RECONCILE_MAX, Reconciler};
use service::Service;
use status::{AuthorityStatus, Readiness};
use store::Store;

/// The reason why the authority did not start.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file could not be read or has mistakes.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The process has no access to the Kubernetes API.
    #[error("no access to the Kubernetes API: {0}; run it in a pod, or set KUBECONFIG")]
    Kubernetes(String),
    /// An address cannot be bound.
    #[error("{what} {address}: {source}")]
    Listen {
        /// `listen` or `metrics`.
        what: &'static str,
        /// The configured address.
        address: SocketAddr,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// Signal handlers could not be installed.
    #[error("listen for signals: {0}")]
    Signal(#[from] io::Error),
}

fn needs_kubernetes(config: &Config) -> bool {
    matches!(config.root, RootStorage::Secret { .. })
        || matches!(config.bundle, BundleTarget::ConfigMap { .. })
        || matches!(config.agents, Agents::Kubernetes { .. })
}

/// Returns the current status.
pub type StatusSource = Arc<dyn Fn() -> AuthorityStatus + Send + Sync>;

/// A started authority. Its address is bound and its reconciler runs.
pub struct Authority {
    listener: TcpListener,
    service: Arc<Service>,
    state: State,
    _reconciler: AbortOnDropHandle<()>,
}

/// The state for operators.
#[derive(Clone)]
struct State {
    live: Arc<ArcSwapOption<Live>>,
    counters: Arc<Counters>,
    last_error: Arc<ArcSwapOption<String>>,
    authn: Arc<Authenticator>,
}

impl Authority {
    /// Starts the authority. Requires a tokio runtime.
    ///
    /// # Errors
    /// [`AuthorityError`]. After the start, failures of the store or the API are retried.
    pub async fn open(config: Config) -> Result<Self, AuthorityError> {
        let client = if needs_kubernetes(&config) {
            Some(Client::try_default().await.map_err(|e| AuthorityError::Kubernetes(format_chain(&e)))?)
        } else {
            None
        };
        Self::start(config, client).await
    }

    /// Returns a function that returns the current status without blocking.
    #[must_use]
    pub fn status(&self) -> StatusSource {
        let state = self.state.clone();
        Arc::new(move || state.status())
    }

    async fn start(config: Config, client: Option<Client>) -> Result<Self, AuthorityError> {
        let authn = Arc::new(authn(&config, client.as_ref())?);
        let state =
            State { live: Arc::default(), counters: Arc::default(), last_error: Arc::default(), authn };
        let listener = bind("listen", config.listen).await?;
        let reconciler = Reconciler {
            store: store(&config, client.as_ref()),
            bundle: bundle(&config, client.as_ref()),
            trust_domain: config.trust_domain.clone(),
            names: config.names.clone(),
            lifetimes: config.lifetimes,
            reconcile_max: RECONCILE_MAX,
            live: state.live.clone(),
            last_error: state.last_error.clone(),
            known: None,
            published: None,
        };
        let (live, counters, authn) = (state.live.clone(), state.counters.clone(), state.authn.clone());
        let service =
            Service::new(live, authn, config.trust_domain.clone(), config.lifetimes, config.rate, counters);
        tracing::info!(trust_domain = %config.trust_domain, listen = %config.listen, "authority runs");
        let reconciler = AbortOnDropHandle::new(tokio::spawn(reconciler.run()));
        Ok(Self { listener, service: Arc::new(service), state, _reconciler: reconciler })
    }

    /// Serves callers until `stop`, and then finishes the current requests.
    pub async fn serve(self, stop: CancellationToken) {
        server::serve(self.listener, self.state.live.clone(), self.service, stop).await;
    }
}

impl State {
    fn status(&self) -> AuthorityStatus {
        let live = self.live.load_full();
        let (issued, refused) = self.counters.totals();
        AuthorityStatus {
            readiness: match &live {
                None => Readiness::NoRoot(self.last_error.load_full().map(|it| (*it).clone())),
                Some(live) if live.stale(Instant::now()) => {
                    Readiness::Stale(self.last_error.load_full().map(|it| (*it).clone()))
                }
                Some(_) => Readiness::Ready,
            },
            issued,
            refused,
            upkeep_failing: self.last_error.load().is_some() || self.authn.file_error().is_some(),
            root_not_after: live.as_ref().map(|live| live.root_not_after),
            intermediate_not_after: live.as_ref().map(|live| live.signer.not_after),
            roots: live.as_ref().map_or(0, |live| live.roots as u64),
        }
    }
}

/// Binds the configured `address` of `what`.
///
/// # Errors
/// [`AuthorityError::Listen`].
pub async fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, AuthorityError> {
    TcpListener::bind(address).await.map_err(|source| AuthorityError::Listen { what, address, source })
}

fn authn(config: &Config, client: Option<&Client>) -> Result<Authenticator, AuthorityError> {
    let domain = &config.trust_domain;
    match &config.agents {
        Agents::Kubernetes { service_accounts, audience, static_pods } => {
            let client = client.expect(CLIENT).clone();
            let (accounts, audience) = (service_accounts.clone(), audience.clone());
            let kubernetes = Kubernetes::new(client, accounts, audience, static_pods.clone(), domain.clone());
            Ok(Authenticator::Kubernetes(kubernetes))
        }
        Agents::Standalone { tokens, directory } => {
            Ok(Authenticator::standalone(tokens.clone(), directory.clone(), domain)?)
        }
    }
}

fn store(config: &Config, client: Option<&Client>) -> Store {
    match &config.root {
        RootStorage::Secret { namespace, name } => Store::Secret {
            api: Box::new(Api::namespaced(client.expect(CLIENT).clone(), namespace)),
            name: name.clone(),
        },
        RootStorage::Directory(path) => Store::Directory(path.clone()),
    }
}

fn bundle(config: &Config, client: Option<&Client>) -> Bundle {
    match &config.bundle {
        BundleTarget::ConfigMap { namespace, name, key } => {
            let api = Box::new(Api::namespaced(client.expect(CLIENT).clone(), namespace));
            Bundle::ConfigMap { api, name: name.clone(), key: key.clone() }
        }
        BundleTarget::File(path) => Bundle::File(path.clone()),
    }
}

const CLIENT: &str = "`needs_kubernetes` names every use of the API";

#[cfg(test)]
mod tests;
