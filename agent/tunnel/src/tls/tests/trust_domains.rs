//! Tests of trust domains and the roots that vouch for them, in both directions: every domain with every root.

use rustls::RootCertStore;
use tacit_core::spiffe::TrustDomain;
use tacit_identity::peer_trust::{Distrust, FederatedDomain, OwnRoots, PeerTrust, TrustDomains};
use tokio::sync::watch;

use super::*;

const OWN: &str = "cluster.local";
const ALIAS: &str = "old.example";
const PARTNER: &str = "partner.example";
const SECOND: &str = "second.example";
const OTHER: &str = "other.example";

/// The roots of the mesh, and of two federated domains.
struct Roots {
    own: TestIssuer,
    partner: TestIssuer,
    second: TestIssuer,
    partner_roots: watch::Sender<Arc<RootCertStore>>,
    _second_roots: watch::Sender<Arc<RootCertStore>>,
    trust: Arc<PeerTrust>,
}

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).expect("valid")
}

fn id(domain: &str, account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://{domain}/ns/shop/sa/{account}")).expect("valid")
}

impl Roots {
    fn new() -> Self {
        let (own, partner, second) = (TestIssuer::new(), TestIssuer::new(), TestIssuer::new());
        let (partner_roots, of_partner) = watch::channel(partner.roots());
        let (second_roots, of_second) = watch::channel(second.roots());
        let federated = [(PARTNER, of_partner), (SECOND, of_second)]
            .map(|(name, roots)| FederatedDomain { name: domain(name), roots });
        let domains = TrustDomains::new(vec![domain(ALIAS)], federated);
        let trust = Arc::new(PeerTrust { domains, ..PeerTrust::default() });
        Self { own, partner, second, partner_roots, _second_roots: second_roots, trust }
    }

    /// Credentials of the mesh that hold peers to the trust domains.
    fn checking(&self, account: &str) -> Credentials {
        self.own.any(&id(OWN, account), SystemTime::now(), HOUR).with_trust(self.trust.clone())
    }

    /// A peer with a certificate of `issuer` for this identity. It trusts the mesh.
    fn peer(&self, issuer: &TestIssuer, identity: &SpiffeId) -> Credentials {
        let mut peer = issuer.any(identity, SystemTime::now(), HOUR);
        // Its own checks are not the subject.
        peer.identity = id(OWN, identity.service_account());
        peer.roots = self.own.roots();
        peer
    }

    /// Every domain with every root, and the outcome.
    fn table(&self) -> [(&'static str, [(&TestIssuer, &'static str); 3]); 5] {
        let (own, partner, second) = (&self.own, &self.partner, &self.second);
        let unknown = "unknown_issuer";
        [
            (OWN, [(own, "ok"), (partner, unknown), (second, unknown)]),
            (ALIAS, [(own, "ok"), (partner, unknown), (second, unknown)]),
            (PARTNER, [(own, unknown), (partner, "ok"), (second, unknown)]),
            (SECOND, [(own, unknown), (partner, unknown), (second, "ok")]),
            (OTHER, [(own, "other_trust_domain"), (partner, unknown), (second, unknown)]),
        ]
    }
}

#[tokio::test]
async fn a_client_is_held_to_the_roots_of_its_own_trust_domain_alone() {
    let roots = Roots::new();
    let db = roots.checking("db");
    for (domain, issuers) in roots.table() {
        for (at, (issuer, expected)) in issuers.into_iter().enumerate() {
            let web = roots.peer(issuer, &id(domain, "web"));
            let (_, server) = handshake(&web, &id(OWN, "db"), &db).await;
            assert_eq!(server, expected, "{domain} by root {at}");
            let mut hbone = ClientConfig::clone(&client_config(&web, &id(OWN, "db")));
            hbone.alpn_protocols = vec![ALPN_HBONE.to_vec()];
            assert_eq!(accept_from(hbone, &db).await, expected, "HBONE, {domain} by root {at}");
        }
    }
}

#[tokio::test]
async fn a_server_is_held_to_the_roots_of_its_own_trust_domain_alone() {
    let roots = Roots::new();
    let web = roots.checking("web");
    for (domain, issuers) in roots.table() {
        // The directory has workloads of the mesh in its own domain.
        let expected_id = id(if domain == ALIAS { OWN } else { domain }, "db");
        for (at, (issuer, expected)) in issuers.into_iter().enumerate() {
            let db = roots.peer(issuer, &id(domain, "db"));
            let (near, far) = connection().await;
            let (client, _) =
                tokio::join!(stream::connect(near, &web, &expected_id), stream::accept(far, &db));
            let outcome = client.map_or_else(|error| error.reason().label(), |_| "ok");
            assert_eq!(outcome, expected, "{domain} by root {at}");
        }
    }
}

#[tokio::test]
async fn a_federated_server_is_not_the_account_of_the_same_name_in_the_mesh() {
    let roots = Roots::new();
    let (web, db) = (roots.checking("web"), roots.peer(&roots.partner, &id(PARTNER, "db")));
    assert_eq!(handshake(&web, &id(OWN, "db"), &db).await.0, "identity_mismatch");
    let db = roots.peer(&roots.own, &id(OWN, "db"));
    assert_eq!(handshake(&web, &id(PARTNER, "db"), &db).await.0, "identity_mismatch");
}

