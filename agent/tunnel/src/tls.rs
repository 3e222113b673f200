//! TLS of the tunnel: the offered and required parameters, and the errors.
//!
//! Both sides require TLS 1.3, a peer certificate, and a wire format: [`ALPN_URGENT`], [`ALPN`] or [`ALPN_HBONE`]. Resumption, early data and server names are disabled. Sessions
//! are reused instead, and both sides verify every certificate in full. The crypto provider is built explicitly, so that
//! neither a crate feature nor a process-wide default can add algorithms.

pub(crate) mod handshake;
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
    server::NoServerSessionStorage,
    sign::SingleCertAndKey,
    version::TLS13,
};
use tacit_core::{
    refusal::RefusalReason,
    spiffe::SpiffeId,
    wire::{flow_state::UnexpectedFrame, frame::FrameError},
};
use tacit_identity::credentials::Credentials;

pub use verify::PeerCertificateError;
pub(crate) use verify::VerifiedPeer;

use crate::record::RecordError;
use verify::{ClientVerifier, PeerVerifier, ServerVerifier};

/// The wire format as an ALPN protocol name.
pub const ALPN: &[u8] = b"tacit/1";
/// The same with frames for urgent data, which agents prefer. Agents before it know [`ALPN`] only.
pub const ALPN_URGENT: &[u8] = b"tacit/1.1";
/// HBONE, HTTP/2 CONNECT as Istio ambient speaks it. Two Tacit agents never agree on it, since they prefer the others.
pub const ALPN_HBONE: &[u8] = b"h2";

/// The negotiated parameters, with their IANA names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsInfo {
    /// `TLSv1.3`.
    pub version: &'static str,
    /// For example `TLS13_AES_256_GCM_SHA384`.
    pub cipher: &'static str,
    /// For example `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// The wire format by its ALPN name, for example `tacit/1.1`.
    pub alpn: &'static str,
    /// The peer accepts URGENT frames: both have agreed on [`ALPN_URGENT`].
    pub has_urgent: bool,
}

