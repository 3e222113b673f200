//! Policies from the Kubernetes API: PeerAuthentications and AuthorizationPolicies of `security.istio.io`, in version `v1`, or
//! `v1beta1` on older servers.
//!
//! ```text
//! watcher: PeerAuthentications ────┐
//! watcher: AuthorizationPolicies ──┤──> store ──> Policies
//!                                       └──> log and Event for invalid policies
//! ```
//! Nothing is published before both resources were listed, because a missing policy would allow the traffic it denies. The
//! agent waits meanwhile, for example if the definitions are missing. An invalid policy denies what it selects and does not
//! affect other policies.

use std::{path::PathBuf, sync::Arc};

use kube::{Client, Config};
use tacit_core::policy::{Policies, PolicyKind};
use tokio::sync::mpsc;

use crate::{
    kubernetes::{self, Change, InvalidObjects, KubernetesError, Sender, WatchTasks, access, list_and_watch},
    reload::Opening,
};

mod document;
mod events;
mod store;
#[cfg(test)]
mod testing;

use document::{AuthorizationPolicies, Document, PeerAuthentications};
use events::report;
use store::{Finding, InvalidPolicy, PolicyStore};

/// Access to the API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A kubeconfig file. `None` uses the credentials of the agent's own pod.
    pub kubeconfig: Option<PathBuf>,
}

/// Starts to watch the API. Policies in `root_namespace` apply to the whole mesh.
///
/// # Errors
/// [`KubernetesError`]. An API that does not answer, or does not serve the resources, is not an error.
pub async fn open(options: &Options, root_namespace: Arc<str>) -> Result<Opening<Policies>, KubernetesError> {
    start(access(options.kubeconfig.as_deref()).await?, root_namespace)
}

fn start(config: Config, root_namespace: Arc<str>) -> Result<Opening<Policies>, KubernetesError> {
    let (events, refused) = mpsc::channel(events::WAITING_MAX);
    let source = PolicySource { store: PolicyStore::new(root_namespace), events };
    kubernetes::start(config, source, |client, news| watch_tasks(client, news, refused))
}

fn watch_tasks(
    client: Client,
    news: Sender<PolicySource>,
    refused: mpsc::Receiver<InvalidPolicy>,
) -> WatchTasks {
    let mut watch_tasks = WatchTasks::new();
    watch_tasks.spawn(list_and_watch::<PeerAuthentications>(client.clone(), news.clone()));
    watch_tasks.spawn(list_and_watch::<AuthorizationPolicies>(client.clone(), news));
    watch_tasks.spawn(report(client, refused));
    watch_tasks
}

/// The store, and the channel for Events.
struct PolicySource {
    store: PolicyStore,
    events: mpsc::Sender<InvalidPolicy>,
}

impl kubernetes::ObjectStore for PolicySource {
    type Kind = PolicyKind;
    type Object = Document;
    type Value = Policies;

    fn apply_change(&mut self, change: Change<PolicyKind, Document>) {
        for finding in self.store.apply_change(change) {
            match finding {
                Finding::Warning(note) => tracing::warn!("{note}"),
                Finding::Invalid(refused) => {
                    tracing::error!(policy = refused.name(), "invalid policy: {}", refused.message);
                    // If the channel is full, the policy is only logged.
                    let _ = self.events.try_send(refused);
                }
            }
        }
    }

    fn take_changed(&mut self) -> Option<Policies> {
        self.store.take_changed()
    }

    fn invalid_objects(&self) -> InvalidObjects {
        self.store.invalid_objects()
    }
}

#[cfg(test)]
mod tests;
