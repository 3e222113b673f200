//! Busy polling: a thread polls for the next bytes of a quick exchange before it sleeps.
//!
//! Sleeping and waking costs a thread about 20 us, and an application on the same core as much again. An exchange of a few
//! bytes passes both agents twice. A thread polls again, for as long as [`set_limit`] allows, while exactly one flow moves
//! bytes in quick succession. Short connections in quick succession count as one exchange.
//!
//! Between two polls the thread yields its core to other threads. Without the yield, the application that the flow waits for
//! may be delayed.
//!
//! The cost is bounded. A thread does not poll while nothing moves, for bulk transfers, or while several flows move bytes,
//! because each would delay the others. After each poll without result the thread skips more moves, up to [`SKIPS_MAX`].

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::{sync::Notify, task::yield_now};

/// More bytes than this in one move are bulk, where throughput matters and the next bytes are already there.
const SMALL_BYTES: u64 = 16 * 1024;
/// Moves within this interval are quick.
const QUICK: Duration = Duration::from_micros(500);
/// Number of consecutive quick moves before the thread polls for the next.
const STREAK: u32 = 8;
/// Number of moves without polling after a poll without result. The number doubles with each further failure and is reset by a
/// success. It starts low, because after a single late answer the other agent would also poll in vain.
const SKIPS_MIN: u32 = 4;
const SKIPS_MAX: u32 = 256;

thread_local! {
    static NEXT: Cell<u64> = const { Cell::new(1) };
    static STATE: RefCell<State> = RefCell::new(State::new(Duration::ZERO, Instant::now()));
    /// Notified when the thread starts to poll.
    static START: Arc<Notify> = Arc::default();
}

/// Sets how long the calling thread may poll in [`run`]. Zero, the default, disables polling.
pub fn set_limit(limit: Duration) {
    STATE.set(State::new(limit, Instant::now()));
}

/// Keeps the calling thread polling while polling is useful. Never returns. Runs as a task of its own.
pub async fn run() {
    let wait = START.with(Arc::clone);
    loop {
        wait.notified().await;
        while STATE.with_borrow_mut(|state| state.waits(Instant::now())) {
            thread::yield_now();
            // Run the thread's other tasks and its poller.
            yield_now().await;
        }
    }
}

/// Records that a connection starts on this thread.
pub fn connection_started() {
    STATE.with_borrow_mut(|state| state.begins(Instant::now()));
}

/// Records that a connection of this thread that has no bytes yet has got a step further: its destination has accepted.
pub fn connection_proceeds() {
    STATE.with_borrow_mut(|state| {
        if state.proceeds(Instant::now()) {
            START.with(|wait| wait.notify_one());
        }
    });
}

/// The busy-poll state of one flow.
pub(super) struct BusyPoll {
    id: u64,
    /// Bytes of both directions at the last call.
    counted_bytes: u64,
}

impl BusyPoll {
    /// Registers a flow of this thread.
    pub(super) fn new() -> Self {
        Self { id: NEXT.replace(NEXT.get() + 1), counted_bytes: 0 }
    }

    /// Records that the flow cannot proceed now and has moved `total_bytes` so far.
    pub(super) fn pending(&mut self, total_bytes: u64) {
        let moved_bytes = total_bytes - self.counted_bytes;
        if moved_bytes > 0 {
            self.counted_bytes = total_bytes;
            STATE.with_borrow_mut(|state| {
                if state.moves(self.id, moved_bytes, Instant::now()) {
                    START.with(|wait| wait.notify_one());
                }
            });
        }
    }
}

impl Drop for BusyPoll {
    fn drop(&mut self) {
        STATE.with_borrow_mut(|state| state.ends(self.id, Instant::now()));
    }
}

/// The busy-poll state of one thread.
struct State {
    limit: Duration,
    /// The flow whose bytes moved last; `None` between two connections.
    last: Option<u64>,
    moved_at: Instant,
    /// Consecutive quick moves of one flow.
    streak: u32,
    /// Number of moves to skip before the next poll.
    skips: u32,
    /// The value of `skips` after the next poll without result.
    next_skips: u32,
    is_polling: bool,
}

