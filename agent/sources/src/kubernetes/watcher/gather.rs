//! Reads the events of a watch some times a second instead of one by one. Each wake of a thread, and each published value with all
//! that follow it, costs more than an event.

use std::time::Duration;

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::time::sleep;

/// Time for which events are gathered after an event. Far below the wait for an unknown address (1 s).
const GATHER: Duration = Duration::from_millis(50);

/// The state of one watch: whether an event was read.
#[derive(Debug, Default)]
pub(super) struct Gatherer {
    has_read: bool,
}

impl Gatherer {
    /// Returns the next event. An event is returned at once if it is there already or if none came for [`GATHER`]. Otherwise others
    /// are gathered first. Loses no event when it is cancelled.
    pub(super) async fn next<S: Stream + Unpin>(&mut self, events: &mut S) -> Option<S::Item> {
        let next = match events.next().now_or_never() {
            Some(next) => next,
            None => {
                if self.has_read {
                    sleep(GATHER).await;
                }
                events.next().await
            }
        };
        self.has_read = true;
        next
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tokio::time::Instant;

    use super::*;

    /// An event at each of these times after the start, in milliseconds.
    fn events(times: impl Iterator<Item = u64>) -> impl Stream<Item = u64> + Unpin {
        let begin = Instant::now();
        Box::pin(stream::iter(times).then(move |at| async move {
            tokio::time::sleep_until(begin + Duration::from_millis(at)).await;
            at
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_after_a_pause_is_read_at_once_and_a_burst_together() {
        let begin = Instant::now();
        let mut events = events([100, 110, 120, 300].into_iter());
        let mut gatherer = Gatherer::default();
        let mut read = Vec::new();
        while let Some(at) = gatherer.next(&mut events).await {
            read.push((at, begin.elapsed().as_millis()));
        }
        assert_eq!(read, [(100, 100), (110, 150), (120, 150), (300, 300)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_steady_flow_is_read_some_times_a_second_and_nothing_is_lost() {
        let mut events = events((0..1000).step_by(10));
        let mut gatherer = Gatherer::default();
        let mut reads: Vec<Instant> = Vec::new();
        let mut count = 0;
        while gatherer.next(&mut events).await.is_some() {
            count += 1;
            if reads.last() != Some(&Instant::now()) {
                reads.push(Instant::now());
            }
        }
        assert_eq!(count, 100);
        assert!(reads.len() <= 21, "{} reads", reads.len());
    }
}
