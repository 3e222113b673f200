//! `tacit authority`: the certificate authority of a mesh. It speaks Istio's CA API, so that the agents of Tacit, ztunnel
//! and others can ask it, as the agents can ask istiod or istio-csr.
//!
//! ```text
//!  agent ── CreateCertificate (gRPC, TLS) ──> server ── service ─┬─ callers: which node, has it such a pod?
//!                                                                ├─ request: one identity, proven key
//!                                                                └─ signer: intermediate, key in memory
//!  store (Secret or folder): root <── keeper ── rotation ──> signer, bundle (ConfigMap or file)
//! ```
//!
//! | module | job |
//! |---|---|
//! | `config` | `authority.yaml` |
//! | `server`, `places`, `service` | the door, who holds how much of it, and one request from headers to answer |
//! | `callers` | who asks, and what is on the caller's node |
//! | `request`, `bucket`, `rotation` | pure decisions: what is asked for, how often, which root when |
//! | `root`, `signer` | certificates made and read |
//! | `store`, `bundle`, `keeper` | where the root is kept and published, and keeping both current |
//!
//! Replicas share the store and nothing else. Keys of workloads are made by the agents and never seen here; the
//! intermediate's key never leaves its process.

mod bucket;
mod bundle;
mod callers;
pub mod config;
mod counters;
mod keeper;
mod places;
mod refusal;
mod request;
mod root;
mod rotation;
mod server;
mod service;
mod signer;
mod store;

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use arc_swap::ArcSwapOption;
use kube::{Api, Client};
use tacit_core::error_chain::format_chain;
use tacit_sources::file::LoadError;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::telemetry::{
    admin,
    authority::{AuthorityStatus, Readiness},
};
use bundle::Bundle;
use callers::{Callers, Kubernetes};
use config::{Agents, BundlePlace, Config, RootPlace};
use counters::Counters;
use keeper::{Keeper, LOOK_MAX, Live};
use service::Service;
use store::Store;

/// Why the authority did not start.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file could not be read or holds mistakes.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The Kubernetes API is not configured here.
    #[error("no access to the Kubernetes API: {0}; run it in a pod, or set KUBECONFIG")]
    Kubernetes(String),
    /// An address cannot be had.
    #[error("{what} {address}: {source}")]
    Listen {
        /// `listen` or `metrics`.
        what: &'static str,
        /// The configured address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The system did not give what every process gets.
    #[error("listen for signals: {0}")]
    Signal(#[from] io::Error),
}

/// Runs the authority with `config` until SIGTERM or SIGINT. To be called on a tokio runtime.
///
/// # Errors
/// [`AuthorityError`] when it cannot start. Once it runs, a store or an API that fails is tried again.
pub async fn run(config: Config) -> Result<(), AuthorityError> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let client = if needs_kubernetes(&config) {
        Some(Client::try_default().await.map_err(|e| AuthorityError::Kubernetes(format_chain(&e)))?)
    } else {
        None
    };
    let authority = Authority::start(config, client).await?;
    let serving = tokio::spawn(authority.serve(stop.clone()));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending: requests under way are answered");
    stop.cancel();
    // A panic was printed, and the authority ends anyway.
    let _ = serving.await;
    Ok(())
}

fn needs_kubernetes(config: &Config) -> bool {
    matches!(config.root, RootPlace::Secret { .. })
        || matches!(config.bundle, BundlePlace::ConfigMap { .. })
        || matches!(config.agents, Agents::Kubernetes { .. })
}

/// A started authority: its addresses are bound, its root is looked after.
struct Authority {
    listener: TcpListener,
    metrics: TcpListener,
    service: Arc<Service>,
    state: State,
    _keeper: AbortOnDropHandle<()>,
}

/// What is shown to operators.
#[derive(Clone)]
struct State {
    live: Arc<ArcSwapOption<Live>>,
    counters: Arc<Counters>,
    trouble: Arc<ArcSwapOption<String>>,
    callers: Arc<Callers>,
}