/// The reason why a tunnel failed to open or ended early.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The peer's certificate is rejected.
    #[error("the peer's certificate is refused: {0}")]
    Certificate(#[from] PeerCertificateError),
    /// The peer rejected the handshake or ended the session with an alert. The peer's log has the reason.
    #[error("the peer refused with the TLS alert {0}; see the log of the peer's agent")]
    RefusedByPeer(String),
    /// The peers share no TLS version, cipher suite, key exchange or signature algorithm.
    #[error("no common TLS parameters with the peer, which must support TLS 1.3: {0}")]
    TlsMismatch(String),
    /// The peer uses another wire format.
    #[error("the peer did not agree on ALPN tacit/1 or h2; check that it is a Tacit agent or a ztunnel")]
    Alpn,
    /// The peer violated TLS during the handshake.
    #[error("TLS failed: {0}")]
    Tls(#[source] rustls::Error),
    /// The operation exceeded its time limit.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// The operation.
        what: &'static str,
        /// Its time limit.
        limit: Duration,
    },
    /// The peer violated TLS after the handshake, or ended the session with an alert.
    #[error("TLS failed: {0}")]
    Record(#[source] RecordError),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer closed the session in the middle of a flow.
    #[error("the peer closed the session before the flow had ended")]
    Closed,
    /// The peer sent an invalid frame.
    #[error("the peer broke the wire format: {0}")]
    Frame(#[from] FrameError),
    /// The peer sent a frame that is not allowed in the current state.
    #[error("the peer broke the wire format: {0}")]
    UnexpectedFrame(#[from] UnexpectedFrame),
    /// The connection of a stream violated TLS, or ended with an alert.
    #[error("{1}")]
    Connection(RefusalReason, String),
    /// HTTP/2 of the connection failed.
    #[error("HTTP/2 failed: {0}")]
    Http2(#[from] h2::Error),
}

impl TunnelError {
    /// Returns the reason for which the connection is refused.
    #[must_use]
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::Certificate(refusal) => refusal.reason(),
            Self::RefusedByPeer(_) => RefusalReason::RefusedByPeer,
            Self::TlsMismatch(_) => RefusalReason::TlsMismatch,
            Self::Alpn => RefusalReason::Alpn,
            Self::Tls(_) | Self::Record(_) => RefusalReason::Tls,
            Self::Timeout { .. } => RefusalReason::Timeout,
            Self::Io(_) => RefusalReason::Io,
            Self::Closed => RefusalReason::Closed,
            Self::Frame(_) | Self::UnexpectedFrame(_) => RefusalReason::Protocol,
            Self::Connection(reason, _) => *reason,
            Self::Http2(error) => http2_reason(error),
        }
    }
}

/// The stream below HTTP/2 reports violations of TLS as invalid data.
fn http2_reason(error: &h2::Error) -> RefusalReason {
    match error.get_io().map(io::Error::kind) {
        Some(io::ErrorKind::InvalidData) => RefusalReason::Tls,
        Some(_) => RefusalReason::Io,
        None if error.is_remote() => RefusalReason::Closed,
        None => RefusalReason::Protocol,
    }
}

impl From<rustls::Error> for TunnelError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(reason) => PeerCertificateError::of(&reason).into(),
            rustls::Error::NoCertificatesPresented => PeerCertificateError::NoClientCertificate.into(),
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

/// Returns 16 random bytes, or zeros if randomness is unavailable. Not for secrets.
pub(super) fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    match PROVIDER.secure_random.fill(&mut bytes) {
        Ok(()) => bytes,
        Err(_) => [0; 16],
    }
}

pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
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

/// Returns the client configuration of `own` for a server that must have the identity `expected`.
pub(crate) fn client_config(own: &Credentials, expected: &SpiffeId) -> Arc<ClientConfig> {
    let verifier = |expected| Arc::new(ServerVerifier { peer: peer_verifier(own), expected });
    let shared = || {
        let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("PROVIDER has suites and key exchanges of TLS 1.3")
            .dangerous()
            // A placeholder. Each expected peer gets its own verifier.
            .with_custom_certificate_verifier(verifier(own.identity.clone()))
            .with_client_cert_resolver(resolver(own));
        config.alpn_protocols = alpn();
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        // The crate has its own record layer.
        config.enable_secret_extraction = true;
        config
    };
    own.client_config_for(expected, || {
        // The clone shares most parts.
        let mut config = ClientConfig::clone(own.client_config(shared));
        config.dangerous().set_certificate_verifier(verifier(expected.clone()));
        config
    })
}

/// Returns the server configuration of `own` for clients of its trust domain.
pub(crate) fn server_config(own: &Credentials) -> Arc<ServerConfig> {
    let make = || {
        let verifier = ClientVerifier { peer: peer_verifier(own) };
        let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("PROVIDER has suites and key exchanges of TLS 1.3")
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(resolver(own));
        config.alpn_protocols = alpn();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        config
    };
    own.server_config(make).clone()
}

fn peer_verifier(own: &Credentials) -> PeerVerifier {
    PeerVerifier {
        roots: own.roots.clone(),
        algorithms: PROVIDER.signature_verification_algorithms,
        trust_domain: own.identity.trust_domain().clone(),
        trust: own.trust.clone(),
        own_roots: own.own_roots.clone(),
    }
}

/// The preferred first: a server chooses the first of its own that the client offers. So two Tacit agents never speak HBONE.
fn alpn() -> Vec<Vec<u8>> {
    [ALPN_URGENT, ALPN, ALPN_HBONE].map(<[u8]>::to_vec).into()
}

fn resolver(own: &Credentials) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from(own.certified().clone()))
}

/// Checks and returns the negotiated parameters.
pub(crate) fn negotiated(connection: &CommonState) -> Result<TlsInfo, TunnelError> {
    // rustls rejects a client with another ALPN, and accepts a client that offers none.
    let (alpn, has_urgent) = match connection.alpn_protocol() {
        Some(ALPN_URGENT) => ("tacit/1.1", true),
        Some(ALPN) => ("tacit/1", false),
        Some(ALPN_HBONE) => ("h2", false),
        _ => return Err(TunnelError::Alpn),
    };
    let incomplete = || TunnelError::TlsMismatch("the handshake negotiated no parameters".to_owned());
    Ok(TlsInfo {
        alpn,
        has_urgent,
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
