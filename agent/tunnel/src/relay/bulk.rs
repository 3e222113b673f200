//! Large buffers for directions of flows that move much.
//!
//! Every direction begins with small buffers: in the agent, and in the kernel for the agent's sockets. A direction that has
//! moved [`AFTER_BYTES`] is bulk and gets large ones, if its pod has a unit of its share left. So a flow that nobody reads holds
//! little, a pod's flows together hold a bounded amount, and neither costs anything while bytes pass.
//!
//! | place | small | large |
//! |---|---|---|
//! | one read from an application or the tunnel | 64 KiB | 512 KiB |
//! | unsent bytes of a socket (`TCP_NOTSENT_LOWAT`) | 64 KiB on loopback, 128 KiB outside | up to `tcp_wmem` |
//!
//! The kernel grows the receive buffer of a tunnel's socket with the rate of reading, so a fast flow over a long distance gets its
//! window from the first byte on. The agent reads at first, though, what the application does not: when the application's socket is
//! full for the first time ([`Stall`]) before the direction is bulk, the receive buffer is bound to 128 KiB. Bulk gets 6 MiB then.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tacit_core::shares::{self, Bounds, Ledger, ShareUse, connections::PodId};

use crate::buffers::Size;

/// Payload after which a direction is bulk: twice what all small buffers between two applications hold, so that a flow that
/// nobody reads never gets there.
const AFTER_BYTES: u64 = 2 << 20;

/// Interval of [`Rate`]. Tests that move a flow do so on any machine.
const INTERVAL: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 1 });

/// The bulk directions of all pods.
#[derive(Debug)]
pub struct BulkShare(Mutex<Ledger<PodId>>);

impl BulkShare {
    /// Nothing is used yet.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self(Mutex::new(Ledger::new(bounds)))
    }

    /// Returns the share of `pod`, for its flows.
    #[must_use]
    pub fn of(self: &Arc<Self>, pod: PodId) -> PodBulk {
        PodBulk { all: self.clone(), pod }
    }

    /// Returns the use by pod.
    #[must_use]
    pub fn usage(&self) -> ShareUse<PodId> {
        self.lock().usage(shares::BULK_DIRECTIONS.resource)
    }

    /// A panic while the lock is held leaves at most one unit counted, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Ledger<PodId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The share of one pod.
#[derive(Debug, Clone)]
pub struct PodBulk {
    all: Arc<BulkShare>,
    pod: PodId,
}

/// The buffers of one direction.
#[derive(Debug)]
pub(crate) struct Growth<'a> {
    pod: &'a PodBulk,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Small,
    /// Holds a unit of the pod's share.
    Large,
    /// The pod has its share.
    Refused,
}

/// The answer to a direction that would use large buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grown {
    /// It may from now on: the caller sets its sockets.
    Now,
    /// It may already.
    Before,
    /// It may not, or not yet.
    No,
}

impl<'a> Growth<'a> {
    pub(crate) fn new(pod: &'a PodBulk) -> Self {
        Self { pod, state: State::Small }
    }

    /// Asks for large buffers for a direction that has moved `moved_bytes`.
    pub(crate) fn ask(&mut self, moved_bytes: u64) -> Grown {
        match self.state {
            State::Large => Grown::Before,
            State::Small if moved_bytes >= AFTER_BYTES => {
                let is_granted = self.pod.all.lock().take(self.pod.pod).is_ok();
                self.state = if is_granted { State::Large } else { State::Refused };
                if is_granted { Grown::Now } else { Grown::No }
            }
            State::Small | State::Refused => Grown::No,
        }
    }

    /// Returns true if the direction has moved so much that it is bulk, with large buffers or without.
    pub(crate) fn is_bulk(&self) -> bool {
        self.state != State::Small
    }

    /// Returns true if the direction has large buffers.
    pub(crate) fn is_large(&self) -> bool {
        self.state == State::Large
    }
}

impl Drop for Growth<'_> {
    fn drop(&mut self) {
        if self.is_large() {
            self.pod.all.lock().release(&self.pod.pod);
        }
    }
}

