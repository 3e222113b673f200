//! Tests of the store: JSON as the API writes it, and which policies it becomes.

use serde_json::{Value, json};
use tacit_core::policy::{AuthorizationDecision, Flow, FlowSource, Mode};

use super::{
    super::document::{AuthorizationPolicies, PeerAuthentications},
    *,
};
use crate::{kubernetes::Followed, policy::testing::workload};

fn peer_authentication(value: Value) -> Document {
    serde_json::from_str::<PeerAuthentications>(&value.to_string()).expect("an object").into_object()
}

fn authorization(value: Value) -> Document {
    serde_json::from_str::<AuthorizationPolicies>(&value.to_string()).expect("an object").into_object()
}

fn mode(name: &str, created: &str, mode: &str) -> Document {
    peer_authentication(json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": created},
        "spec": {"mtls": {"mode": mode}},
    }))
}

fn deny(name: &str, app: &str, more: Value) -> Document {
    let mut object = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop", "uid": "u", "resourceVersion": "7"},
        "spec": {"selector": {"matchLabels": {"app": app}}, "action": "DENY", "rules": [{}]},
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        object[field] = value.clone();
    }
    authorization(object)
}

/// A store that has listed these.
fn listed(documents: Vec<Document>) -> Store {
    let mut store = Store::new("istio-system".into());
    list(&mut store, documents);
    store
}

fn list(store: &mut Store, documents: Vec<Document>) {
    for kind in PolicyKind::ALL {
        store.take(Change::Listing(kind));
    }
    for document in documents {
        store.take(Change::Applied(document));
    }
    for kind in PolicyKind::ALL {
        store.take(Change::Listed(kind));
    }
}

fn is_denied(policies: &Policies, app: &str) -> bool {
    let authorization = policies.authorization(&workload("shop", &[("app", app)]));
    let flow = Flow {
        source: FlowSource::Plaintext,
        client: "10.77.1.9".parse().expect("an address"),
        destination: "10.77.2.2:80".parse().expect("an address"),
    };
    matches!(authorization.evaluate(&flow), AuthorizationDecision::Denied(_))
}

#[test]
fn there_are_no_policies_before_both_kinds_were_listed() {
    let mut store = Store::new("istio-system".into());
    for kind in PolicyKind::ALL {
        assert!(store.news().is_none());
        store.take(Change::Listing(kind));
        assert!(store.news().is_none());
        store.take(Change::Listed(kind));
    }
    assert!(store.news().is_some());
    assert!(store.news().is_none(), "nothing has changed");
}

#[test]
fn a_list_removes_what_it_does_not_hold_at_its_end() {
    let mut store = listed(vec![deny("a", "web", json!({})), deny("b", "db", json!({}))]);
    assert!(store.news().is_some_and(|policies| is_denied(&policies, "web") && is_denied(&policies, "db")));
    store.take(Change::Listing(PolicyKind::AuthorizationPolicy));
    store.take(Change::Applied(deny("b", "db", json!({}))));
    assert!(store.news().is_none());
    store.take(Change::Listed(PolicyKind::AuthorizationPolicy));
    assert!(store.news().is_some_and(|policies| !is_denied(&policies, "web") && is_denied(&policies, "db")));
    store.take(Change::Deleted(deny("b", "db", json!({}))));
    assert!(store.news().is_some_and(|policies| !is_denied(&policies, "db")));
}

#[test]
fn of_one_scope_the_oldest_counts_and_of_one_age_the_first_name() {
    let web = workload("shop", &[]);
    let default = |documents| listed(documents).news().expect("complete").modes(&web).default;
    let (old, new) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    assert_eq!(default(vec![mode("a", new, "DISABLE"), mode("b", old, "STRICT")]), Mode::Strict);
    assert_eq!(default(vec![mode("b", old, "DISABLE"), mode("a", old, "STRICT")]), Mode::Strict);
}

