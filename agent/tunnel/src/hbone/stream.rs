//! The stream of one flow, and the bytes that it has received.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use tacit_core::spiffe::SpiffeId;
use tacit_identity::peer_trust::PeerChain;

use super::{
    tls_io::{Failure, TlsIo},
    unsent::Unsent,
};
use crate::{TlsInfo, TunnelError, stream::Established};

/// The authenticated peer of a connection.
#[derive(Debug)]
pub struct Peer {
    identity: SpiffeId,
    not_after: SystemTime,
    chain: PeerChain,
    tls: TlsInfo,
    /// A second descriptor of the connection, to ask the peer's kernel.
    socket: OwnedFd,
    failure: Failure,
}

impl Peer {
    pub(super) fn of(established: Established) -> io::Result<(Self, TlsIo)> {
        let (identity, tls) = (established.peer.clone(), established.tls);
        let not_after = established.peer_validity.not_after;
        let chain = established.peer_chain.clone();
        let io = TlsIo::new(established);
        let socket = io.tcp().as_fd().try_clone_to_owned()?;
        let failure = io.failure().clone();
        Ok((Self { identity, not_after, chain, tls, socket, failure }, io))
    }

    /// Returns the identity in the peer's certificate.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Returns when the peer's certificate expires. Open no flow after that time.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Returns the peer's certificates. Use the connection no more after one of them is revoked.
    #[must_use]
    pub fn chain(&self) -> &PeerChain {
        &self.chain
    }

    /// Returns the negotiated TLS parameters.
    #[must_use]
    pub fn tls(&self) -> &TlsInfo {
        &self.tls
    }

    /// Returns the error of the connection that HTTP/2 reports as `error`, of which it keeps the text alone.
    pub(super) fn failure(&self, error: h2::Error) -> TunnelError {
        let first = error.get_io().and_then(|_| self.failure.get());
        first.map_or_else(|| error.into(), |(reason, text)| TunnelError::Connection(*reason, text.clone()))
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }
}

/// An open stream. It is reset if it is dropped before both ends.
pub struct FlowStream {
    pub(super) send: SendStream<Bytes>,
    pub(super) unsent: Unsent,
    pub(super) received: Received,
    pub(super) peer: Arc<Peer>,
}

impl FlowStream {
    pub(super) fn new(send: SendStream<Bytes>, received: Received, peer: Arc<Peer>) -> Self {
        Self { send, unsent: Unsent::default(), received, peer }
    }
}

/// The receiving direction. What has come is taken out of the queue of HTTP/2 at once, where a frame of one byte costs a hundred. Its
/// part of the window is given back only when it is [consumed](Received::consume), so this holds at most a window.
pub(super) struct Received {
    stream: RecvStream,
    /// The bytes that are forwarded next, as they came.
    first: Bytes,
    /// Those behind, copied.
    rest: BytesMut,
    state: State,
}

enum State {
    Open,
    /// END_STREAM has come.
    Ended,
    Failed(Option<h2::Error>),
}

/// The stream has failed.
pub(super) struct Failed;

impl Received {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self { stream, first: Bytes::new(), rest: BytesMut::new(), state: State::Open }
    }

    /// Takes everything that has come. Then the task is woken when there is more.
    ///
    /// # Errors
    /// The stream was reset, or its connection has failed, after what was taken. [`Received::error`] has the error.
    pub(super) fn take(&mut self, cx: &mut Context<'_>) -> Result<(), Failed> {
        while let State::Open = self.state {
            match self.stream.poll_data(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(bytes))) if self.is_empty() => self.first = bytes,
                Poll::Ready(Some(Ok(bytes))) => self.rest.extend_from_slice(&bytes),
                // Trailers are of no use to an application.
                Poll::Ready(None) => self.state = State::Ended,
                Poll::Ready(Some(Err(error))) => self.state = State::Failed(Some(error)),
            }
        }
        match self.state {
            State::Open | State::Ended => Ok(()),
            State::Failed(_) => Err(Failed),
        }
    }

    /// Returns the error of a stream that has failed, once.
    pub(super) fn error(&mut self) -> Option<h2::Error> {
        match &mut self.state {
            State::Failed(error) => error.take(),
            State::Open | State::Ended => None,
        }
    }

    /// Returns true if nothing is left to forward.
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_empty() && self.rest.is_empty()
    }

    /// Returns true if the peer has ended its direction. Bytes may be left.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Returns the next bytes to forward.
    pub(super) fn bytes(&mut self) -> &[u8] {
        if self.first.is_empty() {
            self.first = std::mem::take(&mut self.rest).freeze();
        }
        &self.first
    }

    /// Removes forwarded bytes, and lets the peer send as many.
    pub(super) fn consume(&mut self, forwarded_bytes: usize) {
        self.first.advance(forwarded_bytes);
        // Fails only for more than has come.
        let _ = self.stream.flow_control().release_capacity(forwarded_bytes);
        if self.first.is_empty() {
            // A slice keeps the whole buffer that it came in.
            self.first = Bytes::new();
        }
    }
}
