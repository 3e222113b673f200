//! An issuer that gets keys and certificates from the SPIRE agent of the node.
//!
//! The Delegated Identity API is the usual one: for each identity, the agent subscribes to the SVIDs of a workload with the selectors
//! `k8s:ns`, `k8s:sa`, and `k8s:pod-uid` of each of its pods on this node. A second stream has the bundles. With the Workload API, the
//! agent gets the identities of its own process, on a node without Kubernetes.
//!
//! SPIRE makes the keys and renews the certificates, and sends both. A stream that ends is opened again after a pause, and the latest
//! SVID stays in use until it expires. An SVID is used only if it is of the identity that was asked for and leads to the roots of the
//! agent's own trust domain.

pub mod api;
mod bundles;
mod feed;
mod socket;
mod svids;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use rustls::{RootCertStore, pki_types::CertificateDer};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_grpc::{CallError, Code};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{
    credentials::{Credentials, CredentialsError},
    issuer::IssueError,
};
use api::Selector;
use bundles::Bundles;
use feed::{Asked, Feed, Source};
use svids::Svid;

/// Pods of an identity whose UIDs are sent; a node runs 110 pods by default. Further ones are left out.
const PODS_MAX: usize = 256;

/// UIDs of the pods of this node, by identity.
pub type PodUids = HashMap<SpiffeId, BTreeSet<String>>;

/// The API of SPIRE that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpireApi {
    /// The Delegated Identity API, on the admin socket: identities of all workloads of the node.
    Delegated,
    /// The Workload API: the identities of the agent's own process.
    Workload,
}

/// The SPIRE agent of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpireConfig {
    /// Unix socket of the SPIRE agent.
    pub socket: PathBuf,
    /// The API behind it.
    pub api: SpireApi,
}

/// The reason why SPIRE gave no certificate.
#[derive(Debug, thiserror::Error)]
pub enum SpireError {
    /// The socket cannot be used.
    #[error("issuer.spire.socket {}: {problem}", path.display())]
    Socket {
        /// The configured path.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// The call failed.
    #[error("issuer.spire.socket {}: {source}{}", path.display(), advice(source))]
    Call {
        /// The configured path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: CallError,
    },
    /// No message.
    #[error(
        "issuer.spire.socket {}: SPIRE has sent nothing within {limit:?}; is the SPIRE agent attested, and is there a registration entry?",
        path.display()
    )]
    Silent {
        /// The configured path.
        path: PathBuf,
        /// Limit for the message.
        limit: Duration,
    },
    /// No entry has these selectors.
    #[error(
        "SPIRE has no registration entry for {asked}: create one with SPIFFE id {identity} and selectors among these, whose parent is the SPIRE agent of this node"
    )]
    NoEntry {
        /// The identity.
        identity: SpiffeId,
        /// Description of the request.
        asked: String,
    },
    /// The entries are of other identities.
    #[error(
        "SPIRE gives {presented} for {asked}, expected {expected}: set the SPIFFE id of the registration entry to spiffe://<trust domain>/ns/<namespace>/sa/<service account>"
    )]
    Identity {
        /// The identity of the directory.
        expected: SpiffeId,
        /// The identities in the certificates.
        presented: String,
        /// Description of the request.
        asked: String,
    },
    /// An SVID that has expired.
    #[error(
        "the SVID of {identity} had expired as it came, at {}; is this node's clock right, and can SPIRE renew it?",
        time::OffsetDateTime::from(*at)
    )]
    Expired {
        /// The identity.
        identity: SpiffeId,
        /// Last moment of validity.
        at: SystemTime,
    },
    /// There are no roots of the agent's trust domain.
    #[error("the bundle of trust domain {} is refused: {problem}", trust_domain.as_str())]
    Bundle {
        /// The agent's trust domain.
        trust_domain: TrustDomain,
        /// The problem.
        problem: String,
    },
    /// Certificates that cannot be read.
    #[error("the SVIDs of SPIRE are refused: {0}")]
    Svids(String),
    /// The SVID does not lead to the bundle's roots.
    #[error("the SVID does not lead to the roots of its trust domain's bundle: {0}")]
    Chain(webpki::Error),
    /// The SVID cannot be used.
    #[error("the SVID is refused: {0}")]
    Credentials(#[from] CredentialsError),
}

/// Returns what an operator can do about a failed call.
fn advice(error: &CallError) -> &'static str {
    match error.status().map(|status| status.code) {
        Some(Code::PermissionDenied) => {
            "; register this agent's process with SPIRE, and for the Delegated Identity API list its SPIFFE id in `authorized_delegates` of the SPIRE agent"
        }
        Some(Code::Unimplemented) => {
            "; the Delegated Identity API is on the socket of `admin_socket_path` of the SPIRE agent, the Workload API on that of `socket_path`"
        }
        _ => "; it is tried again",
    }
}

