//! A mesh of istiod beside the pods of this node.

use std::net::SocketAddr;

use serde_json::json;
use tacit_core::directory::Directory;

mod refused;

use super::{
    super::super::{
        EnrolLabel,
        objects::{Namespace, Node, Object, Pod, ResourceKind, Service as ApiService},
    },
    *,
};
use crate::{
    directory::testing::{local_node, object},
    istiod::address::Membership,
    kubernetes::{Change, ObjectStore as _},
};

const CLUSTER: &str = "c";
const WEB: &str = "shop/web.shop.svc.cluster.local";

fn store() -> DirectoryStore {
    let place = MeshPlace { cluster: CLUSTER.to_owned(), network: String::new() };
    let mut store = DirectoryStore::with_istiod(EnrolLabel::default(), local_node(), place);
    for kind in ResourceKind::ISTIOD {
        store.apply_change(Change::Listing(kind));
        store.apply_change(Change::Listed(kind));
    }
    store
}

/// A pod of this node, as the API has it.
fn own_pod(name: &str, ip: &str) -> Object {
    object::<Pod>(json!({
        "metadata": {"name": name, "namespace": "shop", "uid": "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b",
                     "labels": {"tacit.io/enrol": "true"}},
        "spec": {"nodeName": "a", "serviceAccountName": "web"},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}], "startTime": "2026-01-01T00:00:00Z"},
    }))
}

fn api_service() -> Object {
    object::<ApiService>(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "s"},
        "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
                 "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}]},
    }))
}

fn own_node(zone: &str) -> Object {
    let labels = json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": zone});
    object::<Node>(json!({"metadata": {"name": "a", "labels": labels}}))
}

/// A pod of the cluster on another node, changed by `change`.
fn pod(name: &str, ip: &str, change: impl FnOnce(&mut WorkloadRecord)) -> (String, WorkloadRecord) {
    let mut record = WorkloadRecord {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        cluster: CLUSTER.to_owned(),
        network: String::new(),
        node: "b".to_owned(),
        addresses: vec![ip.parse().expect("an address")],
        is_pod: true,
        is_tunnelled: true,
        trust_domain: None,
        service_account: "web".to_owned(),
        has_waypoint: false,
        is_host_network: false,
        is_healthy: true,
        locality: Locality { region: "r".to_owned(), zone: "z".to_owned(), subzone: String::new() },
        services: vec![Membership {
            service: WEB.to_owned(),
            ports: vec![PortPair { service: 80, target: 8080 }],
        }],
        policies: Vec::new(),
    };
    change(&mut record);
    let uid = if record.is_pod {
        format!("{}//Pod/{}/{}", record.cluster, record.namespace, record.name)
    } else {
        format!("{}/networking.istio.io/WorkloadEntry/{}/{}", record.cluster, record.namespace, record.name)
    };
    (uid, record)
}

fn service(change: impl FnOnce(&mut ServiceRecord)) -> ServiceRecord {
    let mut record = ServiceRecord {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "web.shop.svc.cluster.local".to_owned(),
        addresses: vec![[10, 96, 0, 1].into()],
        ranges: Vec::new(),
        ports: vec![PortPair { service: 80, target: 8080 }],
        has_waypoint: false,
        is_public: true,
        balancing: Balancing::default(),
    };
    change(&mut record);
    record
}

fn send(store: &mut DirectoryStore, name: &str, content: AddressContent) {
    let change = Change::Applied(Object::Address(Box::new(AddressObject { name: name.into(), content })));
    store.apply_change(change);
}

fn send_workload(store: &mut DirectoryStore, (uid, record): (String, WorkloadRecord)) {
    send(store, &uid, AddressContent::Workload(Arc::new(record)));
}

fn send_service(store: &mut DirectoryStore, record: ServiceRecord) {
    let name = format!("{}/{}", record.namespace, record.hostname);
    send(store, &name, AddressContent::Service(Arc::new(record)));
}

fn remove(store: &mut DirectoryStore, name: &str) {
    let object = AddressObject { name: name.into(), content: AddressContent::Removed };
    store.apply_change(Change::Deleted(Object::Address(Box::new(object))));
}

