//! A TLS session that carries one flow at a time in frames. Parallel flows use parallel sessions, so no flow waits for another.
//!
//! A client connects, opens a flow, relays it (`crate::relay`) and may open the next after the server has sent DONE. A server
//! accepts and answers each OPEN with ACCEPT or DENY. `flow_state` defines the order of frames. A violation ends the session.
//! Dropping a session cuts the connection; [`Session::close`] sends close_notify first.

pub(crate) mod opening;
mod optimistic_data;
#[cfg(test)]
mod tests;

use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice},
    net::SocketAddr,
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
use tacit_identity::{certificate::Validity, peer_trust::PeerChain};
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    TunnelError,
    batch::{self, FRAMES_MAX},
    buffers::Buffer,
    stream::{Established, TlsStream},
    tls::TlsInfo,
};
use crate::{
    app_read::AppRead,
    receive_buffer::{ReceiveBuffer, Received},
    socket,
};
pub use opening::OpenError;
pub use optimistic_data::OptimisticData;

/// Limit for a server to keep an idle session. It is longer than the client's pool limit, so the client closes first
/// and never opens a flow on a session that is being closed.
pub const SERVER_IDLE: Duration = Duration::from_secs(120);
/// Limit for a server to send its answer of a few bytes.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// An authenticated session with one peer. Sessions are boxed, because a flow's task would otherwise reserve space for one in
/// every state. Handshakes are boxed for the same reason.
pub struct Session {
    tls: TlsStream,
    receive_buffer: ReceiveBuffer,
    role: Role,
    state: FlowState,
    peer: SpiffeId,
    peer_validity: Validity,
    peer_chain: PeerChain,
    info: TlsInfo,
    /// Server: after this token is cancelled, the session ends with its flow.
    draining: Option<CancellationToken>,
    /// Server: the client sends data without waiting for ACCEPT.
    accept_can_wait: bool,
}

impl Session {
    pub(crate) fn new(established: Established, role: Role) -> Box<Self> {
        Box::new(Self {
            tls: established.stream,
            receive_buffer: established.receive_buffer,
            role,
            state: FlowState::Idle,
            peer: established.peer,
            peer_validity: established.peer_validity,
            peer_chain: established.peer_chain,
            info: established.tls,
            draining: None,
            accept_can_wait: false,
        })
    }

    /// Server: after `draining` is cancelled, the session ends with its current or next flow.
    pub fn end_with_flow_after(&mut self, draining: CancellationToken) {
        self.draining = Some(draining);
    }

    /// Returns the identity in the peer's certificate.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Returns when the peer's certificate expires. Do not use the session after that time.
    #[must_use]
    pub fn peer_not_after(&self) -> SystemTime {
        self.peer_validity.not_after
    }

    /// Returns the peer's certificates. Do not use the session after one of them is revoked.
    #[must_use]
    pub fn peer_chain(&self) -> &PeerChain {
        &self.peer_chain
    }

    /// Returns the negotiated TLS parameters.
    #[must_use]
    pub fn tls(&self) -> &TlsInfo {
        &self.info
    }

    /// Returns the local side's role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Returns the connection.
    pub(crate) fn tcp(&self) -> &TcpStream {
        self.tls.tcp()
    }

