//! One connection to a server, and the streams that flows open on it.
//!
//! ```text
//! Connected ── begin ──> Connection: its task, which runs it to the end
//!                   └──> Client ── place ──> Place ── ask ──> Asked ── answered ──> FlowStream
//! ```
//!
//! A flow holds its [`Place`] until it ends. The connection ends when nothing holds a [`Client`] and no stream is open.

use std::{
    future::{Future as _, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::StatusCode;
use tacit_core::{refusal::RefusalReason, shares::STREAM_WINDOW_MAX};
use tacit_kernel::socket::peer::ask_peer;
use tokio::time::{Instant, sleep};

use super::{
    CLIENT_STREAMS_MAX, Connect, FRAME_MAX_BYTES, FRAMES_BUDGET_BYTES, FlowStream, Peer, RESETS_KEPT,
    RESETS_KEPT_FOR, UNSENT_MAX_BYTES,
    keep_alive::{self, KeepAlive},
    stream::Received,
    tls_io::TlsIo,
    window::Window,
};
use crate::{
    TunnelError,
    session::opening::{Look, OPEN_MAX, Silence, look, patience},
    stream::Established,
};

/// Most bytes of the fields of an answer, as ztunnel's client takes them.
const FIELDS_MAX_BYTES: u32 = 16 << 10;
/// The limit of streams before the server's first SETTINGS. No SETTINGS can have it, so a change shows that they have come.
const LIMIT_UNKNOWN: usize = usize::MAX - 1;

/// A server that has chosen HBONE in the TLS handshake.
pub struct Connected(pub(crate) Established);

impl Connected {
    /// Begins HTTP/2. Nothing is waited for. `window_bytes` is the first window of a stream.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn begin(self, window_bytes: u32) -> Result<(Client, Connection), TunnelError> {
        let (peer, io) = Peer::of(self.0)?;
        let (send, mut connection) = Builder::new()
            .enable_push(false)
            .initial_window_size(window_bytes)
            // Each stream has its own bound.
            .initial_connection_window_size(CLIENT_STREAMS_MAX as u32 * STREAM_WINDOW_MAX)
            .data_frame_budget(FRAMES_BUDGET_BYTES)
            .initial_max_send_streams(LIMIT_UNKNOWN)
            .max_concurrent_reset_streams(RESETS_KEPT)
            // What arrives for streams that are forgotten costs a reset, and no other flow of the pod.
            .max_local_error_reset_streams(None)
            .reset_stream_duration(RESETS_KEPT_FOR)
            .max_frame_size(FRAME_MAX_BYTES)
            .max_header_list_size(FIELDS_MAX_BYTES)
            .max_send_buffer_size(UNSENT_MAX_BYTES.min(window_bytes) as usize)
            .handshake(io)
            .await?;
        let pings = connection.ping_pong().ok_or(TunnelError::Closed)?;
        let state = Arc::new(State {
            streams: AtomicUsize::new(0),
            window_bytes: AtomicU32::new(window_bytes),
            refused_beyond: AtomicUsize::new(CLIENT_STREAMS_MAX),
            is_closed: AtomicBool::new(false),
        });
        let client = Client { send, peer: Arc::new(peer), state: state.clone() };
        let (keep_alive, window) = (KeepAlive::new(pings), Window::new(window_bytes));
        let task = Connection { connection, keep_alive, window, peer: client.peer.clone(), state };
        Ok((client, task))
    }
}

/// Shared by the handles of a connection and its task.
struct State {
    /// Places that are taken.
    streams: AtomicUsize,
    /// The window that a stream shall have.
    window_bytes: AtomicU32,
    /// The server has refused a stream beyond so many, whatever it has announced.
    refused_beyond: AtomicUsize,
    /// No further place is given.
    is_closed: AtomicBool,
}

/// The task of a connection, which moves only while it is polled.
pub struct Connection {
    connection: h2::client::Connection<TlsIo, Bytes>,
    keep_alive: KeepAlive,
    window: Window,
    peer: Arc<Peer>,
    state: Arc<State>,
}

impl Connection {
    /// Waits for the server's first SETTINGS, which bound the streams. Cancel-safe.
    ///
    /// # Errors
    /// [`TunnelError`] if the connection has ended.
    pub async fn settled(&mut self) -> Result<(), TunnelError> {
        poll_fn(|cx| {
            let ended = self.poll_end(cx);
            match self.connection.max_concurrent_send_streams() {
                LIMIT_UNKNOWN => ended.map(|ended| ended.and(Err(TunnelError::Closed))),
                _ => Poll::Ready(Ok(())),
            }
        })
        .await
    }

    /// Runs the connection to its end: by the server, or when it is not used any more.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn run(&mut self) -> Result<(), TunnelError> {
        poll_fn(|cx| self.poll_end(cx)).await
    }

    /// Sends PING sooner, and waits less for the answer.
    #[cfg(test)]
    pub(super) fn hasten_pings(&mut self, limit: Duration) {
        self.keep_alive.hasten(limit);
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        // The connection first: it may have the answer to a PING, or to a change of the window.
        if let Poll::Ready(ended) = Pin::new(&mut self.connection).poll(cx) {
            self.state.is_closed.store(true, Relaxed);
            return Poll::Ready(ended.map_err(|error| self.peer.failure(error)));
        }
        let announce = |bytes| {
            let is_announced = self.connection.set_initial_window_size(bytes).is_ok();
            if is_announced {
                // It leaves with the next turn.
                cx.waker().wake_by_ref();
            }
            is_announced
        };
        if !self.window.set(self.state.window_bytes.load(Relaxed), announce) {
            // A new connection has the smaller window from its begin.
            self.state.is_closed.store(true, Relaxed);
        }
        ready!(self.keep_alive.poll(cx));
        self.state.is_closed.store(true, Relaxed);
        Poll::Ready(Err(TunnelError::Timeout { what: "the answer to a PING", limit: keep_alive::ANSWER_MAX }))
    }
}

