//! One TLS session carrying one flow at a time in frames. Many flows mean many sessions, so no flow waits for another.
//!
//! A client connects, opens a flow, relays it (`crate::relay`) and may open the next when the server has said DONE. A server
//! accepts and answers each OPEN with ACCEPT or DENY. The order of frames is `flow_state`'s; a session on which it is broken is
//! of no further use. Dropping a session cuts the connection; [`Session::close`] says goodbye first.

mod optimistic_data;
#[cfg(test)]
mod tests;

use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice},
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use tacit_core::{
    spiffe::SpiffeId,
    wire::{
        flow_state::{FlowState, Role},
        frame::{Control, FrameType, HEADER_BYTES},
        open::{DenyReason, OPEN_BYTES, Open, OptimisticMode},
    },
};
use tacit_identity::{certificate::Validity, credentials::Credentials};
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    TunnelError,
    batch::FRAMES_MAX,
    buffers::Buffer,
    tls::{
        TlsInfo,
        stream::{self, Established, TlsStream},
    },
};
use crate::{
    app_read::AppRead,
    receive_buffer::{ReceiveBuffer, Received},
};
pub use optimistic_data::OptimisticData;

/// How long a server keeps an idle session. Longer than a client keeps it in its pool, so that the client closes first and
/// never opens a flow on a session that is just being closed.
pub const SERVER_IDLE: Duration = Duration::from_secs(120);
/// How long a client waits for the answer to OPEN: above the server's own limit for reaching the destination.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// How long a server may take to get its answer of a few bytes out.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Why no flow was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The server refused this flow; the session can be used for others.
    #[error("the destination's agent refused the flow: {0}")]
    Denied(DenyReason),
    /// The session was gone before the server answered: a fresh session may be tried.
    #[error("the session was gone before an answer: {0}")]
    Stale(#[source] TunnelError),
    /// The tunnel failed in a way that a fresh session would not mend.
    #[error(transparent)]
    Tunnel(TunnelError),
    /// The application did not wait for the answer; the server has been told.
    #[error("the application has reset its connection")]
    Abandoned,
}

impl OpenError {
    /// For logs and metric labels; one of a fixed set.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Denied(reason) => reason.label(),
            Self::Stale(_) => "stale",
            Self::Tunnel(error) => error.reason(),
            Self::Abandoned => "reset_by_source",
        }
    }
}

impl From<TunnelError> for OpenError {
    fn from(error: TunnelError) -> Self {
        match error {
            gone @ (TunnelError::Io(_) | TunnelError::Closed) => Self::Stale(gone),
            other => Self::Tunnel(other),
        }
    }
}

/// An authenticated session with one peer. Boxed, as the task of a flow would hold room for it in every state that it can
/// be in; so are handshakes, of which nothing is left while a flow runs.
pub struct Session {
    tls: TlsStream,
    receive_buffer: ReceiveBuffer,
    role: Role,
    state: FlowState,
    peer: SpiffeId,
    peer_validity: Validity,
    info: TlsInfo,
    /// Server: once cancelled, the session ends with its flow.
    leaving: Option<CancellationToken>,
    /// Server: the client does not wait for the answer to its OPEN.
    answer_can_wait: bool,
}

impl Session {
    /// Connects over `tcp` as `own` to a server that must be `expected`. Bounded in time.
    ///
    /// # Errors
    /// [`TunnelError`]. A server that refuses us may show only at the first [`Session::open`]: TLS 1.3 lets a client finish
    /// before the server has looked at its certificate.
    pub async fn connect(
        tcp: TcpStream,
        own: &Arc<Credentials>,
        expected: &SpiffeId,
    ) -> Result<Box<Self>, TunnelError> {
        let handshake = Box::pin(stream::connect(tcp, own, expected));
        Ok(Self::new(handshake.await?, Role::Client))
    }

