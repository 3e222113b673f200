//! The calls of one connection, as a server sees them. It is for simulated servers: connections, streams and time are not bounded.

use std::marker::PhantomData;

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE as CONTENT_TYPE_FIELD};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    CONTENT_TYPE,
    call::{CallError, Frames, Origin, Sender},
    status::Status,
};

/// A connection of a client. It runs only while [`Connection::next`] is awaited.
pub struct Connection<IO> {
    inner: h2::server::Connection<IO, Bytes>,
    message_max_bytes: usize,
}

/// One call.
pub struct Call {
    /// Path of the method.
    pub path: String,
    /// Metadata.
    pub headers: HeaderMap,
    requests: RecvStream,
    response: SendResponse<Bytes>,
    message_max_bytes: usize,
}

/// The messages of the client.
pub struct Requests<M> {
    frames: Frames,
    kind: PhantomData<fn() -> M>,
}

/// The server's side of a call.
pub struct Replies<M> {
    response: SendResponse<Bytes>,
    /// After the headers.
    sender: Option<Sender<M>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Connection<IO> {
    /// Opens HTTP/2 on `io`, for messages of at most `message_max_bytes`.
    ///
    /// # Errors
    /// [`CallError::Connection`].
    pub async fn open(io: IO, message_max_bytes: usize) -> Result<Self, CallError> {
        let inner = h2::server::handshake(io).await.map_err(CallError::Connection)?;
        Ok(Self { inner, message_max_bytes })
    }

    /// Returns the next call; `None` after the connection has ended.
    pub async fn next(&mut self) -> Option<Call> {
        let (request, response) = self.inner.accept().await?.ok()?;
        let (head, requests) = request.into_parts();
        let path = head.uri.path().to_owned();
        Some(Call {
            path,
            headers: head.headers,
            requests,
            response,
            message_max_bytes: self.message_max_bytes,
        })
    }
}

impl Call {
    /// Returns both directions of the call.
    pub fn start<Q, A>(self) -> (Requests<Q>, Replies<A>)
    where
        Q: Message + Default,
        A: Message,
    {
        let frames = Frames::new(self.requests, self.message_max_bytes, Origin(None));
        (Requests { frames, kind: PhantomData }, Replies { response: self.response, sender: None })
    }
}

impl<M: Message + Default> Requests<M> {
    /// Returns the client's next message; `None` after the last one.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn message(&mut self) -> Result<Option<M>, CallError> {
        self.frames.next().await
    }
}

impl<M: Message> Replies<M> {
    /// Sends an answer, after the headers.
    ///
    /// # Errors
    /// [`CallError`] if the client is gone.
    pub async fn send(&mut self, message: &M) -> Result<(), CallError> {
        self.opened()?.send(message).await
    }

    /// Sends the headers, if they were not sent.
    fn opened(&mut self) -> Result<&mut Sender<M>, CallError> {
        match &mut self.sender {
            Some(sender) => Ok(sender),
            unopened => {
                let sent = self.response.send_response(headers(), false);
                let stream = sent.map_err(|e| Origin(None).error(e))?;
                Ok(unopened.insert(Sender::new(stream, Origin(None))))
            }
        }
    }

    /// Ends the call. The status is in the headers if there was no answer.
    ///
    /// # Errors
    /// [`CallError`] if the client is gone.
    pub async fn finish(mut self, status: &Status) -> Result<(), CallError> {
        if let Some(sender) = self.sender {
            return sender.finish_with(status.trailers()).await;
        }
        let mut response = headers();
        response.headers_mut().extend(status.trailers());
        self.response.send_response(response, true).map(drop).map_err(|e| Origin(None).error(e))
    }

    /// Resets the call.
    pub fn reset(mut self, reason: Reason) {
        match self.sender {
            Some(sender) => sender.reset(reason),
            None => self.response.send_reset(reason),
        }
    }
}

fn headers() -> Response<()> {
    let mut response = Response::new(());
    response.headers_mut().insert(CONTENT_TYPE_FIELD, HeaderValue::from_static(CONTENT_TYPE));
    response
}
