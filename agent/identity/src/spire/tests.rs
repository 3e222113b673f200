//! The issuer with a simulated SPIRE agent behind a Unix socket.

mod fake;

use std::{
    collections::BTreeSet,
    os::unix::net::UnixListener as StdListener,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_grpc::Status;
use tacit_testing::Scratch;
use tokio::{sync::watch, time::timeout};

use super::{api::BundlesResponse, *};
use crate::{issuer::Issuer, manager::Identities};
use fake::{Ca, Spire, Step};

/// Longer than any test takes, however slow the machine is.
const LONG: Duration = Duration::from_secs(60);
const DOMAIN: &str = "example.org";
const WEB: &str = "spiffe://example.org/ns/shop/sa/web";

fn web() -> SpiffeId {
    SpiffeId::parse(WEB).expect("valid")
}

fn pods(uids: &[&str]) -> Arc<PodUids> {
    let uids: BTreeSet<_> = uids.iter().map(|uid| (*uid).to_owned()).collect();
    Arc::new(PodUids::from([(web(), uids)]))
}

fn issuer_for(socket: &Path, api: SpireApi, pods: watch::Receiver<Arc<PodUids>>) -> SpireIssuer {
    let config = SpireConfig { socket: socket.to_owned(), api };
    SpireIssuer::new(config, TrustDomain::parse(DOMAIN).expect("valid"), pods)
}

/// An issuer without pods at the socket of `spire`.
fn issuer(spire: &Spire, api: SpireApi) -> SpireIssuer {
    issuer_for(spire.socket(), api, watch::channel(Arc::default()).1)
}

async fn next(subscription: &mut Subscription) -> Result<Credentials, String> {
    let next = timeout(LONG, subscription.next()).await.expect("an outcome");
    next.map_err(|error| error.to_string())
}

/// Skips errors until credentials come.
async fn credentials(subscription: &mut Subscription) -> Credentials {
    loop {
        if let Ok(credentials) = next(subscription).await {
            return credentials;
        }
    }
}

/// Skips credentials and other errors until an error contains `text`.
async fn failure(subscription: &mut Subscription, text: &str) -> String {
    loop {
        if let Err(error) = next(subscription).await
            && error.contains(text)
        {
            return error;
        }
    }
}

#[tokio::test]
async fn an_svid_of_the_directorys_identity_becomes_its_credentials() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids(&[WEB])));
    let issuer = issuer_for(spire.socket(), SpireApi::Delegated, watch::channel(pods(&["1-a", "2-b"])).1);
    let credentials = next(&mut issuer.subscribe(&web()).expect("ours")).await.expect("issued");
    assert_eq!((credentials.identity, credentials.roots.len()), (web(), 1));
    let selectors = ["k8s:ns:shop", "k8s:sa:web", "k8s:pod-uid:1-a", "k8s:pod-uid:2-b"];
    assert_eq!(spire.selectors(), [selectors.map(str::to_owned).to_vec()]);
    assert!(issuer.answered().is_some());
}

#[tokio::test]
async fn a_renewed_svid_and_new_roots_are_taken_up() {
    let (ca, next_ca) = (Ca::new(DOMAIN), Ca::new(DOMAIN));
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids(&[WEB])));
    let issuer = issuer(&spire, SpireApi::Delegated);
    let mut subscription = issuer.subscribe(&web()).expect("ours");
    let first = credentials(&mut subscription).await;
    // The same once more is no change.
    let again = ca.svids(&[WEB]);
    spire.svids(Step::Send(again.clone()));
    spire.svids(Step::Send(again));
    spire.bundles(Step::Send(ca.bundles()));
    let second = next(&mut subscription).await.expect("renewed");
    assert_ne!(first.serial, second.serial);
    // Both roots, then an SVID of the new one.
    spire.bundles(Step::Send(ca.bundles_with(&next_ca)));
    let rotating = next(&mut subscription).await.expect("the next are these");
    assert_eq!((&rotating.serial, rotating.roots.len()), (&second.serial, 2));
    spire.svids(Step::Send(next_ca.svids(&[WEB])));
    let third = credentials(&mut subscription).await;
    assert_ne!(third.serial, second.serial);
    // An SVID of a root that is in no bundle is refused, and used as soon as the bundle comes.
    let last_ca = Ca::new(DOMAIN);
    spire.svids(Step::Send(last_ca.svids(&[WEB])));
    failure(&mut subscription, "does not lead to the roots").await;
    spire.bundles(Step::Send(last_ca.bundles()));
    assert_eq!(credentials(&mut subscription).await.roots.len(), 1);
}

