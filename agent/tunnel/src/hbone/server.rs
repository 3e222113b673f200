//! One connection of a client: its requests, and their answers.
//!
//! The connection moves only while [`Server::next`] is polled, so its task polls it until the end, beside the tasks of the streams.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use http::{HeaderValue, Response, StatusCode};
use tacit_core::{shares::STREAM_WINDOW_MAX, spiffe::SpiffeId};
use tokio::time::timeout;

use super::{
    BadRequest, Connect, FIELDS_MAX_BYTES, FRAME_MAX_BYTES, FRAMES_BUDGET_BYTES, FlowStream, Peer,
    RESETS_KEPT, RESETS_KEPT_FOR, STREAMS_MAX, UNSENT_MAX_BYTES,
    keep_alive::{self, KeepAlive},
    request::BAGGAGE,
    stream::Received,
    tls_io::TlsIo,
    window::Window,
};
use crate::{TunnelError, stream::Established};

/// Limit for the first bytes of HTTP/2 after the handshake.
const PREFACE_MAX: Duration = Duration::from_secs(10);

/// The connection of an authenticated client.
pub struct Server {
    connection: Connection<TlsIo, Bytes>,
    keep_alive: KeepAlive,
    client: Arc<Peer>,
    window: Window,
}

/// A client that has chosen HBONE in the TLS handshake.
pub struct Accepted(pub(crate) Established);

impl Accepted {
    /// Begins HTTP/2. Bounded in time. `window_bytes` is the first window of a stream.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn begin(self, window_bytes: u32) -> Result<Box<Server>, TunnelError> {
        Server::begin(self.0, window_bytes).await.map(Box::new)
    }

    /// Returns the identity in the client's certificate.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.0.peer
    }
}

impl Server {
    async fn begin(established: Established, window_bytes: u32) -> Result<Self, TunnelError> {
        let (client, io) = Peer::of(established)?;
        let preface = Builder::new()
            .initial_window_size(window_bytes)
            // Each stream has its own bound.
            .initial_connection_window_size(STREAMS_MAX * STREAM_WINDOW_MAX)
            .data_frame_budget(FRAMES_BUDGET_BYTES)
            .max_concurrent_streams(STREAMS_MAX)
            .max_concurrent_reset_streams(RESETS_KEPT)
            .reset_stream_duration(RESETS_KEPT_FOR)
            .max_frame_size(FRAME_MAX_BYTES)
            .max_header_list_size(FIELDS_MAX_BYTES)
            .max_send_buffer_size(UNSENT_MAX_BYTES.min(window_bytes) as usize)
            .handshake(io);
        let limit = PREFACE_MAX;
        let mut connection = timeout(limit, preface)
            .await
            .map_err(|_| TunnelError::Timeout { what: "the HTTP/2 preface", limit })??;
        let pings = connection.ping_pong().ok_or(TunnelError::Closed)?;
        let (keep_alive, client) = (KeepAlive::new(pings), Arc::new(client));
        Ok(Self { connection, keep_alive, client, window: Window::new(window_bytes) })
    }

    /// Returns the client.
    #[must_use]
    pub fn client(&self) -> &Arc<Peer> {
        &self.client
    }

    /// Returns true if streams are open.
    #[must_use]
    pub fn has_streams(&self) -> bool {
        self.connection.has_streams()
    }

    /// Sets the window of a stream, unless it is about the same already. Streams that are open get it too. Returns false if streams
    /// still have a much larger one, since the client has not acknowledged a smaller one: refuse its requests.
    #[must_use]
    pub fn set_window(&mut self, window_bytes: u32) -> bool {
        self.window.set(window_bytes, |bytes| self.connection.set_initial_window_size(bytes).is_ok())
    }

    /// Has the client open no more streams, by GOAWAY. The connection ends with its last stream.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }

    /// Returns the next request, or `None` at the end of the connection. Cancel-safe.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn next(&mut self) -> Result<Option<FlowRequest>, TunnelError> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Sends PING sooner, and waits less for the answer.
    #[cfg(test)]
    pub(super) fn hasten_pings(&mut self, limit: Duration) {
        self.keep_alive.hasten(limit);
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<FlowRequest>, TunnelError>> {
        // The connection first: it may have the answer to a PING.
        match self.connection.poll_accept(cx) {
            Poll::Ready(None) => return Poll::Ready(Ok(None)),
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
            Poll::Ready(Some(Ok((request, respond)))) => {
                let connect = Connect::parse(&request);
                let received = Received::new(request.into_body());
                let request = FlowRequest { connect, respond, received, client: self.client.clone() };
                return Poll::Ready(Ok(Some(request)));
            }
            Poll::Pending => {}
        }
        std::task::ready!(self.keep_alive.poll(cx));
        Poll::Ready(Err(TunnelError::Timeout { what: "the answer to a PING", limit: keep_alive::ANSWER_MAX }))
    }
}

/// The answer to a request that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// 400: the request is no CONNECT to this pod.
    BadRequest,
    /// 401: policy denies the flow, or the client's certificate does not prove it.
    Policy,
    /// 503: the application cannot be reached, or the agent does not carry the flow.
    Unavailable,
}

impl Refused {
    fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Policy => StatusCode::UNAUTHORIZED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// A request for a flow, to be answered. Its stream is reset if it is dropped.
pub struct FlowRequest {
    connect: Result<Connect, BadRequest>,
    respond: SendResponse<Bytes>,
    received: Received,
    client: Arc<Peer>,
}

impl FlowRequest {
    /// Returns the claims of the request.
    ///
    /// # Errors
    /// [`BadRequest`]: answer with 400.
    pub fn connect(&self) -> Result<Connect, BadRequest> {
        self.connect.clone()
    }

    /// Waits until the client gives the request up. Meanwhile what the client sends is kept.
    pub async fn abandoned(&mut self) {
        poll_fn(|cx| {
            let is_over = self.received.take(cx).is_err() || self.respond.poll_reset(cx).is_ready();
            if is_over { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Answers with another status than 200, and ends the stream.
    pub fn refuse(mut self, answer: Refused) {
        let mut response = Response::new(());
        *response.status_mut() = answer.status();
        // Fails only if the stream has ended.
        let _ = self.respond.send_response(response, true);
    }

    /// Answers with 200 and `baggage`, which describes the destination.
    ///
    /// # Errors
    /// [`TunnelError`] if the stream has ended.
    pub fn accept(mut self, baggage: &str) -> Result<FlowStream, TunnelError> {
        let mut response = Response::new(());
        if let Ok(baggage) = HeaderValue::from_str(baggage)
            && !baggage.is_empty()
        {
            response.headers_mut().insert(BAGGAGE, baggage);
        }
        let send = self.respond.send_response(response, false)?;
        Ok(FlowStream::new(send, self.received, self.client))
    }
}
