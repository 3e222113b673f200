//! Waiting for the next bytes of a quick exchange without going to sleep.
//!
//! To sleep and be woken costs a thread some 20 us, an application on the same core as much again, and an exchange of a few
//! bytes passes through both agents twice. So a thread on which one flow at a time moves, and on which something moves
//! quickly one after the other, looks at its sockets again for as long as [`set_limit`] says before it sleeps. That may be
//! one flow, or one connection after another: what begins and ends then belongs to the exchange. Measured on two cores that
//! all four ends share: an echo of 64 bytes took 2.3 times as long as without Tacit, and takes less time than without (the
//! cores no longer fall asleep), for the same CPU time of the agents.
//!
//! Between two looks the thread lets others have the core that want it: without that, the application that the flow waits
//! for may be kept from it, and one exchange in a hundred took 200 us.
//!
//! What it may cost is bounded: nothing while nothing moves, nothing for bulk, nothing while several flows move on the
//! thread (each would keep the others waiting), and after waits in vain none for more and more moves, up to [`REST_MAX`].

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::{sync::Notify, task::yield_now};

/// More bytes than this at once are bulk: there throughput counts, and the next are there already.
const SMALL_BYTES: u64 = 16 * 1024;
/// Moves that follow each other within this are quick.
const QUICK: Duration = Duration::from_micros(500);
/// Quick moves one after the other before the thread waits for the next.
const STREAK: u32 = 8;
/// Moves without a wait after one in vain. Twice as many after each that follows, until one was not in vain: where waiting
/// helps, a late answer now and then must not end it, as the other agent then waits in vain too.
const REST_MIN: u32 = 4;
const REST_MAX: u32 = 256;

thread_local! {
    static NEXT: Cell<u64> = const { Cell::new(1) };
    static PACE: RefCell<Pace> = RefCell::new(Pace::new(Duration::ZERO, Instant::now()));
    /// Told when the thread is to wait.
    static WAIT: Arc<Notify> = Arc::default();
}

/// How long the calling thread may wait, in [`stay_awake`]; zero, as it is at first, is not at all.
pub fn set_limit(limit: Duration) {
    PACE.set(Pace::new(limit, Instant::now()));
}

/// Keeps the calling thread awake while that may be worth it. Never ends. A task of its own: it is polled again and again.
pub async fn stay_awake() {
    let wait = WAIT.with(Arc::clone);
    loop {
        wait.notified().await;
        while PACE.with_borrow_mut(|pace| pace.waits(Instant::now())) {
            thread::yield_now();
            // The thread's other tasks and its poller have their turn.
            yield_now().await;
        }
    }
}

/// A connection begins on this thread, which may be the next of a quick exchange.
pub fn begins() {
    PACE.with_borrow_mut(|pace| pace.begins(Instant::now()));
}

/// One flow, as far as its thread's pace goes.
pub(super) struct BusyPoll {
    id: u64,
    /// Bytes of both directions when last looked at.
    seen: u64,
}

impl BusyPoll {
    /// For a flow of this thread.
    pub(super) fn new() -> Self {
        Self { id: NEXT.replace(NEXT.get() + 1), seen: 0 }
    }

    /// The flow can do nothing now, and has moved `total_bytes` so far.
    pub(super) fn pending(&mut self, total_bytes: u64) {
        let moved_bytes = total_bytes - self.seen;
        if moved_bytes > 0 {
            self.seen = total_bytes;
            PACE.with_borrow_mut(|pace| {
                if pace.moves(self.id, moved_bytes, Instant::now()) {
                    WAIT.with(|wait| wait.notify_one());
                }
            });
        }
    }
}

impl Drop for BusyPoll {
    fn drop(&mut self) {
        PACE.with_borrow_mut(|pace| pace.ends(self.id, Instant::now()));
    }
}

/// What moves on one thread.
struct Pace {
    limit: Duration,
    /// The flow whose bytes moved last; `None` between two connections.
    last: Option<u64>,
    moved_at: Instant,
    /// Quick moves, with none of another flow between.
    streak: u32,
    /// Moves without a wait from here on.
    rest: u32,
    /// What `rest` will be after the next wait in vain.
    next_rest: u32,
    is_waiting: bool,
}

