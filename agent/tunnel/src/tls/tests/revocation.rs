//! Tests of revocation lists in handshakes, in both directions and for both wire formats, and on sessions that exist.

use rcgen::{Issuer, KeyPair, SerialNumber};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tacit_identity::{
    peer_trust::PeerTrust,
    revocation::{Revocation, RevocationCheck, RevocationLists, UnknownStatus},
    template::leaf_params,
};
use tacit_testing::pki::{authority, revocation_list};
use tokio::sync::watch;

use super::*;
use crate::Session;

const WEB: u8 = 21;
const DB: u8 = 22;
const BETWEEN: u8 = 11;

/// A root and an authority below it that issues the certificates of `web` and `db`.
struct Mesh {
    root: Issuer<'static, KeyPair>,
    between: Issuer<'static, KeyPair>,
    between_der: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
    lists: watch::Sender<Arc<RevocationLists>>,
    trust: Arc<PeerTrust>,
}

/// The serial numbers that a root and the authority below it have revoked. `None` for an authority without a list.
type Revoked<'a> = (Option<&'a [u8]>, Option<&'a [u8]>);

impl Mesh {
    fn new(unknown: UnknownStatus) -> Self {
        let (params, key) = authority("root", 1);
        let certificate = params.self_signed(&key).expect("signed");
        let root = Issuer::new(params, key);
        let (params, key) = authority("between", BETWEEN);
        let between_der = params.signed_by(&key, &root).expect("signed").der().clone();
        let between = Issuer::new(params, key);
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).expect("a root");
        let first = parse(&[list(&root, &[]), list(&between, &[])]);
        let (lists, watched) = watch::channel(first);
        let check = RevocationCheck::Lists(Arc::new(Revocation::new(watched, unknown)));
        let trust = Arc::new(PeerTrust { revocation: check, ..PeerTrust::default() });
        Self { root, between, between_der, roots: Arc::new(roots), lists, trust }
    }

    fn revoke(&self, (by_root, by_between): Revoked<'_>) {
        let by_root = by_root.map(|serials| list(&self.root, serials));
        let by_between = by_between.map(|serials| list(&self.between, serials));
        self.lists.send_replace(parse(&by_root.into_iter().chain(by_between).collect::<Vec<_>>()));
    }

    /// Credentials of an account whose certificate has this serial number. They hold peers to the lists if `checks`.
    fn credentials(&self, account: &str, serial: u8, checks: bool) -> Arc<Credentials> {
        let mut params =
            leaf_params(&[identity(account).to_string()], SystemTime::now(), HOUR).expect("ascii");
        params.serial_number = Some(SerialNumber::from_slice(&[serial]));
        let key = KeyPair::generate().expect("a key");
        let leaf = params.signed_by(&key, &self.between).expect("signed");
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain = vec![leaf.der().clone(), self.between_der.clone()];
        let credentials = Credentials::new(chain, &key, self.roots.clone()).expect("good");
        Arc::new(if checks { credentials.with_trust(self.trust.clone()) } else { credentials })
    }
}

fn list(issuer: &Issuer<'static, KeyPair>, serials: &[u8]) -> String {
    let serials: Vec<[u8; 1]> = serials.iter().map(|serial| [*serial]).collect();
    revocation_list(issuer, &serials, SystemTime::now() + HOUR, None)
}

fn parse(lists: &[String]) -> Arc<RevocationLists> {
    Arc::new(RevocationLists::parse(lists.concat().as_bytes()).expect("lists"))
}

