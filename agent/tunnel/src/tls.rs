//! TLS of the tunnel: what is offered and required, and why a connection is refused.
//!
//! TLS 1.3 only, both sides authenticate, ALPN must be [`ALPN`] on both, no resumption, no early data, no server name: a
//! session is kept open and used again instead, and every certificate is verified in full by whoever relies on it. The
//! provider is built here explicitly, so that neither a crate feature nor a process-wide default can widen the choice.

mod handshake;
#[cfg(test)]
mod openssl;
pub(crate) mod record;
pub(super) mod stream;
#[cfg(test)]
mod tests;
mod verify;

use std::{
    io,
    sync::{Arc, LazyLock},
    time::Duration,
};

use rustls::{
    AlertDescription, ClientConfig, CommonState, ServerConfig,
    client::Resumption,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite, kx_group},
    },
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    sign::SingleCertAndKey,
    version::TLS13,
};
use tacit_core::{
    spiffe::SpiffeId,
    wire::{flow_state::UnexpectedFrame, frame::FrameError},
};
use tacit_identity::credentials::Credentials;

pub use record::RecordError;
pub use verify::Refusal;

use verify::{ClientVerifier, ServerVerifier};

/// The wire format, as ALPN names it.
pub const ALPN: &[u8] = b"tacit/1";

/// What was negotiated, in the names of the IANA registries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsInfo {
    /// `TLSv1.3`.
    pub version: &'static str,
    /// For example `TLS13_AES_256_GCM_SHA384`.
    pub cipher: &'static str,
    /// For example `X25519MLKEM768`.
    pub key_exchange: &'static str,
}

/// Why a tunnel could not be made or ended early.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The peer's certificate is refused.
    #[error("the peer's certificate is refused: {0}")]
    Certificate(#[from] Refusal),
    /// The peer refused us during the handshake or ended the session with an alert; its log says why.
    #[error("the peer refused with the TLS alert {0}; its log says why")]
    RefusedByPeer(String),
    /// No common TLS version, cipher suite, key exchange or signature.
    #[error("the peer does not speak TLS as Tacit does (TLS 1.3 only): {0}")]
    TlsMismatch(String),
    /// The peer speaks another wire format.
    #[error("the peer did not agree on ALPN tacit/1; is it a Tacit agent?")]
    Alpn,
    /// The peer broke TLS itself.
    #[error("TLS failed: {0}")]
    Tls(#[source] rustls::Error),
    /// It took too long.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What took too long.
        what: &'static str,
        /// How long it may take.
        limit: Duration,
    },
    /// The peer broke TLS after the handshake, or ended the session with an alert.
    #[error("TLS failed: {0}")]
    Record(#[source] RecordError),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer closed the session in the middle of a flow.
    #[error("the peer closed the session before the flow had ended")]
    Closed,
    /// The peer sent bytes that are no frame.
    #[error("the peer broke the wire format: {0}")]
    Frame(#[from] FrameError),
    /// The peer sent a frame that may not come now.
    #[error("the peer broke the wire format: {0}")]
    UnexpectedFrame(#[from] UnexpectedFrame),
}

impl TunnelError {
    /// For logs and metric labels; one of a fixed set.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Certificate(refusal) => refusal.reason(),
            Self::RefusedByPeer(_) => "refused_by_peer",
            Self::TlsMismatch(_) => "tls_mismatch",
            Self::Alpn => "alpn",
            Self::Tls(_) | Self::Record(_) => "tls",
            Self::Timeout { .. } => "timeout",
            Self::Io(_) => "io",
            Self::Closed => "closed",
            Self::Frame(_) | Self::UnexpectedFrame(_) => "protocol",
        }
    }
}

impl From<rustls::Error> for TunnelError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(reason) => Refusal::of(&reason).into(),
            rustls::Error::NoCertificatesPresented => Refusal::NoClientCertificate.into(),
            rustls::Error::NoApplicationProtocol
            | rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::Alpn,
            rustls::Error::AlertReceived(
                alert @ (AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure),
            ) => Self::TlsMismatch(format!("{alert:?}")),
            rustls::Error::AlertReceived(alert) => Self::RefusedByPeer(format!("{alert:?}")),
            rustls::Error::PeerIncompatible(mismatch) => Self::TlsMismatch(format!("{mismatch:?}")),
            other => Self::Tls(other),
        }
    }
}

impl From<RecordError> for TunnelError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Alert(alert) => rustls::Error::AlertReceived(alert).into(),
            other => Self::Record(other),
        }
    }
}

/// 16 random bytes. Not for secrets: zeros when there is no randomness.
pub(super) fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    match PROVIDER.secure_random.fill(&mut bytes) {
        Ok(()) => bytes,
        Err(_) => [0; 16],
    }
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
});

/// The client side of `own`, for a server that must be `expected`.
fn client_config(own: &Credentials, expected: &SpiffeId) -> Arc<ClientConfig> {
    let verifier = |expected| {
        Arc::new(ServerVerifier {
            roots: own.roots.clone(),
            algorithms: PROVIDER.signature_verification_algorithms,
            trust_domain: own.identity.trust_domain().clone(),
            expected,
        })
    };
    let shared = || {
        let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("PROVIDER has suites and key exchanges of TLS 1.3")
            .dangerous()
            // Stands in: each expected peer has one of its own.
            .with_custom_certificate_verifier(verifier(own.identity.clone()))
            .with_client_cert_resolver(resolver(own));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        // For the record layer of our own.
        config.enable_secret_extraction = true;
        config
    };
    own.client_config_for(expected, || {
        // Shares most parts.
        let mut config = ClientConfig::clone(own.client_config(shared));
        config.dangerous().set_certificate_verifier(verifier(expected.clone()));
        config
    })
}

/// The server side of `own`, for clients of its trust domain.
fn server_config(own: &Credentials) -> Arc<ServerConfig> {
    let make = || {
        let chain = WebPkiClientVerifier::builder_with_provider(own.roots.clone(), PROVIDER.clone())
            .build()
            .expect("Credentials have a root, and there are no revocation lists to parse");
        let verifier = ClientVerifier { chain, trust_domain: own.identity.trust_domain().clone() };
        let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("PROVIDER has suites and key exchanges of TLS 1.3")
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(resolver(own));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        config
    };
    own.server_config(make).clone()
}

fn resolver(own: &Credentials) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from(own.certified().clone()))
}

/// What was negotiated, once all of it is as required.
fn negotiated(connection: &CommonState) -> Result<TlsInfo, TunnelError> {
    // A server that knows the client's ALPN refuses another one itself, but takes a client that offers none.
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(TunnelError::Alpn);
    }
    let incomplete = || TunnelError::TlsMismatch("the handshake named no parameters".to_owned());
    Ok(TlsInfo {
        version: match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
            other => return Err(TunnelError::TlsMismatch(format!("{other:?}"))),
        },
        cipher: connection
            .negotiated_cipher_suite()
            .and_then(|suite| suite.suite().as_str())
            .ok_or_else(incomplete)?,
        key_exchange: connection
            .negotiated_key_exchange_group()
            .and_then(|group| group.name().as_str())
            .ok_or_else(incomplete)?,
    })
}
