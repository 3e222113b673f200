//! A root, or another CA that may sign intermediates, with its certificates, key and trust anchors.
//!
//! The authority's own root is ECDSA P-256 with `spiffe://<trust domain>` as its only name. An operator's root uses the layout
//! of a `kubernetes.io/tls` Secret, as written by cert-manager. `tls.crt` may include the chain to a root, `tls.key` holds the
//! key, and `ca.crt` holds the roots. Without `ca.crt` the last certificate of `tls.crt` is the root.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tacit_core::spiffe::TrustDomain;
use tacit_identity::{
    certificate::{self, Validity},
    template::{BACKDATED, random_serial},
};

pub(super) const CERTIFICATE: &str = "tls.crt";
pub(super) const KEY: &str = "tls.key";
pub(super) const ROOTS: &str = "ca.crt";

/// The reason why a root cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    #[error("{0} is missing: write the CA's certificate to {CERTIFICATE} and its key to {KEY}")]
    Missing(&'static str),
    #[error("invalid {field}: {reason}")]
    Certificate { field: &'static str, reason: String },
    #[error("{KEY} holds no valid private key in PEM: {0}")]
    Key(String),
    #[error("{KEY} is not the key of the first certificate in {CERTIFICATE}")]
    Mismatch,
    #[error(
        "certificates signed by it cannot be verified ({0}); check that it may sign another CA, is valid now, and leads to the roots in {ROOTS}"
    )]
    Unverifiable(webpki::Error),
    #[error("cannot create a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// A CA that signs intermediates.
pub(super) struct Root {
    /// Its own certificate, and the chain to a root.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    /// The trust anchors.
    pub(super) anchors: Vec<CertificateDer<'static>>,
    pub(super) validity: Validity,
    /// SHA-256 of its own certificate and of the trust anchors, in hexadecimal.
    pub(super) fingerprint: String,
}

impl Root {
    /// Parses the fields of a store.
    pub(super) fn read(fields: &BTreeMap<String, String>) -> Result<Self, RootError> {
        let text = |field: &'static str| fields.get(field).ok_or(RootError::Missing(field));
        let certificates = certificates(CERTIFICATE, text(CERTIFICATE)?)?;
        let key = PrivateKeyDer::from_pem_slice(text(KEY)?.as_bytes());
        let key = key.map_err(|e| RootError::Key(e.to_string()))?;
        let anchors = match fields.get(ROOTS).filter(|pem| !pem.trim().is_empty()) {
            Some(pem) => self::certificates(ROOTS, pem)?,
            None => certificates.iter().next_back().cloned().into_iter().collect(),
        };
        let unreadable = |e: certificate::CertificateError| RootError::Certificate {
            field: CERTIFICATE,
            reason: e.to_string(),
        };
        let (_, public_key) = certificate::subject_and_key(&certificates[0]).map_err(unreadable)?;
        if public_key != rcgen::PublicKeyData::subject_public_key_info(&key_pair(&key)?) {
            return Err(RootError::Mismatch);
        }
        let validity = certificate::validity(&certificates[0]).map_err(unreadable)?;
        let fingerprint = fingerprint(certificates.iter().take(1).chain(&anchors));
        Ok(Self { certificates, key, anchors, validity, fingerprint })
    }

    /// Returns the trust anchors in PEM.
    pub(super) fn anchors_pem(&self) -> String {
        self.anchors.iter().map(|anchor| pem(anchor)).collect()
    }

    /// Returns the certificates between this CA and a trust anchor.
    pub(super) fn between(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.certificates.iter().filter(|certificate| !self.anchors.contains(certificate))
    }

    /// Returns the issuer that signs with this CA.
    pub(super) fn issuer(&self) -> Result<rcgen::Issuer<'static, KeyPair>, RootError> {
        Ok(rcgen::Issuer::from_ca_cert_der(&self.certificates[0], key_pair(&self.key)?)?)
    }
}

/// Creates a new root of `trust_domain`; returns certificate and key in PEM.
pub(super) fn make(
    trust_domain: &TrustDomain,
    lifetime: Duration,
    now: SystemTime,
) -> Result<(String, String), RootError> {
    let mut params = ca_params(trust_domain, "root", 1)?;
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + lifetime).into();
    let key = KeyPair::generate()?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// Returns the common parameters of the authority's CAs; `depth` more CAs may follow. Each CA has a unique subject, so that
/// verifiers find the right one.
pub(super) fn ca_params(
    trust_domain: &TrustDomain,
    kind: &str,
    depth: u8,
) -> Result<CertificateParams, rcgen::Error> {
    let serial = random_serial()?;
    let short: String = serial[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Tacit");
    // RFC 5280 appendix A limits a common name to 64 characters. The URI name holds the full trust domain.
    let domain: String = trust_domain.as_str().chars().take(40).collect();
    name.push(DnType::CommonName, format!("{domain} {kind} {short}"));
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(depth));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// Encodes a certificate in PEM.
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode_config(
        &pem::Pem::new("CERTIFICATE", certificate.as_ref()),
        pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
    )
}

fn fingerprint<'a>(certificates: impl Iterator<Item = &'a CertificateDer<'static>>) -> String {
    let mut hash = digest::Context::new(&digest::SHA256);
    certificates.for_each(|certificate| hash.update(certificate));
    hex(hash.finish().as_ref())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns whole seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn key_pair(key: &PrivateKeyDer<'static>) -> Result<KeyPair, RootError> {
    KeyPair::try_from(key).map_err(|e| RootError::Key(e.to_string()))
}

fn certificates(field: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, RootError> {
    certificate::list(text.as_bytes()).map_err(|e| RootError::Certificate { field, reason: e.to_string() })
}
