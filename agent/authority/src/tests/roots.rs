//! Tests of roots that are created, supplied, replaced and rotated while agents request certificates.

use std::time::{Duration, Instant, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::json;
use tacit_grpc::Code;
use tacit_identity::credentials::Credentials;
use tokio::time::sleep;

use super::bench::{
    Agent, CONFIG_MAP, Running, SECRET, accepts, cluster, config, field, published, ready, secret, started,
    until, upkeep,
};
use crate::config::{Config, Lifetimes};

const HOUR: Duration = Duration::from_secs(3600);
/// Short enough to see a rotation end: two turns of three seconds.
const SHORT: Duration = Duration::from_secs(2);

#[tokio::test]
async fn replicas_that_start_at_once_sign_with_one_root() {
    let api = cluster().await;
    let mut agents = Vec::new();
    let mut running = Vec::new();
    for _ in 0..6 {
        let replica = Running::start(config(HOUR), Some(&api)).await;
        agents.push(Agent::new(replica.address, "a"));
        running.push(replica);
    }
    ready(&api, &running[0]).await;
    let mut credentials = Vec::new();
    for agent in &agents {
        agent.mount(&api);
        super::until_issued(agent).await;
        credentials.push(agent.issue("web").await.expect("issued"));
    }
    all_accept_each_other(&credentials);
    assert_eq!(published(&api), field(&api, "tls.crt"));
    let intermediates: Vec<_> = credentials.iter().map(|it| it.chain()[1].clone()).collect();
    assert!(intermediates.windows(2).all(|pair| pair[0] != pair[1]), "each has an intermediate of its own");
}

#[tokio::test]
async fn an_intermediate_is_replaced_at_half_of_its_life() {
    let (_api, _running, agent) = started(SHORT).await;
    let first = agent.issue("web").await.expect("issued");
    let deadline = Instant::now() + Duration::from_secs(20);
    let second = loop {
        let next = agent.issue("web").await.expect("never a gap");
        if next.chain()[1] != first.chain()[1] {
            break next;
        }
        assert!(Instant::now() < deadline, "the intermediate stays");
        sleep(Duration::from_millis(50)).await;
    };
    assert!(second.not_after > first.not_after);
    assert_eq!(first.roots.roots, second.roots.roots);
    accepts(&first, &second).expect("the old trusts the new");
}

#[tokio::test]
async fn a_root_is_rotated_under_two_replicas_and_nobody_notices() {
    let api = cluster().await;
    let replicas =
        [Running::start(config(SHORT), Some(&api)).await, Running::start(config(SHORT), Some(&api)).await];
    let agents = replicas.each_ref().map(|replica| Agent::new(replica.address, "a"));
    ready(&api, &replicas[0]).await;
    let old_root = field(&api, "tls.crt");
    for agent in &agents {
        agent.mount(&api);
        super::until_issued(agent).await;
    }
    let mut asked = api.object(SECRET);
    asked["metadata"]["annotations"] = json!({"tacit.io/rotate-root": "now"});
    api.put(SECRET, asked);

    let mut held: Vec<Credentials> = Vec::new();
    let mut most_roots = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    let ended = || field(&api, "tls.crt") != old_root && !published(&api).contains(old_root.trim());
    while !ended() || held.iter().any(|it| it.roots.len() > 1) {
        assert!(Instant::now() < deadline, "the rotation does not end");
        for agent in &agents {
            agent.mount(&api);
            held.push(agent.issue("web").await.expect("never a gap"));
        }
        held.retain(|credentials| !credentials.expired(SystemTime::now()));
        all_accept_each_other(&held);
        most_roots = most_roots.max(held.iter().map(|it| it.roots.len()).max().unwrap_or_default());
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(most_roots, 2, "both were trusted for a while");
    assert_eq!(published(&api), field(&api, "tls.crt"), "and then the new one alone");
    assert!(field(&api, "tacit.json").contains("\"followed\": \"now\""), "asked once, done once");
}

#[tokio::test]
async fn a_brought_root_is_used_and_its_replacement_noticed_by_nobody() {
    let api = cluster().await;
    let (first, second) = (brought(true), brought(true));
    let put = |(certificate, key): &(String, String)| {
        api.put(SECRET, secret(&[("tls.crt", certificate), ("tls.key", key), ("ca.crt", certificate)]));
    };
    put(&first);
    let running = Running::start(long_intermediates(), Some(&api)).await;
    let agent = Agent::new(running.address, "a");
    ready(&api, &running).await;
    agent.mount(&api);
    assert_eq!(published(&api), first.0);
    assert_eq!(field(&api, "tls.key"), first.1, "a root that was brought is not changed");
    let mut held = vec![agent.issue("web").await.expect("issued")];
    let old_anchor = held[0].roots.roots.clone();

    // As cert-manager does: its own fields change, others stay.
    let mut object = secret(&[("tls.crt", &second.0), ("tls.key", &second.1), ("ca.crt", &second.0)]);
    object["data"]["tacit.json"] = api.object(SECRET)["data"]["tacit.json"].clone();
    api.put(SECRET, object);
    let deadline = Instant::now() + Duration::from_secs(60);
    while held.iter().any(|it| it.roots.roots.iter().any(|root| old_anchor.contains(root))) {
        assert!(Instant::now() < deadline, "the old root is never forgotten");
        agent.mount(&api);
        held.push(agent.issue("web").await.expect("never a gap"));
        held.retain(|credentials| !credentials.expired(SystemTime::now()));
        all_accept_each_other(&held);
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(published(&api), second.0);
}

#[tokio::test]
async fn a_root_that_cannot_sign_is_refused_and_the_last_good_one_stays() {
    // Looked at every two seconds, and good for eight without a look.
    let (api, running, agent) = started(Duration::from_secs(60)).await;
    let (good, good_object) = (published(&api), api.object(SECRET));
    let (certificate, key) = brought(false);
    let (other, other_key) = brought(true);
    for (what, fields) in [
        ("no CA below it", [("tls.crt", certificate.as_str()), ("tls.key", &key), ("ca.crt", "")]),
        ("not its key", [("tls.crt", &other), ("tls.key", &key), ("ca.crt", "")]),
        ("invalid", [("tls.crt", "invalid"), ("tls.key", &key), ("ca.crt", "")]),
    ] {
        upkeep(&running, false, what).await;
        api.put(SECRET, secret(&fields));
        upkeep(&running, true, what).await;
        agent.issue("web").await.expect("the last good root is in use");
        assert_eq!(published(&api), good, "{what}");
        api.put(SECRET, good_object.clone());
    }
    upkeep(&running, false, "the good root is back").await;
    api.put(SECRET, secret(&[("tls.crt", &other), ("tls.key", &other_key), ("ca.crt", "")]));
    until("another root that can sign is taken", || published(&api).contains(other.trim())).await;
    upkeep(&running, false, "another root that can sign").await;
}

#[tokio::test]
async fn a_replica_that_cannot_read_the_store_stops_signing_in_time() {
    let (api, running, agent) = started(SHORT).await;
    agent.issue("web").await.expect("issued");
    api.content().failing = Some("/secrets/");
    let deadline = Instant::now() + Duration::from_secs(20);
    while agent.issue("web").await.is_ok() {
        assert!(Instant::now() < deadline, "it signs on");
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(agent.refused("web").await, Code::Unavailable);
    assert!((running.status)().unready().is_some());
    api.content().failing = None;
    super::until_issued(&agent).await;
}

#[tokio::test]
async fn what_the_api_cannot_answer_is_a_refusal() {
    let (api, _running, agent) = started(HOUR).await;
    for failing in ["/tokenreviews", "/namespaces/shop/pods", "/namespaces/tacit-system/pods"] {
        api.content().failing = Some(failing);
        assert_eq!(agent.refused("web").await, Code::Unavailable, "{failing}");
    }
    api.content().failing = None;
    agent.issue("web").await.expect("issued");
}

#[tokio::test]
async fn a_bundle_that_somebody_changes_is_put_back() {
    let (api, _running, _agent) = started(SHORT).await;
    let good = published(&api);
    let mut changed = api.object(CONFIG_MAP);
    changed["data"]["root-cert.pem"] = json!("invalid");
    api.put(CONFIG_MAP, changed);
    until("the bundle is back", || published(&api) == good).await;
}

fn all_accept_each_other(all: &[Credentials]) {
    for one in all {
        for other in all {
            accepts(one, other).expect("certificates in use at once trust each other");
        }
    }
}

/// Certificate and key of a root, in PEM; one that may not sign another CA when `deep` is false.
fn brought(deep: bool) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "brought");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(u8::from(deep)));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let certificate = params.self_signed(&key).expect("signed").der().clone();
    (crate::root::pem(&certificate), key.serialize_pem())
}

/// An intermediate that is about to be replaced still signs for a whole turn, as with the defaults.
fn long_intermediates() -> Config {
    let short = config(SHORT);
    Config { lifetimes: Lifetimes { intermediate: SHORT * 8, ..short.lifetimes }, ..short }
}
