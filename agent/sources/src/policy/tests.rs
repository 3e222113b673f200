//! Tests against a simulated API server: versions, definitions that come and go, and the state kept meanwhile.

use std::time::Duration;

use serde_json::{Value, json};
use tacit_core::policy::{AuthorizationDecision, Flow, FlowSource as From, Mode};
use tokio::time::timeout;

use super::testing::workload;
use super::*;
use crate::{
    kubernetes::testing::{DEFINITIONS, Server},
    reload::{ReloadState, Watched},
};

const MODES: &str = "/apis/security.istio.io/v1/peerauthentications";
const MODES_BETA: &str = "/apis/security.istio.io/v1beta1/peerauthentications";
const POLICIES: &str = "/apis/security.istio.io/v1/authorizationpolicies";
const POLICIES_BETA: &str = "/apis/security.istio.io/v1beta1/authorizationpolicies";
const EVENTS: &str = "/api/v1/namespaces/shop/events";

/// Longer than the pauses between retries in these tests (some seconds).
const DEADLINE: Duration = Duration::from_secs(30);

async fn open(server: &Server) -> Watched<Policies> {
    let config = Config::new(format!("http://{}", server.address()).parse().expect("a URL"));
    let settings = MeshSettings {
        root_namespace: "istio-system".into(),
        minimum: Mode::Disable,
        aliases: Arc::default(),
    };
    start(config, settings).expect("a client").complete().await.expect("followed")
}

async fn opened(server: &Server) -> Watched<Policies> {
    timeout(DEADLINE, open(server)).await.expect("complete before the deadline")
}

async fn until(watched: &Watched<Policies>, what: &str, is: impl FnMut(&Arc<Policies>) -> bool) {
    let mut changes = watched.subscribe();
    let reached = timeout(DEADLINE, changes.wait_for(is)).await;
    reached.unwrap_or_else(|_| panic!("{what}: not before the deadline")).expect("followed");
}

async fn until_state(
    watched: &Watched<Policies>,
    what: &str,
    is: impl Fn(&ReloadState) -> bool,
) -> ReloadState {
    let mut states = watched.states();
    let reached = timeout(DEADLINE, states.wait_for(is)).await;
    reached.unwrap_or_else(|_| panic!("{what}: {:?}", watched.state())).expect("followed").clone()
}

fn mode(name: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"mtls": {"mode": mode}},
    })
}

fn deny(name: &str, app: &str, action: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
        "spec": {"selector": {"matchLabels": {"app": app}}, "action": action, "rules": [{}]},
    })
}

fn is_strict(policies: &Policies) -> bool {
    policies.modes(&workload("shop", &[])).default == Mode::Strict
}

fn is_denied(policies: &Policies, app: &str) -> bool {
    let authorization = policies.authorization(&workload("shop", &[("app", app)]));
    let flow = Flow {
        source: From::Plaintext,
        client: "10.77.1.9".parse().expect("an address"),
        destination: "10.77.2.2:80".parse().expect("an address"),
    };
    matches!(authorization.evaluate(&flow), AuthorizationDecision::Denied(_))
}

/// Namespace shop is STRICT, and three policies deny. A page holds two objects.
fn cluster(modes: &str, policies: &str) -> Server {
    let server = Server::start();
    server.set(modes, mode("default", "STRICT"));
    for app in ["a", "b", "c"] {
        server.set(policies, deny(&format!("deny-{app}"), app, "DENY"));
    }
    server
}

fn are_all_there(policies: &Policies) -> bool {
    is_strict(policies) && ["a", "b", "c"].iter().all(|app| is_denied(policies, app))
}

#[tokio::test]
async fn policies_are_listed_and_watched() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    assert!(are_all_there(&watched.current()) && !is_denied(&watched.current(), "web"));
    server.set(POLICIES, deny("deny-web", "web", "DENY"));
    until(&watched, "a new policy", |policies| is_denied(policies, "web")).await;
    server.set(POLICIES, deny("deny-web", "db", "DENY"));
    until(&watched, "a change", |policies| !is_denied(policies, "web") && is_denied(policies, "db")).await;
    server.remove(POLICIES, "deny-web");
    until(&watched, "a policy is gone", |policies| !is_denied(policies, "db")).await;
    server.remove(MODES, "default");
    until(&watched, "no mode is left", |policies| !is_strict(policies)).await;
    assert_eq!(watched.state().last_error, None);
}

