//! Connects to a server of either wire format. ALPN has chosen it by the end of the TLS handshake.

use std::sync::Arc;

use tacit_core::{spiffe::SpiffeId, wire::flow_state::Role};
use tacit_identity::credentials::Credentials;
use tokio::net::TcpStream;

use crate::{Session, TunnelError, hbone, stream, tls::ALPN_HBONE};

/// An authenticated server.
pub enum Outgoing {
    /// It speaks `tacit/1`.
    Tacit(Box<Session>),
    /// It speaks HBONE.
    Hbone(Box<hbone::Connected>),
}

impl Outgoing {
    /// Connects over `tcp` as `own` to a server that must have the identity `expected`. Bounded in time.
    ///
    /// # Errors
    /// [`TunnelError`]. A rejection by the server may surface only with the first flow. In TLS 1.3 a client can finish the handshake
    /// before the server has verified the client's certificate.
    pub async fn connect(
        tcp: TcpStream,
        own: &Arc<Credentials>,
        expected: &SpiffeId,
    ) -> Result<Self, TunnelError> {
        let established = Box::pin(stream::connect(tcp, own, expected)).await?;
        if established.tls.alpn.as_bytes() == ALPN_HBONE {
            return Ok(Self::Hbone(Box::new(hbone::Connected(established))));
        }
        Ok(Self::Tacit(Session::new(established, Role::Client)))
    }
}
