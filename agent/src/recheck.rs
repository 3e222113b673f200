//! Decides again on live flows when something changes that they depend on, on a thread of its own. A flow that may go on does
//! not notice: the worker that carries it does nothing.
//!
//! ```text
//! policy of a pod changed ─────────> all checks of the pod ──┐
//! directory or policies changed ───> checks of plaintext ────┤ queue of pods, in turn
//! trust in peers changed ──────────> checks of tunnels ──────┤
//!                                                            └──> 1 ms of checks, the next pod ... ──> denied: the flow ends
//! ```
//! The pods take turns, so that one with many flows or expensive policies does not delay the others' flows.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    future::{Future, pending},
    io,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use tacit_core::{directory::Directory, policy::Policies, refusal::Refusal};
use tacit_sources::reload::Watched;
use tokio::{sync::oneshot, time::sleep};

/// Time of one pod's turn. Short compared to the time in which a revoked flow must end, long compared to a change of turns.
const TURN: Duration = Duration::from_millis(1);
/// Checks that are taken from the table at a time: one lock for some 100 µs of checks by ordinary policies.
const BATCH: usize = 64;
/// Least time between two rounds of checks of plaintext. Thousands of changes of a directory in a second then cost 20 rounds.
const ROUND: Duration = Duration::from_millis(50);

/// Decides on a flow. Returns the refusal if the flow must end.
type Check = Box<dyn Fn() -> Option<Refusal> + Send + Sync>;

/// The state that a check reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Depends {
    /// The policy of the pod, and for a tunnel the trust in the peer.
    OnPolicy,
    /// The policy of the pod, the directory, and the policies of the mesh.
    OnDirectory,
    /// The trust in the peer alone: revocation lists, and the roots of federated domains.
    OnTrust,
}

/// The checks of a pod, by the id of its cgroup.
type Key = (u64, Depends);

/// The checks of all live flows.
#[derive(Default)]
pub struct Rechecks {
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Default)]
struct Table {
    lists: HashMap<Key, List>,
    /// Lists with a round under way, in turn.
    queue: VecDeque<Key>,
    next_id: u64,
    is_closed: bool,
}

/// Checks of one pod.
#[derive(Default)]
struct List {
    flows: BTreeMap<u64, Arc<LiveCheck>>,
    /// The next flow of the round that is under way.
    round: Option<u64>,
    /// Something has changed since the round began.
    is_outdated: bool,
}

struct LiveCheck {
    check: Check,
    revoked: Mutex<Option<oneshot::Sender<Refusal>>>,
}

/// A registered check. Dropping it removes the check.
struct Registration {
    rechecks: Arc<Rechecks>,
    key: Key,
    id: u64,
}

/// Waits until a flow is refused.
pub struct Revoked {
    told: oneshot::Receiver<Refusal>,
    _registration: Registration,
}

impl Future for Revoked {
    type Output = Refusal;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Refusal> {
        match Pin::new(&mut self.told).poll(cx) {
            Poll::Ready(Ok(refusal)) => Poll::Ready(refusal),
            // The sender lives as long as the registration, unless it was used.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut table = self.rechecks.lock();
        let Some(list) = table.lists.get_mut(&self.key) else { return };
        let removed = list.flows.remove(&self.id);
        if list.flows.is_empty() && list.round.is_none() {
            table.lists.remove(&self.key);
        }
        drop(table);
        // A check may own the last handle of a pod. That is dropped without the lock.
        drop(removed);
    }
}

impl Rechecks {
    /// Returns a future that waits until `check` returns a refusal, now or after a change. `is_decided` returns true if the state
    /// is still that by which the flow was allowed; the first check is made only if not. The check is registered before that, so
    /// that no change is missed.
    pub fn revoked(
        self: &Arc<Self>,
        (pod, depends): (u64, Depends),
        is_decided: impl FnOnce() -> bool,
        check: impl Fn() -> Option<Refusal> + Send + Sync + 'static,
    ) -> Revoked {
        let (tell, told) = oneshot::channel();
        let live = Arc::new(LiveCheck { check: Box::new(check), revoked: Mutex::new(Some(tell)) });
        let registration = self.register((pod, depends), Arc::clone(&live));
        if !is_decided() {
            live.ask();
        }
        Revoked { told, _registration: registration }
    }

    fn register(self: &Arc<Self>, key: Key, live: Arc<LiveCheck>) -> Registration {
        let mut table = self.lock();
        let id = table.next_id;
        table.next_id += 1;
        table.lists.entry(key).or_default().flows.insert(id, live);
        Registration { rechecks: Arc::clone(self), key, id }
    }

    /// Has the flows of a pod checked, because its policy has changed.
    pub fn policy_changed(&self, pod: u64) {
        let mut table = self.lock();
        table.begin_round((pod, Depends::OnPolicy));
        table.begin_round((pod, Depends::OnDirectory));
        self.changed.notify_one();
    }

