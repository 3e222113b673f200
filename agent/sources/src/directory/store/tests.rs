//! Tests of the store: decoding of API JSON, changes, and relists.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use tacit_core::directory::{Affinity, InternalTrafficPolicy};

use super::{
    super::objects::{Namespace, Pod, Service, Slice},
    *,
};
use crate::{
    directory::testing::{local_node, object},
    kubernetes::ObjectStore as _,
};

mod claims;
mod ranges;

/// A UID that the kubelet makes for a static pod.
const HASH: &str = "0123456789abcdef0123456789abcdef";

fn store() -> DirectoryStore {
    DirectoryStore::new(EnrolLabel::default(), local_node())
}

/// Returns a store after the lists of an empty cluster.
fn listed() -> DirectoryStore {
    let mut store = store();
    for kind in ResourceKind::KUBERNETES {
        store.apply_change(Change::Listing(kind));
        store.apply_change(Change::Listed(kind));
    }
    store
}

fn namespace(name: &str, label: Option<&str>) -> Object {
    let labels = label.map(|value| json!({"tacit.io/enrol": value}));
    object::<Namespace>(json!({"metadata": {"name": name, "uid": "n", "labels": labels}}))
}

/// Returns a running pod of namespace shop, modified by `change`.
fn pod(name: &str, node: &str, ip: &str, change: impl FnOnce(&mut Value)) -> Object {
    let mut value = json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": uid(name), "resourceVersion": "7",
            "labels": {"app": "web"}, "annotations": {"other": "x"}, "managedFields": [{"manager": "kubelet"}],
        },
        "spec": {"nodeName": node, "serviceAccountName": "web", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "qosClass": "Burstable", "podIP": ip, "podIPs": [{"ip": ip}],
                   "startTime": "2026-01-01T00:00:00Z", "conditions": null},
    });
    change(&mut value);
    object::<Pod>(value)
}

/// Returns a UID of the pod of this name.
fn uid(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn as_is(_: &mut Value) {}

fn protocol_of(store: &DirectoryStore, name: &str) -> Option<Protocol> {
    store.directory.named("shop", name).map(|workload| workload.protocol)
}

fn at<'a>(store: &'a DirectoryStore, address: &str) -> Option<&'a str> {
    store.directory.at(address.parse().expect("an address")).map(|workload| &*workload.name)
}

#[test]
fn the_fields_of_a_pod_are_decoded() {
    let mut store = store();
    store.apply_change(Change::Applied(namespace("shop", Some("true"))));
    store.apply_change(Change::Applied(pod("web-1", "a", "10.77.1.2", |value| {
        value["status"]["podIPs"] = json!([{"ip": "10.77.1.2"}, {"ip": "fd77::2"}]);
    })));
    let web = store.directory.named("shop", "web-1").expect("known");
    assert_eq!(web.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(web.cgroup, Path::new(&format!("burstable/pod{}", uid("web-1"))));
    assert_eq!((&*web.node, web.labels.iter().count(), web.protocol), ("a", 1, Protocol::Tacit));
    assert_eq!((at(&store, "10.77.1.2"), at(&store, "fd77::2")), (Some("web-1"), Some("web-1")));
    store.apply_change(Change::Applied(pod("static", "a", "10.77.1.3", |value| {
        value["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": HASH});
        value["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Node", "name": "a"}]);
        value["status"]["qosClass"] = json!("Guaranteed");
        value["spec"]["serviceAccountName"] = json!(null);
        value["spec"].as_object_mut().expect("spec").remove("serviceAccountName");
    })));
    let fixed = store.directory.named("shop", "static").expect("known");
    assert_eq!(
        (fixed.cgroup.as_path(), fixed.identity.to_string()),
        (Path::new(&format!("pod{HASH}")), "spiffe://cluster.local/ns/shop/sa/default".to_owned())
    );
}

