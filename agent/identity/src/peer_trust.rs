//! Conditions of trust in peers, beside the roots that came with the own certificate. They are the same for all identities of a node.
//! The own roots may differ by identity, and change while its certificate stays: each identity has its own watch of them.
//!
//! The trust domain in a certificate chooses the roots that its chain must lead to. They are exclusive in both directions:
//!
//! | trust domain | roots | counts as |
//! |---|---|---|
//! | the own one | the own ones | itself |
//! | an alias | the own ones | the own one |
//! | a federated one | those of that domain | itself |
//! | any other | the own ones | refused |
//!
//! The choice is made before the chain is verified, so a certificate that lies about its domain fails against the roots of that domain.

#[cfg(test)]
mod tests;

use std::{collections::HashMap, fmt, sync::Arc, time::SystemTime};

use rustls::RootCertStore;
use tacit_core::{
    refusal::RefusalReason,
    spiffe::{SpiffeId, TrustDomain},
};
use tokio::sync::watch;
use webpki::VerifiedPath;

use crate::{
    certificate, istio,
    revocation::{CertificateChain, RevocationCheck, Unaccepted},
};

/// The conditions of trust in peers.
#[derive(Debug, Default)]
pub struct PeerTrust {
    /// Revocation lists.
    pub revocation: RevocationCheck,
    /// Trust domains beside the own one.
    pub domains: TrustDomains,
}

/// Trust domains beside the own one. None of them is the own one: that is asked first.
#[derive(Debug, Default)]
pub struct TrustDomains {
    aliases: Vec<TrustDomain>,
    federated: HashMap<TrustDomain, FederatedDomain>,
}

/// The roots of a trust domain, at least one.
pub type DomainRoots = RootCertStore;

/// A federated trust domain.
#[derive(Debug, Clone)]
pub struct FederatedDomain {
    /// Its name.
    pub name: TrustDomain,
    /// Its roots. A root that is removed ends the flows that it has vouched for.
    pub roots: watch::Receiver<Arc<DomainRoots>>,
}

/// The roots of the own trust domain, as the holder of credentials has them now.
#[derive(Debug, Clone, Default)]
pub enum OwnRoots {
    /// Those of the credentials, for good.
    #[default]
    Fixed,
    /// The latest of this identity. A root that is removed ends the flows that it has vouched for. Flows of peers whose certificates
    /// have expired by then go on: a planned rotation waits for that.
    Watched(watch::Receiver<Arc<DomainRoots>>),
}

/// The standing of a trust domain.
#[derive(Debug, Clone, Copy)]
pub enum Standing<'a> {
    /// The own domain.
    Own,
    /// Another name of the own domain.
    Alias,
    /// A federated domain.
    Federated(&'a FederatedDomain),
    /// Not trusted.
    Other,
}

impl TrustDomains {
    /// Aliases of the own domain, and federated domains.
    #[must_use]
    pub fn new(aliases: Vec<TrustDomain>, federated: impl IntoIterator<Item = FederatedDomain>) -> Self {
        let federated = federated.into_iter().map(|domain| (domain.name.clone(), domain)).collect();
        Self { aliases, federated }
    }

    /// Returns the standing of `domain` in a mesh of trust domain `own`.
    #[must_use]
    pub fn standing(&self, domain: &TrustDomain, own: &TrustDomain) -> Standing<'_> {
        if domain == own {
            Standing::Own
        } else if self.aliases.contains(domain) {
            Standing::Alias
        } else {
            self.federated.get(domain).map_or(Standing::Other, Standing::Federated)
        }
    }

    /// Returns the federated domains.
    pub fn federated(&self) -> impl Iterator<Item = &FederatedDomain> {
        self.federated.values()
    }
}

impl Standing<'_> {
    /// Returns the identity by which a peer of this standing goes in a mesh of trust domain `own`. `None` if it is not trusted.
    #[must_use]
    pub fn identity(&self, presented: &SpiffeId, own: &TrustDomain) -> Option<SpiffeId> {
        match self {
            Self::Own | Self::Federated(_) => Some(presented.clone()),
            Self::Alias => Some(presented.in_domain(own)),
            Self::Other => None,
        }
    }
}

/// Parses the roots of a federated domain in PEM, at least one.
///
/// # Errors
/// The defect of the text.
pub fn roots(pem: &[u8]) -> Result<DomainRoots, String> {
    istio::store(certificate::list(pem).map_err(|error| error.to_string())?)
}

