//! Validation of certificate requests. Pure.
//!
//! A certificate request proves possession of the key and names the identity. All other content is ignored. The authority sets
//! subject, purposes and lifetime, so a request cannot obtain more than one identity.

use std::time::Duration;

use rcgen::{CertificateSigningRequestParams, PublicKey, SanType};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_identity::istio::api::CertificateRequest;

use super::refusal::RequestRefusal;

/// A valid request that the caller may still lack permission for.
#[derive(Debug)]
pub(super) struct ValidRequest {
    pub(super) identity: SpiffeId,
    pub(super) key: PublicKey,
    pub(super) lifetime: Duration,
}

/// Validates `request`. `own` is the identity of the caller, if the caller is a workload.
pub(super) fn read(
    request: &CertificateRequest,
    own: Option<&SpiffeId>,
    trust_domain: &TrustDomain,
    longest: Duration,
) -> Result<ValidRequest, RequestRefusal> {
    let csr = CertificateSigningRequestParams::from_pem(&request.csr)
        .map_err(|e| RequestRefusal::Csr(e.to_string()))?;
    let identity = match csr.params.subject_alt_names.as_slice() {
        [SanType::URI(uri)] => SpiffeId::parse(uri.as_str())?,
        names => return Err(RequestRefusal::Names(names.len())),
    };
    if identity.trust_domain() != trust_domain {
        return Err(RequestRefusal::TrustDomain { identity, ours: trust_domain.clone() });
    }
    let asked = match request.impersonated() {
        Some(asked) => asked.to_owned(),
        None => own.ok_or_else(|| RequestRefusal::Message("it names no identity".to_owned()))?.to_string(),
    };
    if identity.to_string() != asked {
        return Err(RequestRefusal::Mismatch { csr: identity, asked });
    }
    Ok(ValidRequest {
        identity,
        key: csr.public_key,
        lifetime: lifetime(request.validity_duration, longest)?,
    })
}

/// Returns the lifetime. Zero means `longest`, and longer lifetimes are reduced to it.
fn lifetime(seconds: i64, longest: Duration) -> Result<Duration, RequestRefusal> {
    match u64::try_from(seconds) {
        Ok(0) => Ok(longest),
        Ok(seconds) => Ok(Duration::from_secs(seconds).min(longest)),
        Err(_) => Err(RequestRefusal::Lifetime(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    };

    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
    const DAY: Duration = Duration::from_secs(86_400);

    fn csr(sans: &[SanType], change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = CertificateParams::default();
        params.subject_alt_names = sans.to_vec();
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        params.serialize_request(&key).and_then(|csr| csr.pem()).expect("a request")
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().expect("ascii"))
    }

    fn answer(csr: String, asked: &str, seconds: i64) -> Result<ValidRequest, &'static str> {
        let request = CertificateRequest::for_identity(asked, csr, seconds);
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        read(&request, None, &domain, DAY).map_err(|refusal| refusal.reason())
    }

    #[test]
    fn a_request_for_one_identity_is_read() {
        let wanted = answer(csr(&[uri(WEB)], |_| ()), WEB, 60).expect("granted");
        assert_eq!((wanted.identity.to_string().as_str(), wanted.lifetime), (WEB, Duration::from_secs(60)));
    }

    #[test]
    fn names_other_than_the_one_asked_for_are_refused() {
        let dns = SanType::DnsName("web.shop".try_into().expect("ascii"));
        let other = "spiffe://cluster.local/ns/shop/sa/db";
        for (sans, refused) in [
            (vec![], "names"),
            (vec![uri(WEB), uri(other)], "names"),
            (vec![uri(WEB), uri(WEB)], "names"),
            (vec![uri(WEB), dns.clone()], "names"),
            (vec![dns], "names"),
            (vec![uri(other)], "mismatch"),
            (vec![uri("spiffe://other.local/ns/shop/sa/web")], "trust_domain"),
            (vec![uri("spiffe://cluster.local/ns/shop/sa/web/")], "identity"),
            (vec![uri("https://cluster.local")], "identity"),
        ] {
            assert_eq!(answer(csr(&sans, |_| ()), WEB, 60).err(), Some(refused), "{sans:?}");
        }
        assert_eq!(answer(csr(&[uri(WEB)], |_| ()), other, 60).err(), Some("mismatch"));
    }

    #[test]
    fn a_request_for_nobody_is_for_the_caller_itself() {
        let request = CertificateRequest { csr: csr(&[uri(WEB)], |_| ()), ..Default::default() };
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let own = |own: Option<&str>| {
            let own = own.map(|own| SpiffeId::parse(own).expect("valid"));
            read(&request, own.as_ref(), &domain, DAY).map(|wanted| wanted.lifetime).map_err(|r| r.reason())
        };
        assert_eq!(own(Some(WEB)), Ok(DAY));
        assert_eq!(own(Some("spiffe://cluster.local/ns/shop/sa/db")), Err("mismatch"));
        assert_eq!(own(None), Err("message"));
    }

    #[test]
    fn what_else_a_request_asks_for_changes_nothing_or_is_refused() {
        let ca = csr(&[uri(WEB)], |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
            params.distinguished_name.push(DnType::CommonName, "root");
        });
        assert_eq!(answer(ca, WEB, 60).err(), None);
        let unknown = csr(&[uri(WEB)], |params| {
            params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 2, 3], vec![5, 0])];
        });
        assert_eq!(answer(unknown, WEB, 60).err(), Some("csr"));
    }

    #[test]
    fn a_request_that_is_not_signed_with_its_key_is_refused() {
        let pem = csr(&[uri(WEB)], |_| ());
        let der = pem_body(&pem);
        for at in [der.len() - 1, der.len() - 40, der.len() / 2] {
            let mut forged = der.clone();
            forged[at] ^= 1;
            let forged = rustls::pki_types::CertificateSigningRequestDer::from(forged);
            assert!(CertificateSigningRequestParams::from_der(&forged).is_err(), "byte {at}");
        }
        for text in
            ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
        {
            assert_eq!(answer(text.to_owned(), WEB, 60).err(), Some("csr"), "{text:?}");
        }
    }

    #[test]
    fn the_lifetime_is_bounded() {
        for (seconds, expected) in [
            (0, Ok(DAY)),
            (1, Ok(Duration::from_secs(1))),
            (86_400, Ok(DAY)),
            (86_401, Ok(DAY)),
            (i64::MAX, Ok(DAY)),
            (-1, Err(RequestRefusal::Lifetime(-1))),
        ] {
            assert_eq!(lifetime(seconds, DAY), expected, "{seconds}");
        }
    }

    fn pem_body(pem: &str) -> Vec<u8> {
        use rustls::pki_types::pem::PemObject as _;
        rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).expect("PEM").to_vec()
    }
}
