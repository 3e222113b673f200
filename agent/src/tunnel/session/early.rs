//! What a client's application says before the server has answered OPEN.
//!
//! It is passed on as it is said. So the answer keeps nobody waiting, and a server may let it leave with the application's.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
};

use tokio::net::TcpStream;

use super::{Control, OpenError, Phase, Received, Session};
use crate::tunnel::{
    buffers::Size,
    said::{Said, poll_said, said_already},
};

/// An application that does not wait for the answer.
pub(crate) struct Early<'a> {
    app: &'a TcpStream,
    /// How much of what it said was taken to be sent: the destination may have read it, so it is not sent twice.
    pub(crate) taken_bytes: u64,
    /// How much to read at once.
    size: Size,
}

impl<'a> Early<'a> {
    pub(crate) fn new(app: &'a TcpStream) -> Self {
        Self { app, taken_bytes: 0, size: Size::default() }
    }

    pub(super) fn said_already(&mut self) -> Option<Said> {
        said_already(self.app).inspect(|said| self.takes(said))
    }

    fn poll_said(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Said>> {
        let said = ready!(poll_said(self.app, cx, self.size));
        Poll::Ready(said.inspect(|said| self.takes(said)))
    }

    fn takes(&mut self, said: &Said) {
        self.taken_bytes += said.payload_bytes as u64;
        self.size = said.next;
    }
}

impl Session {
    /// The answer to OPEN. What `early` says from `first` on is passed on meanwhile, if there is a `first`.
    pub(super) async fn answered(
        &mut self,
        early: Option<(&mut Early<'_>, Said)>,
    ) -> Result<Received, OpenError> {
        let (mut early, mut first) = early.unzip();
        poll_fn(|cx| {
            if let Some(first) = first.take() {
                self.pass_on(cx, first)?;
            }
            loop {
                let passed = self.poll_pass_on(cx, early.as_deref_mut())?;
                if let Poll::Ready(answer) = self.poll_received(cx) {
                    return Poll::Ready(answer.map_err(OpenError::from));
                }
                ready!(passed);
            }
        })
        .await
    }

    /// Sends what is queued, and queues what `early` says next.
    fn poll_pass_on(
        &mut self,
        cx: &mut Context<'_>,
        early: Option<&mut Early<'_>>,
    ) -> Poll<Result<(), OpenError>> {
        if let Err(failed) = ready!(self.poll_flush(cx)) {
            // What the server said before it closed tells more than that it is closed.
            return Poll::Ready(Err(self.last_words(cx).unwrap_or(failed).into()));
        }
        let Some(early) = early.filter(|_| self.phase == Phase::Opening { client_ended: false }) else {
            return Poll::Pending;
        };
        match ready!(early.poll_said(cx)) {
            Ok(said) => Poll::Ready(self.pass_on(cx, said)),
            Err(_) => Poll::Ready(Err(self.abandoned(cx))),
        }
    }

    /// Queues what the application has said.
    fn pass_on(&mut self, cx: &mut Context<'_>, said: Said) -> Result<(), OpenError> {
        match self.send_said(said)? {
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
