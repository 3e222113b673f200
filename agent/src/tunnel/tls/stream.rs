//! The bytes of one TLS connection: handshake by tokio-rustls, then records moved between rustls and the socket here.
//!
//! After the handshake rustls is driven directly, for three things its stream adapters do not give: reads of many records at
//! once (the adapters read 4 KiB a system call), a promise that one frame fills one record, and buffers that are held only
//! while bytes are in them. This is the seam for a record layer of our own.

use std::{
    future::Future,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::{Connection, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{TlsInfo, TunnelError, client_config, from_io, negotiated, server_config};
use crate::{
    identity::{SpiffeId, certificate, certificate::Validity, credentials::Credentials},
    tunnel::{buffers::Buffer, socket},
};

/// A handshake takes two round trips and about a millisecond of work.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// A peer whose node has vanished is noticed after about two minutes without an answer. The applications' own keep-alive
/// ends at their agents and cannot notice it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// An established TLS connection.
pub(in crate::tunnel) struct TlsStream {
    tcp: TcpStream,
    connection: Connection,
    incoming: Incoming,
}

/// What the handshake has shown.
pub(in crate::tunnel) struct Established {
    pub(in crate::tunnel) stream: TlsStream,
    pub(in crate::tunnel) peer: SpiffeId,
    pub(in crate::tunnel) peer_validity: Validity,
    pub(in crate::tunnel) tls: TlsInfo,
}

/// Connects as `own` to a server that must be `expected`.
pub(in crate::tunnel) async fn connect(
    tcp: TcpStream,
    own: &Credentials,
    expected: &SpiffeId,
) -> Result<Established, TunnelError> {
    prepare(&tcp)?;
    // Only for rustls to have a name: it is neither sent nor compared.
    let name = ServerName::from(tcp.peer_addr()?.ip());
    let connector = TlsConnector::from(Arc::new(client_config(own, expected)));
    let (tcp, connection) = bounded(connector.connect(name, tcp)).await?.into_inner();
    established(tcp, connection.into())
}

/// Accepts a client of the trust domain of `own`.
pub(in crate::tunnel) async fn accept(tcp: TcpStream, own: &Credentials) -> Result<Established, TunnelError> {
    prepare(&tcp)?;
    let acceptor = TlsAcceptor::from(server_config(own));
    let (tcp, connection) = bounded(acceptor.accept(tcp)).await?.into_inner();
    established(tcp, connection.into())
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)?;
    tcp.set_nodelay(true)
}

async fn bounded<T>(handshake: impl Future<Output = io::Result<T>>) -> Result<T, TunnelError> {
    match timeout(HANDSHAKE_MAX, handshake).await {
        Ok(outcome) => outcome.map_err(from_io),
        Err(_) => Err(TunnelError::Timeout { what: "the TLS handshake", limit: HANDSHAKE_MAX }),
    }
}

fn established(tcp: TcpStream, mut connection: Connection) -> Result<Established, TunnelError> {
    let tls = negotiated(&connection)?;
    // The verifiers have accepted this certificate; reading it again cannot say anything else.
    let leaf = connection.peer_certificates().and_then(|chain| chain.first());
    let leaf = leaf.ok_or(super::Refusal::NoClientCertificate)?;
    let peer = certificate::spiffe_id(leaf).map_err(super::Refusal::from)?;
    let peer_validity = certificate::validity(leaf).map_err(super::Refusal::from)?;
    // A bound here would cut a frame in two records; what is queued is bounded by `queue`'s callers.
    connection.set_buffer_limit(None);
    let stream = TlsStream { tcp, connection, incoming: Incoming::default() };
    Ok(Established { stream, peer, peer_validity, tls })
}

impl TlsStream {
    /// The TCP connection below.
    pub(in crate::tunnel) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Encrypts `frames`, cut into TLS records at every 2^14 bytes. They are sent by [`TlsStream::poll_flush`]; queue more
    /// only when nothing is unsent, which bounds what is held here to one batch.
    pub(in crate::tunnel) fn queue(&mut self, frames: &[u8]) -> Result<(), TunnelError> {
        self.connection.writer().write_all(frames).map_err(from_io)
    }

    /// True while encrypted bytes wait to be sent.
    pub(in crate::tunnel) fn unsent(&self) -> bool {
        self.connection.wants_write()
    }

    /// Sends what is queued.
    pub(in crate::tunnel) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Unblocked(&self.tcp)) {
                Ok(0) => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready!(self.tcp.poll_write_ready(cx))?,
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Decrypts into `room` what is there. `Ok(0)` means that the peer has closed the session.
    pub(in crate::tunnel) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        room: &mut [u8],
    ) -> Poll<Result<usize, TunnelError>> {
        let mut filled = 0;
        loop {
            match self.connection.reader().read(&mut room[filled..]) {
                Ok(0) => return Poll::Ready(Ok(filled)),
                Ok(read_bytes) => filled += read_bytes,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.incoming.is_empty() {
                        if filled > 0 {
                            return Poll::Ready(Ok(filled));
                        }
                        ready!(self.incoming.poll_fill(&self.tcp, cx))?;
                    }
                    self.decrypt()?;
                }
                Err(e) => return Poll::Ready(Err(from_io(e))),
            }
            if filled == room.len() {
                return Poll::Ready(Ok(filled));
            }
        }
    }

    /// Hands received bytes to rustls; no bytes stand for the end of the stream.
    fn decrypt(&mut self) -> Result<(), TunnelError> {
        self.connection.read_tls(&mut self.incoming)?;
        let processed = self.connection.process_new_packets();
        self.incoming.release();
        if let Err(error) = processed {
            // Tells the peer by an alert, if the socket takes it at once.
            let _ = self.connection.write_tls(&mut Unblocked(&self.tcp));
            return Err(error.into());
        }
        Ok(())
    }

    /// True when the connection stands and no byte waits, decrypted or not.
    pub(in crate::tunnel) fn is_quiet(&self) -> bool {
        self.incoming.is_empty() && !self.connection.wants_write() && socket::is_quiet(&self.tcp)
    }

    /// The alert the peer sent before it went, if one has arrived; for when a write has failed.
    pub(in crate::tunnel) fn last_words(&mut self, cx: &mut Context<'_>) -> Option<TunnelError> {
        match self.poll_read(cx, &mut [0; 1]) {
            Poll::Ready(Err(TunnelError::Io(_))) | Poll::Ready(Ok(_)) | Poll::Pending => None,
            Poll::Ready(Err(alert)) => Some(alert),
        }
    }

    /// Sends close_notify if the socket takes it at once, and closes. Never waits.
    pub(in crate::tunnel) fn close(mut self) {
        self.connection.send_close_notify();
        let _ = self.connection.write_tls(&mut Unblocked(&self.tcp));
    }
}

/// Bytes read from the socket which rustls has not taken yet.
#[derive(Default)]
struct Incoming {
    /// `None` when empty.
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Reads once, as much as there is. Stays empty at the end of the stream.
    fn poll_fill(&mut self, tcp: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(tcp.poll_read_ready(cx))?;
        let mut buffer = Buffer::take();
        let read_bytes = ready!(socket::poll_read(tcp, cx, &mut [IoSliceMut::new(&mut buffer)]))?;
        (self.start, self.end) = (0, read_bytes);
        self.buffer = Some(buffer);
        Poll::Ready(Ok(()))
    }

    fn release(&mut self) {
        if self.is_empty() {
            self.buffer = None;
        }
    }
}

impl Read for Incoming {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut rest = self.buffer.as_deref().map_or(&[][..], |buffer| &buffer[self.start..self.end]);
        let read_bytes = rest.read(out)?;
        self.start += read_bytes;
        Ok(read_bytes)
    }
}

/// Writes without waiting.
struct Unblocked<'a>(&'a TcpStream);

impl Write for Unblocked<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
