//! The bytes of one TLS connection on its socket: handshake, sealed records out, received bytes in.
//!
//! Queued bytes are sealed at once and sent in that order. Nothing is queued while a batch is unsent, so at most one batch is
//! buffered. Buffers are held only while they contain bytes.

#[cfg(test)]
mod openssl;

use std::{
    future::Future,
    io::{self, IoSlice, IoSliceMut},
    mem,
    ops::Deref,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::{
    AlertDescription, ContentType, client::UnbufferedClientConnection, pki_types::ServerName,
    server::UnbufferedServerConnection,
};
use tacit_core::spiffe::SpiffeId;
use tacit_identity::{
    certificate::{self, Validity},
    credentials::Credentials,
    peer_trust::PeerChain,
};
use tokio::{net::TcpStream, time::timeout};

use super::{
    batch,
    buffers::Buffer,
    receive_buffer::ReceiveBuffer,
    record::{CONTENT_MAX_BYTES, HEADER_BYTES, Opened, RecordError, Records, TAIL_BYTES},
    socket,
    tls::{
        PeerCertificateError, TlsInfo, TunnelError, VerifiedPeer, client_config,
        handshake::{self, Handshake},
        negotiated, server_config,
    },
};

/// Time limit of a handshake, which takes two round trips and about a millisecond of work.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Records that [`TlsStream::queue_content`] seals at a time: 64 KiB, as a small batch of frames.
const CONTENT_RECORDS: u64 = 4;

/// An established TLS connection.
pub(crate) struct TlsStream {
    tcp: TcpStream,
    records: Records,
    outgoing: Outgoing,
}

/// The results of a handshake.
pub(crate) struct Established {
    pub(crate) stream: TlsStream,
    /// Bytes received behind the handshake.
    pub(crate) receive_buffer: ReceiveBuffer,
    pub(crate) peer: SpiffeId,
    pub(crate) peer_validity: Validity,
    pub(crate) peer_chain: PeerChain,
    pub(crate) tls: TlsInfo,
}

/// Connects as `own` to a server that must have the identity `expected`.
pub(crate) async fn connect(
    tcp: TcpStream,
    own: &Credentials,
    expected: &SpiffeId,
) -> Result<Established, TunnelError> {
    tcp.set_nodelay(true)?;
    // rustls requires a name. The name is neither sent nor compared.
    let name = ServerName::from(tcp.peer_addr()?.ip());
    establish(tcp, UnbufferedClientConnection::new(client_config(own, expected), name)?).await
}

/// Accepts a client of the trust domain of `own`.
pub(crate) async fn accept(tcp: TcpStream, own: &Credentials) -> Result<Established, TunnelError> {
    tcp.set_nodelay(true)?;
    establish(tcp, UnbufferedServerConnection::new(server_config(own))?).await
}

async fn establish(tcp: TcpStream, mut connection: impl Handshake) -> Result<Established, TunnelError> {
    let (behind, verified) = bounded(handshake::run(&tcp, &mut connection)).await?;
    let tls = negotiated(connection.state());
    // The verifiers have accepted this certificate, so parsing it again cannot fail in another way.
    let leaf = connection.state().peer_certificates().and_then(|chain| chain.first());
    let leaf = leaf.ok_or(PeerCertificateError::NoClientCertificate)?;
    let VerifiedPeer { identity: peer, chain: peer_chain } = verified;
    let peer_validity = certificate::validity(leaf).map_err(PeerCertificateError::from)?;
    let (secrets, schedule) = connection.into_secrets()?;
    let mut stream =
        TlsStream { tcp, records: Records::new(secrets, schedule)?, outgoing: Outgoing::default() };
    let tls = tls.inspect_err(|error| match error {
        TunnelError::Alpn => stream.send_alert(AlertDescription::NoApplicationProtocol),
        _ => stream.send_alert(AlertDescription::HandshakeFailure),
    })?;
    let receive_buffer = ReceiveBuffer::with(behind);
    Ok(Established { stream, receive_buffer, peer, peer_validity, peer_chain, tls })
}

async fn bounded<T>(handshake: impl Future<Output = Result<T, TunnelError>>) -> Result<T, TunnelError> {
    let limit = HANDSHAKE_MAX;
    timeout(limit, handshake).await.unwrap_or(Err(TunnelError::Timeout { what: "the TLS handshake", limit }))
}

impl TlsStream {
    /// Returns the TCP connection.
    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Moves the stream to the calling thread's runtime.
    pub(crate) fn moved_to_this_thread(self) -> io::Result<Self> {
        Ok(Self { tcp: TcpStream::from_std(self.tcp.into_std()?)?, ..self })
    }

    /// Seals the `payload_bytes` in the slots of `batch` and queues them. Call it only if no batch is unsent.
    pub(crate) fn queue_batch(&mut self, mut batch: Buffer, payload_bytes: usize) -> Result<(), TunnelError> {
        self.queue_key_update(batch::records(payload_bytes))?;
        let records = &mut self.records;
        let sealed_bytes = batch::seal_frames(&mut batch, payload_bytes, |record| {
            records.seal(ContentType::ApplicationData, record)
        })?;
        self.outgoing.push(batch, sealed_bytes);
        Ok(())
    }

    /// Seals one frame in its own record and queues it.
    pub(crate) fn queue(&mut self, frame: &[u8]) -> Result<(), TunnelError> {
        self.queue_key_update(1)?;
        let record = self.records.sealed(ContentType::ApplicationData, frame)?;
        self.outgoing.behind.extend(record);
        Ok(())
    }

    /// Seals as much of `content` as fits into [`CONTENT_RECORDS`] records and queues it. Returns the number of bytes. Call it only if
    /// nothing is unsent.
    pub(crate) fn queue_content(&mut self, content: &[IoSlice<'_>]) -> Result<usize, TunnelError> {
        self.queue_key_update(CONTENT_RECORDS)?;
        let behind = &mut self.outgoing.behind.all;
        let (mut queued_bytes, mut slices) = (0, content.iter());
        let mut slice: &[u8] = &[];
        for _ in 0..CONTENT_RECORDS {
            let start = behind.len();
            behind.extend_from_slice(&[0; HEADER_BYTES]);
            let mut room = CONTENT_MAX_BYTES;
            while room > 0 {
                if slice.is_empty() {
                    let Some(next) = slices.next() else { break };
                    slice = next;
                }
                let (here, rest) = slice.split_at(room.min(slice.len()));
                behind.extend_from_slice(here);
                (slice, room) = (rest, room - here.len());
            }
            if room == CONTENT_MAX_BYTES {
                behind.truncate(start);
                break;
            }
            queued_bytes += CONTENT_MAX_BYTES - room;
            behind.resize(behind.len() + TAIL_BYTES, 0);
            self.records.seal(ContentType::ApplicationData, &mut behind[start..])?;
        }
        self.outgoing.behind.end = behind.len();
        Ok(queued_bytes)
    }

    /// Queues close_notify. Nothing may follow.
    pub(crate) fn queue_close(&mut self) -> Result<(), TunnelError> {
        let record = self.records.alert(AlertDescription::CloseNotify)?;
        self.outgoing.behind.extend(record);
        Ok(())
    }

    fn queue_key_update(&mut self, more: u64) -> Result<(), RecordError> {
        if let Some(record) = self.records.key_update(more)? {
            self.outgoing.behind.extend(record);
        }
        Ok(())
    }

    /// Returns true if bytes are unsent or a KeyUpdate is owed.
    pub(crate) fn unsent(&self) -> bool {
        !self.outgoing.is_empty() || self.records.owes_key_update()
    }

    /// Sends the queued bytes.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        if self.records.owes_key_update() {
            self.queue_key_update(0)?;
        }
        while !self.outgoing.is_empty() {
            match ready!(socket::poll_write(&self.tcp, cx, &self.outgoing.slices()))? {
                0 => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
                sent => self.outgoing.advance(sent),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads the available bytes into `receive_buffer` once.
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        receive_buffer: &mut ReceiveBuffer,
    ) -> Poll<Result<(), TunnelError>> {
        loop {
            // An idle flow takes no buffer.
            if self.tcp.poll_read_ready(cx)?.is_pending() {
                receive_buffer.pause();
                return Poll::Pending;
            }
            let room = receive_buffer.room();
            let room_bytes = room.len();
            match socket::try_read(&self.tcp, &mut [IoSliceMut::new(room)]).transpose()? {
                None => {}
                // The end of the stream without close_notify is a truncation.
                Some(0) => return Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
                Some(read_bytes) => {
                    receive_buffer.filled(read_bytes, room_bytes);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    /// Opens a complete record.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        self.records.open(record)
    }

    /// Sends the alert for `error`, if the socket accepts it at once.
    pub(crate) fn send_alert_for(&mut self, error: &TunnelError) {
        if let TunnelError::Record(error) = error
            && let Some(description) = error.alert()
        {
            self.send_alert(description);
        }
    }

    /// Returns true if the connection is open and no bytes are unsent or readable.
    pub(crate) fn is_quiet(&self) -> bool {
        !self.unsent() && socket::is_quiet(&self.tcp)
    }

    /// Sends close_notify if the socket accepts it at once, and closes. Never waits.
    pub(crate) fn close(mut self) {
        self.send_alert(AlertDescription::CloseNotify);
    }

    /// Sends an alert behind the queued bytes, if the socket accepts it at once.
    fn send_alert(&mut self, description: AlertDescription) {
        if let Ok(record) = self.records.alert(description) {
            self.outgoing.behind.extend(record);
            let _ = self.tcp.try_write_vectored(&self.outgoing.slices());
        }
    }
}

/// Sealed bytes in the order of sealing.
#[derive(Default)]
struct Outgoing {
    /// Small records before the batch.
    before: Unsent<Vec<u8>>,
    batch: Option<Unsent<Buffer>>,
    /// Small records behind the batch, or without a batch.
    behind: Unsent<Vec<u8>>,
}

/// The bytes of `all` from `start` to `end`.
#[derive(Default)]
struct Unsent<B> {
    all: B,
    start: usize,
    end: usize,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.before.is_empty() && self.batch.is_none() && self.behind.is_empty()
    }

    /// Appends a batch.
    fn push(&mut self, batch: Buffer, sealed_bytes: usize) {
        debug_assert!(self.batch.is_none() && self.before.is_empty(), "two batches");
        self.before = mem::take(&mut self.behind);
        self.batch = Some(Unsent { all: batch, start: 0, end: sealed_bytes });
    }

    fn slices(&self) -> [IoSlice<'_>; 3] {
        let batch = self.batch.as_ref().map_or(&[][..], Unsent::bytes);
        [self.before.bytes(), batch, self.behind.bytes()].map(IoSlice::new)
    }

    fn advance(&mut self, sent: usize) {
        let sent = self.before.advance(sent);
        let sent = self.batch.as_mut().map_or(sent, |batch| batch.advance(sent));
        self.behind.advance(sent);
        if self.before.is_empty() {
            self.before = Unsent::default();
        }
        self.batch = self.batch.take().filter(|batch| !batch.is_empty());
        if self.behind.is_empty() {
            self.behind = Unsent::default();
        }
    }
}

impl Unsent<Vec<u8>> {
    fn extend(&mut self, bytes: Vec<u8>) {
        self.all.extend(bytes);
        self.end = self.all.len();
    }
}

impl<B: Deref<Target = [u8]>> Unsent<B> {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn bytes(&self) -> &[u8] {
        &self.all[self.start..self.end]
    }

    /// Removes up to `sent` bytes; returns the bytes left for the following part.
    fn advance(&mut self, sent: usize) -> usize {
        let here = sent.min(self.end - self.start);
        self.start += here;
        sent - here
    }
}
