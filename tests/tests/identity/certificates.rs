//! Certificates as a peer could show them: right, or wrong in one way. Signed by the mesh's own root, whose key the
//! issuer keeps in its directory, or by a root of our own.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{fs, path::Path};
use time::{Duration, OffsetDateTime};

/// Signs as the mesh's root or as another one.
pub(crate) struct Forge {
    mesh: Issuer<'static, KeyPair>,
    foreign: Issuer<'static, KeyPair>,
    namesake: Issuer<'static, KeyPair>,
}

/// Who signs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Root {
    Mesh,
    /// Another mesh's.
    Foreign,
    /// Another key under the same name, as when two nodes each made a root of their own.
    Namesake,
}

/// When it is valid.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Valid {
    /// Expired an hour ago.
    Past,
    /// Expired 30 seconds ago.
    JustPast,
    Now,
    /// Valid in 30 seconds.
    Soon,
    /// Valid in an hour.
    Future,
}

/// What a certificate says.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) root: Root,
    pub(crate) valid: Valid,
    /// Its URI names.
    pub(crate) uris: Vec<String>,
}

/// Certificate and key.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Leaf {
    /// As the mesh's issuer would make it for this identity.
    pub(crate) fn right(identity: &str) -> Self {
        Self { root: Root::Mesh, valid: Valid::Now, uris: vec![identity.to_owned()] }
    }
}

impl Forge {
    /// Reads the root in `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let read = |name: &str| fs::read_to_string(folder.join(name)).with_context(|| format!("read {name}"));
        let mesh =
            Issuer::from_ca_cert_pem(&read("root-cert.pem")?, KeyPair::from_pem(&read("root-key.pem")?)?)?;
        Ok(Self { mesh, foreign: root("other.domain")?, namesake: root("cluster.local")? })
    }

    /// A certificate and its key.
    pub(crate) fn sign(&self, leaf: &Leaf) -> Result<Shown> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        for uri in &leaf.uris {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
        }
        if leaf.uris.is_empty() {
            params.subject_alt_names.push(SanType::DnsName("web.shop.svc".try_into()?));
        }
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = match leaf.valid {
            Valid::Past => (now - Duration::hours(2), now - Duration::hours(1)),
            Valid::JustPast => (now - Duration::hours(1), now - Duration::seconds(30)),
            Valid::Soon => (now + Duration::seconds(30), now + Duration::hours(1)),
            Valid::Now => (now - Duration::minutes(1), now + Duration::hours(1)),
            Valid::Future => (now + Duration::hours(1), now + Duration::hours(2)),
        };
        let key = KeyPair::generate()?;
        let root = match leaf.root {
            Root::Mesh => &self.mesh,
            Root::Foreign => &self.foreign,
            Root::Namesake => &self.namesake,
        };
        let certificate = params.signed_by(&key, root)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Shown { chain: vec![certificate.der().clone()], key })
    }
}

/// A root with the subject that Tacit gives the root of that trust domain.
fn root(trust_domain: &str) -> Result<Issuer<'static, KeyPair>> {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Tacit");
    name.push(DnType::CommonName, trust_domain);
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Ok(Issuer::new(params, KeyPair::generate()?))
}