impl State {
    fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            last: None,
            moved_at: now,
            streak: 0,
            skips: 0,
            next_skips: SKIPS_MIN,
            is_polling: false,
        }
    }

    /// Records that a flow moved bytes; returns true if polling starts.
    fn moves(&mut self, id: u64, bytes: u64, now: Instant) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let is_alone = self.last.replace(id).is_none_or(|last| last == id);
        self.skips = self.skips.saturating_sub(1);
        self.step(is_alone && bytes <= SMALL_BYTES, now)
    }

    /// Records that a connection without bytes has got a step further; returns true if polling starts.
    fn proceeds(&mut self, now: Instant) -> bool {
        !self.limit.is_zero() && self.step(self.last.is_none(), now)
    }

    fn step(&mut self, is_one_exchange: bool, now: Instant) -> bool {
        let was_waiting = self.is_polling;
        self.counts(is_one_exchange, now);
        if was_waiting {
            self.next_skips = SKIPS_MIN;
        }
        self.is_polling = self.streak >= STREAK && self.skips == 0;
        self.is_polling && !was_waiting
    }

    /// Records the start of a connection.
    fn begins(&mut self, now: Instant) {
        if !self.limit.is_zero() {
            let is_alone = self.last.take().is_none();
            self.counts(is_alone, now);
        }
    }

    /// Records the end of a flow.
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
        // The exchange has ended, or another flow moved bytes.
        self.is_polling &= self.streak > 0;
    }

    /// Returns true while polling continues.
    fn waits(&mut self, now: Instant) -> bool {
        if self.is_polling && now.duration_since(self.moved_at) >= self.limit {
            (self.is_polling, self.skips) = (false, self.next_skips);
            self.next_skips = (2 * self.next_skips).min(SKIPS_MAX);
        }
        self.is_polling
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(200);
    const SOON: Duration = Duration::from_micros(120);

    struct Thread {
        state: State,
        now: Instant,
    }

    impl Thread {
        fn new() -> Self {
            let now = Instant::now();
            Self { state: State::new(LIMIT, now), now }
        }

        fn moves(&mut self, id: u64, bytes: u64, after: Duration) -> bool {
            self.now += after;
            self.state.moves(id, bytes, self.now);
            self.state.is_polling
        }

        fn waits(&mut self, after: Duration) -> bool {
            self.now += after;
            self.state.waits(self.now)
        }

        /// Returns how many of these moves were followed by polling.
        fn quick_moves(&mut self, id: u64, count: u32) -> u32 {
            (0..count).map(|_| u32::from(self.moves(id, 64, SOON))).sum()
        }

        /// Simulates one connection with one exchange.
        fn connection(&mut self, id: u64, after: Duration) -> bool {
            self.now += after;
            self.state.begins(self.now);
            let waits = self.moves(id, 64, SOON);
            self.now += SOON;
            self.state.ends(id, self.now);
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
        for skips in [SKIPS_MIN, 2 * SKIPS_MIN, 4 * SKIPS_MIN] {
            assert_eq!(thread.quick_moves(1, skips - 1), 0, "a skips after a wait in vain");
            assert_eq!(thread.quick_moves(1, 1), 1);
            assert!(!thread.waits(LIMIT), "in vain again");
        }
        assert_eq!(thread.quick_moves(1, 8 * SKIPS_MIN + 1), 2);
        assert!(!thread.waits(LIMIT));
        assert_eq!(thread.quick_moves(1, SKIPS_MIN), 1, "short again after a wait that was not in vain");
    }

    #[test]
    fn connections_one_after_the_other_are_one_exchange() {
        let mut thread = Thread::new();
        let waits = (1..=10).filter(|id| thread.connection(*id, SOON)).count();
        assert!(waits >= 7, "{waits}");
        assert!(thread.waits(SOON), "for the next");
        assert!(!thread.connection(11, QUICK), "which came late");
        // Two connections at a time.
        let mut thread = Thread::new();
        let waits = (1..100).any(|id| {
            thread.state.begins(thread.now);
            thread.state.begins(thread.now);
            let waits = thread.moves(2 * id, 64, SOON) | thread.moves(2 * id + 1, 64, SOON);
            thread.state.ends(2 * id, thread.now);
            thread.state.ends(2 * id + 1, thread.now);
            waits
        });
        assert!(!waits);
    }

    #[test]
    fn a_connection_that_waits_for_its_destination_is_one_exchange_too() {
        let mut thread = Thread::new();
        let connection = |thread: &mut Thread, id| {
            thread.now += SOON;
            thread.state.begins(thread.now);
            thread.now += SOON;
            thread.state.proceeds(thread.now);
            let waits = thread.moves(id, 64, SOON);
            thread.now += SOON;
            thread.state.ends(id, thread.now);
            waits
        };
        let waits = (1..=10).filter(|id| connection(&mut thread, *id)).count();
        assert!(waits >= 7, "{waits}");
        thread.state.begins(thread.now);
        assert!(thread.waits(SOON), "for the answer");
        thread.now += SOON;
        thread.state.proceeds(thread.now);
        assert!(thread.waits(SOON), "for the first bytes, from the answer on");
        thread.state.moves(99, 64, thread.now);
        thread.state.proceeds(thread.now);
        assert!(!thread.waits(Duration::ZERO), "another flow moves bytes");
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
        thread.state.begins(thread.now);
        assert!(!thread.waits(Duration::ZERO), "another begins");
    }

    #[test]
    fn without_a_limit_nothing_is_waited_for() {
        let mut thread = Thread::new();
        thread.state.limit = Duration::ZERO;
        assert_eq!(thread.quick_moves(1, 2 * STREAK), 0);
    }
}