#[test]
fn a_pods_own_label_wins_over_its_namespaces() {
    use Protocol::{None as Clear, Tacit};
    for (of_namespace, of_pod, expected) in [
        (None, None, Clear),
        (Some("true"), None, Tacit),
        (Some("false"), None, Clear),
        (None, Some("true"), Tacit),
        (Some("true"), Some("false"), Clear),
        (Some("true"), Some("no"), Clear),
        (Some("false"), Some("true"), Tacit),
    ] {
        let own = |value: &mut Value| {
            if let Some(label) = of_pod {
                value["metadata"]["labels"]["tacit.io/enrol"] = json!(label);
            }
        };
        // The order of the events must not matter.
        let mut store_a = store();
        store_a.apply_change(Change::Applied(namespace("shop", of_namespace)));
        store_a.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", own)));
        let mut store_b = store();
        store_b.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", own)));
        store_b.apply_change(Change::Applied(namespace("shop", of_namespace)));
        for store in [&store_a, &store_b] {
            assert_eq!(protocol_of(store, "web"), Some(expected), "{of_namespace:?} {of_pod:?}");
            assert_eq!(at(store, "10.77.1.2"), Some("web"));
        }
    }
}

#[test]
fn another_label_can_enrol() {
    let mut store = store();
    store.enrol = EnrolLabel { name: "istio.io/dataplane-mode".to_owned(), value: "ambient".to_owned() };
    for (label, expected) in [("ambient", Protocol::Tacit), ("none", Protocol::None)] {
        store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", |value| {
            value["metadata"]["labels"]["istio.io/dataplane-mode"] = json!(label);
        })));
        assert_eq!(protocol_of(&store, "web"), Some(expected), "{label}");
    }
}

#[test]
fn a_pod_that_a_ztunnel_serves_speaks_hbone_unless_this_mesh_enrols_it() {
    let mut store = listed();
    let redirected = |note: Option<&'static str>| {
        pod("web", "a", "10.77.1.2", move |value| {
            if let Some(note) = note {
                value["metadata"]["annotations"] = json!({"ambient.istio.io/redirection": note});
            }
        })
    };
    for (note, expected) in [
        (Some("enabled"), Protocol::Hbone),
        (Some("pending"), Protocol::None),
        (Some("enabled"), Protocol::Hbone),
        (None, Protocol::None),
        (Some("enabled"), Protocol::Hbone),
    ] {
        store.apply_change(Change::Applied(redirected(note)));
        assert_eq!(protocol_of(&store, "web"), Some(expected), "{note:?}");
    }
    for (label, expected) in [(Some("true"), Protocol::Tacit), (None, Protocol::Hbone)] {
        store.apply_change(Change::Applied(namespace("shop", label)));
        assert_eq!(protocol_of(&store, "web"), Some(expected), "{label:?}");
    }
    assert!(store.directory.is_enrolled("10.77.1.2".parse().expect("literal")));
    store.apply_change(Change::Deleted(redirected(None)));
    store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", as_is)));
    assert_eq!(protocol_of(&store, "web"), Some(Protocol::None), "another pod of the name");
}

