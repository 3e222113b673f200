//! Tests of what pods and nodes claim: cgroups, addresses, and what is told about them.

use std::net::IpAddr;

use super::{ranges::node, *};

const VICTIM: &str = "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b";

fn enrolled(value: &mut Value) {
    value["metadata"]["labels"]["tacit.io/enrol"] = json!("true");
}

/// Returns a pod of node a that claims the cgroup of the UID `text` as a mirror pod does.
fn mirror(name: &str, ip: &str, text: &str) -> Object {
    pod(name, "a", ip, |value| {
        enrolled(value);
        value["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": text});
        value["metadata"]["ownerReferences"] = json!([{"kind": "Node", "name": "a"}]);
    })
}

fn victim() -> Object {
    pod("victim", "a", "10.77.1.2", |value| {
        enrolled(value);
        value["metadata"]["uid"] = json!(VICTIM);
    })
}

/// Returns the pods of node a with their cgroups.
fn here(store: &DirectoryStore) -> Vec<(String, String)> {
    let mut all: Vec<_> = store
        .directory
        .on_node("a")
        .map(|workload| (workload.name.to_string(), workload.cgroup.display().to_string()))
        .collect();
    all.sort();
    all
}

fn has(name: &str, uid: &str) -> (String, String) {
    (name.to_owned(), format!("burstable/pod{uid}"))
}

/// Returns the problems in the status, after a publication.
fn told(store: &mut DirectoryStore) -> Vec<String> {
    let _ = store.take_changed();
    store.invalid_objects().list
}

#[test]
fn the_annotation_of_a_mirror_pod_counts_on_a_mirror_pod_alone() {
    for (text, owner) in [
        (VICTIM, json!(null)),
        (VICTIM, json!([{"kind": "ReplicaSet", "name": "a"}])),
        (VICTIM, json!([{"kind": "Node", "name": "b"}])),
        (HASH, json!(null)),
        ("0123abcd", json!([{"kind": "Node", "name": "a"}])),
        ("..", json!([{"kind": "Node", "name": "a"}])),
        ("", json!([{"kind": "Node", "name": "a"}])),
        (&format!("{}/..", uid("false")), json!([{"kind": "Node", "name": "a"}])),
    ] {
        let mut store = listed();
        store.apply_change(Change::Applied(victim()));
        let false_mirror = pod("false", "a", "10.77.1.3", |value| {
            enrolled(value);
            value["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": text});
            value["metadata"]["ownerReferences"] = owner.clone();
        });
        store.apply_change(Change::Applied(false_mirror.clone()));
        assert_eq!(here(&store), [has("false", &uid("false")), has("victim", VICTIM)], "{text:?} {owner}");
        let lines = told(&mut store);
        assert!(lines.len() == 1 && lines[0].starts_with("pod shop/false: annotation"), "{lines:?}");
        assert_eq!(store.warnings(), lines);
        // It is told once, and not after the pod is gone.
        store.apply_change(Change::Applied(false_mirror.clone()));
        assert!(store.take_changed().is_none() && store.warnings().is_empty());
        store.apply_change(Change::Deleted(false_mirror));
        assert!(told(&mut store).is_empty());
    }
}

#[test]
fn a_mirror_pod_never_gets_the_cgroup_of_another_pod() {
    // Both orders: after a restart the false pod may be listed first.
    for order in [[0, 1], [1, 0]] {
        let mut store = listed();
        let pods = [victim(), mirror("false", "10.77.1.3", VICTIM)];
        order.iter().for_each(|index| store.apply_change(Change::Applied(pods[*index].clone())));
        assert_eq!(here(&store), [has("victim", VICTIM)], "{order:?}");
        let lines = told(&mut store);
        assert!(lines.len() == 1 && lines[0].contains("shop/false is not enrolled"), "{lines:?}");
        assert_eq!(store.warnings(), lines);
        // An update of the victim does not hand its cgroup over.
        store.apply_change(Change::Applied(pod("victim", "a", "10.77.1.2", |value| {
            enrolled(value);
            value["metadata"]["uid"] = json!(VICTIM);
            value["metadata"]["labels"]["more"] = json!("yes");
        })));
        assert_eq!(here(&store), [has("victim", VICTIM)]);
    }
    // Nor does its end, while processes of it may live on.
    let mut store = listed();
    store.apply_change(Change::Applied(victim()));
    store.apply_change(Change::Deleted(victim()));
    store.apply_change(Change::Applied(mirror("false", "10.77.1.3", VICTIM)));
    assert_eq!(here(&store), [has("false", &uid("false"))]);
}

