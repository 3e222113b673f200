//! The directory of a cluster, from the API of Kubernetes.
//!
//! ```text
//! follow: namespaces ─┐
//! follow: pods ───────┤ channel ──> store ──> snapshot, published when complete and changed
//! follow: services ───┤
//! follow: slices ─────┘
//! ```
//! Nothing is published before each kind was listed once. From then on what is known stays in use whatever becomes of the
//! API: a failure is logged once, and its age is in the status and in the metrics until the API answers again.

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::SystemTime};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::Directory;
use crate::{
    identity::TrustDomain,
    reload::{ReloadState, Watched},
};

mod cgroup;
mod follow;
mod objects;
mod store;

pub use cgroup::CgroupLayout;
use follow::follow;
use objects::{Kind, Namespace, Pod, Service, Slice};
use store::{Change, Store};

/// Changes on their way; a follower that is ahead by so many waits.
const CHANGES_MAX: usize = 1024;
/// Most changes that go into one snapshot: a flood is published some hundred times a second.
const BATCH: usize = 512;

/// How the API is reached and what enrols a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// What enrols a pod.
    pub enrol_label: EnrolLabel,
    /// A kubeconfig file; `None` is the credentials of the pod that the agent runs in.
    pub kubeconfig: Option<PathBuf>,
}

/// The label that enrols a pod, on itself or on its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolLabel {
    /// Its name.
    pub name: String,
    /// The value that enrols.
    pub value: String,
}

impl Default for EnrolLabel {
    fn default() -> Self {
        Self { name: "tacit.io/enrol".to_owned(), value: "true".to_owned() }
    }
}

impl fmt::Display for EnrolLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// Where the agent stands.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its node.
    pub node: Arc<str>,
    /// Trust domain of all identities.
    pub trust_domain: TrustDomain,
    /// How the node names pods' cgroups.
    pub cgroups: CgroupLayout,
}

/// Why the API cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kubeconfig file is bad.
    #[error("kubeconfig {path:?}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// There are no credentials of a pod.
    #[error("no credentials of a pod: {0}; outside a cluster set directory.kubernetes.kubeconfig")]
    InCluster(#[from] kube::config::InClusterError),
    /// The credentials cannot be used.
    #[error("credentials of the API: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The tasks ended, a bug.
    #[error("the tasks that follow the API ended, a bug of Tacit, please report it")]
    Ended,
}

/// What followers tell.
#[derive(Debug)]
enum News {
    Change(Change),
    /// What is known of this kind is up to date.
    Fresh(Kind),
    Failed(Kind, String),
}

/// Follows the API from now on. Returns once the directory is complete, however long that takes.
///
/// # Errors
/// [`OpenError`]; that the API does not answer is none.
pub async fn open(options: &Options, place: Place) -> Result<Watched<Directory>, OpenError> {
    let config = match &options.kubeconfig {
        None => Config::incluster()?,
        Some(path) => {
            let failed = |source| OpenError::Kubeconfig { path: path.clone(), source };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)?
        }
    };
    start(config, options.enrol_label.clone(), place).await
}

async fn start(config: Config, enrol: EnrolLabel, place: Place) -> Result<Watched<Directory>, OpenError> {
    let state = ReloadState {
        file: format!("kubernetes {}", config.cluster_url).into(),
        loaded_at: SystemTime::now(),
        loads: 0,
        refusals: 0,
        last_error: None,
        stale_since: None,
    };
    let client = Client::try_from(config).map_err(|error| OpenError::Client(Box::new(error)))?;
    let (values_sender, values) = watch::channel(Arc::new(Directory::default()));
    let (state_sender, state) = watch::channel(state);
    let publisher = Publisher {
        store: Store::new(enrol, place),
        failing: BTreeMap::new(),
        values: values_sender,
        state: state_sender,
    };
    let task = tokio::spawn(publisher.run(client)).abort_handle();
    // From here on the task ends with this value, also when the wait is given up.
    let watched = Watched::fed(values, state.clone(), task);
    let mut state = state;
    state.wait_for(|state| state.loads > 0).await.map_err(|_| OpenError::Ended)?;
    Ok(watched)
}

struct Publisher {
    store: Store,
    /// Since when a kind is not followed, and why.
    failing: BTreeMap<Kind, (SystemTime, String)>,
    values: watch::Sender<Arc<Directory>>,
    state: watch::Sender<ReloadState>,
}

impl Publisher {
    async fn run(mut self, client: Client) {
        let (sender, mut news) = mpsc::channel(CHANGES_MAX);
        let mut followers = JoinSet::new();
        followers.spawn(follow::<Namespace>(client.clone(), sender.clone()));
        followers.spawn(follow::<Pod>(client.clone(), sender.clone()));
        followers.spawn(follow::<Service>(client.clone(), sender.clone()));
        followers.spawn(follow::<Slice>(client, sender));
        let mut batch = Vec::with_capacity(BATCH);
        while news.recv_many(&mut batch, BATCH).await > 0 {
            for one in batch.drain(..) {
                self.take(one);
            }
            self.publish();
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Change(change) => self.store.take(change),
            News::Fresh(kind) => {
                if self.failing.remove(&kind).is_some() {
                    tracing::info!(kind = kind.label(), "the Kubernetes API is followed again");
                    self.tell();
                }
            }
            News::Failed(kind, problem) => {
                let since = match self.failing.get(&kind) {
                    Some((since, _)) => *since,
                    None => {
                        tracing::warn!(
                            kind = kind.label(),
                            problem,
                            "the Kubernetes API is not followed; what is known stays in use"
                        );
                        SystemTime::now()
                    }
                };
                self.failing.insert(kind, (since, problem));
                self.state.send_modify(|state| state.refusals += 1);
                self.tell();
            }
        }
    }

    fn publish(&mut self) {
        let Some(directory) = self.store.news() else { return };
        self.values.send_replace(Arc::new(directory));
        self.state.send_modify(|state| {
            state.loads += 1;
            state.loaded_at = SystemTime::now();
        });
    }

    /// What fails, for the operator.
    fn tell(&self) {
        let problems: Vec<&str> = self.failing.values().map(|(_, problem)| problem.as_str()).collect();
        let since = self.failing.values().map(|(since, _)| *since).min();
        self.state.send_modify(|state| {
            state.last_error = (!problems.is_empty()).then(|| problems.join("\n"));
            state.stale_since = since;
        });
    }
}

#[cfg(test)]
mod tests;
