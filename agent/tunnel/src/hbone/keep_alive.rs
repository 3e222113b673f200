//! PING: shows that the peer of a connection answers, however quiet its flows are.

use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

/// Time between an answer and the next PING.
pub(super) const EVERY: Duration = Duration::from_secs(10);
/// Limit for the answer to a PING.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(20);

/// The PINGs of one connection.
pub(super) struct KeepAlive {
    pings: PingPong,
    timer: Pin<Box<Sleep>>,
    every: Duration,
    answer_max: Duration,
    is_asked: bool,
}

impl KeepAlive {
    pub(super) fn new(pings: PingPong) -> Self {
        Self { pings, timer: Box::pin(sleep(EVERY)), every: EVERY, answer_max: ANSWER_MAX, is_asked: false }
    }

    /// Uses `limit` for both times.
    #[cfg(test)]
    pub(super) fn hasten(&mut self, limit: Duration) {
        (self.every, self.answer_max) = (limit, limit);
        self.timer.as_mut().reset(Instant::now() + limit);
    }

    /// Ready if the peer has not answered in time. A connection that has ended reports that itself.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.is_asked && self.pings.poll_pong(cx).is_ready() {
                self.is_asked = false;
                self.timer.as_mut().reset(Instant::now() + self.every);
            }
            std::task::ready!(self.timer.as_mut().poll(cx));
            if self.is_asked {
                return Poll::Ready(());
            }
            // Fails only after the connection has ended.
            let _ = self.pings.send_ping(Ping::opaque());
            self.is_asked = true;
            self.timer.as_mut().reset(Instant::now() + self.answer_max);
        }
    }
}
