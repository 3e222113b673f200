//! How long ACCEPT waits for the application's first bytes, to leave with them.
//!
//! A message less is a wake-up less on the client's node. That pays when a thread has several connections to begin at a
//! time: it saves 3 % of both agents' CPU for a connection of 64 bytes, with 16 clients. A connection that begins alone is 6 %
//! slower with it: there the client's agent wakes up while the application is at work, and the answer finds it awake.
//!
//! So an answer waits only while the connection that began before it on the same thread still waits for its application.
//! All such answers share one timer: one each would cost more than what they save.

use std::{
    cell::{Cell, RefCell},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio::time::sleep;

/// The longest wait. An application that is about to answer has had the core by then.
const HELD_MAX: Duration = Duration::from_millis(5);

static NEXT: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// The flow that began last on this thread, until its application has spoken.
    static LATEST: Cell<Option<(u32, Instant)>> = const { Cell::new(None) };
    /// The latest of this thread.
    static ROUND: RefCell<Arc<Round>> = RefCell::new(Arc::new(Round::new(None)));
}

/// All that wait for the same timer.
struct Round {
    number: u32,
    /// `None` once it is over.
    waiting: Mutex<Option<Vec<Waker>>>,
}

impl Round {
    fn new(waiting: Option<Vec<Waker>>) -> Self {
        Self { number: NEXT.fetch_add(1, Relaxed), waiting: Mutex::new(waiting) }
    }

    /// Joins it, unless it is over.
    fn join(&self, waker: &Waker) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut().map(|waiting| waiting.push(waker.clone())).is_some()
    }

    fn is_over(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    async fn run(self: Arc<Self>) {
        sleep(HELD_MAX).await;
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
}

/// The wait of one flow, which ends when it is dropped: when the application has spoken. A flow polls it on one thread.
pub(super) struct Held {
    id: u32,
    is_crowded: bool,
    round: Option<u32>,
}

impl Held {
    pub(super) fn new() -> Self {
        let (id, now) = (NEXT.fetch_add(1, Relaxed), Instant::now());
        let before = LATEST.replace(Some((id, now)));
        let is_crowded = before.is_some_and(|(_, since)| now.duration_since(since) < HELD_MAX);
        Self { id, is_crowded, round: None }
    }

    /// False for a connection that begins alone: its answer does not wait.
    pub(super) fn is_crowded(&self) -> bool {
        self.is_crowded
    }

    /// Pending for up to [`HELD_MAX`], less when the thread's timer runs already.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ROUND.with_borrow_mut(|round| match self.round {
            Some(number) if number == round.number && !round.is_over() => Poll::Pending,
            Some(_) => Poll::Ready(()),
            None => {
                if !round.join(cx.waker()) {
                    *round = Arc::new(Round::new(Some(vec![cx.waker().clone()])));
                    tokio::spawn(round.clone().run());
                }
                self.round = Some(round.number);
                Poll::Pending
            }
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if LATEST.get().is_some_and(|(id, _)| id == self.id) {
            LATEST.set(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::timeout;

    use super::*;

    async fn over(mut held: Held) {
        poll_fn(|cx| held.poll(cx)).await;
    }

    #[tokio::test]
    async fn only_a_connection_behind_one_that_waits_is_crowded() {
        let first = Held::new();
        assert!(!first.is_crowded());
        let second = Held::new();
        assert!(second.is_crowded());
        drop(first);
        let third = Held::new();
        assert!(third.is_crowded(), "the second still waits");
        drop(third);
        assert!(!Held::new().is_crowded(), "the latest has spoken");
        LATEST.set(Instant::now().checked_sub(HELD_MAX).map(|long_ago| (0, long_ago)));
        assert!(!Held::new().is_crowded(), "the latest may never speak");
    }

    #[tokio::test]
    async fn all_wait_for_one_timer_and_the_next_for_another() {
        for _ in 0..2 {
            let late = async {
                sleep(HELD_MAX / 4).await;
                let held = Held::new();
                let waits = ROUND.with_borrow(|round| !round.is_over());
                over(held).await;
                waits
            };
            let all = async { tokio::join!(over(Held::new()), over(Held::new()), late) };
            let ((), (), waits) = timeout(Duration::from_secs(5), all).await.expect("woken");
            assert!(waits && ROUND.with_borrow(|round| round.is_over()));
        }
    }
}