#[tokio::test]
async fn an_alias_goes_by_the_own_trust_domain_and_a_federated_one_by_its_name() {
    let roots = Roots::new();
    let db = roots.checking("db");
    for (issuer, domain, expected) in [
        (&roots.own, OWN, id(OWN, "web")),
        (&roots.own, ALIAS, id(OWN, "web")),
        (&roots.partner, PARTNER, id(PARTNER, "web")),
    ] {
        let web = roots.peer(issuer, &id(domain, "web"));
        let (near, far) = connection().await;
        let to = id(OWN, "db");
        let (_client, server) = tokio::join!(stream::connect(near, &web, &to), stream::accept(far, &db));
        let server = server.map_err(|error| error.to_string()).expect("accepted");
        assert_eq!(server.peer, expected);
        // Roots that the holder of the credentials does not watch cannot change.
        assert_eq!(server.peer_chain.is_unchecked(), domain != PARTNER);
    }
}

#[tokio::test]
async fn a_root_that_is_removed_ends_the_trust_in_whom_it_vouched_for() {
    let roots = Roots::new();
    let (db, to) = (roots.checking("db"), id(OWN, "db"));
    let accept = async |issuer: &TestIssuer, domain: &str| {
        let web = roots.peer(issuer, &id(domain, "web"));
        let (near, far) = connection().await;
        let (_client, server) = tokio::join!(stream::connect(near, &web, &to), stream::accept(far, &db));
        server.map_err(|error| error.to_string()).expect("accepted").peer_chain
    };
    let (partner, second) = (accept(&roots.partner, PARTNER).await, accept(&roots.second, SECOND).await);
    let now = SystemTime::now();
    assert_eq!((partner.revoked(now), second.revoked(now)), (None, None));
    let next = TestIssuer::new();
    let both: Vec<_> =
        [&roots.partner, &next].into_iter().flat_map(|issuer| issuer.roots().roots.clone()).collect();
    roots.partner_roots.send_replace(Arc::new(RootCertStore { roots: both }));
    assert_eq!(partner.revoked(now), None, "the old root is still there");
    roots.partner_roots.send_replace(next.roots());
    assert_eq!(partner.revoked(now), Some(Distrust::RootRemoved(domain(PARTNER))));
    assert_eq!(partner.check(now), Err(Distrust::RootRemoved(domain(PARTNER))));
    assert_eq!(second.revoked(now), None);
    let web = roots.peer(&roots.partner, &id(PARTNER, "web"));
    assert_eq!(handshake(&web, &to, &db).await.1, "unknown_issuer");
}

#[tokio::test]
async fn an_own_root_that_is_removed_ends_the_trust_in_whom_it_vouched_for() {
    let (roots, next) = (Roots::new(), TestIssuer::new());
    let both = Arc::new(RootCertStore {
        roots: [&roots.own, &next].into_iter().flat_map(|issuer| issuer.roots().roots.clone()).collect(),
    });
    let (own_roots, watched) = watch::channel(both.clone());
    let holding = |account: &str| {
        let mut held = roots.checking(account).with_own_roots(OwnRoots::Watched(watched.clone()));
        held.roots = both.clone();
        held
    };
    let (web, db) = (holding("web"), holding("db"));
    let connect = async |issuer: &TestIssuer, domain: &str| {
        let (client, server) =
            (roots.peer(issuer, &id(domain, "web")), roots.peer(issuer, &id(domain, "db")));
        let (to, chains) = (id(OWN, "db"), |stream: stream::Established| stream.peer_chain);
        let (near, far) = connection().await;
        let (_client, inbound) = tokio::join!(stream::connect(near, &client, &to), stream::accept(far, &db));
        let (near, far) = connection().await;
        let (outbound, _server) =
            tokio::join!(stream::connect(near, &web, &to), stream::accept(far, &server));
        [inbound, outbound].map(|end| end.map(chains).map_err(|error| error.to_string()).expect("verified"))
    };
    let mut held = Vec::new();
    for domain in [OWN, ALIAS] {
        held.push((connect(&roots.own, domain).await, connect(&next, domain).await));
    }
    let now = SystemTime::now();
    let ended = || {
        held.iter()
            .flat_map(|(of_old, of_new)| of_old.iter().chain(of_new))
            .map(|chain| (chain.revoked(now), chain.check(now).err()))
            .filter(|ended| *ended != (None, None))
            .collect::<Vec<_>>()
    };
    assert_eq!(ended(), []);
    // Another set with the same roots.
    own_roots.send_replace(Arc::new(RootCertStore { roots: both.roots.iter().rev().cloned().collect() }));
    assert_eq!(ended(), []);
    own_roots.send_replace(next.roots());
    let removed = Some(Distrust::RootRemoved(domain(OWN)));
    assert_eq!(ended(), vec![(removed.clone(), removed); 4]);
    assert!(held.iter().flat_map(|(_, of_new)| of_new).all(|chain| chain.check(now).is_ok()));
    // A planned rotation removes a root after its certificates have expired, and ends no flow.
    let later = now + 2 * HOUR;
    let of_old = held.iter().flat_map(|(of_old, _)| of_old);
    assert!(of_old.clone().all(|chain| chain.revoked(later).is_none() && chain.check(later).is_err()));
    // A handshake under the earlier credentials.
    let old = roots.peer(&roots.own, &id(OWN, "web"));
    assert_eq!(handshake(&old, &id(OWN, "db"), &db).await.1, "unknown_issuer");
}