/// The rate of a flow with a direction that is bulk. A flow that has moved much over hours is no load for its thread.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    /// Begin of the interval, and what the flow had moved by then.
    begun: Option<(Instant, u64)>,
}

impl Rate {
    /// Returns true if the flow, which has moved `moved_bytes` at `now`, moves [`AFTER_BYTES`] in less than [`INTERVAL`].
    pub(crate) fn is_high(&mut self, now: Instant, moved_bytes: u64) -> bool {
        match self.begun {
            Some((begun, before)) if now.duration_since(begun) < INTERVAL => {
                moved_bytes - before >= AFTER_BYTES
            }
            _ => {
                self.begun = Some((now, moved_bytes));
                false
            }
        }
    }
}

/// The first time that the destination of a direction did not take what was read from its source.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stall {
    #[default]
    Never,
    /// The source's unread bytes were bound then.
    Bounded,
    /// They had a bound before, or the direction has large buffers.
    Unbounded,
}

impl Stall {
    /// Notes a stall, and calls `bound` if it is the first one of a direction with small buffers. `bound` returns true if it set a
    /// bound.
    pub(crate) fn stalled(&mut self, growth: &Growth<'_>, bound: impl FnOnce() -> bool) {
        if *self == Self::Never {
            *self = if !growth.is_large() && bound() { Self::Bounded } else { Self::Unbounded };
        }
    }

    /// Returns true if the direction has set a bound of its source.
    pub(crate) fn is_bounded(self) -> bool {
        self == Self::Bounded
    }
}

impl Size {
    /// Returns this size, or the largest of small buffers.
    pub(crate) fn small(self) -> Self {
        if self == Self::Large { Self::Small } else { self }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A share of `each` directions for every pod.
    pub(crate) fn share(each: u64) -> Arc<BulkShare> {
        Arc::new(BulkShare::new(Bounds { total: 1000, each }))
    }

    #[test]
    fn a_direction_grows_once_after_it_has_moved_much() {
        let share = share(1);
        let pod = share.of(1);
        let mut growth = Growth::new(&pod);
        assert_eq!([0, AFTER_BYTES - 1].map(|moved| growth.ask(moved)), [Grown::No; 2]);
        assert_eq!([AFTER_BYTES; 2].map(|moved| growth.ask(moved)), [Grown::Now, Grown::Before]);
        assert_eq!((growth.is_large(), share.usage().used), (true, 1));
        drop(growth);
        assert_eq!(share.usage().used, 0);
    }

    #[test]
    fn the_first_stall_of_a_direction_with_small_buffers_sets_a_bound() {
        let share = share(1);
        let pod = share.of(1);
        let (small, mut large) = (Growth::new(&pod), Growth::new(&pod));
        assert_eq!(large.ask(AFTER_BYTES), Grown::Now);
        for (growth, sets_bound, expected) in [
            (&small, true, Stall::Bounded),
            (&small, false, Stall::Unbounded),
            (&large, true, Stall::Unbounded),
        ] {
            let (mut stall, mut calls) = (Stall::default(), 0);
            for _ in 0..2 {
                stall.stalled(growth, || {
                    calls += 1;
                    sets_bound
                });
            }
            assert_eq!((stall, calls), (expected, u32::from(!growth.is_large())));
        }
    }

    #[test]
    fn directions_beyond_the_share_of_their_pod_stay_small() {
        let share = share(1);
        let (pod, other) = (share.of(1), share.of(2));
        let (mut first, mut second, mut third) = (Growth::new(&pod), Growth::new(&pod), Growth::new(&other));
        assert_eq!(first.ask(AFTER_BYTES), Grown::Now);
        assert_eq!([second.ask(AFTER_BYTES), second.ask(u64::MAX)], [Grown::No; 2]);
        assert_eq!(third.ask(AFTER_BYTES), Grown::Now, "another pod has its own");
        drop((first, second));
        let usage = share.usage();
        assert_eq!((usage.used, usage.refused), (1, 1), "refused once for each direction");
    }
}
