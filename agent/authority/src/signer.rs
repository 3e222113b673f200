//! The intermediate: signs certificates of workloads, and the one that this server shows itself.
//!
//! Its key is made here and never leaves memory; a process that ends takes it along, and the next one makes another.
//! Before it signs anything it has proven itself: a certificate that it made was verified against the roots.

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
use tacit_identity::issuer::{BACKDATED, leaf_params, random_serial, whole_seconds};
use webpki::{EndEntityCert, KeyUsage};

use super::{
    config::Lifetimes,
    root::{Root, RootError, ca_params, hex, pem, seconds},
};

/// An intermediate with its key.
pub(super) struct Signer {
    issuer: rcgen::Issuer<'static, KeyPair>,
    /// Its certificate, and what leads from its root to one that is trusted.
    chain: Vec<CertificateDer<'static>>,
    /// Fingerprint of the root that signed it.
    pub(super) root: String,
    /// Its serial number, in hexadecimal.
    pub(super) serial: String,
    obtained: SystemTime,
    pub(super) not_after: SystemTime,
    /// What this server shows to callers.
    pub(super) server: Arc<CertifiedKey>,
}

/// A certificate as issued.
pub(super) struct Issued {
    /// In PEM: the certificate, then what leads to the root.
    pub(super) chain: Vec<String>,
    /// In hexadecimal.
    pub(super) serial: String,
    pub(super) not_after: SystemTime,
}

impl Signer {
    /// A new intermediate of `root`, for a server with these DNS names.
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

    /// Past half of its life.
    pub(super) fn due(&self, now: SystemTime) -> bool {
        let life = self.not_after.duration_since(self.obtained).unwrap_or_default();
        now >= self.obtained + life / 2 || now < self.obtained
    }

    /// Whether what it signs now can live for `lifetime`.
    pub(super) fn covers(&self, lifetime: Duration, now: SystemTime) -> bool {
        now + lifetime <= self.not_after
    }

    /// A certificate of `identity` for `key`.
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

    /// A certificate made with it must lead to the roots, as peers will see it.
    fn prove(&self, root: &Root, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), RootError> {
        let params =
            leaf_params(&[format!("spiffe://{trust_domain}/ns/a/sa/a")], now, Duration::from_secs(1))?;
        let leaf = params.signed_by(&KeyPair::generate()?, &self.issuer)?;
        self.verify(leaf.der(), root, now).map_err(RootError::Useless)
    }

    fn verify(&self, leaf: &CertificateDer<'_>, root: &Root, now: SystemTime) -> Result<(), webpki::Error> {
        let (algorithms, usage) = (webpki::ALL_VERIFICATION_ALGS, KeyUsage::client_auth());
        let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds(now)));
        let anchors: Result<Vec<_>, _> = root.anchors.iter().map(webpki::anchor_from_trusted_cert).collect();
        let anchors = anchors?;
        let leaf = EndEntityCert::try_from(leaf)?;
        let path = leaf.verify_for_usage(algorithms, &anchors, &self.chain, time, usage, None, None)?;
        // webpki takes a trusted root for a CA of any depth; other verifiers, such as Envoy's, ask its certificate.
        let depth = path.intermediate_certificates().count();
        let used = root.anchors.iter().zip(&anchors).filter(|(_, anchor)| *anchor == path.anchor());
        let deep_enough =
            used.filter_map(|(certificate, _)| depth_below(certificate)).any(|most| depth <= most);
        if deep_enough { Ok(()) } else { Err(webpki::Error::PathLenConstraintViolated) }
    }
}

/// How many CAs may stand below the one of `certificate`; `None` when it is no CA.
fn depth_below(certificate: &CertificateDer<'_>) -> Option<usize> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let constraints = parsed.basic_constraints().ok()??.value;
    let depth = constraints.path_len_constraint.map_or(usize::MAX, |most| most as usize);
    constraints.ca.then_some(depth)
}

/// Key and certificate of this server, as long-lived as its issuer.
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

/// A moment of `seconds` since 1970.
pub(super) fn moment(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}