    /// Accepts a client of the trust domain of `own` over `tcp`. Bounded in time.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn accept(tcp: TcpStream, own: &Arc<Credentials>) -> Result<Box<Self>, TunnelError> {
        let handshake = Box::pin(stream::accept(tcp, own));
        Ok(Self::new(handshake.await?, Role::Server))
    }

    fn new(established: Established, role: Role) -> Box<Self> {
        Box::new(Self {
            tls: established.stream,
            receive_buffer: established.receive_buffer,
            role,
            state: FlowState::Idle,
            peer: established.peer,
            peer_validity: established.peer_validity,
            info: established.tls,
            leaving: None,
            answer_can_wait: false,
        })
    }

    /// Server: from when `leaving` is cancelled, the session ends with the flow that it carries or the next one.
    pub fn end_with_flow_after(&mut self, leaving: CancellationToken) {
        self.leaving = Some(leaving);
    }

    /// Who the peer is, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// When the peer's certificate expires; the session should not be used longer.
    #[must_use]
    pub fn peer_not_after(&self) -> SystemTime {
        self.peer_validity.not_after
    }

    /// What was negotiated.
    #[must_use]
    pub fn tls(&self) -> &TlsInfo {
        &self.info
    }

    /// Which side we are.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Our address of the connection.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tls.tcp().local_addr()
    }

    /// The peer's address of the connection.
    ///
    /// # Errors
    /// What the kernel says, for example that the connection is gone.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.tls.tcp().peer_addr()
    }

    /// The same session, polled by the calling thread's runtime from now on.
    ///
    /// # Errors
    /// When descriptors or memory of the poller are used up; the session is gone then.
    pub fn rehomed(self: Box<Self>) -> io::Result<Box<Self>> {
        let session = *self;
        Ok(Box::new(Self { tls: session.tls.rehomed()?, ..session }))
    }

    /// True when another flow may be opened.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.state == FlowState::Idle
    }

    /// True when no flow runs, the connection stands and nothing unexpected has arrived. One system call.
    #[must_use]
    pub fn is_idle_alive(&self) -> bool {
        self.state == FlowState::Idle && self.receive_buffer.is_empty() && self.tls.is_quiet()
    }

    /// Client: opens a flow and waits for the answer, at most `OPEN_MAX`. What `optimistic` has said already goes with OPEN, and
    /// if that is something, then also what it says until the answer comes.
    ///
    /// # Errors
    /// [`OpenError`]; see [`Session::is_idle`] for whether the session can be used further.
    pub async fn open(
        &mut self,
        open: &Open,
        optimistic: Option<&mut OptimisticData<'_>>,
    ) -> Result<(), OpenError> {
        let optimistic =
            optimistic.and_then(|optimistic| optimistic.app_read_now().map(|first| (optimistic, first)));
        let optimistic_data = if optimistic.is_some() { OptimisticMode::On } else { OptimisticMode::Off };
        self.send(&Control::Open(Open { optimistic_data, ..*open }))?;
        match bounded("the answer to OPEN", OPEN_MAX, self.answered(optimistic)).await? {
            Received::Control(Control::Deny(reason)) => {
                self.end_after_deny(optimistic_data);
                Err(OpenError::Denied(reason))
            }
            // Anything else than ACCEPT is out of turn and has been refused.
            _ => Ok(()),
        }
    }

    /// Server: the next flow a client asks for; `None` when the client has closed the session or was idle for `idle`. May be
    /// cancelled and called again.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn next(&mut self, idle: Duration) -> Result<Option<Open>, TunnelError> {
        match timeout(idle, poll_fn(|cx| self.poll_received(cx))).await {
            Ok(Ok(Received::Control(Control::Open(open)))) => Ok(Some(open)),
            Err(_) | Ok(Err(TunnelError::Closed)) => Ok(None),
            // Of a flow that had ended when it was sent: nothing is lost but the session.
            Ok(Ok(Received::Control(Control::Reset))) => Ok(None),
            Ok(Err(error)) => Err(error),
            // `flow_state` lets nothing but OPEN begin; in the middle of a flow there is no next one.
            Ok(Ok(_)) => Err(TunnelError::Closed),
        }
    }

    /// Server: the flow that `open` asked for may begin. The relay sends the answer.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn accept_flow(&mut self, open: &Open) -> Result<(), TunnelError> {
        self.answer_can_wait = open.optimistic_data == OptimisticMode::On;
        self.send(&Control::Accept)
    }

    /// Server: the flow that `open` asked for is refused. The session can be used for others, unless data of that flow is
    /// on its way; that is then taken and thrown away, or it would turn our close into a reset, and the answer be lost.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn deny(&mut self, open: &Open, reason: DenyReason) -> Result<(), TunnelError> {
        self.answer(&Control::Deny(reason)).await?;
        self.end_after_deny(open.optimistic_data);
        if open.optimistic_data == OptimisticMode::On {
            let rest = poll_fn(|cx| self.poll_discard(cx));
            // The client closes as soon as it has the answer.
            let _ = timeout(ANSWER_MAX, rest).await;
        }
        Ok(())
    }

    fn end_after_deny(&mut self, optimistic_data: OptimisticMode) {
        if optimistic_data == OptimisticMode::On {
            self.state = FlowState::Closed;
        }
    }

    /// Throws away what comes until the peer closes.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.receive_buffer.next(|record| self.tls.open(record)) {
                Ok(Some(Received::Data)) => self.receive_buffer.consume(usize::MAX),
                Ok(Some(Received::Control(_))) => {}
                Err(_) => return Poll::Ready(()),
                Ok(None) => match ready!(self.tls.poll_fill(cx, &mut self.receive_buffer)) {
                    Ok(()) => {}
                    Err(_) => return Poll::Ready(()),
                },
            }
        }
    }

    /// Closes the session properly, without waiting for anything.
    pub fn close(self: Box<Self>) {
        self.tls.close();
    }

    async fn answer(&mut self, frame: &Control) -> Result<(), TunnelError> {
        self.send(frame)?;
        bounded("sending the answer", ANSWER_MAX, poll_fn(|cx| self.poll_flush(cx))).await
    }

    /// Server: true while a client waits for nothing but what the application says.
    pub(crate) fn answer_can_wait(&self) -> bool {
        self.answer_can_wait
    }

    /// True when the client of the flow that runs has sent FIN.
    pub(crate) fn client_ended(&self) -> bool {
        matches!(self.state, FlowState::Flow { client_ended: true, .. })
    }

    /// Queues a frame; [`Session::poll_flush`] sends it.
    pub(crate) fn send(&mut self, frame: &Control) -> Result<(), TunnelError> {
        self.state = self.state.after(self.role, frame.kind())?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + OPEN_BYTES);
        frame.encode(&mut bytes);
        self.tls.queue(&bytes)
    }

    /// Server: says that the flow is over; and when the session ends with it, that in the same bytes, so that the client
    /// never takes it for one that another flow can begin on.
    pub(crate) fn done(&mut self) -> Result<(), TunnelError> {
        self.send(&Control::Done)?;
        let ends = self.leaving.as_ref().is_some_and(CancellationToken::is_cancelled);
        if ends { self.tls.queue_close() } else { Ok(()) }
    }

    /// Queues `payload_bytes` that were read into the slots of `batch` as DATA frames.
    pub(crate) fn send_data(&mut self, batch: Buffer, payload_bytes: usize) -> Result<(), TunnelError> {
        self.state = self.state.after(self.role, FrameType::Data)?;
        self.tls.queue_batch(batch, payload_bytes)
    }

    /// Queues what an application has said; returns whether that was all.
    pub(crate) fn send_app_read(&mut self, read: AppRead) -> Result<io::Result<bool>, TunnelError> {
        if read.payload_bytes > 0 {
            self.send_data(read.batch, read.payload_bytes)?;
        }
        if matches!(read.ends, Ok(true)) {
            self.send(&Control::Fin)?;
        }
        Ok(read.ends)
    }

    /// True while queued bytes wait to be sent.
    pub(crate) fn unsent(&self) -> bool {
        self.tls.unsent()
    }

    /// Sends what is queued.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.tls.poll_flush(cx)
    }

    /// The next frame. For DATA, take the payload before the next call.
    pub(crate) fn poll_received(&mut self, cx: &mut Context<'_>) -> Poll<Result<Received, TunnelError>> {
        loop {
            match self.receive_buffer.next(|record| self.tls.open(record)) {
                Ok(None) => ready!(self.tls.poll_fill(cx, &mut self.receive_buffer))?,
                Ok(Some(received)) => {
                    let kind = match &received {
                        Received::Control(frame) => frame.kind(),
                        Received::Data => FrameType::Data,
                    };
                    self.state = self.state.after(self.role.peer(), kind)?;
                    return Poll::Ready(Ok(received));
                }
                Err(error) => {
                    self.tls.tell(&error);
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// Why the peer went, if it said so before; for when a write has failed.
    fn last_words(&mut self, cx: &mut Context<'_>) -> Option<TunnelError> {
        match self.poll_received(cx) {
            Poll::Ready(Err(TunnelError::Io(_) | TunnelError::Closed) | Ok(_)) | Poll::Pending => None,
            Poll::Ready(Err(alert)) => Some(alert),
        }
    }

    /// True when something has come that was not looked at.
    #[cfg(test)]
    pub(crate) fn has_received(&self) -> bool {
        !self.receive_buffer.is_empty()
    }

    /// True when received payload is not consumed.
    pub(crate) fn has_payload(&self) -> bool {
        self.receive_buffer.has_payload()
    }

    /// Received payload that is not consumed: points `slices` at it, returns how many are used.
    pub(crate) fn payloads<'a>(&'a self, slices: &mut [IoSlice<'a>; FRAMES_MAX]) -> usize {
        self.receive_buffer.payloads(slices)
    }

    /// True when FIN is known to stand behind that payload.
    pub(crate) fn ends_behind(&self) -> bool {
        self.receive_buffer.ends_behind()
    }

    /// `written_bytes` of the payload are passed on.
    pub(crate) fn consume(&mut self, written_bytes: usize) {
        self.receive_buffer.consume(written_bytes);
    }
}

async fn bounded<T, E: From<TunnelError>>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(TunnelError::Timeout { what, limit }.into()))
}
