//! Access to the Kubernetes API, and the reflector that turns watched objects into published values.
//!
//! ```text
//! watcher of one resource ────┐
//! watcher of another ─────────┤ channel ──> store ──> value, published when complete and changed
//! ```
//! Nothing is published before every resource was listed once. Later the last value stays in use while the API fails. Each
//! failure is logged once. Status and metrics report its age until the API answers again.

use std::path::{Path, PathBuf};

use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Deserialize, Deserializer};

mod reflector;
mod reported;
#[cfg(test)]
pub(crate) mod testing;
mod watcher;

pub(crate) use reflector::{InvalidObjects, ObjectStore, Sender, WatchTasks, start};
pub(crate) use reported::{Problem, reported};
pub(crate) use watcher::{
    Change, Definition, KindName, Pause, Resource, Update, list_and_watch, list_and_watch_again, random,
};

/// The reason why the API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The kubeconfig file is invalid.
    #[error("kubeconfig {path:?}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The error in the file.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// The agent runs outside a pod, or its pod has no credentials.
    #[error("no in-cluster credentials: {0}; outside a cluster set `kubeconfig`")]
    InCluster(#[from] kube::config::InClusterError),
    /// The credentials cannot be used.
    #[error("invalid credentials for the Kubernetes API: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The watch tasks exited, which is a bug.
    #[error("the tasks that watch the Kubernetes API exited; this is a bug of Tacit, please report it")]
    Ended,
}

/// Loads a kubeconfig file, or the credentials of the agent's own pod if `kubeconfig` is `None`.
pub(crate) async fn access(kubeconfig: Option<&Path>) -> Result<Config, KubernetesError> {
    let Some(path) = kubeconfig else { return Ok(Config::incluster()?) };
    let failed = |source| KubernetesError::Kubeconfig { path: path.to_owned(), source };
    let file = Kubeconfig::read_from(path).map_err(failed)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)
}

/// Decodes `null` as the default. Go often encodes an empty list as `null`.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    decoder: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(decoder)?.unwrap_or_default())
}
