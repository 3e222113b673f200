//! Verification of peer certificates. The chain must lead to a root of the trust domain that the certificate names, and be valid now.
//! The certificate must name exactly one identity, of the own trust domain or of one that is trusted beside it. A client also requires
//! the identity it expects.
//!
//! Verification runs inside the handshake, so a rejected peer gets a TLS alert and no byte of a flow. Names are believed only after the
//! chain is verified.

use std::{cell::RefCell, sync::Arc, time::UNIX_EPOCH};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use tacit_core::{
    refusal::RefusalReason,
    spiffe::{SpiffeId, TrustDomain},
};
use tacit_identity::{
    certificate,
    peer_trust::{Distrust, OwnRoots, PeerChain, PeerTrust, Standing},
};
use webpki::{EndEntityCert, KeyUsage};

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
    /// A certificate of the chain is revoked.
    #[error("{0}")]
    Revoked(String),
    /// No current revocation list says that a certificate of the chain is not revoked.
    #[error("{0}")]
    RevocationUnknown(String),
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
            Self::Revoked(_) => RefusalReason::CertificateRevoked,
            Self::RevocationUnknown(_) => RefusalReason::RevocationUnknown,
            Self::Invalid(_) => RefusalReason::InvalidCertificate,
        }
    }

    /// Converts an error of rustls, which may wrap an error of the verifiers below.
    pub(super) fn of(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Revoked => Self::Revoked("it is revoked".to_owned()),
            CertificateError::UnknownRevocationStatus => {
                Self::RevocationUnknown("it may be revoked".to_owned())
            }
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

impl From<Distrust> for PeerCertificateError {
    fn from(distrust: Distrust) -> Self {
        match distrust.reason() {
            RefusalReason::CertificateRevoked => Self::Revoked(distrust.to_string()),
            RefusalReason::RevocationUnknown => Self::RevocationUnknown(distrust.to_string()),
            _ => Self::UnknownIssuer,
        }
    }
}

impl From<PeerCertificateError> for Error {
    fn from(refusal: PeerCertificateError) -> Self {
        match refusal {
            // With an alert of its own, for the peer's log.
            PeerCertificateError::Revoked(_) => CertificateError::Revoked,
            PeerCertificateError::RevocationUnknown(_) => CertificateError::UnknownRevocationStatus,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        }
        .into()
    }
}

/// Returns the error of a chain. An invalid signature in it counts as an unknown issuer: it means another root of the same name, for
/// example of another mesh.
fn chain_error(error: &webpki::Error) -> Error {
    match error {
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            CertificateError::UnknownIssuer
        }
        webpki::Error::BadDer | webpki::Error::BadDerTime | webpki::Error::TrailingData(_) => {
            CertificateError::BadEncoding
        }
        other => {
            CertificateError::Other(OtherError(Arc::new(PeerCertificateError::Invalid(other.to_string()))))
        }
    }
    .into()
}

/// A peer that was verified.
#[derive(Debug, Clone)]
pub(crate) struct VerifiedPeer {
    /// Its identity. An alias is replaced by the own trust domain.
    pub(crate) identity: SpiffeId,
    pub(crate) chain: PeerChain,
}

/// The outcome of a verification: the peer, or why it is refused.
pub(super) type Verdict = Result<VerifiedPeer, PeerCertificateError>;

thread_local! {
    /// The verdict of the verification that this thread has just made. rustls returns nothing but an alert from one, and all connections
    /// with a peer share their verifier.
    static VERDICT: RefCell<Option<Verdict>> = const { RefCell::new(None) };
}

/// Runs a step of a handshake. Returns the verdict too, if the step has verified the peer.
pub(super) fn with_verdict<T>(step: impl FnOnce() -> T) -> (T, Option<Verdict>) {
    VERDICT.take();
    let done = step();
    (done, VERDICT.take())
}

/// Verifies peers of either side.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    pub(super) trust_domain: TrustDomain,
    pub(super) trust: Arc<PeerTrust>,
    pub(super) own_roots: OwnRoots,
}

impl PeerVerifier {
    /// Verifies a chain for `usage` and records the verdict. Returns the identity.
    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<SpiffeId, Error> {
        let leaf = EndEntityCert::try_from(end_entity).map_err(|error| chain_error(&error))?;
        let time = UNIX_EPOCH + std::time::Duration::from_secs(now.as_secs());
        // Not proven yet. It only chooses the roots that have to prove it.
        let presented = certificate::spiffe_id(end_entity);
        let standing = match &presented {
            Ok(presented) => self.trust.domains.standing(presented.trust_domain(), &self.trust_domain),
            Err(_) => Standing::Other,
        };
        let roots = match standing {
            Standing::Federated(domain) => domain.roots.borrow().clone(),
            Standing::Own | Standing::Alias | Standing::Other => self.roots.clone(),
        };
        let own = (&self.trust_domain, &self.own_roots);
        // Another path may lead to a root without the revoked intermediate.
        let unaccepted = RefCell::new(None);
        let is_accepted = |path: &webpki::VerifiedPath<'_>| {
            self.trust.chain_of(path, standing, own).check(time).map_err(|found| {
                unaccepted.replace(Some(found));
                webpki::Error::CertRevoked
            })
        };
        let path = leaf.verify_for_usage(
            self.algorithms.all,
            &roots.roots,
            intermediates,
            now,
            usage,
            None,
            Some(&is_accepted),
        );
        let path = path.map_err(|error| match (error, unaccepted.take()) {
            (webpki::Error::CertRevoked, Some(found)) => {
                let refusal = PeerCertificateError::from(found);
                VERDICT.set(Some(Err(refusal.clone())));
                refusal.into()
            }
            (error, _) => chain_error(&error),
        })?;
        let presented = presented.map_err(PeerCertificateError::from)?;
        let ours = &self.trust_domain;
        let identity = standing.identity(&presented, ours);
        let identity = identity
            .ok_or_else(|| PeerCertificateError::OtherTrustDomain { ours: ours.clone(), presented })?;
        let chain = self.trust.chain_of(&path, standing, own);
        VERDICT.set(Some(Ok(VerifiedPeer { identity: identity.clone(), chain })));
        Ok(identity)
    }
}

/// Verifies a server for a client.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) peer: PeerVerifier,
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
        let presented = self.peer.verify(end_entity, intermediates, now, KeyUsage::server_auth())?;
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
        verify_tls13_signature(message, cert, dss, &self.peer.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.peer.algorithms.supported_schemes()
    }
}

/// Verifies a client for a server.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) peer: PeerVerifier,
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
        self.peer.verify(end_entity, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
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
        verify_tls13_signature(message, cert, dss, &self.peer.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.peer.algorithms.supported_schemes()
    }
}
