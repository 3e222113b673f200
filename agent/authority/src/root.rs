//! A root, or any other CA that may sign intermediates: its certificates, its key, and what must be trusted for it.
//!
//! Tacit's own root is ECDSA P-256 with `spiffe://<trust domain>` as its only name. One that was brought stands in the
//! layout of a `kubernetes.io/tls` Secret as cert-manager writes it: `tls.crt`, which may be followed by what leads to a
//! root, `tls.key`, and `ca.crt` with the roots; without `ca.crt` the last certificate of `tls.crt` is the root.

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
    issuer::{BACKDATED, random_serial},
};

pub(super) const CERTIFICATE: &str = "tls.crt";
pub(super) const KEY: &str = "tls.key";
pub(super) const ROOTS: &str = "ca.crt";

/// Why a root cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    #[error("{0} is missing: write the CA's certificate to {CERTIFICATE} and its key to {KEY}")]
    Missing(&'static str),
    #[error("{field} cannot be used: {reason}")]
    Certificate { field: &'static str, reason: String },
    #[error("{KEY} holds no readable private key in PEM: {0}")]
    Key(String),
    #[error("{KEY} is not the key of the first certificate in {CERTIFICATE}")]
    Mismatch,
    #[error(
        "nothing that it signs can be verified ({0}): is it a CA that may sign another CA, valid now, and of the roots in {ROOTS}?"
    )]
    Useless(webpki::Error),
    #[error("a certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// A CA that signs intermediates.
pub(super) struct Root {
    /// Its own certificate, and what leads to a root.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    /// What must be trusted for it.
    pub(super) anchors: Vec<CertificateDer<'static>>,
    pub(super) validity: Validity,
    /// SHA-256 of its own certificate and of what must be trusted for it, in hexadecimal.
    pub(super) fingerprint: String,
}

impl Root {
    /// Reads the fields of a store.
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

    /// What must be trusted for it, in PEM.
    pub(super) fn anchors_pem(&self) -> String {
        self.anchors.iter().map(|anchor| pem(anchor)).collect()
    }

    /// What leads from it to a root, when it is none itself.
    pub(super) fn between(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.certificates.iter().filter(|certificate| !self.anchors.contains(certificate))
    }

    /// Signs with it.
    pub(super) fn issuer(&self) -> Result<rcgen::Issuer<'static, KeyPair>, RootError> {
        Ok(rcgen::Issuer::from_ca_cert_der(&self.certificates[0], key_pair(&self.key)?)?)
    }
}

/// Certificate and key of a new root of `trust_domain`, in PEM.
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

/// What all CAs of Tacit have in common; `depth` more CAs may stand below it. Each has a subject of its own, so that
/// verifiers find the right one among several.
pub(super) fn ca_params(
    trust_domain: &TrustDomain,
    kind: &str,
    depth: u8,
) -> Result<CertificateParams, rcgen::Error> {
    let serial = random_serial()?;
    let short: String = serial[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Tacit");
    // RFC 5280 appendix A bounds a common name to 64 characters; the URI name carries the whole.
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

/// A certificate in PEM.
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

/// Whole seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn key_pair(key: &PrivateKeyDer<'static>) -> Result<KeyPair, RootError> {
    KeyPair::try_from(key).map_err(|e| RootError::Key(e.to_string()))
}

fn certificates(field: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, RootError> {
    certificate::list(text.as_bytes()).map_err(|e| RootError::Certificate { field, reason: e.to_string() })
}
