//! Bundles: the roots of each trust domain, as SPIRE sends them. Pure.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use rustls::RootCertStore;
use tacit_core::spiffe::TrustDomain;

use crate::certificate;

/// Scheme of a trust domain's SPIFFE id.
const SCHEME: &str = "spiffe://";
/// Bundles of other trust domains that are kept; those beyond are left out.
const FEDERATED_MAX: usize = 256;

/// The roots of the agent's trust domain, and those of others.
#[derive(Debug, Clone)]
pub(super) struct Bundles {
    /// Roots of the agent's own trust domain; never empty.
    pub(super) own: Arc<RootCertStore>,
    /// Roots of the trust domains that SPIRE federates with. They prove nothing by themselves: peers of another trust domain are
    /// accepted only if the configuration of the agent lists it.
    pub(super) federated: BTreeMap<TrustDomain, Arc<RootCertStore>>,
    /// Bundles of other trust domains that were left out, with the reason; at most as many as are kept.
    pub(super) left_out: Vec<String>,
}

impl Bundles {
    /// Reads the bundles of one message, each with the id or name of its trust domain.
    ///
    /// # Errors
    /// The reason why there are no roots of `own`. A bundle of another trust domain that cannot be read is left out.
    pub(super) fn read<'a>(
        bundles: impl IntoIterator<Item = (&'a str, &'a [u8])>,
        own: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, String> {
        let (mut found, mut federated, mut left_out) = (None, BTreeMap::new(), Vec::new());
        for (name, der) in bundles {
            let name = name.strip_prefix(SCHEME).unwrap_or(name);
            if name == own.as_str() {
                found = Some(roots(der, now)?);
                continue;
            }
            let read = TrustDomain::parse(name).map_err(|e| e.to_string());
            match read.and_then(|domain| Ok((domain, roots(der, now)?))) {
                Ok((domain, roots)) if federated.len() < FEDERATED_MAX => {
                    federated.insert(domain, roots);
                }
                Ok((domain, _)) => {
                    note(&mut left_out, format!("{}: more than {FEDERATED_MAX}", domain.as_str()))
                }
                Err(problem) => note(&mut left_out, format!("{name:?}: {problem}")),
            }
        }
        let own =
            found.ok_or_else(|| "it is not among the bundles; is `trustDomain` that of SPIRE?".to_owned())?;
        Ok(Self { own, federated, left_out })
    }
}

fn note(left_out: &mut Vec<String>, problem: String) {
    if left_out.len() < FEDERATED_MAX {
        left_out.push(problem);
    }
}

/// Returns the roots that have not expired. webpki does not check the validity of a root.
fn roots(der: &[u8], now: SystemTime) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    let list = certificate::list_der(der).map_err(|e| e.to_string())?;
    for root in list {
        let validity = certificate::validity(&root).map_err(|e| format!("a root cannot be read: {e}"))?;
        if now <= validity.not_after {
            roots.add(root).map_err(|e| format!("a certificate in it is no root: {e}"))?;
        }
    }
    if roots.is_empty() {
        return Err(
            "all its roots have expired; is this node's clock right, and does SPIRE rotate them?".to_owned()
        );
    }
    Ok(Arc::new(roots))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root(not_after: SystemTime) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.not_before, params.not_after) = (UNIX_EPOCH.into(), not_after.into());
        params.self_signed(&KeyPair::generate().expect("a key")).expect("signed").der().to_vec()
    }

    fn domain(name: &str) -> TrustDomain {
        TrustDomain::parse(name).expect("valid")
    }

    #[test]
    fn own_roots_and_those_of_others_are_kept_apart() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let (one, two) = (root(now), root(now + Duration::from_secs(60)));
        let both = [one.clone(), two].concat();
        let read = Bundles::read(
            [
                ("spiffe://a.example", &both[..]),
                ("spiffe://b.example", &one),
                ("spiffe://c.example", b"nonsense"),
                ("spiffe://UPPER", &one),
            ],
            &domain("a.example"),
            now,
        )
        .expect("roots");
        assert_eq!(read.own.len(), 2);
        assert_eq!(read.federated.keys().collect::<Vec<_>>(), [&domain("b.example")]);
        assert_eq!(read.left_out.len(), 2, "{:?}", read.left_out);
        // A second later the first root has expired.
        let later = now + Duration::from_secs(1);
        let read = Bundles::read([("a.example", &both[..])], &domain("a.example"), later).expect("one left");
        assert_eq!(read.own.len(), 1);
    }

    #[test]
    fn own_roots_that_are_absent_unreadable_or_expired_are_an_error() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let expired = root(now - Duration::from_secs(1));
        let good = root(now);
        let half = &good[..good.len() / 2];
        for (name, der, expected) in [
            ("spiffe://b.example", &good[..], "not among the bundles"),
            ("spiffe://a.example", b"", "no certificate"),
            ("spiffe://a.example", half, "not certificates in DER"),
            ("spiffe://a.example", b"nonsense", "not certificates in DER"),
            ("spiffe://a.example", &expired, "have expired"),
        ] {
            let problem = Bundles::read([(name, der)], &domain("a.example"), now).expect_err("no roots");
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
