//! Applies the updates of watchers to a store and publishes its values.

use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use kube::{Client, Config};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
};

use super::KubernetesError;
use crate::{
    kubernetes::watcher::{Change, KindName, Update},
    reload::{Opening, ReloadState},
};

/// Maximum number of updates in one published value.
const BATCH: usize = 512;
/// Time for which updates are gathered after others, so that a burst, or a steady flow of changes, is one value. A change after a
/// pause is published at once, any other one up to this much later: a pod of this node waits so long for its enrolment.
const GATHER: Duration = Duration::from_millis(10);
/// Updates are not gathered after a batch with more than this: a list, or a burst that is there already.
const FEW: usize = 64;

/// A store that turns objects of some resources into a value.
pub(crate) trait ObjectStore: Send + 'static {
    /// The resources.
    type Kind: KindName;
    /// An object of any of the resources.
    type Object: Send + 'static;
    /// The published value. Its default is never visible.
    type Value: Default + Send + Sync + 'static;

    /// Capacity of the update channel. Watchers wait while it is full.
    const CHANGES_MAX: usize = 1024;

    /// Removes updates that later ones of the same batch replace. The default keeps all.
    fn drop_replaced(_batch: &mut Vec<Update<Self::Kind, Self::Object>>) {}

    /// Applies one change.
    fn apply_change(&mut self, change: Change<Self::Kind, Self::Object>);

    /// Returns the value if it is complete and has changed since the last call.
    fn take_changed(&mut self) -> Option<Self::Value>;

    /// Returns new warnings to log.
    fn warnings(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Returns the invalid objects.
    fn invalid_objects(&self) -> InvalidObjects {
        InvalidObjects::default()
    }
}

/// Invalid objects, for the status.
#[derive(Debug, Default)]
pub(crate) struct InvalidObjects {
    /// Invalid objects of the current value, one per line.
    pub(crate) list: Vec<String>,
    /// Number of invalid objects seen since the start.
    pub(crate) total: u64,
}

/// The channel from watchers to the reflector.
pub(crate) type Sender<S> = mpsc::Sender<Update<<S as ObjectStore>::Kind, <S as ObjectStore>::Object>>;
/// Watch tasks. Dropping the set ends them.
pub(crate) type WatchTasks = JoinSet<()>;

/// Publishes the values of `store`, which is fed by the watchers that `follow` starts.
///
/// # Errors
/// [`KubernetesError`]. An API that does not answer is not an error.
pub(crate) fn start<S: ObjectStore>(
    config: Config,
    store: S,
    follow: impl FnOnce(Client, Sender<S>) -> WatchTasks + Send + 'static,
) -> Result<Opening<S::Value>, KubernetesError> {
    let name = format!("kubernetes {}", config.cluster_url);
    let client = client(config)?;
    let (sender, updates) = mpsc::channel(S::CHANGES_MAX);
    Ok(publish_of(name, store, updates, || follow(client, sender)))
}

/// Returns a client of the API.
///
/// # Errors
/// [`KubernetesError::Client`].
pub(crate) fn client(mut config: Config) -> Result<Client, KubernetesError> {
    // Watchers pause between retries themselves, and report failures at once.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| KubernetesError::Client(Box::new(error)))
}

/// Publishes the values of `store`, which is fed by `updates`, until no sender of updates is left.
pub(crate) fn publish<S: ObjectStore>(
    name: String,
    store: S,
    updates: mpsc::Receiver<Update<S::Kind, S::Object>>,
) -> Opening<S::Value> {
    publish_of(name, store, updates, WatchTasks::new)
}

/// As [`publish`], with the senders of updates that `follow` starts.
pub(crate) fn publish_of<S: ObjectStore>(
    name: String,
    store: S,
    updates: mpsc::Receiver<Update<S::Kind, S::Object>>,
    follow: impl FnOnce() -> WatchTasks + Send + 'static,
) -> Opening<S::Value> {
    let state = ReloadState {
        file: name.into(),
        loaded_at: SystemTime::now(),
        loads: 0,
        refusals: 0,
        last_error: None,
        stale_since: None,
        unreadable: Vec::new(),
    };
    let (values_sender, values) = watch::channel(Arc::new(S::Value::default()));
    let (state_sender, state) = watch::channel(state);
    let publisher = Publisher {
        store,
        failing: BTreeMap::new(),
        invalid_objects: 0,
        values: values_sender,
        state: state_sender,
        gather: GATHER,
    };
    let task = tokio::spawn(async move {
        // Without followers the publisher ends.
        let _followers = follow();
        match spawn_blocking(move || publisher.run(updates)).await {
            Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
            // The runtime ends.
            _ => {}
        }
    });
    Opening::new(values, state, task.abort_handle())
}

struct Publisher<S: ObjectStore> {
    store: S,
    /// Failing resources with the time of the first failure and the latest error.
    failing: BTreeMap<S::Kind, (SystemTime, String)>,
    /// Total of invalid objects at the last publication.
    invalid_objects: u64,
    values: watch::Sender<Arc<S::Value>>,
    state: watch::Sender<ReloadState>,
    /// [`GATHER`], longer in tests.
    gather: Duration,
}