/// A namespace that goes beyond its share and comes back, again and again, used to make every agent list all policies each time.
#[tokio::test]
async fn a_namespace_is_listed_again_without_the_others_and_the_watch_goes_on() {
    const IN_SHOP: &str = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies";
    let server = Server::start();
    for app in ["a", "b", "c"] {
        server.set(POLICIES, deny(&format!("deny-{app}"), app, "DENY"));
        server.set(IN_SHOP, deny(&format!("deny-{app}"), app, "DENY"));
    }
    let config = Config::new(format!("http://{}", server.address()).parse().expect("a URL"));
    let client = Client::try_from(config).expect("a client");
    let again = Arc::new(NamespaceLists::within(Duration::from_millis(10)));
    let (updates, mut news) = mpsc::channel(64);
    let lists = Arc::clone(&again);
    let watching = tokio::spawn(async move {
        list_and_watch_again::<AuthorizationPolicies>(client, updates, &lists).await;
    });
    let mut applied = async |count: usize| {
        let mut names = Vec::new();
        while names.len() < count {
            match timeout(DEADLINE, news.recv()).await.expect("before the deadline").expect("it goes on") {
                Update::Change(Change::Applied(document)) => names.push(document.metadata.name),
                Update::Change(Change::Listing(_) | Change::Listed(_)) | Update::Fresh(_) => {}
                other => panic!("{other:?}"),
            }
        }
        names
    };
    let all = ["deny-a", "deny-b", "deny-c"];
    assert_eq!(applied(3).await, all);
    server.watches(POLICIES, 1).await;
    for round in 1..=3 {
        again.request(["shop".to_owned(), "shop".to_owned()]);
        assert_eq!(applied(3).await, all, "round {round}");
        // What changed meanwhile comes from the watch, which goes on from its version.
        let name = format!("deny-{round}");
        server.set(POLICIES, deny(&name, "web", "DENY"));
        assert_eq!(applied(1).await, [name]);
    }
    // A list that fails is tried again.
    server.fail_only(Some(IN_SHOP));
    again.request(["shop".to_owned()]);
    server.lists_failed(IN_SHOP, 1).await;
    server.fail_only(None);
    assert_eq!(applied(3).await, all);
    assert_eq!(server.lists(POLICIES), 1, "all policies are listed once");
    watching.abort();
}

#[tokio::test]
async fn a_server_without_v1_has_v1beta1() {
    let server = cluster(MODES_BETA, POLICIES_BETA);
    server.without(MODES);
    server.without(POLICIES);
    let watched = opened(&server).await;
    assert!(are_all_there(&watched.current()));
    assert_eq!((watched.state().refusals, watched.state().last_error), (0, None), "no errors");
    server.set(POLICIES_BETA, deny("deny-web", "web", "DENY"));
    until(&watched, "a new policy", |policies| is_denied(policies, "web")).await;
}

#[tokio::test]
async fn a_version_that_is_no_longer_served_is_replaced_without_a_gap() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    for app in ["a", "b", "c", "web"] {
        server.set(POLICIES_BETA, deny(&format!("deny-{app}"), app, "DENY"));
    }
    server.without(POLICIES);
    server.break_connections();
    until(&watched, "the other version", |policies| {
        assert!(are_all_there(policies), "a gap");
        is_denied(policies, "web")
    })
    .await;
    until_state(&watched, "no errors", |state| state.last_error.is_none()).await;
}

#[tokio::test]
async fn without_the_definitions_nothing_is_in_use_until_they_are_there() {
    let server = Server::start();
    for path in [MODES, MODES_BETA, POLICIES, POLICIES_BETA] {
        server.without(path);
    }
    let mut opening = std::pin::pin!(open(&server));
    let refused_again = async {
        server.lists_failed(MODES_BETA, 2).await;
        server.lists_failed(POLICIES_BETA, 2).await;
    };
    tokio::select! {
        watched = &mut opening => panic!("open without definitions: {:?}", watched.current()),
        () = refused_again => {}
    }
    // One resource is not enough.
    server.set(MODES, mode("default", "STRICT"));
    server.with(MODES);
    tokio::select! {
        watched = &mut opening => panic!("open without one definition: {:?}", watched.current()),
        () = server.watches(MODES, 1) => {}
    }
    server.set(POLICIES, deny("deny-a", "a", "DENY"));
    server.with(POLICIES);
    let watched = timeout(DEADLINE, opening).await.expect("before the deadline");
    assert!(is_strict(&watched.current()) && is_denied(&watched.current(), "a"));
}

#[tokio::test]
async fn a_version_that_is_too_old_is_replaced_by_a_list_without_a_gap() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    server.go_down();
    server.break_connections();
    server.remove(POLICIES, "deny-a");
    server.set(POLICIES, deny("deny-d", "d", "DENY"));
    server.forget_history();
    server.come_up();
    until(&watched, "the state of the list", |policies| {
        assert!(is_denied(policies, "b") && is_denied(policies, "c") && is_strict(policies), "a gap");
        is_denied(policies, "d") && !is_denied(policies, "a")
    })
    .await;
}

#[tokio::test]
async fn the_last_state_stays_while_the_api_fails_and_its_age_is_reported() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    server.fail_only(Some(POLICIES));
    server.break_connections();
    let reports =
        |state: &ReloadState| state.last_error.as_ref().is_some_and(|error| error.contains("etcd is away"));
    let state = until_state(&watched, "reported", reports).await;
    assert!(state.stale_since.is_some());
    server.lists_failed(POLICIES, 2).await;
    assert!(are_all_there(&watched.current()));
    server.fail_only(None);
    server.set(POLICIES, deny("deny-d", "d", "DENY"));
    until(&watched, "watched again", |policies| is_denied(policies, "d")).await;
    until_state(&watched, "fresh", |state| state.stale_since.is_none() && state.last_error.is_none()).await;
}