/// Opens streams on a connection. A clone opens them on the same one.
#[derive(Clone)]
pub struct Client {
    send: SendRequest<Bytes>,
    peer: Arc<Peer>,
    state: Arc<State>,
}

impl Client {
    /// Returns the server.
    #[must_use]
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Takes a place for one more flow, whose stream shall have a window of `window_bytes`. Returns `None` if the connection is full, ends,
    /// or is of a certificate that has expired or is revoked.
    #[must_use]
    pub fn place(&self, window_bytes: u32) -> Option<Place> {
        let Self { peer, state, .. } = self;
        let now = SystemTime::now();
        if !self.is_open() || peer.not_after() <= now || peer.chain().check(now).is_err() {
            return None;
        }
        let most = self.streams_max();
        let taken = |streams| (streams < most).then_some(streams + 1);
        state.streams.fetch_update(Relaxed, Relaxed, taken).ok()?;
        // The task reads it when it sends the request.
        state.window_bytes.store(window_bytes, Relaxed);
        Some(Place { client: self.clone() })
    }

    /// Returns the number of flows that the connection carries at a time, as far as is known.
    #[must_use]
    pub fn streams_max(&self) -> usize {
        self.send.current_max_send_streams().min(self.state.refused_beyond.load(Relaxed))
    }

    /// Returns false if no more flows can be opened.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.state.is_closed.load(Relaxed)
    }

    /// Returns true if a flow has a place.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.state.streams.load(Relaxed) > 0
    }

    /// Gives no further place. Flows that have one go on.
    pub fn close(&self) {
        self.state.is_closed.store(true, Relaxed);
    }

    /// Notes that the server carries fewer flows than have a place. A connection that carries none is of no use.
    fn take_fewer(&self) {
        let fewer = self.state.streams.load(Relaxed).saturating_sub(1);
        self.state.refused_beyond.fetch_min(fewer, Relaxed);
        if fewer == 0 {
            self.close();
        }
    }

    /// Marks the connection as ended, before it has processed a request.
    fn ended(&self, error: h2::Error) -> OpenError {
        self.close();
        if error.is_go_away() && error.is_remote() {
            return OpenError::Draining;
        }
        OpenError::Stale(self.peer.failure(error))
    }
}

/// The place of one flow on a connection. It is free again when this is dropped.
pub struct Place {
    client: Client,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.client.state.streams.fetch_sub(1, Relaxed);
    }
}

/// The reason why no flow was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The server has refused the flow.
    #[error("its agent answered {0}")]
    Refused(StatusCode),
    /// The server takes no more flows on this connection, and has not processed the request. Another connection may.
    #[error("its agent is draining")]
    Draining,
    /// The server has not processed the request, because the connection has its limit of streams. Another connection may.
    #[error("its agent takes no more flows on the connection")]
    Full,
    /// The connection ended before the answer. The flow may be tried on a new connection.
    #[error("the connection ended before its agent answered: {0}")]
    Stale(#[source] TunnelError),
    /// The server has reset the stream before an answer.
    #[error("its agent reset the request: {0}")]
    Reset(Reason),
    /// The peer's kernel does not acknowledge the request. The flow may be tried on a new connection.
    #[error("the peer of the connection does not answer")]
    Silent,
    /// The connection failed, and another one would fail too.
    #[error(transparent)]
    Tunnel(TunnelError),
}

impl OpenError {
    /// Returns true if another connection may open the flow.
    #[must_use]
    pub fn is_of_connection(&self) -> bool {
        matches!(self, Self::Draining | Self::Full | Self::Stale(_))
    }

    /// Returns the reason for which the connection is refused.
    #[must_use]
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::Refused(status) => refused(*status),
            Self::Draining => RefusalReason::Draining,
            Self::Full => RefusalReason::Overloaded,
            Self::Stale(error) => error.reason(),
            Self::Reset(_) => RefusalReason::Internal,
            Self::Silent => RefusalReason::PeerUnreachable,
            Self::Tunnel(error) => error.reason(),
        }
    }
}

/// Returns the meaning of an answer. 503 stands for an application that refuses and for one that cannot be reached.
fn refused(status: StatusCode) -> RefusalReason {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RefusalReason::Policy,
        StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND => RefusalReason::UnknownDestination,
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY => RefusalReason::ConnectionRefused,
        StatusCode::GATEWAY_TIMEOUT => RefusalReason::TimedOut,
        StatusCode::TOO_MANY_REQUESTS => RefusalReason::Overloaded,
        _ => RefusalReason::Other,
    }
}