impl<S: ObjectStore> Publisher<S> {
    /// Runs until no watcher is left. Parsing takes up to some 100 ms an object, which must not delay the heartbeat, so the caller
    /// runs it on a thread for blocking work.
    fn run(mut self, mut updates: mpsc::Receiver<Update<S::Kind, S::Object>>) {
        let mut batch = Vec::with_capacity(BATCH);
        while updates.blocking_recv_many(&mut batch, BATCH) > 0 {
            let is_few = batch.len() <= FEW;
            S::drop_replaced(&mut batch);
            for one in batch.drain(..) {
                self.handle(one);
            }
            self.publish();
            // The first lists are read without a pause.
            if is_few && self.state.borrow().loads > 0 {
                thread::sleep(self.gather);
            }
        }
    }

    fn handle(&mut self, updates: Update<S::Kind, S::Object>) {
        match updates {
            Update::Change(change) => self.store.apply_change(change),
            Update::Fresh(kind) => {
                if self.failing.remove(&kind).is_some() {
                    tracing::info!(kind = kind.label(), "the source answers again");
                    self.publish_failures();
                }
            }
            Update::Failed(kind, problem) => {
                let since = self.failing.get(&kind).map(|(since, _)| *since);
                if since.is_none() {
                    self.warn(kind, &problem);
                }
                self.failing.insert(kind, (since.unwrap_or_else(SystemTime::now), problem));
                self.state.send_modify(|state| state.refusals += 1);
                self.publish_failures();
            }
        }
    }

    fn warn(&self, kind: S::Kind, problem: &str) {
        let kind = kind.label();
        if self.state.borrow().loads > 0 {
            tracing::warn!(kind, problem, "cannot watch the source; the last known state stays in use");
        } else {
            tracing::warn!(
                kind,
                problem,
                "cannot watch the source; the agent serves no pod until all resources are listed"
            );
        }
    }

    fn publish(&mut self) {
        let Some(value) = self.store.take_changed() else { return };
        self.store.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        let InvalidObjects { list, total } = self.store.invalid_objects();
        self.values.send_replace(Arc::new(value));
        self.state.send_modify(|state| {
            state.loads += 1;
            state.loaded_at = SystemTime::now();
            state.unreadable = list;
            state.refusals += total.saturating_sub(self.invalid_objects);
        });
        self.invalid_objects = total;
    }

    /// Writes the current failures to the state.
    fn publish_failures(&self) {
        let problems: Vec<&str> = self.failing.values().map(|(_, problem)| problem.as_str()).collect();
        let since = self.failing.values().map(|(since, _)| *since).min();
        self.state.send_modify(|state| {
            state.last_error = (!problems.is_empty()).then(|| problems.join("\n"));
            state.stale_since = since;
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Publishes the last number.
    #[derive(Default)]
    struct Numbers {
        number: u32,
        is_changed: bool,
    }

    impl KindName for () {
        fn label(self) -> &'static str {
            "numbers"
        }
    }

    impl ObjectStore for Numbers {
        type Kind = ();
        type Object = u32;
        type Value = u32;

        fn apply_change(&mut self, change: Change<(), u32>) {
            if let Change::Applied(number) = change {
                self.is_changed |= self.number != number;
                self.number = number;
            }
        }

        fn take_changed(&mut self) -> Option<u32> {
            std::mem::take(&mut self.is_changed).then_some(self.number)
        }
    }

    type Receivers = (watch::Receiver<Arc<u32>>, watch::Receiver<ReloadState>);

    fn publisher(gather: Duration) -> (Publisher<Numbers>, Receivers) {
        let (values, of_values) = watch::channel(Arc::new(0));
        let state = ReloadState {
            file: "numbers".into(),
            loaded_at: SystemTime::now(),
            loads: 0,
            refusals: 0,
            last_error: None,
            stale_since: None,
            unreadable: Vec::new(),
        };
        let (state, of_state) = watch::channel(state);
        let (store, failing) = (Numbers::default(), BTreeMap::new());
        (Publisher { store, failing, invalid_objects: 0, values, state, gather }, (of_values, of_state))
    }

    #[test]
    fn a_change_without_a_new_value_wakes_nobody() {
        let (mut publisher, (mut of_values, mut of_state)) = publisher(GATHER);
        for (number, is_new) in [(1, true), (1, false), (2, true), (2, false)] {
            publisher.handle(Update::Change(Change::Applied(number)));
            publisher.handle(Update::Fresh(()));
            publisher.publish();
            let woken = (of_values.has_changed().expect("open"), of_state.has_changed().expect("open"));
            assert_eq!(woken, (is_new, is_new), "{number}");
            assert_eq!(**of_values.borrow_and_update(), number);
            of_state.borrow_and_update();
        }
    }

    #[tokio::test]
    async fn changes_that_follow_each_other_are_one_value() {
        let gather = Duration::from_secs(2);
        let (publisher, (mut of_values, of_state)) = publisher(gather);
        let (sender, updates) = mpsc::channel(8);
        let send =
            async |number| sender.send(Update::Change(Change::Applied(number))).await.expect("running");
        let running = spawn_blocking(move || publisher.run(updates));
        send(1).await;
        of_values.wait_for(|value| **value == 1).await.expect("running");
        let begin = Instant::now();
        for number in 2..5 {
            send(number).await;
        }
        of_values.wait_for(|value| **value == 4).await.expect("running");
        // The first one may have been published some time before it was seen.
        assert!(begin.elapsed() >= gather / 2, "{:?}", begin.elapsed());
        drop(sender);
        running.await.expect("ends with its senders");
        // A value is published before it is counted.
        assert_eq!(of_state.borrow().loads, 2);
    }
}