/// Waits until the credentials in use have this many roots.
async fn roots_in_use(identities: &Identities, count: usize) -> Arc<Credentials> {
    let mut changes = identities.changes();
    loop {
        // Asks for the identity, at first.
        let _ = identities.ready(&web());
        match identities.current(&web()) {
            Some(held) if held.roots.len() == count => return held,
            _ => timeout(LONG, changes.changed()).await.expect("a change").expect("a sender"),
        }
    }
}

fn roots_of(ca: &Ca) -> Arc<RootCertStore> {
    let bundles = ca.bundles().bundles;
    let bundles = bundles.iter().map(|(name, der)| (name.as_str(), der.as_slice()));
    let domain = TrustDomain::parse(DOMAIN).expect("valid");
    Bundles::read(bundles, &domain, SystemTime::now()).expect("a root").own
}

#[tokio::test]
async fn a_root_that_is_gone_is_not_trusted_though_the_svid_is_refused() {
    let (ca, next_ca) = (Ca::new(DOMAIN), Ca::new(DOMAIN));
    for svids_before in [None, Some(ca.svids(&[])), Some(ca.svids(&["spiffe://example.org/ns/shop/sa/db"]))] {
        let spire = Spire::start();
        spire.bundles(Step::Send(ca.bundles_with(&next_ca)));
        spire.svids(Step::Send(ca.svids(&[WEB])));
        let identities = Identities::start(Issuer::Spire(issuer(&spire, SpireApi::Delegated)));
        let first = roots_in_use(&identities, 2).await;
        let (mut changes, mut removals) = (identities.changes(), identities.root_removals());
        // The SVID in use leads to a root that is gone, or there is none any more.
        if let Some(svids) = svids_before {
            spire.svids(Step::Send(svids));
            while identities.certificates()[0].last_error.is_none() {
                timeout(LONG, changes.changed()).await.expect("an attempt").expect("attempts");
            }
        }
        spire.bundles(Step::Send(next_ca.bundles()));
        let second = roots_in_use(&identities, 1).await;
        assert_eq!(second.roots.roots, roots_of(&next_ca).roots);
        assert_eq!((&second.serial, second.chain()), (&first.serial, first.chain()));
        timeout(LONG, removals.changed()).await.expect("told").expect("a sender");
        while identities.certificates()[0].last_error.is_none() {
            timeout(LONG, changes.changed()).await.expect("an attempt").expect("attempts");
        }
    }
}

#[tokio::test]
async fn a_bundle_of_the_workload_api_counts_though_its_svids_cannot_be_read() {
    let (ca, next_ca) = (Ca::new(DOMAIN), Ca::new(DOMAIN));
    let spire = Spire::start();
    let answer = |bundles: BundlesResponse| {
        let mut answer = ca.own(&[WEB]);
        answer.svids[0].bundle = bundles.bundles.into_values().next().expect("a bundle");
        answer
    };
    spire.own(Step::Send(answer(ca.bundles_with(&next_ca))));
    let identities = Identities::start(Issuer::Spire(issuer(&spire, SpireApi::Workload)));
    let first = roots_in_use(&identities, 2).await;
    let mut bad = answer(next_ca.bundles());
    bad.svids[0].chain = b"nonsense".to_vec();
    spire.own(Step::Send(bad));
    let second = roots_in_use(&identities, 1).await;
    assert_eq!((&second.roots.roots, &second.serial), (&roots_of(&next_ca).roots, &first.serial));
}

#[tokio::test]
async fn an_svid_of_another_identity_is_refused_with_both_names() {
    let ca = Ca::new(DOMAIN);
    for wrong in [
        "spiffe://example.org/ns/shop/sa/db",
        "spiffe://example.org/ns/bank/sa/web",
        "spiffe://other.org/ns/shop/sa/web",
        "spiffe://example.org/web",
    ] {
        let spire = Spire::start();
        spire.bundles(Step::Send(ca.bundles()));
        spire.svids(Step::Send(ca.svids(&[wrong])));
        let issuer = issuer(&spire, SpireApi::Delegated);
        let error = next(&mut issuer.subscribe(&web()).expect("ours")).await.expect_err("another identity");
        assert!(
            error.contains(&format!("SPIRE gives {wrong} for selectors k8s:ns:shop, k8s:sa:web")),
            "{error}"
        );
        assert!(error.contains(&format!("expected {WEB}")), "{error}");
    }
    // Beside the right one it does not matter.
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids(&["spiffe://example.org/web", WEB])));
    let issuer = issuer(&spire, SpireApi::Delegated);
    assert_eq!(next(&mut issuer.subscribe(&web()).expect("ours")).await.expect("issued").identity, web());
    let stranger = SpiffeId::parse("spiffe://other.org/ns/shop/sa/web").expect("valid");
    assert!(matches!(issuer.subscribe(&stranger), Err(IssueError::TrustDomain { .. })));
}

