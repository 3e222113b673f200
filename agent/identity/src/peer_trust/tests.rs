//! Tests of the standing of trust domains, and of their roots. Handshakes are tested in `tacit_tunnel`.

use super::*;

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).expect("valid")
}

#[test]
fn each_domain_has_one_standing_and_the_own_one_comes_first() {
    let (_sender, roots) = watch::channel(Arc::new(RootCertStore::empty()));
    let federated = |name| FederatedDomain { name: domain(name), roots: roots.clone() };
    let own = domain("prod.example");
    // An alias or a federated domain with the own name changes nothing.
    let aliases = vec![domain("old.example"), domain("prod.example")];
    let domains =
        TrustDomains::new(aliases, ["partner.example", "prod.example", "old.example"].map(federated));
    for (name, expected) in [
        ("prod.example", Some("spiffe://prod.example/ns/shop/sa/web")),
        ("old.example", Some("spiffe://prod.example/ns/shop/sa/web")),
        ("partner.example", Some("spiffe://partner.example/ns/shop/sa/web")),
        ("other.example", None),
    ] {
        let presented = SpiffeId::parse(&format!("spiffe://{name}/ns/shop/sa/web")).expect("valid");
        let standing = domains.standing(presented.trust_domain(), &own);
        let identity = standing.identity(&presented, &own).map(|identity| identity.to_string());
        assert_eq!(identity.as_deref(), expected, "{name}");
        assert_eq!(matches!(standing, Standing::Federated(_)), name == "partner.example");
    }
}

#[test]
fn roots_are_at_least_one_certificate() {
    let key = rcgen::KeyPair::generate().expect("a key");
    let root = rcgen::CertificateParams::default().self_signed(&key).expect("signed").pem();
    assert_eq!(roots(root.as_bytes()).expect("a root").roots.len(), 1);
    for bad in ["", "no PEM", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"] {
        roots(bad.as_bytes()).expect_err(bad);
    }
}