    /// Returns the local address of the connection.
    ///
    /// # Errors
    /// The error of the kernel.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tls.tcp().local_addr()
    }

    /// Returns the peer's address of the connection.
    ///
    /// # Errors
    /// The error of the kernel, for example if the connection is closed.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.tls.tcp().peer_addr()
    }

    /// Moves the session to the calling thread's runtime.
    ///
    /// # Errors
    /// If the poller has no descriptors or memory left. The session is then lost.
    pub fn moved_to_this_thread(self: Box<Self>) -> io::Result<Box<Self>> {
        let session = *self;
        Ok(Box::new(Self { tls: session.tls.moved_to_this_thread()?, ..session }))
    }

    /// Returns true if another flow may be opened.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.state == FlowState::Idle
    }

    /// Returns true if no flow runs, the connection is open and no unexpected bytes have arrived. Makes one system call.
    #[must_use]
    pub fn is_idle_alive(&self) -> bool {
        self.state == FlowState::Idle && self.receive_buffer.is_empty() && self.tls.is_quiet()
    }

    /// Server: returns the next flow that the client requests. Returns `None` if the client closed the session or was idle for
    /// `idle`. Cancel-safe.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn next(&mut self, idle: Duration) -> Result<Option<Open>, TunnelError> {
        match timeout(idle, poll_fn(|cx| self.poll_received(cx))).await {
            Ok(Ok(Received::Control(Control::Open(open)))) => Ok(Some(open)),
            Err(_) | Ok(Err(TunnelError::Closed)) => Ok(None),
            // A RESET of a flow that had already ended. Only the session is lost.
            Ok(Ok(Received::Control(Control::Reset))) => Ok(None),
            Ok(Err(error)) => Err(error),
            // `flow_state` accepts only OPEN here, and no flow can start inside another.
            Ok(Ok(_)) => Err(TunnelError::Closed),
        }
    }

    /// Server: accepts the flow of `open`. The relay sends the answer.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn accept_flow(&mut self, open: &Open) -> Result<(), TunnelError> {
        self.accept_can_wait = open.optimistic_data == OptimisticMode::On;
        self.send(&Control::Accept)
    }

    /// Server: rejects the flow of `open`. The session can carry others, unless data of the rejected flow is in transit. Such
    /// data is read and discarded. Otherwise closing the socket would send RST, and the client would lose the answer.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn deny(&mut self, open: &Open, reason: DenyReason) -> Result<(), TunnelError> {
        self.answer(&Control::Deny(reason)).await?;
        self.end_after_deny(open.optimistic_data);
        if open.optimistic_data == OptimisticMode::On {
            let rest = poll_fn(|cx| self.poll_discard(cx));
            // The client closes after it has received the answer.
            let _ = timeout(ANSWER_MAX, rest).await;
        }
        Ok(())
    }

    fn end_after_deny(&mut self, optimistic_data: OptimisticMode) {
        if optimistic_data == OptimisticMode::On {
            self.state = FlowState::Closed;
        }
    }

    /// Discards received frames until the peer closes.
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

    /// Sends close_notify and closes, without waiting.
    pub fn close(self: Box<Self>) {
        self.tls.close();
    }

    async fn answer(&mut self, frame: &Control) -> Result<(), TunnelError> {
        self.send(frame)?;
        bounded("sending the answer", ANSWER_MAX, poll_fn(|cx| self.poll_flush(cx))).await
    }

    /// Server: returns true if the client waits only for data of the application.
    pub(crate) fn accept_can_wait(&self) -> bool {
        self.accept_can_wait
    }

    /// Returns true if the client of the current flow has sent FIN.
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

    /// Server: queues DONE. If the session ends with this flow, close_notify follows in the same bytes, so that the client
    /// never reuses the session.
    pub(crate) fn done(&mut self) -> Result<(), TunnelError> {
        self.send(&Control::Done)?;
        let ends = self.draining.as_ref().is_some_and(CancellationToken::is_cancelled);
        if ends { self.tls.queue_close() } else { Ok(()) }
    }

    /// Queues `payload_bytes` that were read into the slots of `batch` as DATA frames.
    pub(crate) fn send_data(&mut self, batch: Buffer, payload_bytes: usize) -> Result<(), TunnelError> {
        self.state = self.state.after(self.role, FrameType::Data)?;
        self.tls.queue_batch(batch, payload_bytes)
    }

    /// Queues the bytes read from an application; returns whether its stream has ended.
    pub(crate) fn send_app_read(&mut self, read: AppRead) -> Result<io::Result<bool>, TunnelError> {
        match read.payload_bytes {
            0 => {}
            1 if read.is_urgent && self.info.has_urgent => {
                self.send(&Control::Urgent(batch::first_payload_byte(&read.batch)))?;
            }
            payload_bytes => self.send_data(read.batch, payload_bytes)?,
        }
        if matches!(read.ends, Ok(true)) {
            self.send(&Control::Fin)?;
        }
        Ok(read.ends)
    }

    /// Uses large buffers for sent bytes, or ends that.
    pub(crate) fn set_large_sends(&self, is_large: bool) {
        socket::limit_unsent(self.tls.tcp(), is_large);
    }

    /// Returns true if received bytes would have been followed by a larger read.
    pub(crate) fn is_receive_short(&self) -> bool {
        self.receive_buffer.is_short()
    }

    /// Uses large buffers for received bytes, or ends that.
    pub(crate) fn set_large_receives(&mut self, is_large: bool) {
        self.receive_buffer.set_may_grow(is_large);
    }

    /// Bounds the bytes that the kernel keeps unread, because the application does not take what was received. Returns true unless
    /// they have a bound already.
    pub(crate) fn bound_unread(&self) -> bool {
        socket::bound_unread(self.tls.tcp())
    }

    /// Widens that bound, for bulk.
    pub(crate) fn widen_unread(&self) {
        socket::widen_unread(self.tls.tcp());
    }

    /// Ends that bound, for the next flow.
    pub(crate) fn unbound_unread(&self) {
        socket::unbound_unread(self.tls.tcp());
    }

    /// Returns true if queued bytes are unsent.
    pub(crate) fn unsent(&self) -> bool {
        self.tls.unsent()
    }

    /// Sends the queued bytes.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.tls.poll_flush(cx)
    }

    /// Returns the next frame. The payload of DATA must be consumed before the next call.
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
                    self.tls.send_alert_for(&error);
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// Returns the alert that the peer sent before it closed, if any. Called after a failed write.
    fn peer_alert(&mut self, cx: &mut Context<'_>) -> Option<TunnelError> {
        match self.poll_received(cx) {
            Poll::Ready(Err(TunnelError::Io(_) | TunnelError::Closed) | Ok(_)) | Poll::Pending => None,
            Poll::Ready(Err(alert)) => Some(alert),
        }
    }

    /// Sends no URGENT frames, as to an earlier version.
    #[cfg(test)]
    pub(crate) fn forget_urgent(&mut self) {
        self.info.has_urgent = false;
    }

    /// Returns true if received bytes are buffered.
    #[cfg(test)]
    pub(crate) fn has_received(&self) -> bool {
        !self.receive_buffer.is_empty()
    }

    /// Returns true if received payload is not consumed.
    pub(crate) fn has_payload(&self) -> bool {
        self.receive_buffer.has_payload()
    }

    /// Points `slices` at received payload that is not consumed; returns the number of slices used.
    pub(crate) fn payloads<'a>(&'a self, slices: &mut [IoSlice<'a>; FRAMES_MAX]) -> usize {
        self.receive_buffer.payloads(slices)
    }

    /// Returns true if FIN is known to follow that payload.
    pub(crate) fn fin_follows(&self) -> bool {
        self.receive_buffer.fin_follows()
    }

    /// Removes `written_bytes` of the payload.
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