#[tokio::test]
async fn an_empty_update_names_the_missing_entry_and_the_last_svid_stays() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids(&[])));
    let identities = Identities::start(Issuer::Spire(issuer(&spire, SpireApi::Delegated)));
    let error = identities.require(&web()).await.expect_err("no entry").to_string();
    assert!(error.contains("no registration entry for selectors k8s:ns:shop, k8s:sa:web"), "{error}");
    assert!(error.contains(&format!("SPIFFE id {WEB}")), "{error}");
    let mut changes = identities.changes();
    spire.svids(Step::Send(ca.svids(&[WEB])));
    while identities.ready(&web()).is_err() {
        changes.changed().await.expect("attempts");
    }
    // The entry is deleted.
    spire.svids(Step::Send(ca.svids(&[])));
    while identities.certificates()[0].last_error.is_none() {
        changes.changed().await.expect("attempts");
    }
    assert!(identities.current(&web()).is_some(), "until it expires");
}

#[tokio::test]
async fn an_svid_or_a_bundle_that_has_expired_is_refused() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.expired_svids(WEB)));
    let delegated = issuer(&spire, SpireApi::Delegated);
    let error = next(&mut delegated.subscribe(&web()).expect("ours")).await.expect_err("expired");
    assert!(error.contains("had expired as it came"), "{error}");

    let old = Ca::expired(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(old.bundles()));
    spire.svids(Step::Send(old.svids(&[WEB])));
    let delegated = issuer(&spire, SpireApi::Delegated);
    let mut subscription = delegated.subscribe(&web()).expect("ours");
    let error = next(&mut subscription).await.expect_err("expired");
    assert!(
        error.contains("bundle of trust domain example.org is refused: all its roots have expired"),
        "{error}"
    );
    // A later bundle with a good root is used.
    spire.svids(Step::Send(ca.svids(&[WEB])));
    spire.bundles(Step::Send(ca.bundles()));
    credentials(&mut subscription).await;
    // A bad one after it leaves the good one in use.
    spire.bundles(Step::Send(old.bundles()));
    failure(&mut subscription, "have expired").await;
    spire.svids(Step::Send(ca.svids(&[WEB])));
    credentials(&mut subscription).await;
}

#[tokio::test]
async fn an_svid_that_expires_without_another_one_is_reported() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids_for(&[WEB], Duration::from_secs(2))));
    let identities = Identities::start(Issuer::Spire(issuer(&spire, SpireApi::Delegated)));
    let mut changes = identities.changes();
    let is_reported = || matches!(identities.ready(&web()), Err(IssueError::NotRenewed));
    while !is_reported() {
        timeout(LONG, changes.changed()).await.expect("a report").expect("attempts");
    }
    assert!(identities.current(&web()).is_none());
    spire.svids(Step::Send(ca.svids(&[WEB])));
    while identities.ready(&web()).is_err() {
        timeout(LONG, changes.changed()).await.expect("another SVID").expect("attempts");
    }
}

#[tokio::test]
async fn a_delegate_that_is_not_authorized_is_told_what_to_do() {
    let spire = Spire::start();
    let denied =
        Status::new(tacit_grpc::Code::PermissionDenied, "caller not configured as an authorized delegate");
    spire.bundles(Step::End(denied.clone()));
    spire.svids(Step::End(denied));
    let issuer = issuer(&spire, SpireApi::Delegated);
    let error = next(&mut issuer.subscribe(&web()).expect("ours")).await.expect_err("denied");
    assert!(error.contains("PERMISSION_DENIED: caller not configured"), "{error}");
    assert!(error.contains("authorized_delegates"), "{error}");

    let spire = Spire::start();
    spire.svids(Step::End(Status::new(tacit_grpc::Code::Unimplemented, "unknown service")));
    let issuer = issuer_for(spire.socket(), SpireApi::Delegated, watch::channel(Arc::default()).1);
    let error = next(&mut issuer.subscribe(&web()).expect("ours")).await.expect_err("another socket");
    assert!(error.contains("admin_socket_path"), "{error}");
}