    /// Has the flows checked that depend on the directory or on the policies of the mesh.
    pub fn directory_changed(&self) {
        let mut table = self.lock();
        let keys: Vec<Key> =
            table.lists.keys().filter(|(_, depends)| *depends == Depends::OnDirectory).copied().collect();
        keys.into_iter().for_each(|key| table.begin_round(key));
        self.changed.notify_one();
    }

    /// Has the flows checked that depend on the certificates of a peer.
    pub fn trust_changed(&self) {
        let mut table = self.lock();
        let keys: Vec<Key> =
            table.lists.keys().filter(|(_, depends)| *depends != Depends::OnDirectory).copied().collect();
        keys.into_iter().for_each(|key| table.begin_round(key));
        self.changed.notify_one();
    }

    /// Has flows checked for as long as directory and policies change.
    pub async fn follow(
        self: Arc<Self>,
        directory: Arc<Watched<Directory>>,
        policies: Arc<Watched<Policies>>,
    ) {
        let (mut directory, mut policies) = (directory.subscribe(), policies.subscribe());
        loop {
            // A source that has ended changes nothing any more.
            tokio::select! {
                Ok(()) = directory.changed() => {}
                Ok(()) = policies.changed() => {}
                else => return pending().await,
            }
            self.directory_changed();
            sleep(ROUND).await;
        }
    }

    /// Runs the thread. Returns when [`Rechecks::close`] was called.
    ///
    /// # Errors
    /// If the system gives no thread, or the thread panicked.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        let (tell, ended) = oneshot::channel();
        let rechecks = Arc::clone(&self);
        let run = move || {
            rechecks.run_turns();
            // The receiver is dropped if the task was aborted.
            let _ = tell.send(());
        };
        thread::Builder::new().name("tacit-recheck".to_owned()).spawn(run)?;
        ended.await.map_err(|_| io::Error::other("the thread panicked"))
    }

    /// Ends the thread.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_one();
    }

    fn run_turns(&self) {
        loop {
            let mut table = self.lock();
            while table.queue.is_empty() && !table.is_closed {
                table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
            }
            if table.is_closed {
                return;
            }
            drop(table);
            self.turn(TURN);
            thread::yield_now();
        }
    }

    /// Checks flows of the next pod for up to `limit`, at least one. The clock is read after each check, because the share of a
    /// namespace allows policies that cost half a millisecond.
    fn turn(&self, limit: Duration) {
        let begin = Instant::now();
        let Some(key) = self.lock().queue.pop_front() else { return };
        loop {
            // Nothing is decided while the lock is held: opening flows wait for it.
            let (batch, has_more) = self.lock().next_batch(key);
            for (id, live) in batch {
                live.ask();
                if begin.elapsed() >= limit {
                    return self.lock().end_turn(key, id + 1, has_more);
                }
            }
            if !has_more {
                return;
            }
        }
    }

    /// A panic while the lock is held leaves a list as it was or shorter, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LiveCheck {
    fn ask(&self) {
        if let Some(refusal) = (self.check)() {
            let tell = self.revoked.lock().unwrap_or_else(PoisonError::into_inner).take();
            // The flow may have ended.
            let _ = tell.map(|tell| tell.send(refusal));
        }
    }
}

impl Table {
    fn begin_round(&mut self, key: Key) {
        let Some(list) = self.lists.get_mut(&key) else { return };
        if list.round.is_some() {
            list.is_outdated = true;
        } else {
            list.round = Some(0);
            self.queue.push_back(key);
        }
    }

    /// Returns the next checks of the round of a list with their ids, and whether more are left.
    fn next_batch(&mut self, key: Key) -> (Vec<(u64, Arc<LiveCheck>)>, bool) {
        let Some(list) = self.lists.get_mut(&key) else { return (Vec::new(), false) };
        let from = list.round.unwrap_or(0);
        let batch: Vec<(u64, Arc<LiveCheck>)> =
            list.flows.range(from..).take(BATCH).map(|(id, live)| (*id, Arc::clone(live))).collect();
        list.round = match batch.last() {
            Some((last, _)) if batch.len() == BATCH => Some(last + 1),
            _ => std::mem::take(&mut list.is_outdated).then_some(0),
        };
        let has_more = list.round.is_some();
        if !has_more && list.flows.is_empty() {
            self.lists.remove(&key);
        }
        (batch, has_more)
    }

    /// Ends a turn before `next`, a flow of the last batch or the one after it. `has_more` is what came with the batch. A new
    /// round that has begun meanwhile follows the rest of this one, or the last flows would never be checked while changes go on.
    fn end_turn(&mut self, key: Key, next: u64, has_more: bool) {
        let Some(list) = self.lists.get_mut(&key) else { return };
        let is_queued = list.round.is_some() && !has_more;
        list.is_outdated |= list.round.is_some_and(|from| from < next);
        if list.round.is_some() || list.flows.range(next..).next().is_some() {
            list.round = Some(next);
            if !is_queued {
                self.queue.push_back(key);
            }
        }
    }
}

#[cfg(test)]
mod tests;
