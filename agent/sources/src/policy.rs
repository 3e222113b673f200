//! Policies from the API of Kubernetes: PeerAuthentications and AuthorizationPolicies of `security.istio.io`, `v1` where
//! the API server has it, else `v1beta1`.
//!
//! ```text
//! follow: PeerAuthentications ────┐
//! follow: AuthorizationPolicies ──┤──> store ──> Policies
//!                                      └──> log and Event for what cannot be read
//! ```
//! Nothing is published before both kinds were listed: a policy that is not known yet would let through what it denies.
//! While that lasts, because the definitions are missing for instance, the agent waits. An object that cannot be read holds
//! up no other: it denies what it selects.

use std::{path::PathBuf, sync::Arc};

use kube::{Client, Config};
use tacit_core::policy::{Policies, PolicyKind};
use tokio::sync::mpsc;

use crate::{
    kubernetes::{self, Change, Complaints, Followers, OpenError, Sender, access, follow},
    reload::Opening,
};

mod document;
mod events;
mod store;
#[cfg(test)]
mod testing;

use document::{AuthorizationPolicies, Document, PeerAuthentications};
use events::report;
use store::{Finding, Refused, Store};

/// How the API is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A kubeconfig file; `None` is the credentials of the pod that the agent runs in.
    pub kubeconfig: Option<PathBuf>,
}

/// Follows the API from now on; policies in `root_namespace` hold mesh-wide.
///
/// # Errors
/// [`OpenError`]; that the API does not answer, or does not know the kinds, is none.
pub async fn open(options: &Options, root_namespace: Arc<str>) -> Result<Opening<Policies>, OpenError> {
    start(access(options.kubeconfig.as_deref()).await?, root_namespace)
}

fn start(config: Config, root_namespace: Arc<str>) -> Result<Opening<Policies>, OpenError> {
    let (events, refused) = mpsc::channel(events::WAITING_MAX);
    let source = Source { store: Store::new(root_namespace), events };
    kubernetes::start(config, source, |client, news| followers(client, news, refused))
}

fn followers(client: Client, news: Sender<Source>, refused: mpsc::Receiver<Refused>) -> Followers {
    let mut followers = Followers::new();
    followers.spawn(follow::<PeerAuthentications>(client.clone(), news.clone()));
    followers.spawn(follow::<AuthorizationPolicies>(client.clone(), news));
    followers.spawn(report(client, refused));
    followers
}

/// The store, and who hears of what it finds.
struct Source {
    store: Store,
    events: mpsc::Sender<Refused>,
}

impl kubernetes::Store for Source {
    type Kind = PolicyKind;
    type Object = Document;
    type Value = Policies;

    fn take(&mut self, change: Change<PolicyKind, Document>) {
        for finding in self.store.take(change) {
            match finding {
                Finding::Noted(note) => tracing::warn!("{note}"),
                Finding::Refused(refused) => {
                    tracing::error!(policy = refused.name(), "not readable: {}", refused.message);
                    // When too many wait, the log has to do.
                    let _ = self.events.try_send(refused);
                }
            }
        }
    }

    fn news(&mut self) -> Option<Policies> {
        self.store.news()
    }

    fn complaints(&self) -> Complaints {
        self.store.complaints()
    }
}

#[cfg(test)]
mod tests;
