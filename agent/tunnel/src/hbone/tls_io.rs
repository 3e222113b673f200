//! The content of the records of one TLS connection as a stream of bytes, for HTTP/2.
//!
//! The rules of `stream` and `record` hold: KeyUpdate is answered, close_notify is the end of the stream, and an end without it is an
//! error. At most 64 KiB of sealed records are unsent. A quiet connection holds no buffer.

use std::{
    future::Future as _,
    io::{self, IoSlice},
    ops::Range,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use tacit_core::refusal::RefusalReason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

use crate::{
    TunnelError,
    record::{Opened, record_bytes},
    socket,
    stream::{Established, TlsStream},
};

/// Bytes that are read at a time: four full records.
const READ_BYTES: usize = 64 << 10;

/// Limit for the peer's end after the own one.
const LINGER_MAX: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(5) };

/// Reads in a row. Then the tasks of the streams take what has come: some 13,000 frames, if they have one byte each.
const READS_MAX: u32 = 2;

/// The first violation of TLS: its reason and its text. Each stream of the connection fails by it.
pub(super) type Failure = Arc<OnceLock<(RefusalReason, String)>>;

/// One TLS connection.
pub(super) struct TlsIo {
    tls: TlsStream,
    /// Received bytes, opened up to `unopened`.
    received: Vec<u8>,
    /// Opened bytes that are not taken.
    content: Range<usize>,
    unopened: usize,
    /// Reads since the task of the connection last waited.
    reads: u32,
    has_ended: bool,
    is_closed: bool,
    /// The wait for the peer's end, after the own one.
    linger: Option<Pin<Box<Sleep>>>,
    failure: Failure,
}

impl TlsIo {
    /// Takes the connection of a handshake. The rest of `established` stays.
    pub(super) fn new(established: Established) -> Self {
        Self {
            tls: established.stream,
            received: established.receive_buffer.into_unopened(),
            content: 0..0,
            unopened: 0,
            reads: 0,
            has_ended: false,
            is_closed: false,
            linger: None,
            failure: Failure::default(),
        }
    }

    pub(super) fn failure(&self) -> &Failure {
        &self.failure
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        self.tls.tcp()
    }

    /// Opens the next record that has content, or marks the end. Returns false if more bytes are needed.
    fn open_next(&mut self) -> Result<bool, TunnelError> {
        while self.content.is_empty() && !self.has_ended {
            let rest = &mut self.received[self.unopened..];
            let bytes = match record_bytes(rest).map_err(TunnelError::from)? {
                Some(bytes) if bytes <= rest.len() => bytes,
                _ => return Ok(false),
            };
            match self.tls.open(&mut rest[..bytes])? {
                Opened::Data(content) => {
                    self.content = self.unopened + content.start..self.unopened + content.end;
                }
                Opened::Nothing => {}
                Opened::Closed => self.has_ended = true,
            }
            self.unopened += bytes;
        }
        Ok(true)
    }

    /// Reads once from the socket.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.received.drain(..self.unopened);
        self.unopened = 0;
        if self.reads == READS_MAX {
            self.reads = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            if self.tls.tcp().poll_read_ready(cx)?.is_pending() {
                self.reads = 0;
                self.received.shrink_to_fit();
                return Poll::Pending;
            }
            self.received.reserve(READ_BYTES);
            match self.tls.tcp().try_read_buf(&mut self.received) {
                // A truncation: the peer has not sent close_notify.
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {
                    self.reads += 1;
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tls.poll_flush(cx).map_err(io_error)
    }
}

impl AsyncRead for TlsIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.open_next() {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => {
                    this.tls.send_alert_for(&error);
                    let _ = this.failure.set((error.reason(), error.to_string()));
                    return Poll::Ready(Err(io_error(error)));
                }
            }
            if this.tls.unsent() {
                // A KeyUpdate may be owed. The socket may be full; the task is woken when it is not.
                let _ = this.poll_send(cx)?;
            }
            ready!(this.poll_fill(cx))?;
        }
        let bytes = this.content.len().min(to.remaining());
        to.put_slice(&this.received[this.content.start..][..bytes]);
        this.content.start += bytes;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Poll::Ready(this.tls.queue_content(bytes).map_err(io_error))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.is_closed {
            this.is_closed = true;
            this.tls.queue_close().map_err(io_error)?;
        }
        ready!(this.poll_send(cx))?;
        if this.linger.is_none() {
            socket::finish(this.tls.tcp())?;
        }
        // The kernel answers what the peer still sends, such as WINDOW_UPDATE, with a reset if the socket is closed, and drops what is
        // unsent. So the end of the peer is waited for.
        let linger = this.linger.get_or_insert_with(|| Box::pin(sleep(LINGER_MAX)));
        if linger.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        loop {
            this.unopened = this.received.len();
            if ready!(this.poll_fill(cx)).is_err() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// HTTP/2 keeps the kind of an error, and its text.
fn io_error(error: TunnelError) -> io::Error {
    match error {
        TunnelError::Io(error) => error,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}
