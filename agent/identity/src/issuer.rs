//! Issuers of workload certificates: the agent itself, with a root in a directory (`root`), for standalone use, an authority
//! that implements Istio's CA API (`istio`), or a SPIRE agent (`spire`).
//!
//! The first two are asked for a certificate, and SPIRE sends one with its key whenever it has a new one. Leaves have one URI name and
//! both key purposes, one per service account, because every pod is client and server. Their keys never leave memory.

use std::{
    ops::RangeInclusive,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, KeyPair};
use rustls::{
    RootCertStore,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_grpc::Code;

use super::{
    credentials::{Credentials, CredentialsError},
    istio::{CallError, IstioError, IstioIssuer},
    root::{EmbeddedRoot, EmbeddedRootError},
    spire::{SpireError, SpireIssuer},
    template::leaf_params,
};

/// Lifetime of a leaf certificate where none is configured.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Below ten seconds renewal at half life could not be tried twice; leaves cannot be revoked, so a month is the most.
pub const LEAF_LIFETIME_RANGE: RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(30 * 24 * 3600);

/// Why no certificate was issued.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IssueError {
    /// The identity is of another trust domain than the issuer.
    #[error("{identity} is not of trust domain {ours}")]
    TrustDomain {
        /// The identity of the requested certificate.
        identity: SpiffeId,
        /// The issuer's trust domain.
        ours: TrustDomain,
    },
    /// Key or certificate could not be made.
    #[error("the certificate could not be made: {0}")]
    Sign(String),
    /// The authority gave none.
    #[error("{0}")]
    Istio(#[source] Arc<IstioError>),
    /// SPIRE gave none.
    #[error("{0}")]
    Spire(#[source] Arc<SpireError>),
    /// SPIRE has not renewed an SVID.
    #[error(
        "the certificate has expired, and SPIRE has sent no other one; can the SPIRE agent reach its server?"
    )]
    NotRenewed,
    /// The issuer did not answer in time.
    #[error("the issuer did not answer within {0:?}")]
    Timeout(Duration),
    /// The first attempt has not ended.
    #[error("the issuer was asked and has not answered yet")]
    Awaited,
    /// The failure a test asked for.
    #[cfg(test)]
    #[error("the test wants a failure")]
    Injected,
}

impl IssueError {
    /// Returns true if the issuer answered that this agent cannot have the identity. A later attempt can succeed all the same.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::TrustDomain { .. } => true,
            Self::Istio(error) => match &**error {
                IstioError::Call(CallError::Refused { code, .. }) => {
                    matches!(code, Code::PermissionDenied | Code::InvalidArgument)
                }
                _ => false,
            },
            _ => false,
        }
    }
}

/// An issuer of certificates.
pub enum Issuer {
    /// The agent itself.
    Embedded(EmbeddedIssuer),
    /// An authority.
    Istio(IstioIssuer),
    /// The SPIRE agent of the node.
    Spire(SpireIssuer),
    /// The agent itself, failing as often as the counter says.
    #[cfg(test)]
    Failing(EmbeddedIssuer, std::sync::atomic::AtomicU32),
    /// The agent itself, with no answer ever for one identity.
    #[cfg(test)]
    Hanging(EmbeddedIssuer, SpiffeId),
}

impl Issuer {
    /// A key and certificate for `identity`: new ones, or those that SPIRE has.
    ///
    /// # Errors
    /// [`IssueError`].
    pub async fn issue(&self, identity: &SpiffeId) -> Result<Credentials, IssueError> {
        match self {
            Self::Embedded(issuer) => issuer.issue(identity, SystemTime::now()),
            Self::Istio(issuer) => issuer.issue(identity).await.map_err(|e| IssueError::Istio(Arc::new(e))),
            Self::Spire(issuer) => issuer.subscribe(identity)?.next().await,
            #[cfg(test)]
            Self::Failing(issuer, failures) => {
                use std::sync::atomic::Ordering::Relaxed;
                match failures.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
                    Ok(_) => Err(IssueError::Injected),
                    Err(_) => issuer.issue(identity, SystemTime::now()),
                }
            }
            #[cfg(test)]
            Self::Hanging(_, hangs) if hangs == identity => std::future::pending().await,
            #[cfg(test)]
            Self::Hanging(issuer, _) => issuer.issue(identity, SystemTime::now()),
        }
    }
}

