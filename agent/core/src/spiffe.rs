//! Workload identities: SPIFFE ids of the form `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! An id is parsed once, where it comes in, and cannot be wrong afterwards.

use std::{fmt, sync::Arc};

/// Longest SPIFFE id accepted, in bytes (SPIFFE-ID section 2.3 asks implementations to support 2048).
const ID_MAX_BYTES: usize = 2048;
/// Longest trust domain name, in bytes (SPIFFE-ID section 2.3).
const TRUST_DOMAIN_MAX_BYTES: usize = 255;
/// Longest Kubernetes object name, in bytes (RFC 1123 subdomain).
const NAME_MAX_BYTES: usize = 253;

/// Service account of a pod whose spec names none.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Returns the service account of a Kubernetes pod whose `spec.serviceAccountName` is `named`. Empty or absent means `default`, as in
/// Kubernetes. Specs of static pods name none: the API server rejects a mirror pod with a service account.
#[must_use]
pub fn pod_service_account(named: &str) -> &str {
    if named.is_empty() { DEFAULT_SERVICE_ACCOUNT } else { named }
}

/// The mistake of a text that is not a SPIFFE id, trust domain or name of the form Tacit uses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// Trust domain empty, too long or with a character outside `a-z 0-9 . - _`.
    #[error("trust domain {0:?} must be 1 to 255 characters of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    /// Namespace or service account is no RFC 1123 name.
    #[error(
        "{what} {value:?} must be 1 to 253 characters of a-z, 0-9, '-' and '.', no '-' or '.' at either end"
    )]
    Name {
        /// `namespace` or `service account`.
        what: &'static str,
        /// The text refused.
        value: String,
    },
}

/// A trust domain: the root under which identities are compared. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a trust domain name such as `cluster.local`.
    ///
    /// # Errors
    /// [`IdentityError::TrustDomain`] when it is no SPIFFE trust domain name.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let fits = (1..=TRUST_DOMAIN_MAX_BYTES).contains(&text.len());
        let clean = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
        if fits && clean { Ok(Self(text.into())) } else { Err(IdentityError::TrustDomain(text.to_owned())) }
    }

    /// The name, without a scheme.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of one service account. Cheap to clone, hash and compare.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// The identity of `service_account` in `namespace`.
    ///
    /// # Errors
    /// [`IdentityError::Name`] when either is no RFC 1123 name.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        check_name("namespace", namespace)?;
        check_name("service account", service_account)?;
        Ok(Self {
            trust_domain: trust_domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }

    /// Parses a SPIFFE URI. Nothing is normalised: another spelling of the same id is refused.
    ///
    /// # Errors
    /// [`IdentityError`] naming the part that is wrong.
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(uri.chars().take(ID_MAX_BYTES).collect());
        if uri.len() > ID_MAX_BYTES {
            return Err(form());
        }
        let rest = uri.strip_prefix("spiffe://").ok_or_else(form)?;
        let mut parts = rest.split('/');
        let mut next = || parts.next().ok_or_else(form);
        let (domain, ns, namespace, sa, account) = (next()?, next()?, next()?, next()?, next()?);
        if ns != "ns" || sa != "sa" || parts.next().is_some() {
            return Err(form());
        }
        Self::new(&TrustDomain::parse(domain)?, namespace, account)
    }

    /// Returns the same service account in another trust domain.
    #[must_use]
    pub fn in_domain(&self, trust_domain: &TrustDomain) -> Self {
        Self { trust_domain: trust_domain.clone(), ..self.clone() }
    }

    /// The trust domain it belongs to.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

fn check_name(what: &'static str, value: &str) -> Result<(), IdentityError> {
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    let clean = bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'));
    if clean && bytes.len() <= NAME_MAX_BYTES && edge(bytes.first()) && edge(bytes.last()) {
        Ok(())
    } else {
        Err(IdentityError::Name { what, value: value.chars().take(NAME_MAX_BYTES).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_names_no_service_account_has_the_default_one() {
        assert_eq!(pod_service_account(""), "default");
        for named in ["default", "web"] {
            assert_eq!(pod_service_account(named), named);
        }
    }

    #[test]
    fn an_id_is_printed_as_it_was_parsed() {
        let text = "spiffe://cluster.local/ns/shop/sa/web";
        assert_eq!(SpiffeId::parse(text).expect("valid").to_string(), text);
    }

    #[test]
    fn anything_but_the_exact_form_is_refused() {
        for text in [
            "",
            "spiffe://",
            "https://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/",
            "spiffe://cluster.local/ns/shop/sa/web/x",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://Cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local:80/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/we%62",
            "spiffe://cluster.local/ns/shop/sa/..",
            "SPIFFE://cluster.local/ns/shop/sa/web",
        ] {
            assert!(SpiffeId::parse(text).is_err(), "{text:?} was accepted");
        }
    }
}
