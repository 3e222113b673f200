//! Ending in good order: stop accepting, let flows finish, reset what is left at the deadline.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Time for resetting the remaining flows, after the deadline.
const CUT: Duration = Duration::from_secs(1);

/// Shared by everything that serves connections.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    /// Cancelled before `stop` if no other agent takes over.
    pub alone: CancellationToken,
    /// Cancelled when no new connection is taken any more. A session ends with its flow from then on.
    pub stop: CancellationToken,
    /// Cancelled when sessions without a flow end.
    pub idle: CancellationToken,
    /// Cancelled when flows that still live are to be reset.
    pub cut: CancellationToken,
    /// Counts the tasks that serve flows.
    pub tasks: TaskTracker,
}

/// The result of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// All flows ended by themselves.
    Finished,
    /// This many tasks were cut at the deadline.
    Cut(usize),
}

impl Drain {
    /// Stops accepting, waits up to `limit` for flows to end, then resets the rest. For `linger`, flows may still begin on
    /// sessions that peers have in their pools: to close one just as its peer sends the first bytes of a flow on it would
    /// lose that flow.
    pub async fn run(&self, limit: Duration, linger: Duration) -> Drained {
        self.stop.cancel();
        self.tasks.close();
        let end_idle = async {
            sleep(linger).await;
            self.idle.cancel();
        };
        let ended = async {
            tokio::select! {
                () = self.tasks.wait() => {}
                () = end_idle => self.tasks.wait().await,
            }
        };
        if timeout(limit, ended).await.is_ok() {
            return Drained::Finished;
        }
        let left = self.tasks.len();
        self.cut.cancel();
        // A connection without a relay does not see the cancellation. The exit of the process resets it.
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
        assert_eq!(drain.run(Duration::from_millis(20), Duration::ZERO).await, Drained::Cut(1));

        let drain = Drain::default();
        let stop = drain.stop.clone();
        drain.tasks.spawn(async move { stop.cancelled().await });
        assert_eq!(drain.run(Duration::from_secs(60), Duration::ZERO).await, Drained::Finished);
    }

    #[tokio::test]
    async fn sessions_without_a_flow_linger_no_longer_than_they_may() {
        let (short, long) = (Duration::from_millis(20), Duration::from_secs(60));
        for (limit, linger, ended) in [(long, short, Drained::Finished), (short, long, Drained::Cut(1))] {
            let drain = Drain::default();
            let (idle, cut) = (drain.idle.clone(), drain.cut.clone());
            drain.tasks.spawn(async move {
                tokio::select! {
                    () = idle.cancelled() => {}
                    () = cut.cancelled() => {}
                }
            });
            assert_eq!(drain.run(limit, linger).await, ended);
        }
    }
}