/// Signs with a root of its own.
pub struct EmbeddedIssuer {
    root: EmbeddedRoot,
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
    leaf_lifetime: Duration,
}

impl EmbeddedIssuer {
    /// The issuer whose root is in `directory`; makes the root when there is none. Blocks for the disk.
    ///
    /// # Errors
    /// [`EmbeddedRootError`] when the root cannot be used.
    pub fn open(
        directory: &Path,
        trust_domain: &TrustDomain,
        leaf_lifetime: Duration,
    ) -> Result<Self, EmbeddedRootError> {
        let root = EmbeddedRoot::open(directory, trust_domain, SystemTime::now())?;
        let mut roots = RootCertStore::empty();
        roots.add(root.certificate.clone()).map_err(|e| EmbeddedRootError::CertificateUnreadable {
            path: directory.into(),
            reason: e.to_string(),
        })?;
        Ok(Self { root, roots: Arc::new(roots), trust_domain: trust_domain.clone(), leaf_lifetime })
    }

    /// A new key and certificate for `identity`, valid until one lifetime after `now`.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn issue(&self, identity: &SpiffeId, now: SystemTime) -> Result<Credentials, IssueError> {
        if identity.trust_domain() != &self.trust_domain {
            return Err(IssueError::TrustDomain {
                identity: identity.clone(),
                ours: self.trust_domain.clone(),
            });
        }
        let params = leaf_params(&[identity.to_string()], now, self.leaf_lifetime).map_err(sign_error)?;
        self.sign(&params).map_err(|e| IssueError::Sign(e.to_string()))
    }

    fn sign(&self, params: &CertificateParams) -> Result<Credentials, SignError> {
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.root.issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Credentials::new(vec![leaf.der().clone()], &key, self.roots.clone())?)
    }
}

