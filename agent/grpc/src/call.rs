//! A call: the sender of its messages, the receiver of its answers, and its end.

use std::{
    future::poll_fn,
    marker::PhantomData,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream, client::ResponseFuture};
use http::{HeaderMap, Response, StatusCode, header::CONTENT_TYPE as CONTENT_TYPE_FIELD};
use prost::Message;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    CONTENT_TYPE,
    frame::{self, Deframer, MessageError},
    status::{Code, Status},
};

/// The reason why a call ended without success, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection failed, or the server closed it.
    #[error("the connection broke: {0}")]
    Connection(#[source] h2::Error),
    /// The server does not answer.
    #[error("the server did not answer an HTTP/2 PING within {0:?}")]
    Silent(Duration),
    /// The server reset the call.
    #[error("the server reset the call: {0}")]
    Reset(Reason),
    /// The call has ended before.
    #[error("the call has ended")]
    Ended,
    /// The address or path is not usable in a request.
    #[error("no request can be made: {0}")]
    Request(#[from] http::Error),
    /// The answer is not one of gRPC.
    #[error("the answer is not gRPC: {0}")]
    Protocol(String),
    /// A message cannot be read.
    #[error("the answer cannot be read: {0}")]
    Message(#[from] MessageError),
    /// The server ended the call with another code than OK.
    #[error("the server refused, {0}")]
    Status(Status),
}

impl CallError {
    /// Returns the status with which the server ended the call; `None` if the call ended in another way.
    #[must_use]
    pub fn status(&self) -> Option<&Status> {
        match self {
            Self::Status(status) => Some(status),
            _ => None,
        }
    }
}

/// A connection while calls use it. The last user closes it.
pub(crate) struct Link {
    pub(crate) silent: Arc<OnceLock<Duration>>,
    pub(crate) _driver: AbortOnDropHandle<()>,
}

/// The state of a connection, for the errors of its calls.
#[derive(Clone)]
pub(crate) struct Origin(pub(crate) Option<Arc<Link>>);

impl Origin {
    pub(crate) fn error(&self, error: h2::Error) -> CallError {
        let silent = self.0.as_ref().and_then(|link| link.silent.get());
        match (silent, error.reason()) {
            (Some(limit), _) => CallError::Silent(*limit),
            (None, Some(reason)) if error.is_reset() => CallError::Reset(reason),
            _ => CallError::Connection(error),
        }
    }
}

/// Sends the messages of one direction of a call.
pub struct Sender<M> {
    stream: SendStream<Bytes>,
    /// Bytes of the latest message that the peer's window has not admitted yet.
    unsent: BytesMut,
    origin: Origin,
    kind: PhantomData<fn(M)>,
}

impl<M: Message> Sender<M> {
    pub(crate) fn new(stream: SendStream<Bytes>, origin: Origin) -> Self {
        Self { stream, unsent: BytesMut::new(), origin, kind: PhantomData }
    }

    /// Sends a message. Waits until the peer's flow control has admitted all of it. A message whose `send` was dropped half-way is
    /// completed by the next `send` or `finish`.
    ///
    /// # Errors
    /// [`CallError`] if the call or the connection has ended. The receiver has the status.
    pub async fn send(&mut self, message: &M) -> Result<(), CallError> {
        self.flush().await?;
        self.unsent.extend_from_slice(&frame::frame(message));
        self.flush().await
    }

    /// Ends this direction.
    ///
    /// # Errors
    /// As of [`Sender::send`].
    pub async fn finish(mut self) -> Result<(), CallError> {
        self.flush().await?;
        self.stream.send_data(Bytes::new(), true).map_err(|e| self.origin.error(e))
    }

    pub(crate) async fn finish_with(mut self, trailers: HeaderMap) -> Result<(), CallError> {
        self.flush().await?;
        self.stream.send_trailers(trailers).map_err(|e| self.origin.error(e))
    }

    pub(crate) fn reset(mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    async fn flush(&mut self) -> Result<(), CallError> {
        while !self.unsent.is_empty() {
            self.stream.reserve_capacity(self.unsent.len());
            let admitted = poll_fn(|cx| self.stream.poll_capacity(cx)).await;
            let admitted = admitted.ok_or(CallError::Ended)?.map_err(|e| self.origin.error(e))?;
            let piece = self.unsent.split_to(admitted.min(self.unsent.len())).freeze();
            self.stream.send_data(piece, false).map_err(|e| self.origin.error(e))?;
        }
        Ok(())
    }
}

/// The frames of one direction.
pub(crate) struct Frames {
    stream: RecvStream,
    deframer: Deframer,
    origin: Origin,
}

impl Frames {
    pub(crate) fn new(stream: RecvStream, max_bytes: usize, origin: Origin) -> Self {
        Self { stream, deframer: Deframer::new(max_bytes), origin }
    }

    /// Returns the next message; `None` after the last one. Loses nothing if dropped while it waits.
    pub(crate) async fn next<M: Message + Default>(&mut self) -> Result<Option<M>, CallError> {
        loop {
            if let Some(frame) = self.deframer.next()? {
                return Ok(Some(frame::decode(&frame)?));
            }
            match self.stream.data().await {
                Some(Ok(bytes)) => {
                    self.deframer.push(&bytes);
                    let released = self.stream.flow_control().release_capacity(bytes.len());
                    released.map_err(|e| self.origin.error(e))?;
                }
                Some(Err(error)) => return Err(self.origin.error(error)),
                None => {
                    self.deframer.end()?;
                    return Ok(None);
                }
            }
        }
    }

    async fn trailers(&mut self) -> Result<Option<HeaderMap>, CallError> {
        self.stream.trailers().await.map_err(|e| self.origin.error(e))
    }
}

/// Receives the answers of a call. Dropping it cancels the call.
pub struct Receiver<M> {
    state: State,
    headers: HeaderMap,
    max_bytes: usize,
    origin: Origin,
    kind: PhantomData<fn() -> M>,
}

enum State {
    /// The server has not answered. A server of a stream may do that with its first message only.
    Asked(ResponseFuture),
    Open(Box<Frames>),
    Ended,
}

impl<M: Message + Default> Receiver<M> {
    pub(crate) fn new(response: ResponseFuture, max_bytes: usize, origin: Origin) -> Self {
        let headers = HeaderMap::new();
        Self { state: State::Asked(response), headers, max_bytes, origin, kind: PhantomData }
    }

    /// Returns the headers of the answer; empty before the first [`Receiver::message`] has ended.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Returns the next answer; `None` if the server ended the call with status OK. Loses nothing if dropped while it waits.
    ///
    /// # Errors
    /// [`CallError`]; the call has ended then.
    pub async fn message(&mut self) -> Result<Option<M>, CallError> {
        let outcome = self.advance().await;
        if !matches!(outcome, Ok(Some(_))) {
            self.state = State::Ended;
        }
        outcome
    }

    async fn advance(&mut self) -> Result<Option<M>, CallError> {
        if let State::Asked(response) = &mut self.state {
            let response = response.await.map_err(|e| self.origin.error(e))?;
            let (headers, stream) = head(response)?;
            self.headers = headers;
            // Without any message, the status may be in the headers.
            if let Some(status) = Status::read(&self.headers) {
                return end(status);
            }
            is_grpc(&self.headers)?;
            self.state = State::Open(Box::new(Frames::new(stream, self.max_bytes, self.origin.clone())));
        }
        let State::Open(frames) = &mut self.state else { return Err(CallError::Ended) };
        if let Some(message) = frames.next().await? {
            return Ok(Some(message));
        }
        let trailers = frames.trailers().await?.unwrap_or_default();
        match Status::read(&trailers) {
            Some(status) => end(status),
            None => Err(CallError::Protocol("it ended without a status".to_owned())),
        }
    }

    /// Returns the only answer of the call, after its status.
    pub(crate) async fn only(&mut self) -> Result<M, CallError> {
        let wrong = |count| CallError::Protocol(format!("{count} messages, expected one"));
        let message = self.message().await?.ok_or_else(|| wrong("no"))?;
        match self.message().await? {
            None => Ok(message),
            Some(_) => Err(wrong("several")),
        }
    }
}

fn head(response: Response<RecvStream>) -> Result<(HeaderMap, RecvStream), CallError> {
    let (head, stream) = response.into_parts();
    if head.status != StatusCode::OK {
        return Err(CallError::Protocol(format!("HTTP status {}", head.status)));
    }
    Ok((head.headers, stream))
}

fn is_grpc(headers: &HeaderMap) -> Result<(), CallError> {
    let kind = headers.get(CONTENT_TYPE_FIELD).map(|kind| String::from_utf8_lossy(kind.as_bytes()));
    match kind {
        Some(kind) if kind.starts_with(CONTENT_TYPE) => Ok(()),
        kind => {
            let kind = kind.unwrap_or_default();
            Err(CallError::Protocol(format!("content type {kind:?}, expected {CONTENT_TYPE:?}")))
        }
    }
}

fn end<M>(status: Status) -> Result<Option<M>, CallError> {
    if status.code == Code::Ok { Ok(None) } else { Err(CallError::Status(status)) }
}
