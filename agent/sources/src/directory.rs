//! The directory from the Kubernetes API. `store` combines namespaces, pods, services and endpoint slices into a directory.
//! The ranges of the mesh are taken from nodes, ServiceCIDRs, pods and services.

use std::{fmt, path::PathBuf, sync::Arc};

use kube::{Client, Config};
use tacit_core::{
    directory::{Directory, Ranges},
    spiffe::TrustDomain,
};

use tokio::sync::mpsc;

use crate::{
    istiod,
    kubernetes::{
        self, KubernetesError, ObjectStore as _, Sender, Update, WatchTasks, access, list_and_watch,
        list_and_watch_selected, publish_of,
    },
    reload::Opening,
};

mod announce;
mod cgroup;
pub(crate) mod objects;
mod store;

use announce::AnnouncedStore;
pub use announce::{Announce, AnnounceState, Announcer, Serving};
pub use cgroup::CgroupLayout;
use objects::{Namespace, Node, Object, Pod, ResourceKind, Service, ServiceCidr, Slice};
use store::DirectoryStore;
pub use store::MeshPlace;

/// Access to the API, and the label that enrols pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The readers for which the pods of the node are announced.
    pub announce: Announce,
    /// The label that enrols a pod.
    pub enrol_label: EnrolLabel,
    /// A kubeconfig file. `None` uses the credentials of the agent's own pod.
    pub kubeconfig: Option<PathBuf>,
}

/// The label that enrols a pod, set on the pod or on its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolLabel {
    /// The label's name.
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

/// Properties of the local node and the mesh.
#[derive(Debug, Clone)]
pub struct LocalNode {
    /// Name of the node.
    pub node: Arc<str>,
    /// Trust domain of all identities.
    pub trust_domain: TrustDomain,
    /// Names of the pods' cgroups on the node.
    pub cgroups: CgroupLayout,
    /// Configured ranges of the mesh.
    pub ranges: Arc<Ranges>,
}

/// Starts to watch the API. Returns the announcer if the options ask for announcements.
///
/// # Errors
/// [`KubernetesError`]. An API that does not answer is not an error.
pub async fn open(
    options: &Options,
    local_node: LocalNode,
) -> Result<(Opening<Directory>, Option<Announcer>), KubernetesError> {
    start(access(options.kubeconfig.as_deref()).await?, options, local_node)
}

fn start(
    config: Config,
    options: &Options,
    local_node: LocalNode,
) -> Result<(Opening<Directory>, Option<Announcer>), KubernetesError> {
    let store = DirectoryStore::new(options.enrol_label.clone(), local_node);
    match options.announce {
        Announce::None => Ok((kubernetes::start(config, store, watch_tasks)?, None)),
        Announce::Ambient => {
            let (store, announcer) = announced(store, config.clone())?;
            Ok((kubernetes::start(config, store, watch_tasks)?, Some(announcer)))
        }
    }
}

fn watch_tasks(client: Client, news: Sender<DirectoryStore>) -> WatchTasks {
    let mut watch_tasks = WatchTasks::new();
    watch_tasks.spawn(list_and_watch::<Namespace>(client.clone(), news.clone()));
    watch_tasks.spawn(list_and_watch::<Pod>(client.clone(), news.clone()));
    watch_tasks.spawn(list_and_watch::<Service>(client.clone(), news.clone()));
    watch_tasks.spawn(list_and_watch::<Slice>(client.clone(), news.clone()));
    watch_tasks.spawn(list_and_watch::<Node>(client.clone(), news.clone()));
    watch_tasks.spawn(list_and_watch::<ServiceCidr>(client, news));
    watch_tasks
}

/// Starts to watch the API for this node, services and ranges, and `follow`, which sends the resources of istiod.
pub(crate) fn start_with_istiod<F>(
    config: Config,
    options: &istiod::Options,
    local_node: LocalNode,
    name: String,
    follow: impl FnOnce(mpsc::Sender<Update<ResourceKind, Object>>) -> F,
) -> Result<(Opening<Directory>, Option<Announcer>), KubernetesError>
where
    F: Future<Output = ()> + Send + 'static,
{
    let client = kubernetes::client(config.clone())?;
    let own = format!("spec.nodeName={},status.phase!=Succeeded,status.phase!=Failed", local_node.node);
    let enrol = options.local.enrol_label.clone();
    let store = DirectoryStore::with_istiod(enrol, local_node, options.place.clone());
    let (news, updates) = mpsc::channel(DirectoryStore::CHANGES_MAX);
    let istiod = follow(news.clone());
    let watch = move || {
        let mut watch_tasks = WatchTasks::new();
        watch_tasks.spawn(list_and_watch::<Namespace>(client.clone(), news.clone()));
        watch_tasks.spawn(list_and_watch_selected::<Pod>(client.clone(), news.clone(), own));
        watch_tasks.spawn(list_and_watch::<Service>(client.clone(), news.clone()));
        watch_tasks.spawn(list_and_watch::<Node>(client.clone(), news.clone()));
        watch_tasks.spawn(list_and_watch::<ServiceCidr>(client, news));
        watch_tasks.spawn(istiod);
        watch_tasks
    };
    match options.local.announce {
        Announce::None => Ok((publish_of(name, store, updates, watch), None)),
        Announce::Ambient => {
            let (store, announcer) = announced(store, config)?;
            Ok((publish_of(name, store, updates, watch), Some(announcer)))
        }
    }
}

/// Returns the store with the announcer of this node's pods.
fn announced(store: DirectoryStore, config: Config) -> Result<(AnnouncedStore, Announcer), KubernetesError> {
    let (store, pods) = AnnouncedStore::new(store);
    let announcer = Announcer::new(config, pods);
    Ok((store, announcer.map_err(|error| KubernetesError::Client(Box::new(error)))?))
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
