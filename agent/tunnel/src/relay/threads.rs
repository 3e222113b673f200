//! The two kinds of threads that carry flows, and the move of a flow from one to another.
//!
//! A thread that moves bulk is busy all the time, so the kernel gives it the core late when bytes of a quiet flow come. So flows begin
//! on quick threads, and one that turns out to be bulk goes on at a bulk thread. The task of a flow moves as a whole. Its sockets are
//! registered anew, with the poller of the thread that they come to.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
};

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// For flows that exchange little, and all that begin.
    Quick,
    /// For flows that move much.
    Bulk,
}

thread_local! {
    /// The kind of thread that polls a movable task now. `None` while none does.
    static RUNS_ON: Cell<Option<ThreadKind>> = const { Cell::new(None) };
    /// The kind that this task has asked for.
    static WANTS: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

/// Resets [`RUNS_ON`], after a panic too.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        RUNS_ON.set(None);
    }
}

/// Runs `task` on this thread, of kind `on`, until it ends or has to move. Returns the kind of thread to move to.
pub async fn until_move<F: Future<Output = ()> + ?Sized>(
    on: ThreadKind,
    task: &mut Pin<Box<F>>,
) -> Option<ThreadKind> {
    poll_fn(|cx| {
        WANTS.set(None);
        RUNS_ON.set(Some(on));
        let running = Running;
        let polled = task.as_mut().poll(cx);
        drop(running);
        match (polled, WANTS.take()) {
            (Poll::Ready(()), _) => Poll::Ready(None),
            (Poll::Pending, Some(kind)) => Poll::Ready(Some(kind)),
            (Poll::Pending, None) => Poll::Pending,
        }
    })
    .await
}

/// Returns true if the task that runs can move to a thread of this kind, and is not on one.
pub(crate) fn can_move_to(kind: ThreadKind) -> bool {
    RUNS_ON.get().is_some_and(|on| on != kind)
}

/// Moves the task that runs to a thread of this kind. Returns false at once if it is on one, or cannot move.
pub(crate) async fn move_to(kind: ThreadKind) -> bool {
    if !can_move_to(kind) {
        return false;
    }
    let _asked = Asked;
    poll_fn(|_| {
        if !can_move_to(kind) {
            return Poll::Ready(());
        }
        // The new task polls again, so nothing has to wake this one.
        WANTS.set(Some(kind));
        Poll::Pending
    })
    .await;
    true
}

/// Takes back what was asked for, if the wait is given up.
struct Asked;

impl Drop for Asked {
    fn drop(&mut self) {
        WANTS.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_moves_when_it_asks_and_ends_where_it_is() {
        let mut task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async {
            assert!(!move_to(ThreadKind::Quick).await, "it is there");
            assert!(move_to(ThreadKind::Bulk).await);
            tokio::task::yield_now().await;
            assert!(!can_move_to(ThreadKind::Bulk) && can_move_to(ThreadKind::Quick));
            assert!(move_to(ThreadKind::Quick).await);
        });
        assert_eq!(until_move(ThreadKind::Quick, &mut task).await, Some(ThreadKind::Bulk));
        assert_eq!(until_move(ThreadKind::Bulk, &mut task).await, Some(ThreadKind::Quick));
        assert_eq!(until_move(ThreadKind::Quick, &mut task).await, None);
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_moves_nothing() {
        let mut task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async {
            tokio::select! {
                biased;
                _ = move_to(ThreadKind::Bulk) => {}
                () = async {} => {}
            }
            tokio::task::yield_now().await;
        });
        assert_eq!(until_move(ThreadKind::Quick, &mut task).await, None);
    }

    #[tokio::test]
    async fn a_task_that_cannot_move_goes_on() {
        assert!(!can_move_to(ThreadKind::Bulk) && !move_to(ThreadKind::Bulk).await);
    }

    #[tokio::test]
    async fn a_panic_leaves_no_task_movable() {
        let mut task: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(async { panic!("a defect of one flow") });
        let run = tokio::spawn(async move { until_move(ThreadKind::Quick, &mut task).await });
        assert!(run.await.is_err());
        assert!(!can_move_to(ThreadKind::Bulk));
    }
}