impl Pace {
    fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, last: None, moved_at: now, streak: 0, rest: 0, next_rest: REST_MIN, is_waiting: false }
    }

    /// Bytes of a flow; true when a wait begins.
    fn moves(&mut self, id: u64, bytes: u64, now: Instant) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let was_waiting = self.is_waiting;
        let is_alone = self.last.replace(id).is_none_or(|last| last == id);
        self.counts(is_alone && bytes <= SMALL_BYTES, now);
        self.rest = self.rest.saturating_sub(1);
        if was_waiting {
            self.next_rest = REST_MIN;
        }
        self.is_waiting = self.streak >= STREAK && self.rest == 0;
        self.is_waiting && !was_waiting
    }

    /// A connection.
    fn begins(&mut self, now: Instant) {
        if !self.limit.is_zero() {
            let is_alone = self.last.take().is_none();
            self.counts(is_alone, now);
        }
    }

    /// A flow.
    fn ends(&mut self, id: u64, now: Instant) {
        if self.last == Some(id) {
            self.last = None;
            self.counts(true, now);
        }
    }

    fn counts(&mut self, is_one_exchange: bool, now: Instant) {
        let is_quick = now.duration_since(self.moved_at) < QUICK;
        self.streak = if is_one_exchange && is_quick { self.streak.saturating_add(1) } else { 0 };
        self.moved_at = now;
        // The exchange is over, or no longer the only one.
        self.is_waiting &= self.streak > 0;
    }

    /// True as long as a wait goes on.
    fn waits(&mut self, now: Instant) -> bool {
        if self.is_waiting && now.duration_since(self.moved_at) >= self.limit {
            (self.is_waiting, self.rest) = (false, self.next_rest);
            self.next_rest = (2 * self.next_rest).min(REST_MAX);
        }
        self.is_waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(200);
    const SOON: Duration = Duration::from_micros(120);

    struct Thread {
        pace: Pace,
        now: Instant,
    }

    impl Thread {
        fn new() -> Self {
            let now = Instant::now();
            Self { pace: Pace::new(LIMIT, now), now }
        }

        fn moves(&mut self, id: u64, bytes: u64, after: Duration) -> bool {
            self.now += after;
            self.pace.moves(id, bytes, self.now);
            self.pace.is_waiting
        }

        fn waits(&mut self, after: Duration) -> bool {
            self.now += after;
            self.pace.waits(self.now)
        }

        /// How many of these moves were followed by a wait.
        fn quick_moves(&mut self, id: u64, count: u32) -> u32 {
            (0..count).map(|_| u32::from(self.moves(id, 64, SOON))).sum()
        }

        /// One connection with one exchange.
        fn connection(&mut self, id: u64, after: Duration) -> bool {
            self.now += after;
            self.pace.begins(self.now);
            let waits = self.moves(id, 64, SOON);
            self.now += SOON;
            self.pace.ends(id, self.now);
            waits
        }
    }

    #[test]
    fn a_quick_exchange_is_waited_for_up_to_the_limit() {
        let mut thread = Thread::new();
        assert_eq!(thread.quick_moves(1, STREAK), 1);
        assert!(thread.waits(SOON), "within the limit");
        assert!(!thread.waits(SOON), "beyond it");
        assert!(!thread.waits(SOON), "and not again");
        for rest in [REST_MIN, 2 * REST_MIN, 4 * REST_MIN] {
            assert_eq!(thread.quick_moves(1, rest - 1), 0, "a rest after a wait in vain");
            assert_eq!(thread.quick_moves(1, 1), 1);
            assert!(!thread.waits(LIMIT), "in vain again");
        }
        assert_eq!(thread.quick_moves(1, 8 * REST_MIN + 1), 2);
        assert!(!thread.waits(LIMIT));
        assert_eq!(thread.quick_moves(1, REST_MIN), 1, "short again after a wait that was not in vain");
    }

    #[test]
    fn connections_one_after_the_other_are_one_exchange() {
        let mut thread = Thread::new();
        let waits = (1..=10).filter(|id| thread.connection(*id, SOON)).count();
        assert!(waits >= 7, "{waits}");
        assert!(thread.waits(SOON), "for the next");
        assert!(!thread.connection(11, QUICK), "which came late");
        // Two at a time.
        let mut thread = Thread::new();
        let waits = (1..100).any(|id| {
            thread.pace.begins(thread.now);
            thread.pace.begins(thread.now);
            let waits = thread.moves(2 * id, 64, SOON) | thread.moves(2 * id + 1, 64, SOON);
            thread.pace.ends(2 * id, thread.now);
            thread.pace.ends(2 * id + 1, thread.now);
            waits
        });
        assert!(!waits);
    }

    #[test]
    fn neither_slow_moves_nor_bulk_are_waited_for() {
        let mut thread = Thread::new();
        assert!((0..1000).all(|_| !thread.moves(1, 64, QUICK)), "slow");
        assert!((0..1000).all(|_| !thread.moves(1, SMALL_BYTES + 1, SOON)), "bulk");
        thread.quick_moves(1, STREAK);
        assert!(!thread.moves(1, SMALL_BYTES + 1, SOON), "a bulk after an exchange");
    }

    #[test]
    fn several_flows_of_a_thread_are_not_waited_for() {
        let mut thread = Thread::new();
        assert!((0..1000).all(|_| thread.quick_moves(1, 1) + thread.quick_moves(2, 1) == 0));
        assert_eq!(thread.quick_moves(1, 1 + STREAK), 1);
        thread.quick_moves(2, 1);
        assert!(!thread.waits(Duration::ZERO), "another has moved");
        assert_eq!(thread.quick_moves(1, 1 + STREAK), 1);
        thread.pace.begins(thread.now);
        assert!(!thread.waits(Duration::ZERO), "another begins");
    }

    #[test]
    fn without_a_limit_nothing_is_waited_for() {
        let mut thread = Thread::new();
        thread.pace.limit = Duration::ZERO;
        assert_eq!(thread.quick_moves(1, 2 * STREAK), 0);
    }
}
