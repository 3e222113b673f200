//! The threads that carry flows. Each runs a runtime of its own, so a flow stays on the thread that accepted it: its two
//! sockets, its buffers and its timers have one poller, and no wake-up crosses threads. There are as many again for bulk, to which
//! flows go on that move much (`relay::threads`): a thread that moves bulk gets the core late for others.
//!
//! A pod's listeners have a home. What is accepted there stays there, unless another thread has clearly less to do: then
//! the connection moves once, before anything was read from it. (One listener for each thread by SO_REUSEPORT would spread
//! connections too, but any process of the pod with the agent's user id could join such a group and be handed a share.)

use std::{
    cell::Cell,
    future::Future,
    io,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use tacit_tunnel::{
    buffers,
    relay::{busy_poll, threads::ThreadKind},
};
use tokio::{runtime::Handle, sync::oneshot, time::interval};
use tokio_util::sync::CancellationToken;

/// Lead in connections over the idlest thread from which a thread passes new connections on.
const LEAD_MAX: usize = 2;

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// All of them.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    /// Those for bulk, as many.
    bulk: Vec<Worker>,
    failed: CancellationToken,
}

#[derive(Debug)]
struct Worker {
    handle: Handle,
    /// Connections it serves.
    load: Arc<AtomicUsize>,
    /// Ends the thread when dropped. Nobody joins it: the last to drop may be a flow on that very thread.
    _running: oneshot::Sender<()>,
}

/// Counts one connection while it lives.
#[derive(Debug)]
pub struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Workers {
    /// Starts `count` threads, which stay awake for up to `busy_poll` when quick exchanges make that worth it.
    ///
    /// # Errors
    /// Fails if the system gives no thread or no poller.
    pub fn start(count: NonZeroUsize, busy_poll: Duration) -> io::Result<Self> {
        let failed = CancellationToken::new();
        let start = |kind| {
            let start = |index| Worker::start(kind, index, busy_poll, failed.clone());
            (0..count.get()).map(start).collect::<io::Result<_>>()
        };
        Ok(Self { workers: start(ThreadKind::Quick)?, bulk: start(ThreadKind::Bulk)?, failed })
    }

    /// Cancelled when one of the threads, or a task that is started with [`vital`] and this token, has panicked.
    #[must_use]
    pub fn failed(&self) -> &CancellationToken {
        &self.failed
    }

    /// Returns the number of workers.
    #[must_use]
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// The runtime of one.
    #[must_use]
    pub fn handle(&self, index: usize) -> &Handle {
        &self.workers[index % self.workers.len()].handle
    }

    /// Returns the worker for a new connection that was accepted on `home`.
    pub fn place(&self, home: usize) -> (usize, Load) {
        let loads: Vec<_> = self.workers.iter().map(|worker| worker.load.load(Relaxed)).collect();
        let index = choose(home, &loads);
        let load = &self.workers[index].load;
        load.fetch_add(1, Relaxed);
        (index, Load(load.clone()))
    }

    /// Returns the runtime of a thread of this kind for a flow that moves from another thread, and its load. `first` is the worker
    /// that the flow began on.
    pub fn place_moved(&self, kind: ThreadKind, first: usize) -> (&Handle, Load) {
        let (threads, choose): (_, fn(usize, &[usize]) -> usize) = match kind {
            ThreadKind::Quick => (&self.workers, choose),
            ThreadKind::Bulk => (&self.bulk, idlest),
        };
        let loads: Vec<_> = threads.iter().map(|worker| worker.load.load(Relaxed)).collect();
        let Worker { handle, load, .. } = &threads[choose(first, &loads)];
        load.fetch_add(1, Relaxed);
        (handle, Load(load.clone()))
    }

    /// The one that runs the caller; the first when none does.
    #[must_use]
    pub fn current() -> usize {
        CURRENT.get()
    }
}

impl Worker {
    fn start(
        kind: ThreadKind,
        index: usize,
        busy_poll: Duration,
        failed: CancellationToken,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (running, ended) = oneshot::channel();
        let run = move || {
            CURRENT.set(index);
            if kind == ThreadKind::Quick {
                busy_poll::set_limit(busy_poll);
                runtime.spawn(vital(failed.clone(), busy_poll::run()));
            }
            runtime.block_on(vital(failed, async {
                tokio::select! {
                    // Nothing is ever sent.
                    _ = ended => {}
                    () = trim() => {}
                }
            }));
        };
        let name = match kind {
            ThreadKind::Quick => "tacit-flows",
            ThreadKind::Bulk => "tacit-bulk",
        };
        thread::Builder::new().name(format!("{name}-{index}")).spawn(run)?;
        Ok(Self { handle, load: Arc::default(), _running: running })
    }
}

