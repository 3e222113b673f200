//! Tests of what is made of an authority's answer, whoever the authority is.

use super::*;
use crate::issuer::testing;

fn pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", certificate.as_ref()))
}

fn web() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid")
}

/// A key, a certificate for it, and the root: as an authority that signs with its root would answer.
fn answer(identity: &SpiffeId) -> (KeyPair, String, String) {
    let issuer = testing::issuer("cluster.local");
    let key = KeyPair::generate().expect("a key");
    let (leaf, root) = issuer.for_key(identity, &key);
    (key, pem(&leaf), pem(&root))
}

fn judged(chain: &[&str], key: &KeyPair) -> Result<Credentials, IstioError> {
    let answer = CertificateResponse { cert_chain: chain.iter().map(|pem| (*pem).to_owned()).collect() };
    credentials(&answer, key, &web())
}

#[test]
fn an_answer_is_leaf_between_and_roots() {
    let (key, leaf, root) = answer(&web());
    let (_, _, other) = answer(&web());
    assert_eq!(judged(&[&leaf, &root], &key).expect("good").roots.len(), 1);
    // istiod has an empty text where nothing is between.
    assert_eq!(judged(&[&leaf, "", &root], &key).expect("good").chain().len(), 1);
    // Two roots in the last element, while one is replaced.
    assert_eq!(judged(&[&leaf, &format!("{other}{root}")], &key).expect("good").roots.len(), 2);
}

#[test]
fn an_answer_that_peers_could_not_verify_is_refused() {
    let (key, leaf, root) = answer(&web());
    let (other_key, other_leaf, other_root) = answer(&web());
    let db = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/db").expect("valid");
    let (db_key, db_leaf, db_root) = answer(&db);
    for (what, chain, key) in [
        ("nothing", &[][..], &key),
        ("no root", &[leaf.as_str()], &key),
        ("an empty root", &[&leaf, ""], &key),
        ("no certificate", &["nonsense", &root], &key),
        ("another root", &[&leaf, &other_root], &key),
        ("another key", &[&leaf, &root], &other_key),
        ("somebody else's certificate", &[&other_leaf, &other_root], &key),
        ("another identity", &[&db_leaf, &db_root], &db_key),
    ] {
        assert!(judged(chain, key).is_err(), "{what}");
    }
    assert!(matches!(judged(&[&db_leaf, &db_root], &db_key), Err(IstioError::Identity { .. })));
}

#[test]
fn a_certificate_that_has_expired_as_it_comes_is_refused() {
    let (key, leaf, root) = answer(&web());
    let end = judged(&[&leaf, &root], &key).expect("good").not_after;
    let second = Duration::from_secs(1);
    for (received, good) in [(end - second, true), (end, false), (end + second, false)] {
        let credentials = judged(&[&leaf, &root], &key).expect("good");
        let outcome = still_valid(credentials, received);
        assert_eq!(outcome.is_ok(), good, "{received:?}");
        assert!(good || matches!(outcome, Err(IstioError::Expired)));
    }
}

/// An issuer without a root file, and the result of its published roots.
async fn roots_of(published: Result<Option<String>, String>) -> Result<usize, String> {
    let config = IstioConfig {
        address: "authority:1".to_owned(),
        server_name: "authority".to_owned(),
        root_file: "/nonexistent/root.pem".into(),
        token_file: "/nonexistent/token".into(),
        cluster_id: None,
        lifetime: Duration::from_secs(60),
    };
    let issuer = IstioIssuer::new(config).with_published_roots(Box::new(move || {
        let published = published.clone();
        Box::pin(async move { published })
    }));
    issuer.roots().await.map(|roots| roots.len()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn published_roots_are_used_while_there_is_no_root_file() {
    let (_, _, root) = answer(&web());
    assert_eq!(roots_of(Ok(Some(root))).await, Ok(1));
    for (published, problem) in [
        (Ok(None), "it does not exist yet"),
        (Err("the API is away".to_owned()), "the API is away"),
        (Ok(Some("nonsense".to_owned())), "rootFile /nonexistent/root.pem"),
    ] {
        let refused = roots_of(published).await.expect_err("no roots");
        assert!(refused.contains(problem), "{refused}");
    }
}
