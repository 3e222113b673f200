//! Accepts a client of either wire format. ALPN has chosen it by the end of the TLS handshake.

use std::sync::Arc;

use tacit_core::wire::flow_state::Role;
use tacit_identity::credentials::Credentials;
use tokio::net::TcpStream;

use crate::{Session, TunnelError, hbone, stream, tls::ALPN_HBONE};

/// An authenticated client.
pub enum Incoming {
    /// It speaks `tacit/1`.
    Tacit(Box<Session>),
    /// It speaks HBONE.
    Hbone(Box<hbone::Accepted>),
}

impl Incoming {
    /// Accepts a client of the trust domain of `own` over `tcp`. Bounded in time.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn accept(tcp: TcpStream, own: &Arc<Credentials>) -> Result<Self, TunnelError> {
        let established = Box::pin(stream::accept(tcp, own)).await?;
        if established.tls.alpn.as_bytes() == ALPN_HBONE {
            return Ok(Self::Hbone(Box::new(hbone::Accepted(established))));
        }
        Ok(Self::Tacit(Session::new(established, Role::Server)))
    }
}
