//! A channel: one HTTP/2 connection to a server, and the calls on it.

use std::{
    future::{Future as _, poll_fn},
    pin::pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, PingPong, client::SendRequest};
use http::{
    HeaderMap, HeaderValue, Request,
    header::{CONTENT_TYPE as CONTENT_TYPE_FIELD, TE},
};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    CONTENT_TYPE,
    call::{CallError, Link, Origin, Receiver, Sender},
};

/// Longest headers of an answer, in bytes.
const HEADERS_MAX_BYTES: u32 = 32 * 1024;
/// Smallest and largest flow control window, in bytes: the minimum of HTTP/2, and enough for a large answer on a fast link.
const WINDOW_BYTES: (u32, u32) = (65_535, 1024 * 1024);

/// Settings of a channel.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Scheme and authority of requests: `https://istiod.istio-system.svc:15012`, or `http://localhost` for a Unix socket.
    pub origin: String,
    /// Longest message that is received, in bytes. A longer one ends its call.
    pub message_max_bytes: usize,
    /// PINGs that find a dead server.
    pub keep_alive: KeepAlive,
}

/// HTTP/2 PINGs of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlive {
    /// None. The deadline of the caller ends a call of a dead server.
    Off,
    /// A PING after each interval.
    ///
    /// Servers close connections with more PINGs than they allow. grpc-go allows one in 5 minutes unless the server has another
    /// setting, and one at any time after it has sent data.
    Every {
        /// Time between an answer and the next PING.
        interval: Duration,
        /// Limit for the answer. The connection is closed after it.
        timeout: Duration,
    },
}

/// The answer of a call with one message in each direction.
#[derive(Debug)]
pub struct Answer<M> {
    /// Headers of the answer; empty if the server did not answer.
    pub headers: HeaderMap,
    /// The message.
    pub outcome: Result<M, CallError>,
}

/// A connection to a server. The connection is closed after the channel and the senders and receivers of all calls are dropped.
pub struct Channel {
    requests: SendRequest<Bytes>,
    settings: Settings,
    origin: Origin,
}

impl Channel {
    /// Opens HTTP/2 on `io`. Needs a tokio runtime. The caller sets the deadline.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn open<IO>(io: IO, settings: Settings) -> Result<Self, CallError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (least, most) = WINDOW_BYTES;
        let window = u32::try_from(settings.message_max_bytes).unwrap_or(most).clamp(least, most);
        let (requests, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .max_header_list_size(HEADERS_MAX_BYTES)
            .initial_window_size(window)
            .initial_connection_window_size(window)
            .handshake(io)
            .await
            .map_err(CallError::Connection)?;
        let pings = connection.ping_pong();
        let silent = Arc::new(OnceLock::new());
        let (keep_alive, noted) = (settings.keep_alive, silent.clone());
        let driver = tokio::spawn(async move {
            tokio::select! {
                // Calls learn of an error themselves.
                _ = &mut connection => {}
                limit = silence(pings, keep_alive) => {
                    // Before the connection is dropped, so that its calls read it.
                    let _ = noted.set(limit);
                }
            }
        });
        let link = Arc::new(Link { silent, _driver: AbortOnDropHandle::new(driver) });
        Ok(Self { requests, settings, origin: Origin(Some(link)) })
    }

    /// Makes a call with one message in each direction. The caller sets the deadline; dropping the future cancels the call.
    pub async fn unary<Q, A>(&self, path: &str, metadata: &HeaderMap, message: &Q) -> Answer<A>
    where
        Q: Message,
        A: Message + Default,
    {
        let (mut sender, mut receiver) = match self.bidirectional::<Q, A>(path, metadata).await {
            Ok(call) => call,
            Err(error) => return Answer { headers: HeaderMap::new(), outcome: Err(error) },
        };
        let outcome = {
            let mut sending = pin!(async move {
                sender.send(message).await?;
                sender.finish().await
            });
            let mut sent = false;
            let mut only = pin!(receiver.only());
            // A server may refuse before it has read the message. If sending fails, the receiver has the reason.
            poll_fn(|cx| {
                sent = sent || sending.as_mut().poll(cx).is_ready();
                only.as_mut().poll(cx)
            })
            .await
        };
        Answer { headers: receiver.headers().clone(), outcome }
    }

    /// Makes a call with one message, answered by a stream of messages.
    ///
    /// # Errors
    /// [`CallError`] if the call cannot be made.
    pub async fn server_stream<Q, A>(
        &self,
        path: &str,
        metadata: &HeaderMap,
        message: &Q,
    ) -> Result<Receiver<A>, CallError>
    where
        Q: Message,
        A: Message + Default,
    {
        let (mut sender, receiver) = self.bidirectional::<Q, A>(path, metadata).await?;
        // If sending fails, the receiver has the reason.
        if sender.send(message).await.is_ok() {
            let _ = sender.finish().await;
        }
        Ok(receiver)
    }

    /// Makes a call with streams of messages in both directions. It does not wait for the server's first answer.
    ///
    /// # Errors
    /// [`CallError`] if the call cannot be made.
    pub async fn bidirectional<Q, A>(
        &self,
        path: &str,
        metadata: &HeaderMap,
    ) -> Result<(Sender<Q>, Receiver<A>), CallError>
    where
        Q: Message,
        A: Message + Default,
    {
        let mut request = Request::post(format!("{}{path}", self.settings.origin)).body(())?;
        *request.headers_mut() = metadata.clone();
        request.headers_mut().insert(CONTENT_TYPE_FIELD, HeaderValue::from_static(CONTENT_TYPE));
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        let failed = |e| self.origin.error(e);
        let mut requests = self.requests.clone().ready().await.map_err(failed)?;
        let (response, stream) = requests.send_request(request, false).map_err(failed)?;
        let receiver = Receiver::new(response, self.settings.message_max_bytes, self.origin.clone());
        Ok((Sender::new(stream, self.origin.clone()), receiver))
    }
}

/// Returns the limit that the server exceeded. Never returns without keep-alive or after the connection has ended.
async fn silence(pings: Option<PingPong>, keep_alive: KeepAlive) -> Duration {
    if let (Some(mut pings), KeepAlive::Every { interval, timeout: limit }) = (pings, keep_alive) {
        loop {
            sleep(interval).await;
            match timeout(limit, pings.ping(Ping::opaque())).await {
                Ok(Ok(_)) => {}
                // The connection has ended.
                Ok(Err(_)) => break,
                Err(_) => return limit,
            }
        }
    }
    std::future::pending().await
}