#[tokio::test]
async fn a_revoked_peer_is_refused_in_both_directions() {
    let none: &[u8] = &[];
    for (revoked, refusal) in [
        ((Some(none), Some(none)), "ok"),
        ((Some(none), Some(&[WEB, DB][..])), "certificate_revoked"),
        ((Some(&[BETWEEN][..]), Some(none)), "certificate_revoked"),
        // Serial numbers of the other issuer.
        ((Some(&[WEB, DB][..]), Some(&[BETWEEN][..])), "ok"),
        ((Some(none), None), "revocation_unknown"),
        ((None, Some(none)), "revocation_unknown"),
        ((None, Some(&[WEB, DB][..])), "certificate_revoked"),
    ] {
        let mesh = Mesh::new(UnknownStatus::Deny);
        let (web, db) = (mesh.credentials("web", WEB, false), mesh.credentials("db", DB, false));
        let (checking_web, checking_db) =
            (mesh.credentials("web", WEB, true), mesh.credentials("db", DB, true));
        mesh.revoke(revoked);
        let by_peer = if refusal == "ok" { "ok" } else { "refused_by_peer" };

        let (client, server) = handshake(&checking_web, &identity("db"), &db).await;
        // The client of a good server waits for more, so only the server's outcome counts.
        let outcome =
            if refusal == "ok" { (refusal, server.as_str()) } else { (client.as_str(), server.as_str()) };
        assert_eq!(outcome, (refusal, by_peer), "client, {revoked:?}");

        let (client, server) = handshake(&web, &identity("db"), &checking_db).await;
        let outcome =
            if refusal == "ok" { (by_peer, server.as_str()) } else { (client.as_str(), server.as_str()) };
        assert_eq!(outcome, (by_peer, refusal), "server, {revoked:?}");

        let mut hbone = ClientConfig::clone(&client_config(&web, &identity("db")));
        hbone.alpn_protocols = vec![ALPN_HBONE.to_vec()];
        assert_eq!(accept_from(hbone, &checking_db).await, refusal, "HBONE, {revoked:?}");
    }
}

#[tokio::test]
async fn unknown_status_is_accepted_where_that_is_configured() {
    let mesh = Mesh::new(UnknownStatus::Allow);
    let (web, db) = (mesh.credentials("web", WEB, true), mesh.credentials("db", DB, true));
    mesh.revoke((Some(&[]), None));
    assert_eq!(handshake(&web, &identity("db"), &db).await.1, "ok");
    mesh.revoke((None, Some(&[DB])));
    assert_eq!(handshake(&web, &identity("db"), &db).await.0, "certificate_revoked");
}

#[tokio::test]
async fn the_log_names_the_revoked_certificate_and_the_peer_gets_the_alert() {
    let mesh = Mesh::new(UnknownStatus::Deny);
    let (web, db) = (mesh.credentials("web", WEB, false), mesh.credentials("db", DB, true));
    mesh.revoke((Some(&[]), Some(&[WEB])));
    let (near, far) = connection().await;
    let expected = identity("db");
    let connect = async {
        let mut session = Session::connect(near, &web, &expected).await?;
        session.open(&crate::testing::open(), None).await.map_err(|error| match error {
            crate::OpenError::Tunnel(error) => error,
            other => panic!("{other}"),
        })
    };
    let (client, server) = tokio::join!(connect, stream::accept(far, &db));
    let server = server.err().expect("refused").to_string();
    assert_eq!(
        server,
        "the peer's certificate is refused: the certificate with serial number 15 is revoked by its issuer, CN=between"
    );
    let client = client.expect_err("refused").to_string();
    assert!(client.contains("CertificateRevoked"), "{client}");
}

#[tokio::test]
async fn a_session_knows_when_its_peer_is_revoked() {
    let mesh = Mesh::new(UnknownStatus::Deny);
    let (web, db) = (mesh.credentials("web", WEB, true), mesh.credentials("db", DB, true));
    let (near, far) = connection().await;
    let expected = identity("db");
    let (client, server) = tokio::join!(Session::connect(near, &web, &expected), Session::accept(far, &db));
    let (client, server) = (client.expect("connected"), server.expect("accepted"));
    let now = SystemTime::now();
    let ends = || [&client, &server].map(|session| session.peer_chain().revoked(now).is_some());
    assert_eq!(ends(), [false, false]);
    for (revoked, expected) in [
        ((Some(&[][..]), Some(&[DB][..])), [true, false]),
        ((Some(&[]), Some(&[WEB])), [false, true]),
        ((Some(&[BETWEEN]), Some(&[])), [true, true]),
        // Not known any more, which is no revocation.
        ((None, Some(&[])), [false, false]),
    ] {
        mesh.revoke(revoked);
        assert_eq!(ends(), expected, "{revoked:?}");
    }
    assert!(client.peer_chain().check(now).is_err(), "no new flow while the status is unknown");
}

#[tokio::test]
async fn without_lists_a_session_keeps_no_chain() {
    let (client, server) = crate::testing::sessions().await;
    assert!(client.peer_chain().is_unchecked() && server.peer_chain().is_unchecked());
}
