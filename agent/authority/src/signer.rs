//! The intermediate. It signs the certificates of workloads and of this server.
//!
//! The key is created in this process and never leaves its memory. A new process creates a new key. Before an intermediate is
//! used, a test certificate signed by it is verified against the roots.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime},
    sign::CertifiedKey,
};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_identity::template::{BACKDATED, leaf_params, random_serial, whole_seconds};
use webpki::{EndEntityCert, KeyUsage};

use super::{
    config::Lifetimes,
    root::{Root, RootError, ca_params, hex, pem, seconds},
};

/// An intermediate with its key.
pub(super) struct Signer {
    issuer: rcgen::Issuer<'static, KeyPair>,
    /// Its certificate and the chain to a trust anchor.
    chain: Vec<CertificateDer<'static>>,
    /// Fingerprint of the root that signed it.
    pub(super) root: String,
    /// Its serial number, in hexadecimal.
    pub(super) serial: String,
    obtained: SystemTime,
    pub(super) not_after: SystemTime,
    /// Certificate and key of this server.
    pub(super) server: Arc<CertifiedKey>,
}

/// An issued certificate.
pub(super) struct Issued {
    /// The certificate and its chain, in PEM.
    pub(super) chain: Vec<String>,
    /// In hexadecimal.
    pub(super) serial: String,
    pub(super) not_after: SystemTime,
}

impl Signer {
    /// Creates an intermediate of `root` for a server with these DNS names.
    pub(super) fn make(
        root: &Root,
        trust_domain: &TrustDomain,
        names: &[String],
        lifetimes: Lifetimes,
        now: SystemTime,
    ) -> Result<Self, RootError> {
        let now = whole_seconds(now);
        let mut params = ca_params(trust_domain, "intermediate", 0)?;
        let not_after = (now + lifetimes.intermediate).min(root.validity.not_after);
        params.not_before = (now - BACKDATED).into();
        params.not_after = not_after.into();
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &root.issuer()?)?;
        let serial = params.serial_number.as_ref().map(SerialNumber::to_bytes).unwrap_or_default();
        let chain: Vec<_> = [certificate.der()].into_iter().chain(root.between()).cloned().collect();
        let issuer = rcgen::Issuer::new(params, key);
        let server = server(&issuer, &chain, names, not_after, now)?;
        let made = Self {
            issuer,
            chain,
            root: root.fingerprint.clone(),
            serial: hex(&serial),
            obtained: now,
            not_after,
            server: Arc::new(server),
        };
        made.prove(root, trust_domain, now)?;
        Ok(made)
    }

    /// Returns true after half of its life.
    pub(super) fn due(&self, now: SystemTime) -> bool {
        let life = self.not_after.duration_since(self.obtained).unwrap_or_default();
        now >= self.obtained + life / 2 || now < self.obtained
    }

    /// Returns true if a certificate issued now can live for `lifetime`.
    pub(super) fn covers(&self, lifetime: Duration, now: SystemTime) -> bool {
        now + lifetime <= self.not_after
    }

    /// Issues a certificate of `identity` for `key`.
    pub(super) fn issue(
        &self,
        identity: &SpiffeId,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, rcgen::Error> {
        let left = self.not_after.duration_since(whole_seconds(now)).unwrap_or_default();
        let params = leaf_params(&[identity.to_string()], now, lifetime.min(left))?;
        let leaf = params.signed_by(key, &self.issuer)?;
        let serial = params.serial_number.as_ref().map(SerialNumber::to_bytes).unwrap_or_default();
        Ok(Issued {
            chain: [leaf.der()].into_iter().chain(&self.chain).map(|certificate| pem(certificate)).collect(),
            serial: hex(&serial),
            not_after: params.not_after.into(),
        })
    }

    /// Verifies a test certificate against the roots, as a peer would.
    fn prove(&self, root: &Root, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), RootError> {
        let params =
            leaf_params(&[format!("spiffe://{trust_domain}/ns/a/sa/a")], now, Duration::from_secs(1))?;
        let leaf = params.signed_by(&KeyPair::generate()?, &self.issuer)?;
        self.verify(leaf.der(), root, now).map_err(RootError::Unverifiable)
    }

    fn verify(&self, leaf: &CertificateDer<'_>, root: &Root, now: SystemTime) -> Result<(), webpki::Error> {
        let (algorithms, usage) = (webpki::ALL_VERIFICATION_ALGS, KeyUsage::client_auth());
        let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds(now)));
        let anchors: Result<Vec<_>, _> = root.anchors.iter().map(webpki::anchor_from_trusted_cert).collect();
        let anchors = anchors?;
        let leaf = EndEntityCert::try_from(leaf)?;
        let path = leaf.verify_for_usage(algorithms, &anchors, &self.chain, time, usage, None, None)?;
        // webpki ignores the depth limit of a trusted root. Other verifiers, for example Envoy's, enforce it.
        let depth = path.intermediate_certificates().count();
        let used = root.anchors.iter().zip(&anchors).filter(|(_, anchor)| *anchor == path.anchor());
        let deep_enough =
            used.filter_map(|(certificate, _)| depth_below(certificate)).any(|most| depth <= most);
        if deep_enough { Ok(()) } else { Err(webpki::Error::PathLenConstraintViolated) }
    }
}

/// Returns how many CAs may follow `certificate`, or `None` if it is not a CA.
fn depth_below(certificate: &CertificateDer<'_>) -> Option<usize> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let constraints = parsed.basic_constraints().ok()??.value;
    let depth = constraints.path_len_constraint.map_or(usize::MAX, |most| most as usize);
    constraints.ca.then_some(depth)
}

/// Creates key and certificate of this server, which expire with the intermediate.
fn server(
    issuer: &rcgen::Issuer<'static, KeyPair>,
    chain: &[CertificateDer<'static>],
    names: &[String],
    not_after: SystemTime,
    now: SystemTime,
) -> Result<CertifiedKey, RootError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    for name in names {
        params.subject_alt_names.push(match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.as_str().try_into()?),
        });
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
    params.not_before = (now - BACKDATED).into();
    params.not_after = not_after.into();
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signer = aws_lc_rs::sign::any_supported_type(&key).map_err(|e| RootError::Key(e.to_string()))?;
    let chain = [certificate.der()].into_iter().chain(chain).cloned().collect();
    Ok(CertifiedKey::new(chain, signer))
}

/// Returns the time of `seconds` since 1970.
pub(super) fn time_of(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}