impl Place {
    /// Returns the server.
    #[must_use]
    pub fn peer(&self) -> &Arc<Peer> {
        &self.client.peer
    }

    /// Returns the connection.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Asks for a flow. `baggage` describes its source. The stream is reset if the result is dropped.
    ///
    /// # Errors
    /// [`OpenError::Stale`].
    pub async fn ask(&self, connect: &Connect, baggage: &str) -> Result<Asked, OpenError> {
        let client = &self.client;
        let mut send = client.send.clone().ready().await.map_err(|error| client.ended(error))?;
        let (response, send) =
            send.send_request(connect.request(baggage), false).map_err(|error| client.ended(error))?;
        Ok(Asked { response, send: Some(send), client: client.clone() })
    }
}

/// A flow that has been asked for.
pub struct Asked {
    response: ResponseFuture,
    /// None after the answer.
    send: Option<SendStream<Bytes>>,
    client: Client,
}

impl Asked {
    /// Waits for the answer, or until the peer has not acknowledged the request for a few round trips. Cancel-safe.
    ///
    /// # Errors
    /// [`OpenError::Silent`] if the peer does not acknowledge: [`Asked::answered`] waits on. Others are final.
    pub async fn acknowledged(&mut self) -> Result<FlowStream, OpenError> {
        self.wait(Silence::Bounded).await
    }

    /// Waits on after [`OpenError::Silent`]. Cancel-safe.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn answered(&mut self) -> Result<FlowStream, OpenError> {
        self.wait(Silence::Allowed).await
    }

    /// Does the same, and asks the peer's kernel whether it has the request.
    ///
    /// # Errors
    /// As [`Asked::acknowledged`].
    pub async fn answered_if_received(&mut self) -> Result<FlowStream, OpenError> {
        // A connection that cannot be asked has ended, which the wait reports.
        let _ = ask_peer(self.client.peer.socket());
        self.wait(Silence::Bounded).await
    }

    async fn wait(&mut self, silence: Silence) -> Result<FlowStream, OpenError> {
        let begun = Instant::now();
        let mut look = pin!(sleep(patience(Duration::ZERO)));
        poll_fn(|cx| {
            if let Poll::Ready(answer) = Pin::new(&mut self.response).poll(cx) {
                return Poll::Ready(self.take_answer(answer));
            }
            while look.as_mut().poll(cx).is_ready() {
                let next = self.check_answer(begun.elapsed(), silence)?;
                look.as_mut().reset(begun + next);
            }
            Poll::Pending
        })
        .await
    }

    fn take_answer(
        &mut self,
        answer: Result<http::Response<RecvStream>, h2::Error>,
    ) -> Result<FlowStream, OpenError> {
        match answer {
            Ok(response) if response.status() == StatusCode::OK => {
                let send = self.send.take().ok_or(OpenError::Tunnel(TunnelError::Closed))?;
                Ok(FlowStream::new(send, Received::new(response.into_body()), self.client.peer.clone()))
            }
            Ok(response) => Err(OpenError::Refused(response.status())),
            // The agent's own GOAWAY says nothing about the request.
            Err(error) if error.is_go_away() && error.is_remote() => Err(self.client.ended(error)),
            Err(error) if error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM) => {
                self.client.take_fewer();
                Err(OpenError::Full)
            }
            Err(error) if error.is_reset() => {
                Err(OpenError::Reset(error.reason().unwrap_or(Reason::INTERNAL_ERROR)))
            }
            Err(error) => match self.client.peer.failure(error) {
                gone if matches!(gone.reason(), RefusalReason::Io | RefusalReason::Closed) => {
                    Err(OpenError::Stale(gone))
                }
                failed => Err(OpenError::Tunnel(failed)),
            },
        }
    }

    /// Looks at an answer that has not come in `waited`. Returns the time at which to look again.
    fn check_answer(&self, waited: Duration, silence: Silence) -> Result<Duration, OpenError> {
        match look(self.client.peer.socket(), waited, silence)
            .map_err(|error| OpenError::Tunnel(error.into()))?
        {
            Look::Again(at) => Ok(at),
            Look::Silent => Err(OpenError::Silent),
            Look::TooLate => Err(OpenError::Tunnel(TunnelError::Timeout {
                what: "the answer to CONNECT",
                limit: OPEN_MAX,
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_has_a_reason() {
        for (status, reason) in [
            (400, RefusalReason::UnknownDestination),
            (401, RefusalReason::Policy),
            (403, RefusalReason::Policy),
            (404, RefusalReason::UnknownDestination),
            (429, RefusalReason::Overloaded),
            (500, RefusalReason::Other),
            (502, RefusalReason::ConnectionRefused),
            (503, RefusalReason::ConnectionRefused),
            (504, RefusalReason::TimedOut),
            (204, RefusalReason::Other),
        ] {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(OpenError::Refused(status).reason(), reason, "{status}");
        }
    }
}
