//! Directory and policies from istiod, the control plane of Istio, or any server of its delta xDS for ambient.
//!
//! ```text
//! Kubernetes API: pods of this node, namespaces, services, nodes ──┐
//! istiod: addresses ──┬────────────────────────────────────────────┴─> directory store ──> Directory
//!                     └─ policies that workloads list ─┐
//! istiod: authorizations ──────────────────────────────┴─> policy store ──> Policies
//! ```
//! One connection serves both. istiod sends no UIDs, so the cgroups of this node's pods come from the API (ADR 24). The state stays
//! while istiod or the API is away.
//!
//! | module | content |
//! |---|---|
//! | `messages` | the messages, by hand |
//! | `address`, `authorization` | messages become records and policies; pure |
//! | `settle` | the end of a time of changes |
//! | `session` | names of what is known, ACK and NACK; pure |
//! | `client` | the connection |
//! | `policies` | the store of policies |

use std::{net::IpAddr, sync::Arc};

use tacit_core::{directory::Directory, policy::Policies};
use tokio::sync::{mpsc, watch};

use crate::{
    directory::{Announcer, LocalNode, MeshPlace, Options as DirectoryOptions},
    kubernetes::{KubernetesError, ObjectStore as _, access, publish},
    policy::MeshSettings,
    reload::Opening,
};

pub(crate) mod address;
mod authorization;
mod client;
pub(crate) mod messages;
mod policies;
mod session;
mod settle;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use client::{Client, OwnPlace, Sinks};
use policies::ReducedStore;

pub use client::{ConnectionState, Dial, Dialled, Io};
pub use session::TypeStatus;

/// The connection to istiod, and the agent's place in the mesh.
#[derive(Clone)]
pub struct Options {
    /// Opens connections.
    pub dial: Dial,
    /// Host and port, for messages and requests.
    pub address: String,
    /// Cluster and network of the agent.
    pub place: MeshPlace,
    /// The agent's own pod.
    pub agent: AgentPod,
    /// The label that enrols pods of this node, and access to the API.
    pub local: DirectoryOptions,
}

/// The pod of the agent, as istiod identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentPod {
    /// Its name.
    pub name: String,
    /// Its namespace: that of the token.
    pub namespace: String,
    /// Its address.
    pub address: IpAddr,
}

/// Both sources, opened but perhaps not complete.
pub struct Sources {
    /// The directory.
    pub directory: Opening<Directory>,
    /// The policies, if they are istiod's too.
    pub policies: Option<Opening<Policies>>,
    /// The announcer of this node's pods, if the options ask for announcements.
    pub announcer: Option<Announcer>,
}

/// Starts to follow istiod, and the API for the pods of this node. Policies are istiod's if `policies` is given.
///
/// # Errors
/// [`KubernetesError`]. An istiod or an API that does not answer is not an error.
pub async fn open(
    options: &Options,
    local_node: LocalNode,
    policies: Option<MeshSettings>,
) -> Result<Sources, KubernetesError> {
    let config = access(options.local.kubeconfig.as_deref()).await?;
    let (state, connection) = watch::channel(ConnectionState::default());
    let own = OwnPlace {
        node: Arc::clone(&local_node.node),
        cluster: options.place.cluster.clone(),
        network: options.place.network.clone(),
    };
    let name = || format!("istiod {}", options.address);
    let (of_policies, policies) = match policies {
        Some(settings) => {
            let store = ReducedStore::new(settings, Arc::clone(&local_node.node));
            let (sender, updates) = mpsc::channel(ReducedStore::CHANGES_MAX);
            (Some(sender), Some(publish(name(), store, updates)))
        }
        None => (None, None),
    };
    let node = node(options, &local_node.node);
    let origin = format!("https://{}", options.address);
    let dial = (Arc::clone(&options.dial), origin);
    let (directory, announcer) =
        crate::directory::start_with_istiod(config, options, local_node, name(), |directory| {
            Client::new(dial, node, own, Sinks { directory, policies: of_policies }, state).run()
        })?;
    Ok(Sources { directory: directory.with_connection(connection), policies, announcer })
}

/// Returns the node that istiod expects of a proxy for the pods of a node.
fn node(options: &Options, node_name: &str) -> messages::Node {
    let AgentPod { name, namespace, address } = &options.agent;
    let id = format!("ztunnel~{address}~{name}.{namespace}~{namespace}.svc.cluster.local");
    let metadata = [
        ("NAME", name.as_str()),
        ("NAMESPACE", namespace),
        ("NODE_NAME", node_name),
        ("CLUSTER_ID", &options.place.cluster),
        ("NETWORK", &options.place.network),
    ];
    session::node(id, &options.place.cluster, &metadata)
}