impl Authority {
    async fn start(config: Config, client: Option<Client>) -> Result<Self, AuthorityError> {
        let callers = Arc::new(callers(&config, client.as_ref())?);
        let state =
            State { live: Arc::default(), counters: Arc::default(), trouble: Arc::default(), callers };
        let listener = bind("listen", config.listen).await?;
        let metrics = bind("metrics", config.metrics).await?;
        let keeper = Keeper {
            store: store(&config, client.as_ref()),
            bundle: bundle(&config, client.as_ref()),
            trust_domain: config.trust_domain.clone(),
            names: config.names.clone(),
            lifetimes: config.lifetimes,
            look_max: LOOK_MAX,
            live: state.live.clone(),
            trouble: state.trouble.clone(),
            known: None,
            published: None,
        };
        let (live, counters, callers) = (state.live.clone(), state.counters.clone(), state.callers.clone());
        let service =
            Service::new(live, callers, config.trust_domain.clone(), config.lifetimes, config.rate, counters);
        tracing::info!(trust_domain = %config.trust_domain, listen = %config.listen, "authority runs");
        let keeper = AbortOnDropHandle::new(tokio::spawn(keeper.run()));
        Ok(Self { listener, metrics, service: Arc::new(service), state, _keeper: keeper })
    }

    async fn serve(self, stop: CancellationToken) {
        let state = self.state.clone();
        let source: admin::AuthoritySource = Arc::new(move || state.status());
        let door = server::serve(self.listener, self.state.live.clone(), self.service, stop.clone());
        tokio::join!(door, admin::serve_authority(self.metrics, source, stop.cancelled()));
    }
}

impl State {
    fn status(&self) -> AuthorityStatus {
        let live = self.live.load_full();
        let (issued, refused) = self.counters.totals();
        AuthorityStatus {
            readiness: match &live {
                None => Readiness::NoRoot(self.trouble.load_full().map(|it| (*it).clone())),
                Some(live) if live.stale(Instant::now()) => {
                    Readiness::Stale(self.trouble.load_full().map(|it| (*it).clone()))
                }
                Some(_) => Readiness::Ready,
            },
            issued,
            refused,
            upkeep_failing: self.trouble.load().is_some() || self.callers.trouble().is_some(),
            root_not_after: live.as_ref().map(|live| live.root_not_after),
            intermediate_not_after: live.as_ref().map(|live| live.signer.not_after),
            roots: live.as_ref().map_or(0, |live| live.roots as u64),
        }
    }
}

async fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, AuthorityError> {
    TcpListener::bind(address).await.map_err(|source| AuthorityError::Listen { what, address, source })
}

fn callers(config: &Config, client: Option<&Client>) -> Result<Callers, AuthorityError> {
    let domain = &config.trust_domain;
    match &config.agents {
        Agents::Kubernetes { service_accounts, audience } => {
            let client = client.expect(CLIENT).clone();
            let kubernetes =
                Kubernetes::new(client, service_accounts.clone(), audience.clone(), domain.clone());
            Ok(Callers::Kubernetes(kubernetes))
        }
        Agents::Standalone { tokens, directory } => {
            Ok(Callers::standalone(tokens.clone(), directory.clone(), domain)?)
        }
    }
}

fn store(config: &Config, client: Option<&Client>) -> Store {
    match &config.root {
        RootPlace::Secret { namespace, name } => Store::Secret {
            api: Box::new(Api::namespaced(client.expect(CLIENT).clone(), namespace)),
            name: name.clone(),
        },
        RootPlace::Directory(path) => Store::Directory(path.clone()),
    }
}

fn bundle(config: &Config, client: Option<&Client>) -> Bundle {
    match &config.bundle {
        BundlePlace::ConfigMap { namespace, name, key } => {
            let api = Box::new(Api::namespaced(client.expect(CLIENT).clone(), namespace));
            Bundle::ConfigMap { api, name: name.clone(), key: key.clone() }
        }
        BundlePlace::File(path) => Bundle::File(path.clone()),
    }
}

const CLIENT: &str = "`needs_kubernetes` names every use of the API";

#[cfg(test)]
mod tests;
