//! The API of Kubernetes, for the sources that follow it: how it is reached, and how what it tells becomes a value.
//!
//! ```text
//! follow: one kind ────┐
//! follow: one more ────┤ channel ──> store ──> value, published when complete and changed
//! ```
//! Nothing is published before each kind was listed once. From then on what is known stays in use whatever becomes of the
//! API: a failure is logged once, and its age is in the status and in the metrics until the API answers again.

use std::path::{Path, PathBuf};

use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Deserialize, Deserializer};

mod reflector;
#[cfg(test)]
pub(crate) mod testing;
mod watcher;

pub(crate) use reflector::{Complaints, Followers, Sender, Store, start};
pub(crate) use watcher::{Change, Definition, Followed, Label, follow, random};

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
    #[error("no credentials of a pod: {0}; outside a cluster set `kubeconfig`")]
    InCluster(#[from] kube::config::InClusterError),
    /// The credentials cannot be used.
    #[error("credentials of the API: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The tasks ended, a bug.
    #[error("the tasks that follow the API ended, a bug of Tacit, please report it")]
    Ended,
}

/// How the API is reached: by a kubeconfig file; `None` is the credentials of the pod that the agent runs in.
pub(crate) async fn access(kubeconfig: Option<&Path>) -> Result<Config, OpenError> {
    let Some(path) = kubeconfig else { return Ok(Config::incluster()?) };
    let failed = |source| OpenError::Kubeconfig { path: path.to_owned(), source };
    let file = Kubeconfig::read_from(path).map_err(failed)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)
}

/// Go writes an empty list as `null` as often as not: null is none.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    decoder: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(decoder)?.unwrap_or_default())
}
