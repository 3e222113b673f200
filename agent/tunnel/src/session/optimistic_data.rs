//! What a client's application says before the server has answered OPEN.
//!
//! It is passed on as it is said. So the answer keeps nobody waiting, and a server may let it leave with the application's.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
};

use tokio::net::TcpStream;

use super::{Control, FlowState, OpenError, Received, Session};
use crate::{
    app_read::{AppRead, app_read_now, poll_app_read},
    buffers::Size,
};

/// An application that does not wait for the answer.
pub struct OptimisticData<'a> {
    app: &'a TcpStream,
    /// How much of what it said was taken to be sent: the destination may have read it, so it is not sent twice.
    pub taken_bytes: u64,
    /// How much to read at once.
    size: Size,
}

impl<'a> OptimisticData<'a> {
    /// Starts with nothing read from `app`.
    #[must_use]
    pub fn new(app: &'a TcpStream) -> Self {
        Self { app, taken_bytes: 0, size: Size::default() }
    }

    pub(super) fn app_read_now(&mut self) -> Option<AppRead> {
        app_read_now(self.app).inspect(|read| self.takes(read))
    }

    fn poll_app_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<AppRead>> {
        let read = ready!(poll_app_read(self.app, cx, self.size));
        Poll::Ready(read.inspect(|read| self.takes(read)))
    }

    fn takes(&mut self, read: &AppRead) {
        self.taken_bytes += read.payload_bytes as u64;
        self.size = read.next;
    }
}

impl Session {
    /// The answer to OPEN. What `optimistic` says from `first` on is passed on meanwhile, if there is a `first`.
    pub(super) async fn answered(
        &mut self,
        optimistic: Option<(&mut OptimisticData<'_>, AppRead)>,
    ) -> Result<Received, OpenError> {
        let (mut optimistic, mut first) = optimistic.unzip();
        poll_fn(|cx| {
            if let Some(first) = first.take() {
                self.pass_on(cx, first)?;
            }
            loop {
                let passed = self.poll_pass_on(cx, optimistic.as_deref_mut())?;
                if let Poll::Ready(answer) = self.poll_received(cx) {
                    return Poll::Ready(answer.map_err(OpenError::from));
                }
                ready!(passed);
            }
        })
        .await
    }

    /// Sends what is queued, and queues what `optimistic` says next.
    fn poll_pass_on(
        &mut self,
        cx: &mut Context<'_>,
        optimistic: Option<&mut OptimisticData<'_>>,
    ) -> Poll<Result<(), OpenError>> {
        if let Err(failed) = ready!(self.poll_flush(cx)) {
            // What the server said before it closed tells more than that it is closed.
            return Poll::Ready(Err(self.last_words(cx).unwrap_or(failed).into()));
        }
        let Some(optimistic) =
            optimistic.filter(|_| self.state == FlowState::Opening { client_ended: false })
        else {
            return Poll::Pending;
        };
        match ready!(optimistic.poll_app_read(cx)) {
            Ok(read) => Poll::Ready(self.pass_on(cx, read)),
            Err(_) => Poll::Ready(Err(self.abandoned(cx))),
        }
    }

    /// Queues what the application has said.
    fn pass_on(&mut self, cx: &mut Context<'_>, read: AppRead) -> Result<(), OpenError> {
        match self.send_app_read(read)? {
            Ok(_) => Ok(()),
            Err(_) => Err(self.abandoned(cx)),
        }
    }

    /// The application has reset its connection. The server is told if the socket takes it at once; otherwise that the session
    /// is cut says the same.
    fn abandoned(&mut self, cx: &mut Context<'_>) -> OpenError {
        if self.send(&Control::Reset).is_ok() {
            let _ = self.poll_flush(cx);
        }
        OpenError::Abandoned
    }
}