/// The annotation is removed after the release. Until then the pod must not look like one of a ztunnel.
#[test]
fn a_pod_that_an_agent_announced_is_never_taken_for_one_of_a_ztunnel() {
    let mut store = listed();
    store.follow_own_pods();
    let announced = |label: Option<&'static str>, node: &str| {
        pod("web", node, "10.77.1.2", move |value| {
            value["metadata"]["annotations"] =
                json!({"ambient.istio.io/redirection": "enabled", "tacit.io/announced": "true"});
            if let Some(label) = label {
                value["metadata"]["labels"]["tacit.io/enrol"] = json!(label);
            }
        })
    };
    for node in ["a", "b"] {
        for (label, expected) in
            [(Some("true"), Protocol::Tacit), (Some("false"), Protocol::None), (None, Protocol::None)]
        {
            store.apply_change(Change::Applied(announced(label, node)));
            assert_eq!(protocol_of(&store, "web"), Some(expected), "{label:?} on {node}");
            let has_changed = store.take_changed().is_some();
            assert!(has_changed || label.is_none());
            let own = store.take_own_pods(has_changed).expect("its labels have changed");
            let own: Vec<(bool, bool, bool)> =
                own.iter().map(|pod| (pod.is_enrolled, pod.is_redirected, pod.is_marked)).collect();
            let is_enrolled = label == Some("true");
            // Another node's pods are not this agent's.
            assert_eq!(own, if node == "a" { vec![(is_enrolled, true, true)] } else { vec![] });
        }
        store.apply_change(Change::Deleted(announced(None, node)));
        let has_changed = store.take_changed().is_some();
        assert!(store.take_own_pods(has_changed).expect("it was deleted").is_empty());
    }
    store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", as_is)));
    for label in [Some("true"), None] {
        store.apply_change(Change::Applied(namespace("shop", label)));
        let has_changed = store.take_changed().is_some();
        let own = store.take_own_pods(has_changed).expect("the namespace has changed");
        assert_eq!((own[0].is_enrolled, own[0].is_marked), (label.is_some(), false), "by its namespace");
        assert_eq!(own[0].cgroup, store.directory.named("shop", "web").expect("known").cgroup);
    }
}

#[test]
fn a_namespace_enrols_and_releases_running_pods() {
    let mut store = listed();
    store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", as_is)));
    assert!(store.take_changed().is_some());
    for (label, expected) in [(Some("true"), Protocol::Tacit), (None, Protocol::None)] {
        store.apply_change(Change::Applied(namespace("shop", label)));
        let published = store.take_changed().expect("changed");
        assert_eq!(published.named("shop", "web").expect("known").protocol, expected);
    }
    assert_eq!(store.directory.departed().count(), 0, "released on purpose");
}

#[test]
fn irrelevant_changes_are_not_published() {
    let mut store = listed();
    assert!(store.take_changed().is_some_and(|directory| directory.is_empty()), "complete, though empty");
    assert!(store.take_changed().is_none());
    store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", as_is)));
    assert!(store.take_changed().is_some());
    let mut publishes = |path: &str, to: Value| {
        let change = |value: &mut Value| *value.pointer_mut(path).expect("an object") = to;
        store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", change)));
        let is_published = store.take_changed().is_some();
        store.apply_change(Change::Applied(pod("web", "a", "10.77.1.2", as_is)));
        assert_eq!(store.take_changed().is_some(), is_published, "{path}: back again");
        is_published
    };
    for (path, to) in [
        ("/metadata/resourceVersion", json!("8")),
        ("/metadata/annotations/other", json!("y")),
        ("/metadata/managedFields", json!([{"manager": "kubelet", "fieldsV1": {"f:status": {}}}])),
        ("/spec/containers", json!([{"name": "c", "image": "i:2"}])),
        ("/status/conditions", json!([{"type": "Ready", "status": "False"}])),
        ("/status/startTime", json!("2026-01-01T00:00:01Z")),
    ] {
        assert!(!publishes(path, to), "{path}");
    }
    for (path, to) in [
        ("/metadata/labels/app", json!("other")),
        ("/spec/serviceAccountName", json!("other")),
        ("/status/podIPs", json!([{"ip": "10.77.1.3"}])),
        ("/status/phase", json!("Succeeded")),
    ] {
        assert!(publishes(path, to), "{path}");
    }
}

#[test]
fn nothing_is_published_before_everything_is_listed() {
    let mut store = store();
    for (kind, done) in ResourceKind::KUBERNETES.into_iter().zip([false, false, false, false, false, true]) {
        store.apply_change(Change::Listing(kind));
        store.apply_change(Change::Listed(kind));
        assert_eq!(store.take_changed().is_some(), done, "{kind:?}");
    }
}

