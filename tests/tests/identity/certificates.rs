//! Certificates of fake peers: valid, or invalid in one property. They are signed by the mesh's root, whose key is in the
//! issuer's folder, or by another root.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{fs, path::Path};
use time::{Duration, OffsetDateTime};

/// Root keys that sign the certificates of fake peers.
pub(crate) struct Roots {
    mesh: Issuer<'static, KeyPair>,
    foreign: Issuer<'static, KeyPair>,
    namesake: Issuer<'static, KeyPair>,
}

/// Root that signs a certificate.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SigningRoot {
    Mesh,
    /// The root of another mesh.
    Foreign,
    /// Another key with the subject of the mesh's root, as if two nodes each had created a root.
    Namesake,
}

/// Validity period of a certificate.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Validity {
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

/// Properties of a certificate.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) root: SigningRoot,
    pub(crate) validity: Validity,
    /// URI names of the certificate.
    pub(crate) uris: Vec<String>,
}

/// Certificate chain and key of a fake peer.
#[derive(Debug)]
pub(crate) struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Leaf {
    /// Returns the properties that the mesh's issuer gives this identity.
    pub(crate) fn valid(identity: &str) -> Self {
        Self { root: SigningRoot::Mesh, validity: Validity::Now, uris: vec![identity.to_owned()] }
    }
}

impl Roots {
    /// Reads the mesh's root in `folder` and creates the other roots.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let read = |name: &str| fs::read_to_string(folder.join(name)).with_context(|| format!("read {name}"));
        let mesh =
            Issuer::from_ca_cert_pem(&read("root-cert.pem")?, KeyPair::from_pem(&read("root-key.pem")?)?)?;
        Ok(Self { mesh, foreign: root("other.domain")?, namesake: root("cluster.local")? })
    }

    /// Signs a certificate and returns it with its key.
    pub(crate) fn sign(&self, leaf: &Leaf) -> Result<Credentials> {
        match leaf.root {
            SigningRoot::Mesh => leaf.signed_by(&self.mesh),
            SigningRoot::Foreign => leaf.signed_by(&self.foreign),
            SigningRoot::Namesake => leaf.signed_by(&self.namesake),
        }
    }
}

/// The root of a federated trust domain.
pub(crate) struct FederatedRoot {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl FederatedRoot {
    pub(crate) fn new(trust_domain: &str) -> Result<Self> {
        let params = root_params(trust_domain);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Returns the root's certificate.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// Signs a certificate, whichever root it names.
    pub(crate) fn sign(&self, leaf: &Leaf) -> Result<Credentials> {
        leaf.signed_by(&self.issuer)
    }
}

impl Leaf {
    fn signed_by(&self, root: &Issuer<'static, KeyPair>) -> Result<Credentials> {
        let leaf = self;
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
        (params.not_before, params.not_after) = match leaf.validity {
            Validity::Past => (now - Duration::hours(2), now - Duration::hours(1)),
            Validity::JustPast => (now - Duration::hours(1), now - Duration::seconds(30)),
            Validity::Soon => (now + Duration::seconds(30), now + Duration::hours(1)),
            Validity::Now => (now - Duration::minutes(1), now + Duration::hours(1)),
            Validity::Future => (now + Duration::hours(1), now + Duration::hours(2)),
        };
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, root)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Credentials { chain: vec![certificate.der().clone()], key })
    }
}

/// Creates a root with the subject that Tacit gives the root of this trust domain.
fn root(trust_domain: &str) -> Result<Issuer<'static, KeyPair>> {
    Ok(Issuer::new(root_params(trust_domain), KeyPair::generate()?))
}

fn root_params(trust_domain: &str) -> CertificateParams {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Tacit");
    name.push(DnType::CommonName, trust_domain);
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}
