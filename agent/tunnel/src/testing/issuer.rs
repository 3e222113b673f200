//! A certificate authority for tests. It also signs certificates that `Credentials` rejects.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use tacit_core::spiffe::SpiffeId;
use tacit_identity::{credentials::Credentials, template::leaf_params};

/// An authority with its own root.
pub(crate) struct TestIssuer {
    issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
}

impl TestIssuer {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).expect("signed");
        let mut roots = RootCertStore::empty();
        roots.add(root.der().clone()).expect("a root");
        Self { issuer: Issuer::new(params, key), roots: Arc::new(roots) }
    }

    /// Returns the root.
    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.roots)
    }

    /// Issues credentials of `identity` in any trust domain, valid until `lifetime` after `now`.
    pub(crate) fn any(&self, identity: &SpiffeId, now: SystemTime, lifetime: Duration) -> Credentials {
        let params = leaf_params(&[identity.to_string()], now, lifetime).expect("ascii");
        let (leaf, key) = self.signed(&params);
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Credentials::new(vec![leaf.der().clone()], &key, Arc::clone(&self.roots)).expect("good")
    }

    /// Issues key and certificate of `identity` as PEM, for external programs.
    pub(crate) fn pem(&self, identity: &SpiffeId) -> [String; 2] {
        let lifetime = Duration::from_secs(600);
        let params = leaf_params(&[identity.to_string()], SystemTime::now(), lifetime).expect("ascii");
        let (leaf, key) = self.signed(&params);
        [key.serialize_pem(), leaf.pem()]
    }

    /// Issues a chain and key with exactly these URI names, which `Credentials` rejects.
    pub(crate) fn invalid(&self, uris: &[String]) -> Arc<CertifiedKey> {
        let mut params = leaf_params(uris, SystemTime::now(), Duration::from_secs(60)).expect("ascii");
        params.subject_alt_names.push(SanType::DnsName("web.shop".try_into().expect("ascii")));
        let (leaf, key) = self.signed(&params);
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signer = aws_lc_rs::sign::any_supported_type(&key).expect("P-256");
        Arc::new(CertifiedKey::new(vec![leaf.der().clone()], signer))
    }

    fn signed(&self, params: &CertificateParams) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let leaf = params.signed_by(&key, &self.issuer).expect("signed");
        (leaf, key)
    }
}