fn at<'a>(directory: &'a Directory, ip: &str) -> Option<&'a Arc<Workload>> {
    directory.at(ip.parse().expect("an address"))
}

/// The endpoints that clients of this node use first, and the number of the others.
fn endpoints(directory: &Directory, vip: &str) -> (Vec<String>, usize) {
    let at: SocketAddr = vip.parse().expect("an address");
    let Some(service) = directory.service_for(at) else { return (Vec::new(), 0) };
    let ports = service.ports.iter().find(|port| port.port == at.port()).expect("the port");
    let mut near: Vec<String> = ports.ipv4.usable().iter().map(|one| one.address.to_string()).collect();
    near.sort();
    let all = ports.ipv4.iter().count();
    (near.clone(), all - near.len())
}

#[test]
fn pods_here_are_the_apis_and_workloads_elsewhere_istiods() {
    let mut store = store();
    store.apply_change(Change::Applied(own_pod("here", "10.77.1.2")));
    // istiod has it too, with other properties.
    send_workload(
        &mut store,
        pod("here", "10.77.1.9", |w| (w.node, w.is_tunnelled) = ("a".to_owned(), false)),
    );
    // This one is too new for the API's watch, or a lie.
    send_workload(&mut store, pod("new", "10.77.1.3", |w| w.node = "a".to_owned()));
    send_workload(&mut store, pod("far", "10.77.2.2", |_| {}));
    send_workload(&mut store, pod("plain", "10.77.2.3", |w| w.is_tunnelled = false));
    let directory = store.take_changed().expect("complete");
    let here = at(&directory, "10.77.1.2").expect("of the API");
    assert!(here.cgroup.to_string_lossy().contains("pod0b4c1d9e"), "{:?}", here.cgroup);
    assert_eq!(here.protocol, Protocol::Tacit);
    assert_eq!((at(&directory, "10.77.1.9"), at(&directory, "10.77.1.3")), (None, None));
    let far = at(&directory, "10.77.2.2").expect("of istiod");
    assert_eq!((&*far.node, far.protocol), ("b", Protocol::Tacit));
    assert_eq!(far.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(at(&directory, "10.77.2.3").expect("known").protocol, Protocol::None);
    assert_eq!(directory.on_node("a").count(), 1);
}

#[test]
fn a_pod_that_moves_is_never_lost() {
    let mut store = store();
    store.apply_change(Change::Applied(own_pod("web-0", "10.77.1.2")));
    send_workload(&mut store, pod("web-0", "10.77.1.2", |w| w.node = "a".to_owned()));
    // istiod learns first that another node has it.
    send_workload(&mut store, pod("web-0", "10.77.2.2", |_| {}));
    let directory = store.take_changed().expect("changed");
    assert_eq!(&*at(&directory, "10.77.1.2").expect("still here").node, "a");
    store.apply_change(Change::Deleted(own_pod("web-0", "10.77.1.2")));
    let directory = store.take_changed().expect("changed");
    assert_eq!(&*at(&directory, "10.77.2.2").expect("moved").node, "b");
    assert_eq!(directory.departed().count(), 1, "its processes here may live on");
    // And back: the API learns first.
    store.apply_change(Change::Applied(own_pod("web-0", "10.77.1.2")));
    let directory = store.take_changed().expect("changed");
    assert_eq!((at(&directory, "10.77.2.2"), directory.len()), (None, 1));
    remove(&mut store, "c//Pod/shop/web-0");
    let directory = store.take_changed().unwrap_or(directory);
    assert!(at(&directory, "10.77.1.2").is_some(), "not istiod's to remove");
    // A new list of this node's pods does not concern those elsewhere.
    send_workload(&mut store, pod("far", "10.77.2.9", |_| {}));
    store.apply_change(Change::Listing(ResourceKind::Pods));
    store.apply_change(Change::Listed(ResourceKind::Pods));
    let directory = store.take_changed().expect("changed");
    assert_eq!((at(&directory, "10.77.1.2"), at(&directory, "10.77.2.9").is_some()), (None, true));
}

#[test]
fn labels_of_a_namespace_enrol_pods_here_alone() {
    let mut store = store();
    send_workload(&mut store, pod("far", "10.77.2.2", |w| w.is_tunnelled = false));
    let labels = json!({"tacit.io/enrol": "true"});
    let namespace = json!({"metadata": {"name": "shop", "uid": "n", "labels": labels}});
    store.apply_change(Change::Applied(object::<Namespace>(namespace)));
    let directory = store.take_changed().expect("complete");
    assert_eq!(at(&directory, "10.77.2.2").expect("known").protocol, Protocol::None, "istiod knows that");
}

#[test]
fn addresses_that_prove_nothing_are_endpoints_alone() {
    let mut store = store();
    store.apply_change(Change::Applied(api_service()));
    send_service(&mut store, service(|_| {}));
    send_workload(&mut store, pod("host", "192.0.2.1", |w| w.is_host_network = true));
    send_workload(&mut store, pod("vm", "10.77.9.1", |w| (w.is_pod, w.is_tunnelled) = (false, false)));
    send_workload(&mut store, pod("other", "10.77.9.2", |w| w.network = "n2".to_owned()));
    let directory = store.take_changed().expect("complete");
    assert_eq!(directory.len(), 1, "that of the other network, which is refused");
    assert!(at(&directory, "192.0.2.1").is_none() && at(&directory, "10.77.9.1").is_none());
    assert_eq!(
        endpoints(&directory, "10.96.0.1:80"),
        (vec!["10.77.9.1:8080".to_owned(), "192.0.2.1:8080".to_owned()], 0)
    );
    // A tunnelled WorkloadEntry has an identity, but no pod loses its address to it.
    send_workload(&mut store, pod("vm", "10.77.2.2", |w| w.is_pod = false));
    send_workload(&mut store, pod("web", "10.77.2.2", |_| {}));
    let directory = store.take_changed().expect("changed");
    assert_eq!(&*at(&directory, "10.77.2.2").expect("the pod's").name, "web");
    // A pod of another cluster with the names of one here.
    send_workload(&mut store, pod("web", "10.78.2.2", |w| w.cluster = "d".to_owned()));
    let directory = store.take_changed().expect("changed");
    assert_eq!(&*at(&directory, "10.78.2.2").expect("known").name, "d//Pod/shop/web");
    assert_eq!(&*at(&directory, "10.78.2.2").expect("known").node, "d/b");
    assert!(at(&directory, "10.77.2.2").is_some());
}

#[test]
fn a_service_has_the_apis_addresses_and_istiods_endpoints_in_any_order() {
    let parts: [fn(&mut DirectoryStore); 4] = [
        |store| store.apply_change(Change::Applied(api_service())),
        |store| send_service(store, service(|_| {})),
        |store| send_workload(store, pod("one", "10.77.2.2", |_| {})),
        |store| send_workload(store, pod("two", "10.77.2.3", |w| w.is_healthy = false)),
    ];
    for first in 0..4 {
        let mut store = store();
        for index in 0..4 {
            parts[(first + index) % 4](&mut store);
            drop(store.take_changed());
        }
        let known = store.directory.service_named("shop", "web").expect("known").clone();
        assert_eq!((known.ports[0].node_port, known.addresses.len()), (Some(30080), 1), "{first}");
        assert_eq!(
            endpoints(&store.directory, "10.96.0.1:80"),
            (vec!["10.77.2.2:8080".to_owned()], 0),
            "{first}"
        );
        assert_eq!(store.directory.services().count(), 1, "{first}: not under its hostname too");
        remove(&mut store, "c//Pod/shop/one");
        let directory = store.take_changed().expect("changed");
        assert_eq!(endpoints(&directory, "10.96.0.1:80"), (Vec::new(), 0));
        remove(&mut store, WEB);
        store.apply_change(Change::Deleted(api_service()));
        assert_eq!(store.take_changed().expect("changed").services().count(), 0);
    }
}

#[test]
fn target_ports_are_those_of_the_workload_else_of_the_service() {
    let mut store = store();
    store.apply_change(Change::Applied(api_service()));
    send_service(&mut store, service(|_| {}));
    let ports = |target| move |w: &mut WorkloadRecord| w.services[0].ports[0].target = target;
    send_workload(&mut store, pod("own", "10.77.2.2", ports(9090)));
    send_workload(&mut store, pod("default", "10.77.2.3", ports(0)));
    let all = vec!["10.77.2.2:9090".to_owned(), "10.77.2.3:8080".to_owned()];
    assert_eq!(endpoints(&store.take_changed().expect("changed"), "10.96.0.1:80"), (all, 0));
    send_service(&mut store, service(|s| s.ports[0].target = 0));
    let own = vec!["10.77.2.2:9090".to_owned()];
    assert_eq!(endpoints(&store.take_changed().expect("changed"), "10.96.0.1:80"), (own, 0), "no port known");
}

#[test]
fn preferences_order_the_endpoints_and_strict_ones_leave_others_out() {
    use BalancingScope::{Network, Node as SameNode, Region, Zone};
    let mut store = store();
    store.apply_change(Change::Applied(api_service()));
    store.apply_change(Change::Applied(own_node("z")));
    send_workload(&mut store, pod("near", "10.77.2.2", |_| {}));
    send_workload(&mut store, pod("region", "10.77.2.3", |w| w.locality.zone = "y".to_owned()));
    send_workload(&mut store, pod("far", "10.77.2.4", |w| w.locality.region = "q".to_owned()));
    let all = |count: usize| (2..2 + count).map(|i| format!("10.77.2.{i}:8080")).collect::<Vec<_>>();
    let mut with = |preference: &[BalancingScope], mode, change: &dyn Fn(&mut DirectoryStore)| {
        let balancing = Balancing { preference: preference.to_vec(), mode, uses_unhealthy: false };
        send_service(&mut store, service(|s| s.balancing = balancing));
        change(&mut store);
        drop(store.take_changed());
        endpoints(&store.directory, "10.96.0.1:80")
    };
    let preference = [Network, Region, Zone];
    assert_eq!(with(&[], Distribution::Even, &|_| {}), (all(3), 0));
    assert_eq!(with(&preference, Distribution::Failover, &|_| {}), (all(1), 2));
    assert_eq!(with(&preference, Distribution::Strict, &|_| {}), (all(1), 0));
    assert_eq!(with(&[SameNode], Distribution::Strict, &|_| {}), (Vec::new(), 0));
    let sick =
        |store: &mut DirectoryStore| send_workload(store, pod("near", "10.77.2.2", |w| w.is_healthy = false));
    assert_eq!(with(&preference, Distribution::Failover, &sick), (vec!["10.77.2.3:8080".to_owned()], 1));
    let moved = |store: &mut DirectoryStore| store.apply_change(Change::Applied(own_node("y")));
    assert_eq!(with(&preference, Distribution::Strict, &moved), (vec!["10.77.2.3:8080".to_owned()], 0));
}

#[test]
fn a_destination_behind_a_waypoint_or_a_gateway_is_not_reached_around_it() {
    let detour = |store: &mut DirectoryStore, at: &str| {
        drop(store.take_changed());
        store.directory.detour(at.parse().expect("an address"))
    };
    let mut store = store();
    store.apply_change(Change::Applied(api_service()));
    store.apply_change(Change::Applied(own_pod("here", "10.77.1.2")));
    send_service(&mut store, service(|s| s.has_waypoint = true));
    send_workload(&mut store, pod("far", "10.77.2.2", |w| w.has_waypoint = true));
    send_workload(
        &mut store,
        pod("here", "10.77.1.2", |w| (w.node, w.has_waypoint) = ("a".to_owned(), true)),
    );
    for at in ["10.96.0.1:80", "10.96.0.1:81", "10.77.2.2:8080", "10.77.1.2:8080"] {
        assert_eq!(detour(&mut store, at), Some(Detour::Waypoint), "{at}");
    }
    send_service(&mut store, service(|_| {}));
    assert_eq!(
        detour(&mut store, "10.96.0.1:80"),
        None,
        "a waypoint of workloads is not for the service's clients"
    );
    // Only endpoints in another network.
    remove(&mut store, "c//Pod/shop/far");
    send_workload(
        &mut store,
        pod("here", "10.77.1.2", |w| (w.node, w.services) = ("a".to_owned(), Vec::new())),
    );
    send_workload(&mut store, pod("other", "10.77.2.2", |w| w.network = "n2".to_owned()));
    assert_eq!(detour(&mut store, "10.96.0.1:80"), Some(Detour::Gateway));
    assert_eq!(detour(&mut store, "10.77.1.2:8080"), None);
    send_workload(&mut store, pod("near", "10.77.2.3", |_| {}));
    assert_eq!(detour(&mut store, "10.96.0.1:80"), None);
}

#[test]
fn a_service_behind_a_waypoint_is_in_the_ranges_of_the_mesh() {
    let cluster_ip = "10.96.0.1".parse().expect("an address");
    let mut store = store();
    store.apply_change(Change::Applied(api_service()));
    send_service(&mut store, service(|_| {}));
    send_workload(&mut store, pod("plain", "10.77.2.2", |w| w.is_tunnelled = false));
    let directory = store.take_changed().expect("changed");
    assert!(!directory.ranges().contains(cluster_ip), "nothing of it is enrolled");
    send_service(&mut store, service(|s| s.has_waypoint = true));
    let directory = store.take_changed().expect("changed");
    assert!(directory.ranges().contains(cluster_ip));
    // An address that anybody can write is not captured for a waypoint.
    let outer = [198, 51, 100, 7];
    send_service(
        &mut store,
        service(|s| {
            (s.hostname, s.addresses, s.has_waypoint) = ("x.example".to_owned(), vec![outer.into()], true);
        }),
    );
    let directory = store.take_changed().expect("changed");
    assert!(!directory.ranges().contains(outer.into()));
}

#[test]
fn the_addresses_of_a_service_entry_yield_to_pods_and_cluster_ips() {
    let entry = |name: &str, addresses: &[[u8; 4]]| {
        let addresses = addresses.iter().map(|ip| (*ip).into()).collect();
        service(|s| {
            s.hostname = format!("{name}.example");
            s.has_waypoint = true;
            s.addresses = addresses;
        })
    };
    let mut store = store();
    store.apply_change(Change::Applied(api_service()));
    send_service(&mut store, service(|_| {}));
    send_workload(&mut store, pod("one", "10.77.2.2", |_| {}));
    send_service(&mut store, entry("thief", &[[10, 96, 0, 1], [10, 77, 2, 2], [240, 240, 0, 1]]));
    let directory = store.take_changed().expect("changed");
    let at = |text: &str| -> SocketAddr { text.parse().expect("an address") };
    let name = |text: &str| directory.service_for(at(text)).map(|service| service.name.to_string());
    assert_eq!(name("10.96.0.1:80").as_deref(), Some("web"));
    assert_eq!(name("10.77.2.2:80"), None);
    assert_eq!(directory.detour(at("10.77.2.2:80")), None);
    assert_eq!(directory.detour(at("10.96.0.1:80")), None);
    assert_eq!(name("240.240.0.1:80").as_deref(), Some("thief.example"), "nobody else's");
    send_service(&mut store, entry("good", &[[198, 51, 100, 7]]));
    let directory = store.take_changed().expect("changed");
    assert_eq!(directory.detour(at("198.51.100.7:80")), Some(Detour::Waypoint));
}

#[test]
fn a_resource_that_cannot_be_read_keeps_the_version_before() {
    let mut store = store();
    send_workload(&mut store, pod("far", "10.77.2.2", |_| {}));
    drop(store.take_changed());
    send(&mut store, "c//Pod/shop/far", AddressContent::Unreadable("networkMode is 7".to_owned()));
    let directory = store.take_changed().expect("the problem is shown");
    assert!(at(&directory, "10.77.2.2").is_some());
    let shown = store.invalid_objects().list;
    assert!(shown.len() == 1 && shown[0].contains("networkMode is 7"), "{shown:?}");
    send_workload(&mut store, pod("far", "10.77.2.3", |_| {}));
    let directory = store.take_changed().expect("changed");
    assert_eq!((at(&directory, "10.77.2.2"), store.invalid_objects().list.len()), (None, 0));
}