#[test]
fn a_mirror_pod_that_waits_for_a_cgroup_does_not_inherit_it() {
    let false_mirror = mirror("false", "10.77.1.3", VICTIM);
    let recreated = pod("victim", "a", "10.77.1.2", enrolled);
    // A pod ends, or a pod of its name follows unseen, while processes of it may live on.
    for (end, expected) in [
        (Change::Deleted(victim()), vec![has("false", &uid("false"))]),
        (Change::Applied(recreated), vec![has("false", &uid("false")), has("victim", &uid("victim"))]),
    ] {
        let mut store = listed();
        store.apply_change(Change::Applied(victim()));
        store.apply_change(Change::Applied(false_mirror.clone()));
        store.apply_change(end);
        assert_eq!(here(&store), expected);
    }
    let mut store = listed();
    store.apply_change(Change::Applied(victim()));
    store.apply_change(Change::Applied(false_mirror.clone()));
    store.apply_change(Change::Deleted(victim()));
    store.apply_change(Change::Applied(false_mirror));
    assert_eq!(here(&store), [has("false", &uid("false"))], "nor with its next update");
    // Nor that of a pod that was not enrolled.
    let plain = pod("plain", "a", "10.77.1.2", |value| value["metadata"]["uid"] = json!(VICTIM));
    let mut store = listed();
    store.apply_change(Change::Applied(plain.clone()));
    store.apply_change(Change::Deleted(plain));
    store.apply_change(Change::Applied(mirror("false", "10.77.1.3", VICTIM)));
    assert_eq!(here(&store), [has("false", &uid("false"))]);
    assert_eq!(store.directory.departed().count(), 0, "not to be served");
}

#[test]
fn of_two_mirror_pods_the_older_has_the_cgroup_in_every_order_of_a_list() {
    let created = |name: &str, time: Option<&str>| {
        pod(name, "a", "10.77.1.2", |value| {
            enrolled(value);
            value["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": HASH});
            value["metadata"]["ownerReferences"] = json!([{"kind": "Node", "name": "a"}]);
            value["metadata"]["creationTimestamp"] = json!(time);
        })
    };
    for younger in [Some("2026-01-01T00:00:01Z"), None] {
        let pods = [created("static", Some("2026-01-01T00:00:00Z")), created("false", younger)];
        for order in [[0, 1], [1, 0]] {
            let mut store = listed();
            order.iter().for_each(|index| store.apply_change(Change::Applied(pods[*index].clone())));
            assert_eq!(here(&store), [has("static", HASH)], "{order:?} {younger:?}");
        }
    }
}

#[test]
fn a_static_pod_has_the_cgroup_of_its_mirror_pod_and_keeps_it() {
    let mut store = listed();
    store.apply_change(Change::Applied(mirror("static", "10.77.1.2", HASH)));
    store.apply_change(Change::Applied(mirror("false", "10.77.1.3", HASH)));
    assert_eq!(here(&store), [has("static", HASH)]);
    // The kubelet makes a new mirror pod of the same name.
    store.apply_change(Change::Deleted(mirror("false", "10.77.1.3", HASH)));
    store.apply_change(Change::Deleted(mirror("static", "10.77.1.2", HASH)));
    store.apply_change(Change::Applied(mirror("static", "10.77.1.2", HASH)));
    assert_eq!((here(&store), told(&mut store).len()), (vec![has("static", HASH)], 0));
}

#[test]
fn a_mirror_pod_claims_nothing_before_its_kubelet_has_reported_it() {
    let unreported = |name: &str| {
        pod(name, "a", "10.77.1.3", |value| {
            enrolled(value);
            value["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": HASH});
            value["metadata"]["ownerReferences"] = json!([{"kind": "Node", "name": "a"}]);
            // All of a status that the creator of a pod can have.
            value["status"] = json!({"phase": "Pending", "qosClass": "Burstable"});
        })
    };
    let mut store = listed();
    store.apply_change(Change::Applied(unreported("false")));
    assert_eq!(here(&store), [has("false", &uid("false"))], "its own");
    store.apply_change(Change::Applied(unreported("static")));
    store.apply_change(Change::Applied(mirror("static", "10.77.1.2", HASH)));
    assert_eq!(here(&store), [has("false", &uid("false")), has("static", HASH)]);
}