/// Gets credentials from the SPIRE agent.
pub struct SpireIssuer {
    api: SpireApi,
    source: Source,
    pods: watch::Receiver<Arc<PodUids>>,
    /// The stream of bundles, or of the agent's own SVIDs and bundles. It is opened with the first subscription.
    shared: OnceLock<Stream>,
}

/// A stream in a task of its own, which ends with the last user.
#[derive(Clone)]
struct Stream {
    feed: watch::Receiver<Feed>,
    _task: Arc<AbortOnDropHandle<()>>,
}

/// The credentials of one identity, as they change.
pub struct Subscription {
    identity: SpiffeId,
    source: Source,
    api: SpireApi,
    pods: watch::Receiver<Arc<PodUids>>,
    selectors: Vec<Selector>,
    svids: Stream,
    bundles: Stream,
    /// The messages that the latest outcome is of. Later ones are compared by their address.
    judged: Option<Judged>,
    /// Chain and roots of the latest credentials; `None` after an error.
    returned: Option<(Vec<CertificateDer<'static>>, Arc<RootCertStore>)>,
    reported: [Option<Arc<SpireError>>; 2],
}

/// The roots of the own trust domain, as they change.
pub(crate) struct Roots {
    bundles: Stream,
    returned: Option<Arc<RootCertStore>>,
}

impl Roots {
    /// Returns the roots of the latest message if they are others than the last that this returned, or else waits for them. Loses
    /// nothing if dropped while it waits.
    pub(crate) async fn next(&mut self) -> Arc<RootCertStore> {
        loop {
            let latest = self.bundles.feed.borrow_and_update().bundles.as_ref().map(|it| it.own.clone());
            let is_new = |latest: &Arc<RootCertStore>| {
                self.returned.as_ref().is_none_or(|returned| returned.roots != latest.roots)
            };
            if let Some(latest) = latest.filter(is_new) {
                self.returned = Some(latest.clone());
                return latest;
            }
            self.bundles.changed().await;
        }
    }
}

/// Messages with SVIDs and, if they were needed, with bundles.
type Judged = (Arc<Vec<Svid>>, Option<Arc<Bundles>>);

impl SpireIssuer {
    /// Returns an issuer for identities of `trust_domain`. `pods` has the pods of this node, whose UIDs are among the selectors. Nothing
    /// is opened yet: an agent starts while SPIRE is down.
    #[must_use]
    pub fn new(config: SpireConfig, trust_domain: TrustDomain, pods: watch::Receiver<Arc<PodUids>>) -> Self {
        let source = Source { path: config.socket, trust_domain };
        Self { api: config.api, source, pods, shared: OnceLock::new() }
    }

    /// Returns the path of the socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.source.path
    }

    /// Returns the time of the latest message with bundles; `None` before the first.
    #[must_use]
    pub fn answered(&self) -> Option<SystemTime> {
        self.shared.get().and_then(|stream| stream.feed.borrow().answered)
    }

    /// Returns the roots of the other trust domains that SPIRE federates with, as of the latest message. They prove nothing
    /// by themselves: peers of another trust domain may be accepted only if the configuration of the agent lists it.
    #[must_use]
    pub fn federated(&self) -> BTreeMap<TrustDomain, Arc<RootCertStore>> {
        let bundles = self.shared.get().and_then(|stream| stream.feed.borrow().bundles.clone());
        bundles.map(|bundles| bundles.federated.clone()).unwrap_or_default()
    }

    /// Subscribes to the credentials of `identity`. Needs a tokio runtime. Never waits.
    ///
    /// # Errors
    /// [`IssueError::TrustDomain`] if the identity is of another trust domain.
    pub fn subscribe(&self, identity: &SpiffeId) -> Result<Subscription, IssueError> {
        let ours = &self.source.trust_domain;
        if identity.trust_domain() != ours {
            return Err(IssueError::TrustDomain { identity: identity.clone(), ours: ours.clone() });
        }
        let mut pods = self.pods.clone();
        let selectors = selectors(identity, &pods.borrow_and_update());
        let asked = match self.api {
            SpireApi::Delegated => Asked::Bundles,
            SpireApi::Workload => Asked::Own,
        };
        let bundles = self.shared.get_or_init(|| Stream::open(&self.source, asked)).clone();
        let svids = match self.api {
            SpireApi::Delegated => Stream::open(&self.source, Asked::Svids(selectors.clone())),
            SpireApi::Workload => bundles.clone(),
        };
        Ok(Subscription {
            identity: identity.clone(),
            source: self.source.clone(),
            api: self.api,
            pods,
            selectors,
            svids,
            bundles,
            judged: None,
            returned: None,
            reported: [None, None],
        })
    }
}

impl Stream {
    fn open(source: &Source, asked: Asked) -> Self {
        let (sender, feed) = watch::channel(Feed::default());
        let task = tokio::spawn(feed::follow(source.clone(), asked, sender));
        Self { feed, _task: Arc::new(AbortOnDropHandle::new(task)) }
    }

