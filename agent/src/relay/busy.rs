//! Waiting for the next bytes of a quick exchange without going to sleep.
//!
//! To sleep and be woken costs a thread some 20 us, an application on the same core as much again, and an exchange of a few
//! bytes passes through both agents twice. So a flow that is alone on its thread and whose bytes come quickly one after the
//! other has its thread look at the sockets again, for as long as [`set_limit`] says, before it sleeps. Measured on two cores
//! that all four ends share: an echo of 64 bytes took 2.3 times as long as without Tacit, and takes less time than without
//! (the cores no longer fall asleep), for the same CPU time of the agents.
//!
//! Between two looks the thread lets others have the core that want it: without that, the application that the flow waits
//! for may be kept from it, and one exchange in a hundred took 200 us.
//!
//! What it may cost is bounded: nothing while nothing moves, nothing for bulk, nothing while several flows move on the
//! thread (each would keep the others waiting), and after waits in vain none for more and more moves, up to [`REST_MAX`].

use std::{
    cell::Cell,
    future::Future as _,
    pin::pin,
    task::Context,
    thread,
    time::{Duration, Instant},
};

use tokio::task::yield_now;

/// More bytes than this at once are bulk: there throughput counts, and the next are there already.
const SMALL_BYTES: u64 = 16 * 1024;
/// Moves that follow each other within this are quick.
const QUICK: Duration = Duration::from_micros(500);
/// Quick moves of one flow, with none of another flow of the thread between, before its thread waits for it.
const STREAK: u32 = 8;
/// Moves of a flow without a wait after one in vain. Twice as many after each that follows, until one was not in vain: where
/// waiting helps, a late answer now and then must not end it, as the other agent then waits in vain too.
const REST_MIN: u32 = 4;
const REST_MAX: u32 = 256;

thread_local! {
    static LIMIT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static NEXT: Cell<u64> = const { Cell::new(0) };
    /// The flow whose bytes moved last on this thread.
    static LAST: Cell<u64> = const { Cell::new(0) };
}

/// How long flows of the calling thread may keep it awake; zero, as it is at first, is not at all.
pub(crate) fn set_limit(limit: Duration) {
    LIMIT.set(limit);
}

/// What one flow may expect of waiting.
pub(super) struct Busy {
    id: u64,
    limit: Duration,
    /// Bytes of both directions when last looked at.
    seen: u64,
    moved_at: Instant,
    streak: u32,
    /// Moves without a wait from here on.
    rest: u32,
    /// What `rest` will be after the next wait in vain.
    next_rest: u32,
    is_waiting: bool,
}

impl Busy {
    /// For a flow of this thread.
    pub(super) fn new() -> Self {
        let id = NEXT.get() + 1;
        NEXT.set(id);
        let limit = LIMIT.get();
        Self {
            id,
            limit,
            seen: 0,
            moved_at: Instant::now(),
            streak: 0,
            rest: 0,
            next_rest: REST_MIN,
            is_waiting: false,
        }
    }

    /// The flow can do nothing now, and has moved `total_bytes` so far. Has its task polled again at once if that may be
    /// worth it; the thread's other tasks, its poller and other threads have their turn before.
    pub(super) fn pending(&mut self, cx: &mut Context<'_>, total_bytes: u64) {
        if !self.limit.is_zero() && self.is_worth_it(total_bytes, Instant::now()) {
            // Registers the task to be polled after the poller; nothing is left to be done with the future.
            let _ = pin!(yield_now()).poll(cx);
            thread::yield_now();
        }
    }

    fn is_worth_it(&mut self, total_bytes: u64, now: Instant) -> bool {
        let moved_bytes = total_bytes - self.seen;
        if moved_bytes > 0 {
            let is_alone = LAST.replace(self.id) == self.id;
            let is_quick = now.duration_since(self.moved_at) < QUICK && moved_bytes <= SMALL_BYTES;
            self.streak = if is_alone && is_quick { self.streak.saturating_add(1) } else { 0 };
            self.rest = self.rest.saturating_sub(1);
            (self.seen, self.moved_at) = (total_bytes, now);
            if self.is_waiting {
                self.next_rest = REST_MIN;
            }
            self.is_waiting = self.streak >= STREAK && self.rest == 0;
        } else if self.is_waiting
            && (now.duration_since(self.moved_at) >= self.limit || LAST.get() != self.id)
        {
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

    struct Exchange {
        busy: Busy,
        total_bytes: u64,
        now: Instant,
    }

    impl Exchange {
        fn new() -> Self {
            set_limit(LIMIT);
            Self { busy: Busy::new(), total_bytes: 0, now: Instant::now() }
        }

        fn moves(&mut self, bytes: u64, after: Duration) -> bool {
            self.total_bytes += bytes;
            self.looks(after)
        }

        fn looks(&mut self, after: Duration) -> bool {
            self.now += after;
            self.busy.is_worth_it(self.total_bytes, self.now)
        }

        fn quick_moves(&mut self, count: u32) -> u32 {
            (0..count).map(|_| u32::from(self.moves(64, SOON))).sum()
        }
    }

    #[test]
    fn a_quick_exchange_is_waited_for_up_to_the_limit() {
        let mut flow = Exchange::new();
        assert_eq!(flow.quick_moves(1 + STREAK), 1);
        assert!(flow.looks(SOON), "within the limit");
        assert!(!flow.looks(SOON), "beyond it");
        assert!(!flow.looks(SOON), "and not again");
        for rest in [REST_MIN, 2 * REST_MIN, 4 * REST_MIN] {
            assert_eq!(flow.quick_moves(rest - 1), 0, "a rest after a wait in vain");
            assert_eq!(flow.quick_moves(1), 1);
            assert!(!flow.looks(LIMIT), "in vain again");
        }
        assert_eq!(flow.quick_moves(8 * REST_MIN + 1), 2);
        assert!(!flow.looks(LIMIT));
        assert_eq!(flow.quick_moves(REST_MIN), 1, "short again after a wait that was not in vain");
    }

    #[test]
    fn neither_slow_moves_nor_bulk_are_waited_for() {
        let mut flow = Exchange::new();
        assert!((0..1000).all(|_| !flow.moves(64, QUICK)), "slow");
        assert!((0..1000).all(|_| !flow.moves(SMALL_BYTES + 1, SOON)), "bulk");
        flow.quick_moves(STREAK);
        assert!(!flow.moves(SMALL_BYTES + 1, SOON), "a bulk after an exchange");
    }

    #[test]
    fn several_flows_of_a_thread_are_not_waited_for() {
        let (mut one, mut other) = (Exchange::new(), Exchange::new());
        assert!((0..1000).all(|_| one.quick_moves(1) + other.quick_moves(1) == 0));
        assert_eq!(one.quick_moves(2 + STREAK), 2);
        other.quick_moves(1);
        assert!(!one.looks(Duration::ZERO), "another has moved");
    }

    #[test]
    fn without_a_limit_a_task_is_not_polled_again() {
        set_limit(Duration::ZERO);
        let mut busy = Busy::new();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        (0..2 * u64::from(STREAK)).for_each(|total| busy.pending(&mut cx, total));
        assert!(!busy.is_waiting && busy.streak == 0);
    }
}