#[derive(Debug, thiserror::Error)]
enum SignError {
    #[error(transparent)]
    Make(#[from] rcgen::Error),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

fn sign_error(error: rcgen::Error) -> IssueError {
    IssueError::Sign(error.to_string())
}

#[cfg(test)]
pub(crate) mod testing {
    //! An issuer for the tests of this crate.

    use rustls::pki_types::CertificateDer;
    use tacit_testing::Scratch;

    use super::*;

    /// An issuer with a root of its own in a new temporary directory.
    pub(crate) fn issuer(trust_domain: &str) -> EmbeddedIssuer {
        let directory = Scratch::new();
        let domain = TrustDomain::parse(trust_domain).expect("a trust domain");
        EmbeddedIssuer::open(directory.path(), &domain, Duration::from_secs(3600)).expect("a root")
    }

    impl EmbeddedIssuer {
        /// A certificate of `identity` for `key`, and the root.
        pub(crate) fn for_key(
            &self,
            identity: &SpiffeId,
            key: &KeyPair,
        ) -> (CertificateDer<'static>, CertificateDer<'static>) {
            let params = leaf_params(&[identity.to_string()], SystemTime::now(), self.leaf_lifetime);
            let leaf = params.and_then(|params| params.signed_by(key, &self.root.issuer)).expect("signed");
            (leaf.der().clone(), self.root.certificate.clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::{BACKDATED, whole_seconds};
    use std::{fs, os::unix::fs::PermissionsExt, sync::Barrier, thread, time::UNIX_EPOCH};
    use tacit_testing::Scratch;

    const HOUR: Duration = Duration::from_secs(3600);

    fn open(directory: &Path, trust_domain: &str) -> Result<EmbeddedIssuer, EmbeddedRootError> {
        EmbeddedIssuer::open(directory, &TrustDomain::parse(trust_domain).expect("valid"), HOUR)
    }

    fn web() -> SpiffeId {
        SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid")
    }

    #[test]
    fn agents_starting_at_once_end_with_one_root() {
        let directory = Scratch::new();
        let start = Barrier::new(8);
        let roots: Vec<_> = thread::scope(|scope| {
            let agents: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        open(directory.path(), "cluster.local").expect("opens").root.certificate
                    })
                })
                .collect();
            agents.into_iter().map(|agent| agent.join().expect("no panic")).collect()
        });
        assert!(roots.iter().all(|root| root == &roots[0]));
        let again = open(directory.path(), "cluster.local").expect("opens again");
        assert_eq!(again.root.certificate, roots[0]);
        let mode = fs::metadata(directory.path().join("root-key.pem")).expect("a key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_key_left_alone_by_a_crash_gets_its_certificate() {
        let directory = Scratch::new();
        let first = open(directory.path(), "cluster.local").expect("opens").issue(&web(), SystemTime::now());
        fs::remove_file(directory.path().join("root-cert.pem")).expect("was there");
        let second = open(directory.path(), "cluster.local").expect("opens again");
        assert_eq!(
            first.expect("issued").roots.roots[0].subject_public_key_info,
            second.roots.roots[0].subject_public_key_info
        );
    }

    #[test]
    fn a_root_that_cannot_be_trusted_is_refused() {
        let directory = Scratch::new();
        let other = Scratch::new();
        open(directory.path(), "cluster.local").expect("opens");
        open(other.path(), "cluster.local").expect("opens");
        let (key, certificate) =
            (directory.path().join("root-key.pem"), directory.path().join("root-cert.pem"));

        assert!(matches!(open(directory.path(), "other.local"), Err(EmbeddedRootError::TrustDomain { .. })));

        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).expect("ours");
        assert!(matches!(
            open(directory.path(), "cluster.local"),
            Err(EmbeddedRootError::KeyExposed { mode: 0o640, .. })
        ));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("ours");

        fs::copy(other.path().join("root-cert.pem"), &certificate).expect("copied");
        assert!(matches!(open(directory.path(), "cluster.local"), Err(EmbeddedRootError::Mismatch(_))));

        fs::write(&certificate, "nonsense").expect("written");
        assert!(matches!(
            open(directory.path(), "cluster.local"),
            Err(EmbeddedRootError::CertificateUnreadable { .. })
        ));

        fs::write(&key, "nonsense").expect("written");
        assert!(matches!(
            open(directory.path(), "cluster.local"),
            Err(EmbeddedRootError::KeyUnreadable { .. })
        ));

        fs::remove_file(&key).expect("was there");
        assert!(matches!(open(directory.path(), "cluster.local"), Err(EmbeddedRootError::KeyMissing(_))));
    }

    #[test]
    fn a_leaf_names_one_identity_and_lives_as_long_as_asked() {
        let directory = Scratch::new();
        let issuer = open(directory.path(), "cluster.local").expect("opens");
        let now = UNIX_EPOCH + Duration::from_millis(1_795_477_086_750);
        let first = issuer.issue(&web(), now).expect("issued");
        let second = issuer.issue(&web(), now).expect("issued");
        assert_eq!(first.identity, web());
        assert_eq!(first.not_before, whole_seconds(now) - BACKDATED);
        assert_eq!(first.not_after, whole_seconds(now) + HOUR);
        assert_ne!(first.serial, second.serial);
        assert!(!format!("{first:?}").contains("certified"));
    }

    #[test]
    fn another_trust_domain_gets_no_certificate() {
        let issuer = testing::issuer("cluster.local");
        let stranger = SpiffeId::parse("spiffe://other.local/ns/shop/sa/web").expect("valid");
        assert!(matches!(issuer.issue(&stranger, SystemTime::now()), Err(IssueError::TrustDomain { .. })));
    }
}
