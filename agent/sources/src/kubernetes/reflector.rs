//! From what followers tell to values that others watch.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use kube::{Client, Config};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::OpenError;
use crate::{
    kubernetes::watcher::{Change, Label, News},
    reload::{Opening, ReloadState},
};

/// Changes on their way; a follower that is ahead by so many waits.
const CHANGES_MAX: usize = 1024;
/// Most changes that go into one value: a flood is published some hundred times a second.
const BATCH: usize = 512;

/// What is made of the objects of some kinds.
pub(crate) trait Store: Send + 'static {
    /// The kinds.
    type Kind: Label;
    /// An object of any of them.
    type Object: Send + 'static;
    /// What is published. Its default is seen by nobody.
    type Value: Default + Send + Sync + 'static;

    /// Takes one change.
    fn take(&mut self, change: Change<Self::Kind, Self::Object>);

    /// The value when it is complete and has changed since it was last asked for.
    fn news(&mut self) -> Option<Self::Value>;

    /// What the log should say once.
    fn warnings(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Objects that are not as they should be.
    fn complaints(&self) -> Complaints {
        Complaints::default()
    }
}

/// Objects that are not as they should be, for the operator.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    /// Those of the value in use, a line each.
    pub(crate) list: Vec<String>,
    /// How many there ever were.
    pub(crate) total: u64,
}

/// Where followers tell.
pub(crate) type Sender<S> = mpsc::Sender<News<<S as Store>::Kind, <S as Store>::Object>>;
/// Tasks that end with the value that they feed.
pub(crate) type Followers = JoinSet<()>;

/// Feeds `store` by the followers that `follow` starts.
///
/// # Errors
/// [`OpenError`]; that the API does not answer is none.
pub(crate) fn start<S: Store>(
    mut config: Config,
    store: S,
    follow: impl FnOnce(Client, Sender<S>) -> Followers + Send + 'static,
) -> Result<Opening<S::Value>, OpenError> {
    let state = ReloadState {
        file: format!("kubernetes {}", config.cluster_url).into(),
        loaded_at: SystemTime::now(),
        loads: 0,
        refusals: 0,
        last_error: None,
        stale_since: None,
        unreadable: Vec::new(),
    };
    // Followers pause themselves, and tell at once what fails.
    config.default_retry = false;
    let client = Client::try_from(config).map_err(|error| OpenError::Client(Box::new(error)))?;
    let (values_sender, values) = watch::channel(Arc::new(S::Value::default()));
    let (state_sender, state) = watch::channel(state);
    let publisher = Publisher {
        store,
        failing: BTreeMap::new(),
        complaints: 0,
        values: values_sender,
        state: state_sender,
    };
    let task = tokio::spawn(async move {
        let (sender, news) = mpsc::channel(CHANGES_MAX);
        let _followers = follow(client, sender);
        publisher.run(news).await;
    });
    Ok(Opening::fed(values, state, task.abort_handle()))
}

struct Publisher<S: Store> {
    store: S,
    /// Since when a kind is not followed, and why.
    failing: BTreeMap<S::Kind, (SystemTime, String)>,
    /// Complaints that were counted.
    complaints: u64,
    values: watch::Sender<Arc<S::Value>>,
    state: watch::Sender<ReloadState>,
}

impl<S: Store> Publisher<S> {
    async fn run(mut self, mut news: mpsc::Receiver<News<S::Kind, S::Object>>) {
        let mut batch = Vec::with_capacity(BATCH);
        while news.recv_many(&mut batch, BATCH).await > 0 {
            for one in batch.drain(..) {
                self.take(one);
            }
            self.publish();
        }
    }

    fn take(&mut self, news: News<S::Kind, S::Object>) {
        match news {
            News::Change(change) => self.store.take(change),
            News::Fresh(kind) => {
                if self.failing.remove(&kind).is_some() {
                    tracing::info!(kind = kind.label(), "the Kubernetes API is followed again");
                    self.tell();
                }
            }
            News::Failed(kind, problem) => {
                let since = self.failing.get(&kind).map(|(since, _)| *since);
                if since.is_none() {
                    self.warn(kind, &problem);
                }
                self.failing.insert(kind, (since.unwrap_or_else(SystemTime::now), problem));
                self.state.send_modify(|state| state.refusals += 1);
                self.tell();
            }
        }
    }

    fn warn(&self, kind: S::Kind, problem: &str) {
        let kind = kind.label();
        if self.state.borrow().loads > 0 {
            tracing::warn!(kind, problem, "the Kubernetes API is not followed; what is known stays in use");
        } else {
            tracing::warn!(
                kind,
                problem,
                "the Kubernetes API is not followed; the agent waits, and serves no pod before it has read all"
            );
        }
    }

    fn publish(&mut self) {
        let Some(value) = self.store.news() else { return };
        self.store.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        let Complaints { list, total } = self.store.complaints();
        self.values.send_replace(Arc::new(value));
        self.state.send_modify(|state| {
            state.loads += 1;
            state.loaded_at = SystemTime::now();
            state.unreadable = list;
            state.refusals += total.saturating_sub(self.complaints);
        });
        self.complaints = total;
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