#[test]
fn a_relist_removes_deleted_objects_at_its_end() {
    let mut store = listed();
    for (name, ip) in [("web", "10.77.1.2"), ("db", "10.77.1.3")] {
        store.apply_change(Change::Applied(pod(name, "b", ip, as_is)));
    }
    store.apply_change(Change::Listing(ResourceKind::Pods));
    assert_eq!(store.directory.len(), 2);
    store.apply_change(Change::Applied(pod("web", "b", "10.77.1.2", as_is)));
    assert_eq!(store.directory.len(), 2);
    store.apply_change(Change::Listed(ResourceKind::Pods));
    assert_eq!((at(&store, "10.77.1.2"), at(&store, "10.77.1.3")), (Some("web"), None));
}

#[test]
fn a_deleted_pod_is_kept_for_its_processes_on_its_own_node() {
    let enrolled = |value: &mut Value| value["metadata"]["labels"]["tacit.io/enrol"] = json!("true");
    let mut store = listed();
    store.apply_change(Change::Applied(pod("here", "a", "10.77.1.2", enrolled)));
    store.apply_change(Change::Applied(pod("far", "b", "10.77.2.2", enrolled)));
    store.apply_change(Change::Applied(pod("plain", "a", "10.77.1.3", as_is)));
    store.apply_change(Change::Applied(pod("job", "a", "10.77.1.4", enrolled)));
    // A terminating pod stays. The deletion of a pod and the end of a job remove the pod.
    store.apply_change(Change::Applied(pod("here", "a", "10.77.1.2", |value| {
        enrolled(value);
        value["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    })));
    assert_eq!(at(&store, "10.77.1.2"), Some("here"));
    for name in ["here", "far", "plain"] {
        store.apply_change(Change::Deleted(pod(name, "a", "10.77.1.2", as_is)));
    }
    store.apply_change(Change::Applied(pod("job", "a", "10.77.1.4", |value| {
        value["status"]["phase"] = json!("Succeeded")
    })));
    let departed: Vec<&str> = store.directory.departed().map(|workload| &*workload.name).collect();
    assert_eq!(departed, ["here", "job"]);
    assert!(store.directory.is_empty());
    for i in 0..2 * DEPARTED_MAX {
        store.apply_change(Change::Applied(pod(&format!("p{i}"), "a", "10.77.1.2", enrolled)));
        store.apply_change(Change::Deleted(pod(&format!("p{i}"), "a", "10.77.1.2", as_is)));
    }
    assert_eq!(store.directory.departed().count(), DEPARTED_MAX);
}

#[test]
fn a_namespace_with_many_deleted_pods_forgets_only_its_own() {
    let of = |namespace: &str, name: &str| {
        pod(name, "a", "10.77.1.2", |value| {
            value["metadata"]["namespace"] = json!(namespace);
            value["metadata"]["labels"]["tacit.io/enrol"] = json!("true");
        })
    };
    let mut store = listed();
    let mut end = |namespace: &str, name: &str| {
        store.apply_change(Change::Applied(of(namespace, name)));
        store.apply_change(Change::Deleted(of(namespace, name)));
    };
    end("shop", "victim");
    (0..2 * DEPARTED_MAX).for_each(|i| end("false", &format!("p{i}")));
    let departed: Vec<String> = store.directory.departed().map(|workload| workload.full_name()).collect();
    assert_eq!(departed.len(), DEPARTED_MAX);
    assert_eq!((&*departed[0], &*departed[1]), ("shop/victim", &*format!("false/p{}", DEPARTED_MAX + 1)));
}

#[test]
fn pods_with_the_nodes_network_are_left_alone_and_listed() {
    let host = |value: &mut Value| value["spec"]["hostNetwork"] = json!(true);
    let mut store = listed();
    store.apply_change(Change::Applied(pod("agent", "a", "192.0.2.1", host)));
    store.apply_change(Change::Applied(pod("agent-b", "b", "192.0.2.2", host)));
    let names = |store: &DirectoryStore| {
        store.directory.host_network().map(|w| w.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(&store), ["agent"]);
    assert_eq!((at(&store, "192.0.2.1"), at(&store, "192.0.2.2"), store.directory.len()), (None, None, 0));
    store.apply_change(Change::Listing(ResourceKind::Pods));
    store.apply_change(Change::Listed(ResourceKind::Pods));
    assert!(names(&store).is_empty());
}

#[test]
fn a_pod_without_address_is_known_on_its_own_node() {
    let fresh = |value: &mut Value| {
        value["status"] = json!({"phase": "Pending", "qosClass": "BestEffort"});
        value["metadata"]["labels"]["tacit.io/enrol"] = json!("true");
    };
    let mut store = listed();
    store.apply_change(Change::Applied(pod("here", "a", "", fresh)));
    store.apply_change(Change::Applied(pod("far", "b", "", fresh)));
    store.apply_change(Change::Applied(pod("unscheduled", "", "", fresh)));
    let here: Vec<_> = store.directory.on_node("a").collect();
    assert_eq!((here.len(), store.directory.len()), (1, 1));
    assert_eq!(
        (here[0].addresses.len(), here[0].cgroup.as_path()),
        (0, Path::new(&format!("besteffort/pod{}", uid("here"))))
    );
}

fn service(change: impl FnOnce(&mut Value)) -> Object {
    let mut value = json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "s"},
        "spec": {
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd96::1"], "type": "ClusterIP",
            "ports": [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"},
                      {"name": "dns", "port": 53, "protocol": "UDP"}],
        },
    });
    change(&mut value);
    object::<Service>(value)
}

fn slice(name: &str, family: &str, port: u16, endpoints: Value) -> Object {
    object::<Slice>(json!({
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family,
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": endpoints,
    }))
}

fn usable(store: &DirectoryStore) -> Vec<String> {
    let service = store.directory.service_at("10.96.0.1".parse().expect("an address")).expect("known");
    let all = service.ports.iter().flat_map(|port| port.ipv4.usable().iter().chain(port.ipv6.usable()));
    all.map(|endpoint| format!("{} {}", endpoint.address, endpoint.node)).collect()
}

#[test]
fn a_service_is_built_from_its_slices_in_any_order() {
    let mut store = listed();
    store.apply_change(Change::Applied(slice("web-1", "IPv4", 8080, json!([
        {"addresses": ["10.77.1.2"], "conditions": {"ready": true}, "nodeName": "a"},
        {"addresses": ["10.77.1.3"], "conditions": {"ready": false}, "nodeName": "a"},
        {"addresses": ["10.77.1.4"], "conditions": {}, "topology": {"kubernetes.io/hostname": "b"}},
        {"addresses": ["10.77.1.5"], "conditions": {"ready": false, "serving": true, "terminating": true}},
    ]))));
    assert!(store.directory.services().next().is_none());
    store.apply_change(Change::Applied(service(as_is)));
    assert_eq!(usable(&store), ["10.77.1.2:8080 a", "10.77.1.4:8080 b"]);
    // Other slices may have another port number for the same name, or the other family.
    store.apply_change(Change::Applied(slice(
        "web-2",
        "IPv4",
        9090,
        json!([{"addresses": ["10.77.2.2"], "nodeName": "b"}]),
    )));
    store.apply_change(Change::Applied(slice(
        "web-3",
        "IPv6",
        8080,
        json!([{"addresses": ["fd77::2"], "nodeName": "b"}]),
    )));
    assert_eq!(
        usable(&store),
        ["10.77.1.2:8080 a", "10.77.1.4:8080 b", "10.77.2.2:9090 b", "[fd77::2]:8080 b"]
    );
    assert!(store.take_changed().is_some());
    store.apply_change(Change::Deleted(slice("web-1", "IPv4", 8080, json!(null))));
    assert_eq!(usable(&store), ["10.77.2.2:9090 b", "[fd77::2]:8080 b"]);
    assert!(store.take_changed().is_some());
    store.apply_change(Change::Deleted(service(as_is)));
    assert!(store.take_changed().is_some_and(|directory| directory.services().next().is_none()));
}

#[test]
fn terminating_endpoints_serve_if_no_other_is_ready() {
    let mut store = listed();
    store.apply_change(Change::Applied(service(as_is)));
    store.apply_change(Change::Applied(slice("web-1", "IPv4", 80, json!([
        {"addresses": ["10.77.1.5"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.77.1.6"], "conditions": {"ready": false, "serving": false, "terminating": true}},
    ]))));
    assert_eq!(usable(&store), ["10.77.1.5:80 "]);
}

#[test]
fn hints_of_slices_are_followed_for_this_node_and_its_zone() {
    let mut store = listed();
    store.apply_change(Change::Applied(service(as_is)));
    let zone = |name: &str| json!({"forZones": [{"name": name}]});
    store.apply_change(Change::Applied(slice(
        "web-1",
        "IPv4",
        80,
        json!([
            {"addresses": ["10.77.1.5"], "hints": zone("east")},
            {"addresses": ["10.77.1.6"], "hints": zone("west")},
        ]),
    )));
    let in_zone = |name: &str, zone: &str| {
        let labels = json!({"topology.kubernetes.io/zone": zone});
        let node = json!({"metadata": {"name": name, "labels": labels}});
        Object::Node(Box::new(serde_json::from_value(node).expect("a node")))
    };
    assert_eq!(usable(&store), ["10.77.1.5:80 ", "10.77.1.6:80 "], "the zone is not known");
    store.apply_change(Change::Applied(in_zone("b", "east")));
    assert_eq!(usable(&store), ["10.77.1.5:80 ", "10.77.1.6:80 "], "another node's zone");
    store.apply_change(Change::Applied(in_zone("a", "west")));
    assert_eq!(usable(&store), ["10.77.1.6:80 "]);
    store.apply_change(Change::Applied(in_zone("a", "east")));
    assert_eq!(usable(&store), ["10.77.1.5:80 "], "the node has moved");
    store.apply_change(Change::Applied(slice(
        "web-1",
        "IPv4",
        80,
        json!([
            {"addresses": ["10.77.1.5"], "hints": {"forNodes": [{"name": "b"}], "forZones": [{"name": "east"}]}},
            {"addresses": ["10.77.1.6"], "hints": {"forNodes": [{"name": "a"}], "forZones": [{"name": "east"}]}},
        ]),
    )));
    assert_eq!(usable(&store), ["10.77.1.6:80 "]);
    store.apply_change(Change::Deleted(in_zone("a", "east")));
    assert_eq!(usable(&store), ["10.77.1.6:80 "], "a hint for the node needs no zone");
}

#[test]
fn traffic_policy_and_session_affinity_are_decoded() {
    let mut store = listed();
    store.apply_change(Change::Applied(service(|value| {
        value["spec"]["internalTrafficPolicy"] = json!("Local");
        value["spec"]["sessionAffinity"] = json!("ClientIP");
        value["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 60}});
        value["spec"].as_object_mut().expect("spec").remove("clusterIPs");
    })));
    let web = store.directory.service_named("shop", "web").expect("known");
    assert_eq!(
        (web.traffic, web.affinity),
        (InternalTrafficPolicy::Local, Affinity::ClientIp(Duration::from_secs(60)))
    );
    assert_eq!((web.addresses.len(), web.ports.len()), (1, 1), "TCP alone");
    store.apply_change(Change::Applied(service(|value| {
        value["spec"]["clusterIP"] = json!("None");
        value["spec"]["clusterIPs"] = json!(["None"]);
    })));
    assert!(store.directory.service_named("shop", "web").expect("known").addresses.is_empty(), "headless");
    assert!(store.directory.service_at("10.96.0.1".parse().expect("an address")).is_none());
}
