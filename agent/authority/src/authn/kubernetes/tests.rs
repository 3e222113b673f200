//! Tests of reviews and pods. Any missing claim leads to a refusal.

use serde_json::{Value, json};

use super::*;

fn review() -> Value {
    json!({
        "authenticated": true,
        "audiences": ["tacit-authority"],
        "user": {
            "username": "system:serviceaccount:tacit-system:tacit-agent",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["tacit-x"],
                "authentication.kubernetes.io/pod-uid": ["1-2"],
                "authentication.kubernetes.io/node-name": ["a"],
            },
        },
    })
}

fn judged(review: Value) -> Result<Bearer, &'static str> {
    let accounts = [("tacit-system".to_owned(), "tacit-agent".to_owned())];
    let status: TokenReviewStatus = serde_json::from_value(review).expect("a status");
    bearer(&status, "tacit-authority", &accounts).map_err(|refusal| refusal.reason())
}

fn with(change: impl FnOnce(&mut Value)) -> Value {
    let mut review = review();
    change(&mut review);
    review
}

#[test]
fn an_agent_is_known_by_its_review() {
    let bearer = judged(review()).expect("known");
    assert_eq!((bearer.pod.as_str(), bearer.node.as_deref()), ("tacit-x", Some("a")));
    let older = with(|it| drop(it["user"]["extra"].as_object_mut().expect("claims").remove(NODE_NAME)));
    assert_eq!(judged(older).expect("known").node, None);
}

#[test]
fn a_review_that_lacks_anything_is_a_refusal() {
    let claim = |name: &'static str, value: Value| with(move |it| it["user"]["extra"][name] = value);
    for (review, reason) in [
        (json!({}), "token"),
        (with(|it| it["authenticated"] = json!(false)), "token"),
        (with(|it| it["authenticated"] = Value::Null), "token"),
        (with(|it| it["error"] = json!("expired")), "token"),
        (with(|it| it["audiences"] = Value::Null), "audience"),
        (with(|it| it["audiences"] = json!([])), "audience"),
        (with(|it| it["audiences"] = json!(["kubernetes"])), "audience"),
        (with(|it| it["user"] = Value::Null), "not_an_agent"),
        (with(|it| it["user"]["username"] = json!("system:node:a")), "not_an_agent"),
        (with(|it| it["user"]["username"] = json!("system:serviceaccount:shop:tacit-agent")), "not_an_agent"),
        (with(|it| it["user"]["username"] = json!("system:serviceaccount:tacit-system:web")), "not_an_agent"),
        (
            with(|it| it["user"]["username"] = json!("system:serviceaccount:tacit-system:tacit-agent:x")),
            "not_an_agent",
        ),
        (with(|it| it["user"]["extra"] = Value::Null), "no_node"),
        (claim(POD_NAME, json!([])), "no_node"),
        (claim(POD_NAME, json!(["a", "b"])), "no_node"),
        (claim(POD_NAME, json!([""])), "no_node"),
        (claim(POD_UID, json!([])), "no_node"),
    ] {
        assert_eq!(judged(review.clone()).err(), Some(reason), "{review}");
    }
}

fn pod(change: impl FnOnce(&mut Value)) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "web-1", "namespace": "shop", "uid": "1-2"},
        "spec": {"nodeName": "a", "serviceAccountName": "web", "containers": []},
        "status": {"phase": "Running"},
    });
    change(&mut pod);
    serde_json::from_value(pod).expect("a pod")
}

#[test]
fn the_node_is_that_of_the_very_pod_the_token_is_bound_to() {
    let bearer = Bearer {
        namespace: "shop".to_owned(),
        service_account: "web".to_owned(),
        pod: "web-1".to_owned(),
        pod_uid: "1-2".to_owned(),
        node: None,
    };
    assert_eq!(node_of(Some(&pod(|_| ())), &bearer), Ok("a".to_owned()));
    assert!(node_of(None, &bearer).is_err());
    for wrong in [
        pod(|it| it["metadata"]["uid"] = json!("3-4")),
        pod(|it| it["metadata"]["uid"] = Value::Null),
        pod(|it| it["spec"]["serviceAccountName"] = json!("db")),
        pod(|it| it["spec"]["nodeName"] = Value::Null),
        pod(|it| it["spec"]["nodeName"] = json!("")),
        pod(|it| it["spec"] = Value::Null),
    ] {
        assert!(node_of(Some(&wrong), &bearer).is_err(), "{wrong:?}");
    }
}

#[test]
fn a_pod_counts_while_it_may_run_on_that_node() {
    let web = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid");
    for (pod, expected) in [
        (pod(|_| ()), true),
        (pod(|it| it["status"]["phase"] = json!("Pending")), true),
        (pod(|it| it["status"]["phase"] = json!("Unknown")), true),
        (pod(|it| it["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z")), true),
        (pod(|it| it["status"]["phase"] = json!("Succeeded")), false),
        (pod(|it| it["status"]["phase"] = json!("Failed")), false),
        (pod(|it| it["status"] = Value::Null), false),
        (pod(|it| it["spec"]["nodeName"] = json!("b")), false),
        (pod(|it| it["spec"]["nodeName"] = Value::Null), false),
        (pod(|it| it["spec"]["serviceAccountName"] = json!("db")), false),
        (pod(|it| it["spec"]["serviceAccountName"] = json!("")), false),
        (pod(|it| it["metadata"]["namespace"] = json!("other")), false),
    ] {
        assert_eq!(counts(&pod, "a", &web, "web"), expected, "{pod:?}");
    }
}

#[test]
fn a_pod_without_a_service_account_has_the_default_one_and_is_told_from_pods_that_name_it() {
    let id = |account: &str| {
        SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).expect("valid")
    };
    let names = |name: Value| pod(|it| it["spec"]["serviceAccountName"] = name);
    for (pod, account, named, expected) in [
        (names(json!("")), "default", "", true),
        (names(Value::Null), "default", "", true),
        (names(json!("")), "default", "default", false),
        (names(json!("default")), "default", "default", true),
        (names(json!("default")), "default", "", false),
        (names(json!("web")), "default", "", false),
        (names(json!("")), "web", "", false),
        (names(json!("")), "web", "web", false),
    ] {
        assert_eq!(counts(&pod, "a", &id(account), named), expected, "{pod:?} {account} {named:?}");
    }
}
