//! Tells the store of policies that what belongs together has arrived, or will not arrive. It depends on no connection.

use std::{future::pending, time::Duration};

use tokio::{
    select,
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::policies::{PolicyDocument, PolicyResource};
use crate::kubernetes::{Change, Update};

/// Longest time from the first response until the store is told, however many more come. A large mesh always changes.
pub(super) const LONGEST: Duration = Duration::from_secs(5);

/// Tells the store after each time in which `touched` changed: `quiet` after the latest change, or `longest` after the first one.
pub(super) async fn settle(
    mut touched: watch::Receiver<()>,
    policies: Option<mpsc::Sender<Update<PolicyResource, PolicyDocument>>>,
    (quiet, longest): (Duration, Duration),
) {
    let Some(policies) = policies else { return pending().await };
    while touched.changed().await.is_ok() {
        let limit = Instant::now() + longest;
        let mut deadline = limit.min(Instant::now() + quiet);
        loop {
            select! {
                biased;
                () = sleep_until(deadline) => break,
                changed = touched.changed() => match changed {
                    Ok(()) => deadline = limit.min(Instant::now() + quiet),
                    Err(_) => return pending().await,
                },
            }
        }
        let settle = Update::Change(Change::Applied(PolicyDocument::Settle));
        if policies.send(settle).await.is_err() {
            break;
        }
    }
    // The connections end for reasons of their own.
    pending().await
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::istiod::testing::within;

    const HOUR: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(50);

    fn start(quiet: Duration, longest: Duration) -> (watch::Sender<()>, impl AsyncFnMut() -> Instant) {
        let (sender, mut told) = mpsc::channel(8);
        let touched = watch::Sender::new(());
        tokio::spawn(settle(touched.subscribe(), Some(sender), (quiet, longest)));
        (touched, async move || {
            assert!(within(told.recv()).await.is_some());
            Instant::now()
        })
    }

    #[tokio::test]
    async fn the_store_is_told_even_if_changes_never_end() {
        let (touched, mut told) = start(HOUR, SHORT);
        let begin = Instant::now();
        let noise = tokio::spawn(async move {
            loop {
                touched.send_replace(());
                sleep(SHORT / 10).await;
            }
        });
        assert!(told().await - begin >= SHORT);
        assert!(told().await - begin >= SHORT * 2, "and again");
        noise.abort();
    }

    #[tokio::test]
    async fn the_store_is_told_once_it_is_quiet() {
        let (touched, mut told) = start(SHORT, HOUR);
        for _ in 0..2 {
            let begin = Instant::now();
            touched.send_replace(());
            assert!(told().await - begin >= SHORT);
        }
    }
}
