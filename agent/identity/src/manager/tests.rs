//! Tests of the node's credentials: issued, renewed, asked for again, and gone when nobody wants them.

use std::{
    sync::{Weak, atomic::AtomicU32},
    time::Instant,
};

use tacit_core::spiffe::TrustDomain;
use tacit_testing::Scratch;

use super::*;
use crate::issuer::EmbeddedIssuer;

fn web() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid")
}

fn embedded(lifetime: Duration) -> EmbeddedIssuer {
    let directory = Scratch::new();
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    EmbeddedIssuer::open(directory.path(), &domain, lifetime).expect("a root")
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_required_identity_has_credentials_until_it_is_forgotten() {
    let identities = Identities::start(Issuer::Embedded(embedded(Duration::from_secs(3600))));
    assert!(identities.current(&web()).is_none());
    identities.require(&web()).await.expect("issued");
    let first = identities.current(&web()).expect("there");
    identities.require(&web()).await.expect("still there");
    assert_eq!(identities.current(&web()).expect("there").serial, first.serial);
    identities.forget(&web());
    assert!(identities.current(&web()).is_none());
    assert!(identities.certificates().is_empty());
}

#[tokio::test]
async fn credentials_are_renewed_at_half_life() {
    let identities = Identities::start(Issuer::Embedded(embedded(Duration::from_secs(4))));
    identities.require(&web()).await.expect("issued");
    let first = identities.current(&web()).expect("there");
    until("a new serial number", || identities.current(&web()).expect("never a gap").serial != first.serial)
        .await;
    assert!(!first.expired(SystemTime::now()), "renewed only after the old one had expired");
}

#[tokio::test]
async fn a_failing_issuer_is_asked_again_and_its_error_shown() {
    let issuer = Issuer::Failing(embedded(Duration::from_secs(3600)), AtomicU32::new(1));
    let identities = Identities::start(issuer);
    assert!(matches!(identities.require(&web()).await, Err(IssueError::Injected)));
    assert!(identities.current(&web()).is_none());
    let state = identities.certificates().remove(0);
    assert_eq!((state.renewal_failures, state.serial.as_str()), (1, ""));
    assert!(state.last_error.is_some());
    until("the second attempt", || identities.current(&web()).is_some()).await;
    assert_eq!(identities.certificates().remove(0).renewal_failures, 0);
}

#[tokio::test]
async fn expired_credentials_are_not_handed_out() {
    let issuer = embedded(Duration::from_secs(3600));
    let shared = Shared::new(watch::Sender::new(()));
    let long_ago = SystemTime::now() - Duration::from_secs(7200);
    shared.succeeded(issuer.issue(&web(), long_ago).expect("issued"));
    assert!(shared.usable(SystemTime::now()).is_none());
    assert!(shared.usable(long_ago).is_some());
}

#[test]
fn a_root_that_is_gone_is_told_and_a_renewal_below_the_same_root_is_not() {
    let (old, new) = (embedded(Duration::from_secs(3600)), embedded(Duration::from_secs(3600)));
    let issue = |issuer: &EmbeddedIssuer| issuer.issue(&web(), SystemTime::now()).expect("issued");
    let removals = watch::Sender::new(());
    let mut removed = removals.subscribe();
    let shared = Shared::new(removals);
    shared.succeeded(issue(&old));
    let first = shared.usable(SystemTime::now()).expect("issued");
    let OwnRoots::Watched(roots) = &first.own_roots else { panic!("not watched") };
    let mut roots = roots.clone();
    let both = RootCertStore { roots: [&old, &new].map(|it| issue(it).roots.roots[0].clone()).to_vec() };
    let twin = RootCertStore::clone(&first.roots);
    let below = |roots| {
        let mut credentials = issue(&old);
        credentials.roots = Arc::new(roots);
        credentials
    };
    for (credentials, count, is_removed) in [
        (issue(&old), 1, false),
        (below(twin), 1, false),
        (below(both), 2, false),
        (issue(&new), 1, true),
        (issue(&new), 1, false),
    ] {
        shared.succeeded(credentials);
        // The sessions of the first credentials see the roots of the latest.
        assert_eq!(roots.borrow_and_update().len(), count);
        assert_eq!(removed.has_changed().expect("a sender"), is_removed);
        removed.mark_unchanged();
    }
    assert_eq!(roots.borrow().roots, issue(&new).roots.roots);
    assert_ne!(first.roots.roots, issue(&new).roots.roots);
}

#[tokio::test]
async fn another_trust_domain_is_an_error_at_once() {
    let identities = Identities::start(Issuer::Embedded(embedded(Duration::from_secs(3600))));
    let stranger = SpiffeId::parse("spiffe://other.local/ns/shop/sa/web").expect("valid");
    let refused = identities.require(&stranger).await;
    assert!(matches!(refused, Err(IssueError::TrustDomain { .. })));
}

#[tokio::test]
async fn an_identity_that_is_forgotten_leaves_memory_and_is_not_asked_for_again() {
    // Renewed every second, as long as it is wanted.
    let identities = Identities::start(Issuer::Embedded(embedded(Duration::from_secs(2))));
    identities.require(&web()).await.expect("issued");
    let slot = Arc::downgrade(identities.slots.map.load().get(&web()).expect("there"));
    let shared = Arc::downgrade(&slot.upgrade().expect("in use").shared);
    let key = Arc::downgrade(&identities.current(&web()).expect("there"));
    assert!(key.upgrade().is_some(), "in use");
    identities.forget(&web());
    // The task that renews holds the last of it, and is aborted: what is left of it goes when it is polled next.
    until("nothing holds key and certificate, and no task would renew them", || {
        Weak::strong_count(&slot) + Weak::strong_count(&shared) + Weak::strong_count(&key) == 0
    })
    .await;
}

#[tokio::test]
async fn an_issuer_that_hangs_for_one_identity_holds_up_no_other() {
    let db = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/db").expect("valid");
    let issuer = Issuer::Hanging(embedded(Duration::from_secs(3600)), db.clone());
    let identities = Identities::start(issuer);
    identities.prepare(&db);
    identities.require(&web()).await.expect("issued");
    assert!(matches!(identities.ready(&db), Err(IssueError::Awaited)));
    identities.ready(&web()).expect("still there");
    assert!(identities.current(&db).is_none());
}
