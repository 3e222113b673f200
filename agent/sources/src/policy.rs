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
//! affect other policies. Policies that exceed the share of their namespace are not applied, and deny all connections to its pods.

use std::{path::PathBuf, sync::Arc};

use kube::{Client, Config};
use tacit_core::{
    policy::{Mode, Policies, PolicyKind},
    spiffe::TrustDomain,
};
use tokio::sync::mpsc;

use crate::{
    kubernetes::{
        self, Change, InvalidObjects, KubernetesError, NamespaceLists, Sender, Update, WatchTasks, access,
        list_and_watch_again,
    },
    reload::Opening,
};

mod document;
mod events;
mod not_applied;
mod store;
#[cfg(test)]
mod testing;

use document::{AuthorizationPolicies, Document, PeerAuthentications};
use events::report;
pub(crate) use not_applied::NotApplied;
use store::{Finding, InvalidPolicy, PolicyStore};

/// Access to the API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A kubeconfig file. `None` uses the credentials of the agent's own pod.
    pub kubeconfig: Option<PathBuf>,
}

/// Settings of the mesh that hold for its policies.
#[derive(Debug, Clone)]
pub struct MeshSettings {
    /// Namespace whose policies apply to the whole mesh.
    pub root_namespace: Arc<str>,
    /// No policy sets a mode below this one.
    pub minimum: Mode,
    /// Other names of the mesh's own trust domain.
    pub aliases: Arc<[TrustDomain]>,
}

impl MeshSettings {
    /// Returns the policies with these settings.
    #[must_use]
    pub fn applied(&self, policies: Policies) -> Policies {
        policies.with_minimum(self.minimum).with_aliases(self.aliases.clone())
    }
}

/// Starts to watch the API.
///
/// # Errors
/// [`KubernetesError`]. An API that does not answer, or does not serve the resources, is not an error.
pub async fn open(options: &Options, settings: MeshSettings) -> Result<Opening<Policies>, KubernetesError> {
    start(access(options.kubeconfig.as_deref()).await?, settings)
}

fn start(config: Config, settings: MeshSettings) -> Result<Opening<Policies>, KubernetesError> {
    let (events, refused) = mpsc::channel(events::WAITING_MAX);
    let relists = Relists::default();
    let store = PolicyStore::new(settings.root_namespace.clone());
    let source = PolicySource { store, settings, events, relists: relists.clone() };
    kubernetes::start(config, source, |client, news| watch_tasks(client, news, refused, relists))
}

/// Requests of new lists of namespaces, for each resource.
type Relists = [Arc<NamespaceLists>; PolicyKind::ALL.len()];

fn watch_tasks(
    client: Client,
    news: Sender<PolicySource>,
    refused: mpsc::Receiver<InvalidPolicy>,
    [relist_modes, relist_policies]: Relists,
) -> WatchTasks {
    let mut watch_tasks = WatchTasks::new();
    let (modes, news_of_modes) = (client.clone(), news.clone());
    watch_tasks.spawn(async move {
        list_and_watch_again::<PeerAuthentications>(modes, news_of_modes, &relist_modes).await;
    });
    let policies = client.clone();
    watch_tasks.spawn(async move {
        list_and_watch_again::<AuthorizationPolicies>(policies, news, &relist_policies).await;
    });
    watch_tasks.spawn(report(client, refused));
    watch_tasks
}

/// The store, and the channel for Events.
struct PolicySource {
    store: PolicyStore,
    settings: MeshSettings,
    events: mpsc::Sender<InvalidPolicy>,
    relists: Relists,
}

impl kubernetes::ObjectStore for PolicySource {
    type Kind = PolicyKind;
    type Object = Document;
    type Value = Policies;

    /// A policy has up to 1.5 MiB.
    const CHANGES_MAX: usize = 64;

    fn drop_replaced(batch: &mut Vec<Update<PolicyKind, Document>>) {
        store::drop_replaced(batch);
    }

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
        let changed = self.store.take_changed();
        let namespaces = self.store.take_needs_list();
        if !namespaces.is_empty() {
            self.relists.iter().for_each(|relist| relist.request(namespaces.iter().cloned()));
        }
        changed.map(|policies| self.settings.applied(policies))
    }

    fn warnings(&mut self) -> Vec<String> {
        self.store.warnings()
    }

    fn invalid_objects(&self) -> InvalidObjects {
        self.store.invalid_objects()
    }
}

#[cfg(test)]
mod tests;
