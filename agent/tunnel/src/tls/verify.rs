//! Verification of peer certificates. The chain must lead to a configured root and be valid now. The certificate must then
//! name exactly one identity of the trust domain. A client also requires the identity it expects.
//!
//! Verification runs inside the handshake, so a rejected peer gets a TLS alert and no byte of a flow. Names are examined only
//! after the chain is verified.

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
use tacit_core::{
    refusal::RefusalReason,
    spiffe::{SpiffeId, TrustDomain},
};
use tacit_identity::certificate;

/// The reason why a peer's certificate is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerCertificateError {
    /// The peer has another identity than the expected one.
    #[error("its identity is {presented}, but the directory expects {expected}")]
    IdentityMismatch {
        /// The expected identity.
        expected: SpiffeId,
        /// The identity in the certificate.
        presented: SpiffeId,
    },
    /// The identity belongs to another mesh.
    #[error("{presented} is not of our trust domain {ours}")]
    OtherTrustDomain {
        /// The local trust domain.
        ours: TrustDomain,
        /// The identity in the certificate.
        presented: SpiffeId,
    },
    /// The certificate has expired.
    #[error("it has expired; see why the peer's agent cannot renew, and compare both clocks")]
    Expired,
    /// The certificate is not valid yet.
    #[error("it is not valid yet; compare both clocks")]
    NotYetValid,
    /// The chain leads to no configured root.
    #[error("its issuer is not one of our roots; check that both nodes use the same issuer")]
    UnknownIssuer,
    /// The certificate names no identity or several.
    #[error("it has {0} URI names, expected exactly one")]
    UriNames(usize),
    /// The URI is not a SPIFFE id.
    #[error("its URI name is not a valid identity: {0}")]
    NotAnIdentity(String),
    /// The client sent no certificate.
    #[error("the client sent no certificate")]
    NoClientCertificate,
    /// Any other defect.
    #[error("{0}")]
    Invalid(String),
}

impl PeerCertificateError {
    /// Returns the reason for which the connection is refused.
    #[must_use]
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::IdentityMismatch { .. } => RefusalReason::IdentityMismatch,
            Self::OtherTrustDomain { .. } => RefusalReason::OtherTrustDomain,
            Self::Expired => RefusalReason::Expired,
            Self::NotYetValid => RefusalReason::NotYetValid,
            Self::UnknownIssuer => RefusalReason::UnknownIssuer,
            Self::UriNames(_) => RefusalReason::UriNames,
            Self::NotAnIdentity(_) => RefusalReason::NotAnIdentity,
            Self::NoClientCertificate => RefusalReason::NoClientCertificate,
            Self::Invalid(_) => RefusalReason::InvalidCertificate,
        }
    }

    /// Converts an error of rustls, which may wrap an error of the verifiers below.
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

impl From<certificate::CertificateError> for PeerCertificateError {
    fn from(error: certificate::CertificateError) -> Self {
        match error {
            certificate::CertificateError::UriNames(count) => Self::UriNames(count),
            certificate::CertificateError::Identity(reason) => Self::NotAnIdentity(reason.to_string()),
            other => Self::Invalid(other.to_string()),
        }
    }
}

impl From<PeerCertificateError> for Error {
    fn from(refusal: PeerCertificateError) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// Maps an invalid signature in the chain to an unknown issuer. It means another root of the same name, for example of
/// another mesh.
fn chain_error(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
        other => other,
    }
}

/// Returns the identity of a verified certificate, which must be of `trust_domain`.
fn member(leaf: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<SpiffeId, PeerCertificateError> {
    let presented = certificate::spiffe_id(leaf)?;
    if presented.trust_domain() == trust_domain {
        Ok(presented)
    } else {
        Err(PeerCertificateError::OtherTrustDomain { ours: trust_domain.clone(), presented })
    }
}

/// Verifies a server for a client.
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
        // An address is not an identity, so the name of the connection is ignored.
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
            Err(PeerCertificateError::IdentityMismatch { expected: self.expected.clone(), presented }.into())
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

/// Verifies a client for a server.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) chain: Arc<dyn ClientCertVerifier>,
    pub(super) trust_domain: TrustDomain,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has one certificate for the mesh. Hints would only lengthen the handshake.
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
