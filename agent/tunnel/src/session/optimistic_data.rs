//! Data that a client's application sends before the server has answered OPEN.
//!
//! The client agent forwards this data at once. ACCEPT therefore delays nothing, and the server agent may send it with the
//! destination application's first bytes.

use std::{
    future::{Future as _, poll_fn},
    io,
    pin::pin,
    task::{Context, Poll, ready},
};

use tacit_kernel::socket::AppStream;
use tokio::time::{Instant, sleep_until};

use super::{
    Control, FlowState, OpenError, Received, Session,
    opening::{OPEN_ACKNOWLEDGED, Silence},
};
use crate::{
    app_read::{AppRead, app_read_now, poll_app_read},
    buffers::Size,
};

/// An application that may send data before the answer.
pub struct OptimisticData<'a> {
    app: &'a AppStream,
    /// Number of bytes taken for sending. The destination may have read them, so they must not be sent again.
    pub taken_bytes: u64,
    /// Size of the next read.
    size: Size,
}

impl<'a> OptimisticData<'a> {
    /// Creates the state for `app`, with nothing read yet.
    #[must_use]
    pub fn new(app: &'a AppStream) -> Self {
        Self { app, taken_bytes: 0, size: Size::default() }
    }

    pub(super) fn app_read_now(&mut self) -> Option<AppRead> {
        app_read_now(self.app).inspect(|read| self.record(read))
    }

    fn poll_app_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<AppRead>> {
        let read = ready!(poll_app_read(self.app, cx, self.size));
        Poll::Ready(read.inspect(|read| self.record(read)))
    }

    fn record(&mut self, read: &AppRead) {
        self.taken_bytes += read.payload_bytes as u64;
        // Nothing is known yet about the reader at the far end.
        self.size = read.next.small();
    }
}

impl Session {
    /// Waits for the answer to OPEN, as long as `check_answer` allows. If `first` is present, forwards it and the following data of `optimistic` meanwhile.
    pub(super) async fn wait_for_answer(
        &mut self,
        optimistic: Option<(&mut OptimisticData<'_>, AppRead)>,
        silence: Silence,
    ) -> Result<Received, OpenError> {
        let (mut optimistic, mut first) = optimistic.unzip();
        let begun = Instant::now();
        let mut look = pin!(sleep_until(begun + OPEN_ACKNOWLEDGED));
        poll_fn(|cx| {
            if let Some(first) = first.take() {
                self.forward(cx, first)?;
            }
            loop {
                let forwarded = self.poll_forward(cx, optimistic.as_deref_mut())?;
                if let Poll::Ready(answer) = self.poll_received(cx) {
                    return Poll::Ready(answer.map_err(OpenError::from));
                }
                if forwarded.is_pending() {
                    break;
                }
            }
            while look.as_mut().poll(cx).is_ready() {
                let next = self.check_answer(begun.elapsed(), silence)?;
                look.as_mut().reset(begun + next);
            }
            Poll::Pending
        })
        .await
    }

    /// Sends the queued bytes, then queues the next data of `optimistic`.
    fn poll_forward(
        &mut self,
        cx: &mut Context<'_>,
        optimistic: Option<&mut OptimisticData<'_>>,
    ) -> Poll<Result<(), OpenError>> {
        if let Err(failed) = ready!(self.poll_flush(cx)) {
            // An alert that the server sent before it closed is more specific than the write error.
            return Poll::Ready(Err(self.peer_alert(cx).unwrap_or(failed).into()));
        }
        let Some(optimistic) =
            optimistic.filter(|_| self.state == FlowState::Opening { client_ended: false })
        else {
            return Poll::Pending;
        };
        match ready!(optimistic.poll_app_read(cx)) {
            Ok(read) => Poll::Ready(self.forward(cx, read)),
            Err(_) => Poll::Ready(Err(self.abandoned(cx))),
        }
    }

    /// Queues the bytes that were read.
    fn forward(&mut self, cx: &mut Context<'_>, read: AppRead) -> Result<(), OpenError> {
        match self.send_app_read(read)? {
            Ok(_) => Ok(()),
            Err(_) => Err(self.abandoned(cx)),
        }
    }

    /// Handles a reset by the application. RESET is sent if the socket accepts it at once. Otherwise the closed session has the
    /// same effect.
    fn abandoned(&mut self, cx: &mut Context<'_>) -> OpenError {
        if self.send(&Control::Reset).is_ok() {
            let _ = self.poll_flush(cx);
        }
        OpenError::Abandoned
    }
}