#[test]
fn a_change_of_the_status_alone_is_none() {
    let mut store = listed(vec![deny("a", "web", json!({}))]);
    assert!(store.news().is_some());
    store.take(Change::Applied(deny(
        "a",
        "web",
        json!({"status": {"conditions": [{"type": "Reconciled"}]}}),
    )));
    assert!(store.news().is_none());
}

#[test]
fn a_policy_that_cannot_be_read_denies_what_it_selects_and_is_told_once() {
    let spec =
        json!({"selector": {"matchLabels": {"app": "web"}}, "action": "DENYY", "rules": [{"form": 1}]});
    let bad = || deny("bad", "web", json!({"spec": spec}));
    let mut store = listed(vec![deny("good", "db", json!({}))]);
    let findings = store.take(Change::Applied(bad()));
    let [Finding::Refused(refused)] = findings.as_slice() else { panic!("{findings:?}") };
    assert_eq!(
        refused.message,
        "spec.action: \"DENYY\" is none of ALLOW, DENY, AUDIT, CUSTOM: did you mean DENY?; \
         spec.rules[0].form: unknown field: did you mean `from`?. Until it is corrected, it denies every connection to \
         the workloads that it selects, or all of its namespace where its selector cannot be read."
    );
    assert_eq!((refused.name().as_str(), refused.uid.as_str()), ("AuthorizationPolicy shop/bad", "u"));
    let policies = store.news().expect("changed");
    assert_eq!(["web", "db", "x"].map(|app| is_denied(&policies, app)), [true, true, false]);
    assert_eq!(store.take(Change::Applied(bad())), [], "it was told");
    let Complaints { list, total } = store.complaints();
    assert_eq!((list.len(), total), (1, 1));
    assert!(list[0].starts_with("AuthorizationPolicy shop/bad: spec.action: "), "{list:?}");
    store.take(Change::Applied(deny("bad", "other", json!({}))));
    assert!(store.complaints().list.is_empty());
    assert!(store.news().is_some_and(|policies| !is_denied(&policies, "web")));
}

#[test]
fn what_is_nested_without_end_makes_no_other_object_unreadable() {
    let deep = "[".repeat(5000) + &"]".repeat(5000);
    let text = |field: &str| {
        format!(
            r#"{{"metadata":{{"name":"p","namespace":"shop","managedFields":{deep}}},"status":{deep},"{field}":{deep}}}"#
        )
    };
    let read =
        |text: &str| serde_json::from_str::<AuthorizationPolicies>(text).expect("an object").into_object();
    let mut store = listed(vec![read(&text("x"))]);
    assert!(store.news().is_some_and(|policies| !is_denied(&policies, "web")) && store.refused == 0);
    store.take(Change::Applied(read(&text("spec"))));
    assert!(store.news().is_some_and(|policies| is_denied(&policies, "web")));
}

#[test]
fn an_object_without_a_name_denies_everywhere() {
    let policies = listed(vec![authorization(json!({"spec": {}}))]).news().expect("complete");
    assert!(is_denied(&policies, "web"));
}

#[test]
fn a_note_of_a_policy_is_told_when_the_policy_changes() {
    let http = |path: &str| {
        let rules = json!([{"to": [{"operation": {"paths": [path]}}]}]);
        deny("a", "web", json!({"spec": {"action": "DENY", "rules": rules}}))
    };
    let mut store = listed(Vec::new());
    let findings = store.take(Change::Applied(http("/a")));
    assert!(matches!(findings.as_slice(), [Finding::Noted(note)] if note.contains("shop/a")), "{findings:?}");
    assert_eq!(store.take(Change::Applied(http("/a"))), []);
}

#[test]
fn of_many_unreadable_policies_some_are_shown_and_the_rest_is_counted() {
    let bad = |n: usize| deny(&format!("p{n:02}"), "web", json!({"spec": 7}));
    let store = listed((0..25).map(bad).collect());
    let Complaints { list, total } = store.complaints();
    assert_eq!((list.len(), total), (SHOWN_MAX + 1, 25));
    assert!(list[SHOWN_MAX].starts_with("and 5 more"), "{list:?}");
}