impl PeerTrust {
    /// Returns the certificates and the root of a peer whose chain webpki has verified, as far as the trust in them can end.
    #[must_use]
    pub fn chain_of(
        &self,
        path: &VerifiedPath<'_>,
        standing: Standing<'_>,
        (own, own_roots): (&TrustDomain, &OwnRoots),
    ) -> PeerChain {
        let certificates = self.revocation.chain_of(path);
        let domain = match (standing, own_roots) {
            (Standing::Federated(domain), _) => Some((&domain.name, &domain.roots, None)),
            (Standing::Own | Standing::Alias, OwnRoots::Watched(roots)) => {
                let validity = certificate::validity(&path.end_entity().der());
                Some((own, roots, validity.ok().map(|validity| validity.not_after)))
            }
            (Standing::Own | Standing::Alias, OwnRoots::Fixed) | (Standing::Other, _) => None,
        };
        let root = domain.map(|(domain, roots, spares_after)| {
            let anchor = path.anchor();
            let (name, key) = (&anchor.subject[..], &anchor.subject_public_key_info[..]);
            let (domain, roots) = (domain.clone(), roots.clone());
            Root { domain, roots, spares_after, name: name.into(), key: key.into() }
        });
        if certificates.is_unchecked() && root.is_none() {
            return PeerChain::default();
        }
        PeerChain(Some(Arc::new(Proof { certificates, root })))
    }
}

/// The certificates and the root that a verified peer is trusted by, as far as this trust can end. A clone shares them.
#[derive(Debug, Clone, Default)]
pub struct PeerChain(Option<Arc<Proof>>);

#[derive(Debug)]
struct Proof {
    certificates: CertificateChain,
    /// The root that has vouched for the peer, if it can be removed.
    root: Option<Root>,
}

/// A root, by name and key: the same root in another set of roots is as good.
#[derive(Debug)]
struct Root {
    domain: TrustDomain,
    roots: watch::Receiver<Arc<DomainRoots>>,
    /// The root's removal ends no live flow after this moment. `None`: it always does.
    spares_after: Option<SystemTime>,
    name: Box<[u8]>,
    key: Box<[u8]>,
}

impl Root {
    fn is_trusted(&self) -> bool {
        let roots = self.roots.borrow();
        let is_this = |root: &rustls::pki_types::TrustAnchor<'_>| {
            root.subject[..] == *self.name && root.subject_public_key_info[..] == *self.key
        };
        roots.roots.iter().any(is_this)
    }
}

/// The reason for which a peer is not trusted any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Distrust {
    /// A certificate is revoked, or that is not known.
    Certificate(Unaccepted),
    /// The root that has vouched for the peer is no longer one of this domain.
    RootRemoved(TrustDomain),
}

impl Distrust {
    /// Returns the reason for which the connection is refused.
    #[must_use]
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::Certificate(Unaccepted { unknown: None, .. }) => RefusalReason::CertificateRevoked,
            Self::Certificate(Unaccepted { unknown: Some(_), .. }) => RefusalReason::RevocationUnknown,
            Self::RootRemoved(_) => RefusalReason::UnknownIssuer,
        }
    }
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(unaccepted) => unaccepted.fmt(f),
            Self::RootRemoved(domain) => {
                write!(f, "the root that vouched for the peer is no longer one of trust domain {domain}")
            }
        }
    }
}

impl PeerChain {
    /// Returns true if there is nothing to check, now and later.
    #[must_use]
    pub fn is_unchecked(&self) -> bool {
        self.0.is_none()
    }

    /// Checks the latest lists and roots, for a new session or flow.
    ///
    /// # Errors
    /// [`Distrust`].
    pub fn check(&self, now: SystemTime) -> Result<(), Distrust> {
        let Some(proof) = &self.0 else { return Ok(()) };
        if let Some(root) = proof.root.as_ref().filter(|root| !root.is_trusted()) {
            return Err(Distrust::RootRemoved(root.domain.clone()));
        }
        proof.certificates.check(now).map_err(Distrust::Certificate)
    }

    /// Returns why a live flow must end. Unknown status of a certificate is no reason, and the removal of an own root is none once the
    /// peer's certificate has expired.
    #[must_use]
    pub fn revoked(&self, now: SystemTime) -> Option<Distrust> {
        let Proof { certificates, root } = &**self.0.as_ref()?;
        let ends = |root: &&Root| !root.is_trusted() && root.spares_after.is_none_or(|moment| now <= moment);
        if let Some(root) = root.as_ref().filter(ends) {
            return Some(Distrust::RootRemoved(root.domain.clone()));
        }
        let distrust = certificates.check(now).err().map(Distrust::Certificate);
        distrust.filter(|distrust| distrust.reason() != RefusalReason::RevocationUnknown)
    }
}
