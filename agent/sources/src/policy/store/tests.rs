//! Tests of the store: decoding of API JSON, changes and lists.

use serde_json::{Value, json};
use tacit_core::policy::{AuthorizationDecision, Flow, FlowSource, Mode};

use super::{
    super::document::{AuthorizationPolicies, PeerAuthentications},
    *,
};
use crate::{kubernetes::Resource, policy::testing::workload};

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

/// Returns a store that has listed these documents.
fn listed(documents: Vec<Document>) -> PolicyStore {
    let mut store = PolicyStore::new("istio-system".into());
    list(&mut store, documents);
    store
}

fn list(store: &mut PolicyStore, documents: Vec<Document>) {
    for kind in PolicyKind::ALL {
        store.apply_change(Change::Listing(kind));
    }
    for document in documents {
        store.apply_change(Change::Applied(document));
    }
    for kind in PolicyKind::ALL {
        store.apply_change(Change::Listed(kind));
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
fn nothing_is_published_before_both_resources_are_listed() {
    let mut store = PolicyStore::new("istio-system".into());
    for kind in PolicyKind::ALL {
        assert!(store.take_changed().is_none());
        store.apply_change(Change::Listing(kind));
        assert!(store.take_changed().is_none());
        store.apply_change(Change::Listed(kind));
    }
    assert!(store.take_changed().is_some());
    assert!(store.take_changed().is_none(), "nothing has changed");
}

#[test]
fn a_list_removes_deleted_policies_at_its_end() {
    let mut store = listed(vec![deny("a", "web", json!({})), deny("b", "db", json!({}))]);
    assert!(
        store
            .take_changed()
            .is_some_and(|policies| is_denied(&policies, "web") && is_denied(&policies, "db"))
    );
    store.apply_change(Change::Listing(PolicyKind::AuthorizationPolicy));
    store.apply_change(Change::Applied(deny("b", "db", json!({}))));
    assert!(store.take_changed().is_none());
    store.apply_change(Change::Listed(PolicyKind::AuthorizationPolicy));
    assert!(
        store
            .take_changed()
            .is_some_and(|policies| !is_denied(&policies, "web") && is_denied(&policies, "db"))
    );
    store.apply_change(Change::Deleted(deny("b", "db", json!({}))));
    assert!(store.take_changed().is_some_and(|policies| !is_denied(&policies, "db")));
}

#[test]
fn the_oldest_policy_of_a_scope_wins_then_the_first_name() {
    let web = workload("shop", &[]);
    let default = |documents| listed(documents).take_changed().expect("complete").modes(&web).default;
    let (old, new) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    assert_eq!(default(vec![mode("a", new, "DISABLE"), mode("b", old, "STRICT")]), Mode::Strict);
    assert_eq!(default(vec![mode("b", old, "DISABLE"), mode("a", old, "STRICT")]), Mode::Strict);
}

#[test]
fn a_change_of_the_status_is_not_published() {
    let mut store = listed(vec![deny("a", "web", json!({}))]);
    assert!(store.take_changed().is_some());
    store.apply_change(Change::Applied(deny(
        "a",
        "web",
        json!({"status": {"conditions": [{"type": "Reconciled"}]}}),
    )));
    assert!(store.take_changed().is_none());
}

#[test]
fn an_invalid_policy_denies_what_it_selects_and_is_reported_once() {
    let spec =
        json!({"selector": {"matchLabels": {"app": "web"}}, "action": "DENYY", "rules": [{"form": 1}]});
    let bad = || deny("bad", "web", json!({"spec": spec}));
    let mut store = listed(vec![deny("good", "db", json!({}))]);
    let findings = store.apply_change(Change::Applied(bad()));
    let [Finding::Invalid(refused)] = findings.as_slice() else { panic!("{findings:?}") };
    assert_eq!(
        refused.message,
        "spec.action: \"DENYY\" is none of ALLOW, DENY, AUDIT, CUSTOM: did you mean DENY?; \
         spec.rules[0].form: unknown field: did you mean `from`?. Until the policy is corrected, it denies every connection to \
         the workloads that it selects, or all workloads of its namespace if its selector is invalid."
    );
    assert_eq!((refused.name().as_str(), refused.uid.as_str()), ("AuthorizationPolicy shop/bad", "u"));
    let policies = store.take_changed().expect("changed");
    assert_eq!(["web", "db", "x"].map(|app| is_denied(&policies, app)), [true, true, false]);
    assert_eq!(store.apply_change(Change::Applied(bad())), [], "reported before");
    let InvalidObjects { list, total } = store.invalid_objects();
    assert_eq!((list.len(), total), (1, 1));
    assert!(list[0].starts_with("AuthorizationPolicy shop/bad: spec.action: "), "{list:?}");
    store.apply_change(Change::Applied(deny("bad", "other", json!({}))));
    assert!(store.invalid_objects().list.is_empty());
    assert!(store.take_changed().is_some_and(|policies| !is_denied(&policies, "web")));
}

#[test]
fn deep_nesting_does_not_invalidate_other_objects() {
    let deep = "[".repeat(5000) + &"]".repeat(5000);
    let text = |field: &str| {
        format!(
            r#"{{"metadata":{{"name":"p","namespace":"shop","managedFields":{deep}}},"status":{deep},"{field}":{deep}}}"#
        )
    };
    let read =
        |text: &str| serde_json::from_str::<AuthorizationPolicies>(text).expect("an object").into_object();
    let mut store = listed(vec![read(&text("x"))]);
    assert!(store.take_changed().is_some_and(|policies| !is_denied(&policies, "web")) && store.refused == 0);
    store.apply_change(Change::Applied(read(&text("spec"))));
    assert!(store.take_changed().is_some_and(|policies| is_denied(&policies, "web")));
}

#[test]
fn an_object_without_a_name_denies_everywhere() {
    let policies = listed(vec![authorization(json!({"spec": {}}))]).take_changed().expect("complete");
    assert!(is_denied(&policies, "web"));
}

#[test]
fn a_warning_is_reported_when_the_policy_changes() {
    let http = |path: &str| {
        let rules = json!([{"to": [{"operation": {"paths": [path]}}]}]);
        deny("a", "web", json!({"spec": {"action": "DENY", "rules": rules}}))
    };
    let mut store = listed(Vec::new());
    let findings = store.apply_change(Change::Applied(http("/a")));
    assert!(
        matches!(findings.as_slice(), [Finding::Warning(note)] if note.contains("shop/a")),
        "{findings:?}"
    );
    assert_eq!(store.apply_change(Change::Applied(http("/a"))), []);
}

#[test]
fn invalid_policies_beyond_the_limit_are_counted() {
    let bad = |n: usize| deny(&format!("p{n:02}"), "web", json!({"spec": 7}));
    let store = listed((0..25).map(bad).collect());
    let InvalidObjects { list, total } = store.invalid_objects();
    assert_eq!((list.len(), total), (21, 25));
    assert!(list[20].starts_with("and 5 more"), "{list:?}");
}

/// The share of a namespace, as `tacit_core::shares` has it.
const SHARE_BYTES: usize = 4 << 20;
const SHARE_POLICIES: usize = 2048;

/// A DENY policy of a namespace whose text has about this many bytes.
fn large(namespace: &str, name: &str, bytes: usize) -> Document {
    let principals: Vec<String> = (0..bytes / 40).map(|i| format!("cluster.local/ns/a/sa/{i:015}")).collect();
    authorization(json!({
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"action": "DENY", "rules": [{"from": [{"source": {"principals": principals}}]}]},
    }))
}

#[test]
fn a_change_builds_the_policies_of_its_namespace_alone() {
    let in_namespace = |i: usize| large(&format!("ns-{i}"), "p", 100);
    let mut store = listed((0..200).map(in_namespace).collect());
    let before = store.take_changed().expect("complete");
    assert_eq!(store.builds, 200);
    store.apply_change(Change::Applied(large("ns-7", "p", 300)));
    let after = store.take_changed().expect("changed");
    assert_eq!(store.builds, 201);
    assert!(after.is_same_for("ns-8", &before) && !after.is_same_for("ns-7", &before));
}

#[test]
fn policies_beyond_the_share_of_their_namespace_are_not_read_and_deny_to_its_pods() {
    // Three fit, with room for what is around the principals.
    let quarter = SHARE_BYTES / 4;
    let mut store = listed((0..3).map(|i| large("big", &format!("p{i}"), quarter)).collect());
    store.apply_change(Change::Applied(deny("a", "web", json!({}))));
    let denied = |policies: &Policies, namespace: &str| {
        let authorization = policies.authorization(&workload(namespace, &[("app", "db")]));
        let flow = Flow {
            source: FlowSource::Plaintext,
            client: [10, 77, 1, 9].into(),
            destination: ([10, 77, 2, 2], 80).into(),
        };
        matches!(authorization.evaluate(&flow), AuthorizationDecision::Denied(_))
    };
    let within = store.take_changed().expect("complete");
    assert!(!denied(&within, "big") && store.warnings().is_empty());
    store.apply_change(Change::Applied(large("big", "one-more", quarter)));
    let beyond = store.take_changed().expect("changed");
    assert!(denied(&beyond, "big") && !denied(&beyond, "shop"));
    let warnings = store.warnings();
    assert!(
        warnings.len() == 1 && warnings[0].starts_with("policies of namespace big are not applied"),
        "{warnings:?}"
    );
    assert!(store.warnings().is_empty(), "logged once");
    // Its text is not kept, so a list is required once there is room.
    assert!(store.take_needs_list().is_empty());
    store.apply_change(Change::Deleted(large("big", "p0", 1)));
    let room = store.take_changed().expect("changed");
    assert!(denied(&room, "big") && store.take_needs_list().into_iter().eq(["big".to_owned()]));
    // The list of the namespace.
    for name in ["p1", "p2", "one-more"] {
        store.apply_change(Change::Applied(large("big", name, quarter)));
    }
    assert!(!denied(&store.take_changed().expect("changed"), "big") && store.take_needs_list().is_empty());
}

#[test]
fn a_namespace_has_a_share_of_the_number_of_policies() {
    let many = (0..=SHARE_POLICIES).map(|i| large("big", &format!("p{i}"), 100));
    let mut store = listed(many.collect());
    let policies = store.take_changed().expect("complete");
    assert!(policies.not_applied().map(|(namespace, _)| namespace).eq(["big"]));
}

#[test]
fn of_the_changes_of_a_policy_in_a_batch_the_last_is_applied() {
    let applied = |name: &str, bytes| Update::Change(Change::Applied(large("big", name, bytes)));
    let deleted = |name: &str| Update::Change(Change::Deleted(large("big", name, 1)));
    let kinds = |change: fn(PolicyKind) -> Change| {
        PolicyKind::ALL.into_iter().map(move |kind| Update::Change(change(kind)))
    };
    let mut batch: Vec<Update> = Vec::new();
    batch.extend([applied("p", 100), applied("listed", 100)]);
    batch.extend(kinds(Change::Listing));
    batch.extend([applied("p", 200), applied("listed", 100), applied("p", 300)]);
    batch.extend(kinds(Change::Listed));
    batch.push(Update::Fresh(PolicyKind::AuthorizationPolicy));
    batch.extend((4..60).map(|i| applied("p", i * 100)));
    batch.extend([deleted("q"), applied("q", 100), applied("r", 100), deleted("r"), applied("p", 6000)]);
    let all = |batch: &[Update]| {
        let mut store = PolicyStore::new("istio-system".into());
        for update in batch {
            match update {
                Update::Change(Change::Applied(document)) => {
                    store.apply_change(Change::Applied(document.clone()));
                }
                Update::Change(Change::Deleted(document)) => {
                    store.apply_change(Change::Deleted(document.clone()));
                }
                Update::Change(Change::Listing(kind)) => _ = store.apply_change(Change::Listing(*kind)),
                Update::Change(Change::Listed(kind)) => _ = store.apply_change(Change::Listed(*kind)),
                Update::Fresh(_) | Update::Failed(..) => {}
            }
        }
        store.take_changed().expect("listed")
    };
    let expected = all(&batch);
    drop_replaced(&mut batch);
    assert_eq!(all(&batch), expected);
    let policies = batch
        .iter()
        .filter(|update| matches!(update, Update::Change(Change::Applied(_) | Change::Deleted(_))));
    assert_eq!(policies.count(), 2 + 2 + 3, "before the list, in it, and after it");
    assert!(batch.iter().any(|update| matches!(update, Update::Fresh(_))));
}