#[test]
fn the_cgroup_of_a_pod_with_the_nodes_network_cannot_be_claimed() {
    let host = |value: &mut Value| {
        value["metadata"]["uid"] = json!(VICTIM);
        value["spec"]["hostNetwork"] = json!(true);
    };
    for order in [[0, 1], [1, 0]] {
        let mut store = listed();
        let pods = [pod("proxy", "a", "192.0.2.1", host), mirror("false", "10.77.1.3", VICTIM)];
        order.iter().for_each(|index| store.apply_change(Change::Applied(pods[*index].clone())));
        assert_eq!((here(&store).len(), store.directory.host_network().count()), (0, 1), "{order:?}");
    }
}

#[test]
fn a_pod_whose_uid_is_no_uid_is_left_out_on_its_node() {
    for text in ["", "x", "../..", "0/0", "."] {
        let mut store = listed();
        store.apply_change(Change::Applied(pod("false", "a", "10.77.1.3", |value| {
            enrolled(value);
            value["metadata"]["uid"] = json!(text);
        })));
        assert!(here(&store).is_empty(), "{text:?}");
        let lines = told(&mut store);
        assert!(lines.len() == 1 && lines[0].contains("not enrolled: its UID"), "{lines:?}");
        list_pods(&mut store);
        assert!(told(&mut store).is_empty(), "gone with the pod");
    }
}

/// Applies a list without pods.
fn list_pods(store: &mut DirectoryStore) {
    store.apply_change(Change::Listing(ResourceKind::Pods));
    store.apply_change(Change::Listed(ResourceKind::Pods));
}

