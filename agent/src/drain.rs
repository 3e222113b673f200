//! Ending in good order: stop accepting, let flows finish, reset what is left at the deadline.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long resetting may take, after the deadline.
const CUT: Duration = Duration::from_secs(1);

/// Shared by everything that serves connections.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    /// Cancelled when no new flow is taken any more.
    pub stop: CancellationToken,
    /// Cancelled when flows that still live are to be reset.
    pub cut: CancellationToken,
    /// Counts the tasks that serve flows.
    pub tasks: TaskTracker,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// All flows ended by themselves.
    Finished,
    /// This many tasks were cut at the deadline.
    Cut(usize),
}

impl Drain {
    /// Stops accepting, waits up to `limit` for flows to end, then resets the rest.
    pub async fn run(&self, limit: Duration) -> Drained {
        self.stop.cancel();
        self.tasks.close();
        if timeout(limit, self.tasks.wait()).await.is_ok() {
            return Drained::Finished;
        }
        let left = self.tasks.len();
        self.cut.cancel();
        // What is not in a relay yet does not hear it; the end of the process resets that as well.
        let _ = timeout(CUT, self.tasks.wait()).await;
        Drained::Cut(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn flows_may_finish_and_those_that_do_not_are_cut() {
        let drain = Drain::default();
        let (stop, cut) = (drain.stop.clone(), drain.cut.clone());
        drain.tasks.spawn(async move { stop.cancelled().await });
        drain.tasks.spawn(async move { cut.cancelled().await });
        assert_eq!(drain.run(Duration::from_millis(20)).await, Drained::Cut(1));

        let drain = Drain::default();
        let stop = drain.stop.clone();
        drain.tasks.spawn(async move { stop.cancelled().await });
        assert_eq!(drain.run(Duration::from_secs(60)).await, Drained::Finished);
    }
}
