//! The directory of a cluster, from the API of Kubernetes: namespaces, pods, services and endpoint slices become a
//! directory in `store`, with the ranges of the mesh that they, nodes and ServiceCIDRs tell of.

use std::{fmt, path::PathBuf, sync::Arc};

use kube::{Client, Config};
use tacit_core::{
    directory::{Directory, Ranges},
    spiffe::TrustDomain,
};

use crate::{
    kubernetes::{self, Followers, OpenError, Sender, access, follow},
    reload::Opening,
};

mod cgroup;
mod objects;
mod store;

pub use cgroup::CgroupLayout;
use objects::{Namespace, Node, Pod, Service, ServiceCidr, Slice};
use store::Store;

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
    /// Ranges of the mesh that need not be found.
    pub ranges: Arc<Ranges>,
}

/// Follows the API from now on.
///
/// # Errors
/// [`OpenError`]; that the API does not answer is none.
pub async fn open(options: &Options, place: Place) -> Result<Opening<Directory>, OpenError> {
    start(access(options.kubeconfig.as_deref()).await?, options.enrol_label.clone(), place)
}

fn start(config: Config, enrol: EnrolLabel, place: Place) -> Result<Opening<Directory>, OpenError> {
    kubernetes::start(config, Store::new(enrol, place), followers)
}

fn followers(client: Client, news: Sender<Store>) -> Followers {
    let mut followers = Followers::new();
    followers.spawn(follow::<Namespace>(client.clone(), news.clone()));
    followers.spawn(follow::<Pod>(client.clone(), news.clone()));
    followers.spawn(follow::<Service>(client.clone(), news.clone()));
    followers.spawn(follow::<Slice>(client.clone(), news.clone()));
    followers.spawn(follow::<Node>(client.clone(), news.clone()));
    followers.spawn(follow::<ServiceCidr>(client, news));
    followers
}

#[cfg(test)]
mod tests;