#[test]
fn a_reused_address_belongs_to_the_running_pod() {
    let deleted = |value: &mut Value| value["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let running =
        |value: &mut Value| value["status"]["containerStatuses"] = json!([{"state": {"running": {}}}]);
    let ended = |value: &mut Value| {
        value["status"]["containerStatuses"] = json!([{"state": {"terminated": {"exitCode": 0}}}]);
    };
    let mut store = listed();
    store.apply_change(Change::Applied(pod("old", "b", "10.77.1.2", running)));
    // Deleted, but its containers run: it has the address, and another pod cannot have it too.
    let terminating = pod("old", "b", "10.77.1.2", |value| {
        deleted(value);
        running(value);
    });
    store.apply_change(Change::Applied(terminating));
    assert_eq!(at(&store, "10.77.1.2"), Some("old"));
    store.apply_change(Change::Applied(pod("new", "b", "10.77.1.2", running)));
    assert_eq!(at(&store, "10.77.1.2"), None);
    let vacated = pod("old", "b", "10.77.1.2", |value| {
        deleted(value);
        ended(value);
        value["metadata"]["labels"]["changed"] = json!("yes");
    });
    store.apply_change(Change::Applied(vacated));
    assert_eq!(at(&store, "10.77.1.2"), Some("new"));
    // A namespace that enrols both changes nothing about that.
    store.apply_change(Change::Applied(namespace("shop", Some("true"))));
    assert_eq!(at(&store, "10.77.1.2"), Some("new"));
    store.apply_change(Change::Deleted(pod("old", "b", "10.77.1.2", as_is)));
    assert_eq!(at(&store, "10.77.1.2"), Some("new"));
    // A job that has ended is gone at once.
    store.apply_change(Change::Applied(pod("new", "b", "10.77.1.2", |value| {
        value["status"]["phase"] = json!("Succeeded");
    })));
    store.apply_change(Change::Applied(pod("next", "b", "10.77.1.2", running)));
    assert!(told(&mut store).is_empty());
    assert_eq!(at(&store, "10.77.1.2"), Some("next"));
}

#[test]
fn a_false_claim_makes_an_address_unclear_until_it_goes() {
    let victim_address = "10.77.2.2".parse::<IpAddr>().expect("an address");
    let mut store = listed();
    store.apply_change(Change::Applied(pod("victim", "b", "10.77.2.2", enrolled)));
    let claims = pod("false", "c", "10.77.2.2", enrolled);
    store.apply_change(Change::Applied(claims.clone()));
    let directory = store.take_changed().expect("changed");
    assert!(directory.at(victim_address).is_none() && directory.is_unclear(victim_address));
    assert!(directory.ranges().contains(victim_address), "of the mesh: never in clear");
    let lines = told(&mut store);
    assert!(
        lines.len() == 1 && lines[0].contains("10.77.2.2 is claimed by shop/false on node c"),
        "{lines:?}"
    );
    assert_eq!(store.warnings(), lines);
    store.apply_change(Change::Deleted(claims));
    assert!(store.take_changed().is_some());
    assert!(told(&mut store).is_empty());
    assert_eq!(at(&store, "10.77.2.2"), Some("victim"));
    assert!(store.warnings().is_empty());
}

#[test]
fn an_address_that_no_pod_has_is_not_a_claim() {
    for address in [
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "169.254.1.1",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
        "::ffff:127.0.0.1",
    ] {
        let mut store = listed();
        store.apply_change(Change::Applied(pod("false", "b", address, enrolled)));
        assert_eq!(at(&store, address), None);
        let lines = told(&mut store);
        assert!(lines.len() == 1 && lines[0].contains("is not used: it is a"), "{address}: {lines:?}");
    }
    let mut store = listed();
    store.apply_change(Change::Applied(pod("false", "b", "192.0.2.2", enrolled)));
    store.apply_change(Change::Applied(pod("far", "b", "192.0.2.1", enrolled)));
    assert_eq!((at(&store, "192.0.2.2"), at(&store, "192.0.2.1")), (Some("false"), Some("far")));
    store.apply_change(Change::Applied(node("a", &[], &["192.0.2.1"])));
    store.apply_change(Change::Applied(node("b", &[], &["192.0.2.2"])));
    assert_eq!((at(&store, "192.0.2.2"), at(&store, "192.0.2.1")), (None, None), "of its node, of this node");
    store.apply_change(Change::Deleted(node("b", &[], &[])));
    assert_eq!(at(&store, "192.0.2.2"), Some("false"));
}

#[test]
fn a_node_cannot_take_the_address_of_a_pod_or_a_service_out_of_the_mesh() {
    let mut store = listed();
    store.apply_change(Change::Applied(pod("victim", "b", "10.77.2.2", enrolled)));
    store.apply_change(Change::Applied(service(as_is)));
    store.apply_change(Change::Applied(node("b", &["10.77.2.0/24"], &["192.0.2.2"])));
    store.apply_change(Change::Applied(object::<crate::directory::objects::ServiceCidr>(
        json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}),
    )));
    let false_addresses = ["10.77.2.2", "10.96.0.1", "10.96.7.7", "8.8.8.8"];
    store.apply_change(Change::Applied(node("c", &[], &false_addresses)));
    let directory = store.take_changed().expect("changed");
    let is_mesh = |text: &str| directory.ranges().contains(text.parse().expect("an address"));
    assert!(is_mesh("10.77.2.2") && is_mesh("10.96.0.1") && is_mesh("10.77.2.3") && is_mesh("10.96.7.8"));
    assert!(!is_mesh("10.96.7.7"), "free, so it may be a node's");
    assert_eq!(at(&store, "10.77.2.2"), Some("victim"));
    // A pod that gets the address brings it back.
    store.apply_change(Change::Applied(pod("later", "b", "10.96.7.7", enrolled)));
    let directory = store.take_changed().expect("changed");
    assert!(directory.ranges().contains("10.96.7.7".parse().expect("an address")));
}

#[test]
fn a_namespace_with_many_problems_does_not_hide_those_of_others() {
    let mut store = listed();
    for i in 0..100 {
        store.apply_change(Change::Applied(pod(&format!("false-{i}"), "b", "127.0.0.1", |value| {
            value["metadata"]["namespace"] = json!("false");
        })));
    }
    store.apply_change(Change::Applied(pod("web", "b", "127.0.0.1", as_is)));
    for lines in [told(&mut store), store.warnings()] {
        assert!(lines.len() == 21 && lines.iter().any(|line| line.starts_with("pod shop/web:")), "{lines:?}");
    }
}

#[test]
fn a_pods_annotation_says_when_connect_returns() {
    use tacit_core::directory::Connect::{Early, Truthful};
    for (text, expected, problems) in [
        (None, Truthful, 0),
        (Some("truthful"), Truthful, 0),
        (Some("early"), Early, 0),
        (Some("Early "), Truthful, 1),
    ] {
        let mut store = listed();
        store.apply_change(Change::Applied(pod("web", "a", "10.77.1.3", |value| {
            enrolled(value);
            if let Some(text) = text {
                value["metadata"]["annotations"] = json!({"tacit.io/connect": text});
            }
        })));
        let web = store.directory.named("shop", "web").expect("known");
        assert_eq!(web.connect, expected, "{text:?}");
        assert_eq!(told(&mut store).len(), problems, "{text:?}");
    }
}