    async fn changed(&mut self) {
        if self.feed.changed().await.is_err() {
            // The task has panicked, which the log shows.
            std::future::pending::<()>().await;
        }
    }
}

impl Subscription {
    /// Returns the next credentials, or the next reason why there are none. Credentials come with each new SVID and with new roots.
    /// After an error, earlier credentials stay valid. Loses nothing if dropped while it waits.
    ///
    /// # Errors
    /// [`IssueError::Spire`].
    pub async fn next(&mut self) -> Result<Credentials, IssueError> {
        loop {
            match self.judge() {
                // SPIRE sends all SVIDs again when any entry has changed.
                Some(Ok(credentials)) if self.is_returned(&credentials) => continue,
                Some(Ok(credentials)) => {
                    self.returned = Some((credentials.chain().to_vec(), credentials.roots.clone()));
                    return Ok(credentials);
                }
                Some(Err(error)) => {
                    self.returned = None;
                    return Err(IssueError::Spire(error));
                }
                None => {}
            }
            tokio::select! {
                () = self.svids.changed() => {}
                () = self.bundles.changed() => {}
                Ok(()) = self.pods.changed() => self.follow_pods(),
            }
        }
    }

    /// Returns the roots of the own trust domain. They come by a good bundle, also if the SVID is refused or there is none.
    pub(crate) fn roots(&self) -> Roots {
        Roots { bundles: self.bundles.clone(), returned: None }
    }

    fn is_returned(&self, credentials: &Credentials) -> bool {
        self.returned.as_ref().is_some_and(|(chain, roots)| {
            chain == credentials.chain() && roots.roots == credentials.roots.roots
        })
    }

    /// Opens another stream if the selectors have changed: an entry may be for one pod alone.
    fn follow_pods(&mut self) {
        let selectors = selectors(&self.identity, &self.pods.borrow_and_update());
        if self.api == SpireApi::Delegated && selectors != self.selectors {
            self.svids = Stream::open(&self.source, Asked::Svids(selectors.clone()));
            self.selectors = selectors;
        }
    }

    /// Judges the latest messages; `None` if they were judged before.
    fn judge(&mut self) -> Option<Result<Credentials, Arc<SpireError>>> {
        let svids = self.svids.feed.borrow_and_update().clone();
        let bundles = self.bundles.feed.borrow_and_update().clone();
        // Without an entry no roots are needed, and the Workload API sends none.
        let roots = svids.svids.as_ref().filter(|svids| !svids.is_empty()).and(bundles.bundles.as_ref());
        if let Some(svids) = svids.svids.as_ref().filter(|svids| svids.is_empty() || roots.is_some()) {
            let is_new = self.judged.as_ref().is_none_or(|(old_svids, old_roots)| {
                let same_roots = old_roots.as_ref().map(Arc::as_ptr) == roots.map(Arc::as_ptr);
                !Arc::ptr_eq(old_svids, svids) || !same_roots
            });
            if is_new {
                self.judged = Some((svids.clone(), roots.cloned()));
                return Some(self.choose(svids, roots).map_err(Arc::new));
            }
        }
        // The Workload API has one stream for both.
        let problems = [svids.problem, bundles.problem.filter(|_| self.api == SpireApi::Delegated)];
        for (problem, reported) in problems.into_iter().zip(&mut self.reported) {
            if let Some(problem) = problem
                && !reported.as_ref().is_some_and(|reported| Arc::ptr_eq(reported, &problem))
            {
                *reported = Some(problem.clone());
                return Some(Err(problem));
            }
        }
        None
    }

    fn choose(&self, svids: &[Svid], bundles: Option<&Arc<Bundles>>) -> Result<Credentials, SpireError> {
        let missing = || SpireError::NoEntry { identity: self.identity.clone(), asked: self.asked() };
        let roots = &bundles.ok_or_else(missing)?.own;
        svids::choose(svids, roots, &self.identity, &self.asked(), SystemTime::now())
    }

    /// Describes the request.
    fn asked(&self) -> String {
        match self.api {
            SpireApi::Workload => "this agent's process".to_owned(),
            SpireApi::Delegated => {
                let selectors: Vec<_> = self.selectors.iter().take(4).map(ToString::to_string).collect();
                let more = self.selectors.len().saturating_sub(selectors.len());
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                format!("selectors {}{more}", selectors.join(", "))
            }
        }
    }
}

/// Returns the selectors of a workload with the identity. SPIRE returns the SVIDs of all entries whose selectors are among them, so
/// that entries for the service account and entries for a single pod (of the SPIRE controller manager) are both found.
fn selectors(identity: &SpiffeId, pods: &PodUids) -> Vec<Selector> {
    let uids = pods.get(identity).into_iter().flatten().take(PODS_MAX);
    let account =
        [Selector::k8s("ns", identity.namespace()), Selector::k8s("sa", identity.service_account())];
    account.into_iter().chain(uids.map(|uid| Selector::k8s("pod-uid", uid))).collect()
}

#[cfg(test)]
mod tests;