/// Runs a task that the agent cannot do without. Cancels `failed` if the task panics.
pub async fn vital(failed: CancellationToken, task: impl Future<Output = ()>) {
    struct OnPanic(CancellationToken);

    impl Drop for OnPanic {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.cancel();
            }
        }
    }

    let _guard = OnPanic(failed);
    task.await;
}

async fn trim() {
    let mut tick = interval(buffers::TRIM);
    loop {
        tick.tick().await;
        buffers::trim();
    }
}

/// The one with the least load; of several `home`, if it is one of them.
fn idlest(home: usize, loads: &[usize]) -> usize {
    let least = loads.iter().enumerate().min_by_key(|(index, load)| (**load, *index != home));
    least.map_or(home, |(index, _)| index)
}

/// `home`, unless it leads the idlest by more than [`LEAD_MAX`].
fn choose(home: usize, loads: &[usize]) -> usize {
    let Some((idlest, least)) = loads.iter().copied().enumerate().min_by_key(|(_, load)| *load) else {
        return home;
    };
    match loads.get(home) {
        Some(load) if *load <= least + LEAD_MAX => home,
        _ => idlest,
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn a_connection_stays_at_home_unless_another_thread_is_clearly_idler() {
        for (home, loads, expected) in [
            (0, vec![0], 0),
            (0, vec![7], 0),
            (0, vec![2, 0], 0),
            (0, vec![3, 0], 1),
            (1, vec![9, 10, 8], 1),
            (1, vec![9, 12, 8], 2),
            (1, vec![0, 100, 0], 0),
        ] {
            assert_eq!(choose(home, &loads), expected, "{home} of {loads:?}");
        }
    }

    #[test]
    fn a_flow_moves_to_the_thread_with_the_least_load() {
        for (home, loads, expected) in [
            (0, vec![0, 0], 0),
            (1, vec![0, 0], 1),
            (0, vec![1, 0], 1),
            (1, vec![2, 1, 1], 1),
            (0, vec![2, 1, 1], 1),
        ] {
            assert_eq!(idlest(home, &loads), expected, "{home} of {loads:?}");
        }
    }

    #[tokio::test]
    async fn only_a_panic_of_a_vital_task_is_a_failure() {
        let failed = CancellationToken::new();
        vital(failed.clone(), async {}).await;
        let mut tasks = JoinSet::new();
        tasks.spawn(vital(failed.clone(), std::future::pending()));
        tasks.shutdown().await;
        assert!(!failed.is_cancelled(), "ended, or aborted at shutdown");
        tasks.spawn(vital(failed.clone(), async { panic!("a defect") }));
        assert!(tasks.join_next().await.is_some_and(|ended| ended.is_err()));
        assert!(failed.is_cancelled());
    }

    #[tokio::test]
    async fn a_vital_task_of_a_thread_that_panics_is_a_failure_of_the_workers() {
        let workers = Workers::start(NonZeroUsize::MIN, Duration::ZERO).expect("a thread");
        workers.handle(0).spawn(async { panic!("a defect of one flow") });
        workers.handle(0).spawn(vital(workers.failed().clone(), async { panic!("a defect of a listener") }));
        workers.failed().cancelled().await;
        let (tell, told) = oneshot::channel();
        workers.handle(0).spawn(async move { tell.send(()) });
        assert!(told.await.is_ok(), "the thread goes on");
    }

    #[test]
    fn each_thread_knows_itself_and_what_it_serves() {
        let workers =
            Workers::start(NonZeroUsize::new(2).expect("not zero"), Duration::ZERO).expect("threads");
        let current = |index| {
            let (tell, told) = std::sync::mpsc::channel();
            workers.handle(index).spawn(async move { tell.send(Workers::current()) });
            told.recv().expect("it runs")
        };
        assert_eq!((current(0), current(1)), (0, 1));
        let held: Vec<_> = (0..4).map(|_| workers.place(0)).collect();
        let places: Vec<_> = held.iter().map(|(index, _)| *index).collect();
        assert_eq!(places, [0, 0, 0, 1]);
        drop(held);
        assert_eq!(workers.place(0).0, 0);
    }
}