#[tokio::test]
async fn a_stream_that_is_lost_is_opened_again_and_the_last_svid_stays() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids(&[WEB])));
    let identities = Identities::start(Issuer::Spire(issuer(&spire, SpireApi::Delegated)));
    identities.require(&web()).await.expect("issued");
    let serial = || identities.certificates()[0].serial.clone();
    let mut changes = identities.changes();
    for lost in [Step::Reset, Step::Half, Step::Close, Step::End(Status::OK)] {
        let before = serial();
        let opened = spire.opened();
        spire.svids(lost.clone());
        while identities.certificates()[0].last_error.is_none() {
            changes.changed().await.expect("attempts");
        }
        assert!(identities.current(&web()).is_some(), "{lost:?}: the last SVID stays");
        // The next stream brings another SVID.
        spire.svids(Step::Send(ca.svids(&[WEB])));
        while serial() == before {
            timeout(LONG, changes.changed()).await.expect("another stream").expect("attempts");
        }
        assert!(spire.opened() > opened, "{lost:?}: opened again");
        assert_eq!(identities.certificates()[0].last_error, None);
    }
}

#[tokio::test]
async fn a_socket_that_cannot_be_trusted_or_does_not_exist_is_an_error() {
    let scratch = Scratch::new();
    let file = scratch.path().join("file");
    std::fs::write(&file, "").expect("written");
    let dead = scratch.path().join("dead");
    drop(StdListener::bind(&dead).expect("bound"));
    for (path, problem) in [
        (scratch.path().join("absent"), "it does not exist"),
        (file, "it is not a socket"),
        (dead, "nobody listens"),
    ] {
        let issuer = issuer_for(&path, SpireApi::Delegated, watch::channel(Arc::default()).1);
        let error = next(&mut issuer.subscribe(&web()).expect("ours")).await.expect_err("no socket");
        let expected = format!("issuer.spire.socket {}: {problem}", path.display());
        assert!(error.starts_with(&expected), "{error}");
    }
}

#[tokio::test]
async fn pods_that_come_and_go_change_the_selectors() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles()));
    spire.svids(Step::Send(ca.svids(&[WEB])));
    let (sender, receiver) = watch::channel(pods(&["1"]));
    let issuer = issuer_for(spire.socket(), SpireApi::Delegated, receiver);
    let mut subscription = issuer.subscribe(&web()).expect("ours");
    let first = credentials(&mut subscription).await;
    sender.send_replace(pods(&["2"]));
    spire.svids(Step::Send(ca.svids(&[WEB])));
    while credentials(&mut subscription).await.serial == first.serial {}
    let selectors = spire.selectors();
    assert_eq!(selectors.first().map(|selectors| &*selectors[2]), Some("k8s:pod-uid:1"));
    assert_eq!(selectors.last().map(|selectors| &*selectors[2]), Some("k8s:pod-uid:2"));
}

#[tokio::test]
async fn bundles_of_other_trust_domains_are_kept_apart() {
    let (ca, other) = (Ca::new(DOMAIN), Ca::new("other.org"));
    let spire = Spire::start();
    spire.bundles(Step::Send(ca.bundles_and_those_of(&other)));
    spire.svids(Step::Send(ca.svids(&[WEB])));
    let delegated = issuer(&spire, SpireApi::Delegated);
    assert!(delegated.federated().is_empty());
    let mut subscription = delegated.subscribe(&web()).expect("ours");
    assert_eq!(credentials(&mut subscription).await.roots.len(), 1, "of the own trust domain alone");
    let federated = delegated.federated();
    assert_eq!(federated.keys().map(TrustDomain::as_str).collect::<Vec<_>>(), ["other.org"]);
    // Their roots make no SVID of the own trust domain valid.
    spire.svids(Step::Send(other.svids(&[WEB])));
    failure(&mut subscription, "does not lead to the roots").await;
}

#[tokio::test]
async fn the_workload_api_gives_the_identities_of_the_agents_own_process() {
    let ca = Ca::new(DOMAIN);
    let spire = Spire::start();
    spire.own(Step::Send(ca.own(&[WEB, "spiffe://example.org/ns/shop/sa/db"])));
    let issuer = issuer(&spire, SpireApi::Workload);
    let db = SpiffeId::parse("spiffe://example.org/ns/shop/sa/db").expect("valid");
    let mut subscription = issuer.subscribe(&web()).expect("ours");
    assert_eq!(credentials(&mut subscription).await.identity, web());
    assert_eq!(credentials(&mut issuer.subscribe(&db).expect("ours")).await.identity, db);
    assert_eq!(spire.opened(), 1, "one stream for all");
    // Entry and bundle go.
    spire.own(Step::Send(ca.own(&[])));
    let error = failure(&mut subscription, "no registration entry").await;
    assert!(error.contains("this agent's process"), "{error}");
    spire.own(Step::Send(ca.own(&[WEB])));
    let renewed = credentials(&mut subscription).await;
    assert!(renewed.not_after > SystemTime::now());
}