#[tokio::test]
async fn policies_that_go_with_their_definition_stay_in_use() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    let definition = format!("{DEFINITIONS}/authorizationpolicies.security.istio.io");
    server.end(&definition);
    for app in ["a", "b", "c"] {
        server.remove(POLICIES, &format!("deny-{app}"));
    }
    let reports = |words: &'static str| {
        move |state: &ReloadState| state.last_error.as_ref().is_some_and(|error| error.contains(words))
    };
    until_state(&watched, "reported", reports("is being deleted, and all objects with it")).await;
    server.without(&definition);
    server.without(POLICIES);
    server.without(POLICIES_BETA);
    server.break_connections();
    until_state(&watched, "reported", reports("was deleted, and all objects with it")).await;
    assert!(are_all_there(&watched.current()) && watched.state().stale_since.is_some());
}

#[tokio::test]
async fn the_definition_is_checked_after_each_deletion() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    server.remove(POLICIES, "deny-a");
    until(&watched, "deleted by its owner", |policies| !is_denied(policies, "a")).await;
    server.end(&format!("{DEFINITIONS}/authorizationpolicies.security.istio.io"));
    server.remove(POLICIES, "deny-b");
    server.remove(POLICIES, "deny-c");
    let reports =
        |state: &ReloadState| state.last_error.as_ref().is_some_and(|error| error.contains("all objects"));
    until_state(&watched, "reported", reports).await;
    let policies = watched.current();
    assert!(is_denied(&policies, "b") && is_denied(&policies, "c"), "gone with their definition");
}

#[tokio::test]
async fn many_deletions_at_a_time_need_few_checks_of_the_definition() {
    const MANY: usize = 200;
    let server = cluster(MODES, POLICIES);
    let name = |number: usize| format!("many-{number}");
    (0..MANY).for_each(|number| server.set(POLICIES, deny(&name(number), "many", "DENY")));
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    let definition = format!("{DEFINITIONS}/authorizationpolicies.security.istio.io");
    let before = server.lists(&definition);
    (0..MANY).for_each(|number| server.remove(POLICIES, &name(number)));
    // A change between the deletions keeps its order.
    server.set(POLICIES, deny("deny-a", "new", "DENY"));
    until(&watched, "all are gone", |policies| !is_denied(policies, "many") && is_denied(policies, "new"))
        .await;
    let looks = server.lists(&definition) - before;
    assert!((1..=10).contains(&looks), "{looks} checks for {MANY} policies");
}

#[tokio::test]
async fn an_invalid_policy_denies_only_what_it_selects_and_an_event_has_the_reason() {
    let server = cluster(MODES, POLICIES);
    let watched = opened(&server).await;
    server.watches(POLICIES, 1).await;
    server.set(POLICIES, deny("bad", "web", "DENYY"));
    server.set(POLICIES, deny("good", "db", "DENY"));
    until(&watched, "both count", |policies| is_denied(policies, "web") && is_denied(policies, "db")).await;
    assert!(!is_denied(&watched.current(), "x"));
    let state = until_state(&watched, "reported", |state| !state.unreadable.is_empty()).await;
    assert_eq!(
        (state.unreadable.len(), state.refusals, state.last_error, state.stale_since),
        (1, 1, None, None)
    );
    let events = timeout(DEADLINE, server.created(EVENTS, 1)).await.expect("an event before the deadline");
    let event = &events[0];
    assert_eq!(
        (&event["type"], &event["reason"], &event["involvedObject"]["name"]),
        (&json!("Warning"), &json!("InvalidPolicy"), &json!("bad"))
    );
    let message = event["message"].as_str().expect("a message");
    let wrong = "spec.action: \"DENYY\" is none of ALLOW, DENY, AUDIT, CUSTOM: did you mean DENY?";
    assert!(
        message.starts_with(wrong) && message.contains("Until the policy is corrected, it denies"),
        "{message}"
    );
    server.set(POLICIES, deny("bad", "web", "ALLOW"));
    until(&watched, "it allows", |policies| !is_denied(policies, "web")).await;
    until_state(&watched, "no errors", |state| state.unreadable.is_empty()).await;
}

#[tokio::test]
async fn agents_of_many_nodes_create_one_event() {
    let server = cluster(MODES, POLICIES);
    server.set(POLICIES, deny("bad", "web", "DENYY"));
    let both = (opened(&server).await, opened(&server).await);
    server.set(POLICIES, deny("worse", "web", "?"));
    // The faster agent creates the second Event. By then the slower agent got a conflict for the first.
    let events = timeout(DEADLINE, server.created(EVENTS, 2)).await.expect("events before the deadline");
    let names: Vec<&str> =
        events.iter().filter_map(|event| event["involvedObject"]["name"].as_str()).collect();
    assert_eq!(names, ["bad", "worse"]);
    drop(both);
}
