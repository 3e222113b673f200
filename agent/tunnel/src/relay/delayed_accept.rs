//! Delays ACCEPT so that it leaves with the application's first bytes.
//!
//! One message less saves one wake-up on the client's node. The delay pays only when a thread has several connections to
//! start. For a single connection the delay adds latency, because the client's agent would otherwise wake up while the
//! application works.
//!
//! ACCEPT is therefore delayed only while the previous connection on the thread still waits for its application.

use std::{
    cell::Cell,
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::time::{Sleep, sleep};

/// Maximum delay. An application that is about to respond has run by then.
const DELAY_MAX: Duration = Duration::from_millis(5);

thread_local! {
    static NEXT: Cell<u64> = const { Cell::new(0) };
    /// The last flow that started on this thread, until its application sends bytes.
    static LATEST: Cell<Option<(u64, Instant)>> = const { Cell::new(None) };
}

/// The delay of one flow of this thread. Dropped when the application sends its first bytes.
pub(super) struct DelayedAccept {
    id: u64,
    is_crowded: bool,
    /// Boxed to keep idle flows small.
    timer: Option<Pin<Box<Sleep>>>,
}

impl DelayedAccept {
    pub(super) fn new() -> Self {
        let (id, now) = (NEXT.replace(NEXT.get() + 1), Instant::now());
        let before = LATEST.replace(Some((id, now)));
        let is_crowded = before.is_some_and(|(_, since)| now.duration_since(since) < DELAY_MAX);
        Self { id, is_crowded, timer: None }
    }

    /// Returns false if the previous connection on the thread does not wait. ACCEPT is then not delayed.
    pub(super) fn is_crowded(&self) -> bool {
        self.is_crowded
    }

    /// Pending until [`DELAY_MAX`] has passed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let ended = self.timer.get_or_insert_with(|| Box::pin(sleep(DELAY_MAX))).as_mut().poll(cx);
        if ended.is_ready() {
            self.timer = None;
        }
        ended
    }
}

impl Drop for DelayedAccept {
    fn drop(&mut self) {
        if LATEST.get().is_some_and(|(id, _)| id == self.id) {
            LATEST.set(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_connection_behind_one_that_waits_is_crowded() {
        let first = DelayedAccept::new();
        assert!(!first.is_crowded());
        let second = DelayedAccept::new();
        assert!(second.is_crowded());
        drop(first);
        let third = DelayedAccept::new();
        assert!(third.is_crowded(), "the second still waits");
        drop(third);
        assert!(!DelayedAccept::new().is_crowded(), "the latest has sent");
        LATEST.set(Instant::now().checked_sub(DELAY_MAX).map(|long_ago| (0, long_ago)));
        assert!(!DelayedAccept::new().is_crowded(), "the latest may never send");
    }
}
