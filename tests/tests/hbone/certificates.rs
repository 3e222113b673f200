//! Certificates of peers, signed by the mesh's root.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType, SerialNumber,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use std::{fs, path::Path};
use time::{Duration, OffsetDateTime};

/// Serial number of every peer's certificate, in hexadecimal.
pub(crate) const SERIAL: &str = "4b1d";

/// Chain and key of a peer, and the roots that it trusts.
pub(crate) struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) roots: RootCertStore,
}

/// An authority below the mesh's root.
pub(crate) struct Intermediate {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Intermediate {
    /// Signs the authority's certificate, whose serial number is [`SERIAL`], by the mesh's root in `folder`.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.serial_number = Some(SerialNumber::from_slice(&[0x4b, 0x1d]));
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &root(folder)?.0)?.der().clone();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// Signs a certificate with this URI name, whose serial number is [`SERIAL`] too.
    pub(crate) fn sign(&self, folder: &Path, uri: &str) -> Result<Credentials> {
        let mut credentials = signed_by(&self.issuer, &root(folder)?.1, &[uri])?;
        credentials.chain.push(self.certificate.clone());
        Ok(credentials)
    }
}

/// The root of another mesh.
pub(crate) struct OtherRoot {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl OtherRoot {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "another mesh");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Signs a certificate with this URI name, for a peer of the mesh whose root is in `folder`.
    pub(crate) fn sign(&self, folder: &Path, uri: &str) -> Result<Credentials> {
        signed_by(&self.issuer, &root(folder)?.1, &[uri])
    }
}

/// Signs a certificate with these URI names by the mesh's root in `folder`.
pub(crate) fn sign(folder: &Path, uris: &[&str]) -> Result<Credentials> {
    let (issuer, root) = root(folder)?;
    signed_by(&issuer, &root, uris)
}

/// The mesh's root in `folder`, and its certificate in PEM.
fn root(folder: &Path) -> Result<(Issuer<'static, KeyPair>, String)> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).with_context(|| format!("read {name}"));
    let root = read("root-cert.pem")?;
    Ok((Issuer::from_ca_cert_pem(&root, KeyPair::from_pem(&read("root-key.pem")?)?)?, root))
}

fn signed_by(issuer: &Issuer<'_, KeyPair>, root: &str, uris: &[&str]) -> Result<Credentials> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&[0x4b, 0x1d]));
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    for uri in uris {
        params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
    }
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::minutes(1), now + Duration::hours(1));
    let key = KeyPair::generate()?;
    let leaf = params.signed_by(&key, issuer)?;
    let mut roots = RootCertStore::empty();
    roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(root.as_bytes())?)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Credentials { chain: vec![leaf.der().clone()], key, roots })
}
