//! Whom the tunnel talks to: the chain must lead to our roots and be valid now, then the certificate must name exactly one
//! identity, of our trust domain, and for a client exactly the one it expects.
//!
//! The check runs inside the handshake, so a peer that fails it gets a TLS alert and never a byte of a flow. Names are
//! looked at only after the chain has been verified.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_identity::certificate;

/// Why a peer's certificate is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another workload than the one wanted.
    #[error("it is {presented}, not {expected} as the directory says")]
    IdentityMismatch {
        /// Whom we wanted.
        expected: SpiffeId,
        /// Who answered.
        presented: SpiffeId,
    },
    /// It is of another mesh.
    #[error("{presented} is not of our trust domain {ours}")]
    OtherTrustDomain {
        /// Ours.
        ours: TrustDomain,
        /// Who it is.
        presented: SpiffeId,
    },
    /// It has expired.
    #[error("it has expired; see why the peer's agent cannot renew, and compare both clocks")]
    Expired,
    /// It is of the future.
    #[error("it is not valid yet; compare both clocks")]
    NotYetValid,
    /// No chain to our roots.
    #[error("its issuer is not one of our roots; do both nodes have the same issuer?")]
    UnknownIssuer,
    /// It names no identity or several.
    #[error("it names {0} URIs, exactly one is required")]
    UriNames(usize),
    /// The one URI is no SPIFFE id.
    #[error("its name is no identity: {0}")]
    NotAnIdentity(String),
    /// The client has sent none.
    #[error("the client has sent none")]
    NoClientCertificate,
    /// Anything else that is wrong with it.
    #[error("{0}")]
    Invalid(String),
}

impl Refusal {
    /// For logs and metric labels.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::IdentityMismatch { .. } => "identity_mismatch",
            Self::OtherTrustDomain { .. } => "other_trust_domain",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::UnknownIssuer => "unknown_issuer",
            Self::UriNames(_) => "uri_names",
            Self::NotAnIdentity(_) => "not_an_identity",
            Self::NoClientCertificate => "no_client_certificate",
            Self::Invalid(_) => "invalid_certificate",
        }
    }

    /// What rustls reports, which includes what our own verifiers have said.
    pub(super) fn of(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Other(OtherError(ours)) => {
                ours.downcast_ref::<Self>().cloned().unwrap_or_else(|| Self::Invalid(ours.to_string()))
            }
            other => Self::Invalid(other.to_string()),
        }
    }
}

impl From<certificate::CertificateError> for Refusal {
    fn from(error: certificate::CertificateError) -> Self {
        match error {
            certificate::CertificateError::UriNames(count) => Self::UriNames(count),
            certificate::CertificateError::Identity(reason) => Self::NotAnIdentity(reason.to_string()),
            other => Self::Invalid(other.to_string()),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// A signature in the chain that does not fit means another root of the same name, for example of another mesh.
fn chain_error(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
        other => other,
    }
}

/// The identity a verified certificate names, which must be of `trust_domain`.
fn member(leaf: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<SpiffeId, Refusal> {
    let presented = certificate::spiffe_id(leaf)?;
    if presented.trust_domain() == trust_domain {
        Ok(presented)
    } else {
        Err(Refusal::OtherTrustDomain { ours: trust_domain.clone(), presented })
    }
}

/// A client's check of the server.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    pub(super) trust_domain: TrustDomain,
    pub(super) expected: SpiffeId,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        // Addresses are no identities, so the name the connection was made with says nothing.
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(chain_error)?;
        let presented = member(end_entity, &self.trust_domain)?;
        if presented == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Refusal::IdentityMismatch { expected: self.expected.clone(), presented }.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A server's check of the client.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) chain: Arc<dyn ClientCertVerifier>,
    pub(super) trust_domain: TrustDomain,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has one certificate for us; hints would only make the handshake longer.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now).map_err(chain_error)?;
        member(end_entity, &self.trust_domain)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
