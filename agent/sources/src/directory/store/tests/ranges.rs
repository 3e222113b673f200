//! Tests of range discovery: sources, refusals, and when a range goes.

use tacit_core::directory::Ranges;

use super::*;
use crate::directory::{
    objects::{Node, ServiceCidr},
    store::range_discovery::OUTER_PER_NAMESPACE_MAX,
};

pub(super) fn node(name: &str, cidrs: &[&str], addresses: &[&str]) -> Object {
    let addresses: Vec<Value> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    object::<Node>(json!({
        "metadata": {"name": name, "resourceVersion": "3"},
        "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs, "providerID": "x"},
        "status": {"addresses": addresses, "images": [{"names": ["i"]}]},
    }))
}

fn service_cidr(cidrs: &[&str]) -> Object {
    object::<ServiceCidr>(json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}}))
}

fn enrolled(value: &mut Value) {
    value["metadata"]["labels"]["tacit.io/enrol"] = json!("true");
}

/// Returns a store with configured ranges, after the lists of an empty cluster.
fn within(configured: &[&str]) -> DirectoryStore {
    let configured: Vec<_> = configured.iter().map(|range| range.parse().expect("a range")).collect();
    let local_node = LocalNode { ranges: Ranges::configured(&configured).into(), ..store().local_node };
    let mut store = DirectoryStore::new(EnrolLabel::default(), local_node);
    list_all(&mut store);
    store
}

fn list_all(store: &mut DirectoryStore) {
    for kind in ResourceKind::KUBERNETES {
        store.apply_change(Change::Listing(kind));
        store.apply_change(Change::Listed(kind));
    }
}

/// Returns the published ranges.
fn ranges(store: &mut DirectoryStore) -> String {
    let directory = store.take_changed().unwrap_or_else(|| store.directory.clone());
    directory.ranges().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn refused(store: &DirectoryStore) -> Vec<String> {
    store.invalid_objects().list
}

#[test]
fn nodes_and_service_cidrs_add_ranges_to_the_configured_ones() {
    let mut store = within(&["10.77.0.0/24", "fd77::/16"]);
    assert_eq!(ranges(&mut store), "10.77.0.0/24 fd77::/16");
    store.apply_change(Change::Applied(node("a", &["10.77.0.0/25", "fd77:0:0:1::/64"], &["192.0.2.1"])));
    assert_eq!(ranges(&mut store), "10.77.0.0/24 fd77::/16", "nothing that was not configured");
    store.apply_change(Change::Applied(node("b", &["10.77.1.0/24", "fd78::/64"], &["192.0.2.2"])));
    store.apply_change(Change::Applied(service_cidr(&["10.96.0.0/12"])));
    assert_eq!(ranges(&mut store), "10.77.0.0/23 10.96.0.0/12 fd77::/16 fd78::/64");
    let found = store.directory.ranges();
    assert_eq!((found.count_configured(), found.count_detected()), (2, 3));
    // Servers before 1.16 have only podCIDR.
    store.apply_change(Change::Applied(object::<Node>(
        json!({"metadata": {"name": "old"}, "spec": {"podCIDR": "10.79.0.0/24", "podCIDRs": null}}),
    )));
    assert!(ranges(&mut store).contains("10.79.0.0/24"));
    assert_eq!(refused(&store), Vec::<String>::new());
}

#[test]
fn the_first_directory_has_the_ranges_of_all_that_was_listed() {
    let mut store = store();
    store.apply_change(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
    for kind in ResourceKind::KUBERNETES {
        store.apply_change(Change::Listing(kind));
        if kind == ResourceKind::Nodes {
            store.apply_change(Change::Applied(node("a", &["10.77.0.0/24"], &["192.0.2.1"])));
        }
        if kind == ResourceKind::ServiceCidrs {
            store.apply_change(Change::Applied(service_cidr(&["10.96.0.0/12"])));
        }
        if kind == ResourceKind::Pods {
            store.apply_change(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
        }
        assert!(store.take_changed().is_none(), "before {kind:?} is listed");
        store.apply_change(Change::Listed(kind));
    }
    assert_eq!(ranges(&mut store), "10.77.0.0/24 10.78.0.2/32 10.96.0.0/12");
}

#[test]
fn a_range_goes_with_its_source_and_the_last_address_that_needs_it() {
    let mut store = within(&["10.80.0.0/24"]);
    store.apply_change(Change::Applied(node("a", &["10.77.0.0/24"], &[])));
    store.apply_change(Change::Applied(service_cidr(&["10.96.0.0/12"])));
    store.apply_change(Change::Applied(pod("inside", "b", "10.77.0.2", enrolled)));
    store.apply_change(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
    store.apply_change(Change::Applied(service(|value| value["spec"]["clusterIPs"] = json!(["10.96.0.1"]))));
    assert_eq!(ranges(&mut store), "10.77.0.0/24 10.78.0.2/32 10.80.0.0/24 10.96.0.0/12");
    let mut generation = store.directory.ranges().generation();
    store.apply_change(Change::Deleted(node("a", &[], &[])));
    store.apply_change(Change::Applied(service_cidr(&[])));
    assert_eq!(ranges(&mut store), "10.77.0.0/24 10.78.0.2/32 10.80.0.0/24 10.96.0.0/12", "addresses in use");
    for (gone, left) in [
        (pod("web", "b", "10.78.0.2", enrolled), "10.77.0.0/24 10.80.0.0/24 10.96.0.0/12"),
        (pod("inside", "b", "10.77.0.2", enrolled), "10.80.0.0/24 10.96.0.0/12"),
        (service(as_is), "10.80.0.0/24"),
    ] {
        store.apply_change(Change::Deleted(gone));
        assert_eq!(ranges(&mut store), left);
        assert!(store.directory.ranges().generation() > generation, "the kernel follows");
        generation = store.directory.ranges().generation();
    }
    list_all(&mut store);
    assert_eq!(ranges(&mut store), "10.80.0.0/24", "what is configured stays");
}

#[test]
fn a_false_range_goes_though_pods_in_it_are_in_other_ranges() {
    let mut store = within(&["10.77.0.0/16"]);
    store.apply_change(Change::Applied(pod("web", "b", "10.77.0.2", enrolled)));
    store.apply_change(Change::Applied(node("c", &["10.0.0.0/8"], &[])));
    assert_eq!(ranges(&mut store), "10.0.0.0/8");
    store.apply_change(Change::Applied(node("c", &["10.77.3.0/24"], &[])));
    assert_eq!(ranges(&mut store), "10.77.0.0/16");
    // An address of its own: it goes with the claim, and comes back with the next.
    for _ in 0..2 {
        store.apply_change(Change::Applied(pod("false", "c", "8.8.8.8", enrolled)));
        assert_eq!(ranges(&mut store), "8.8.8.8/32 10.77.0.0/16");
        store.apply_change(Change::Deleted(pod("false", "c", "8.8.8.8", enrolled)));
        assert_eq!(ranges(&mut store), "10.77.0.0/16");
    }
    store.apply_change(Change::Applied(pod("one", "c", "10.78.0.2", enrolled)));
    store.apply_change(Change::Applied(pod("two", "c", "10.78.0.3", enrolled)));
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.2/31");
    // Replaced between two publications.
    store.apply_change(Change::Deleted(pod("one", "c", "10.78.0.2", enrolled)));
    store.apply_change(Change::Applied(pod("three", "c", "10.78.0.2", enrolled)));
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.2/31");
    store.apply_change(Change::Applied(pod("two", "c", "10.78.0.9", enrolled)));
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.2/32 10.78.0.9/32");
}

#[test]
fn a_range_wider_than_the_bound_is_refused() {
    let mut store = within(&[]);
    store.apply_change(Change::Applied(node(
        "c",
        &["192.0.0.0/3", "fd00::/16", "10.0.0.0/8", "fd77::/32"],
        &[],
    )));
    assert_eq!(ranges(&mut store), "10.0.0.0/8 fd77::/32");
    let invalid_ranges = refused(&store);
    assert_eq!(invalid_ranges.len(), 2, "{invalid_ranges:?}");
    assert!(invalid_ranges[1].contains("larger than a detected range may be"), "{invalid_ranges:?}");
}

#[test]
fn invalid_ranges_are_reported_once_and_the_rest_is_used() {
    let mut store = within(&[]);
    let invalid =
        ["0.0.0.0/0", "127.0.0.0/8", "fe80::/64", "pods", "10.99.0.0/16", "224.0.0.0/4", "10.77.3.9/24"];
    store.apply_change(Change::Applied(node("a", &invalid, &["10.99.0.1", "a.example"])));
    store.apply_change(Change::Applied(service_cidr(&["::/0", "fd96::/108"])));
    let found = store.take_changed().expect("changed");
    let is_mesh = |text: &str| found.ranges().contains(text.parse().expect("an address"));
    assert!(is_mesh("10.77.3.1") && is_mesh("fd96::1"));
    // The address of the node is cut out of the range around it.
    assert!(
        !is_mesh("10.99.0.1") && is_mesh("10.99.0.0") && is_mesh("10.99.0.2") && is_mesh("10.99.255.255")
    );
    assert_eq!(found.ranges().iter().count(), 2 + 16);
    let expected = [
        "Node a: spec.podCIDRs[0]: \"0.0.0.0/0\": prefix length 0 covers every address: write the ranges the pods' addresses \
         are taken from",
        "Node a: spec.podCIDRs[1]: \"127.0.0.0/8\": overlaps 127.0.0.0/8 (loopback): write the ranges the pods' addresses \
         are taken from",
    ];
    let invalid_ranges = refused(&store);
    assert_eq!(
        (&invalid_ranges[..2], invalid_ranges.len()),
        (&expected.map(str::to_owned)[..], 6),
        "{invalid_ranges:?}"
    );
    let warnings = store.warnings();
    assert_eq!(warnings.len(), 6);
    assert!(warnings[0].starts_with("mesh range not used: "), "{warnings:?}");
    // An update with the same ranges publishes nothing, and refusals are not logged again.
    store.apply_change(Change::Applied(node("a", &invalid, &["10.99.0.1", "b.example"])));
    assert!(store.take_changed().is_none());
    store.apply_change(Change::Applied(node("b", &["10.77.4.0/24"], &[])));
    assert!(store.take_changed().is_some());
    assert_eq!(store.warnings(), Vec::<String>::new());
    store.apply_change(Change::Deleted(node("a", &[], &[])));
    assert!(store.take_changed().is_some(), "the operator sees that it is gone");
    assert_eq!(refused(&store).len(), 1);
}

#[test]
fn an_object_has_a_bounded_number_of_ranges_and_the_mesh_too() {
    let mut store = within(&[]);
    let many: Vec<String> = (0..100).map(|i| format!("10.{i}.1.0/24")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    store.apply_change(Change::Applied(node("a", &many, &[])));
    assert_eq!(ranges(&mut store).split(' ').count(), 16);
    assert!(refused(&store)[0].ends_with("more than 16 ranges; this one and the following are not used"));
    // Fill the limit with ranges that cannot be merged, and add some more.
    let fit = tacit_abi::limits::MESH_RANGES / 2;
    let ranges_of = |first: u32| -> Vec<String> {
        let address = |i: u32| std::net::Ipv4Addr::from(0x0b00_0000 + 2 * i);
        (first..first + 16).map(|i| format!("{}/32", address(i))).collect()
    };
    for first in (0..fit + 400).step_by(16) {
        let texts = ranges_of(first);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        store.apply_change(Change::Applied(node(&format!("n-{first}"), &texts, &[])));
    }
    assert_eq!(ranges(&mut store).split(' ').count(), fit as usize);
    let invalid_ranges = refused(&store);
    assert_eq!(invalid_ranges.len(), 21, "the first twenty and how many more");
    assert!(invalid_ranges[1].contains("too many ranges"), "{invalid_ranges:?}");
    // An address that does not fit is reported as uncovered.
    store.apply_change(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
    let directory = store.take_changed().expect("a pod");
    assert_eq!(directory.uncovered(directory.ranges()).workloads, 1);
}

#[test]
fn the_address_of_an_enrolled_pod_outside_all_ranges_is_added() {
    let mut store = within(&["10.77.0.0/16"]);
    store.apply_change(Change::Applied(pod("inside", "b", "10.77.0.2", enrolled)));
    store.apply_change(Change::Applied(pod("clear", "b", "10.78.0.1", as_is)));
    assert_eq!(ranges(&mut store), "10.77.0.0/16");
    store.apply_change(Change::Applied(pod("web", "b", "10.78.0.2", |value| {
        enrolled(value);
        value["status"]["podIPs"] = json!([{"ip": "10.78.0.2"}, {"ip": "fd78::2"}]);
    })));
    let directory = store.take_changed().expect("changed");
    assert!(directory.ranges().contains("10.78.0.2".parse().expect("an address")), "in the same directory");
    assert_eq!(directory.uncovered(directory.ranges()), tacit_core::directory::Uncovered::default());
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.2/32 fd78::2/128");
    // The namespace enrols the other pod.
    store.apply_change(Change::Applied(namespace("shop", Some("true"))));
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.1/32 10.78.0.2/32 fd78::2/128");
}

#[test]
fn addresses_of_nodes_and_host_network_pods_are_never_ranges() {
    let mut store = within(&[]);
    store.apply_change(Change::Applied(node("b", &[], &["192.0.2.2", "fd00::2"])));
    for (name, on) in [("here", "a"), ("far", "b")] {
        store.apply_change(Change::Applied(pod(name, on, "192.0.2.9", |value| {
            enrolled(value);
            value["spec"]["hostNetwork"] = json!(true);
        })));
    }
    // The address in a pod's status is not trusted.
    store.apply_change(Change::Applied(pod("claims", "b", "192.0.2.2", enrolled)));
    store.apply_change(Change::Applied(pod("loops", "b", "127.0.0.1", enrolled)));
    assert_eq!(ranges(&mut store), "");
    assert_eq!(store.directory.uncovered(store.directory.ranges()).workloads, 1);
    store.apply_change(Change::Applied(pod("honest", "b", "192.0.2.3", enrolled)));
    assert_eq!(ranges(&mut store), "192.0.2.3/32");
}

#[test]
fn the_addresses_of_a_service_with_an_enrolled_endpoint_are_added() {
    let endpoints = || slice("web-1", "IPv4", 8080, json!([{"addresses": ["10.77.0.2"]}]));
    let web = || pod("web", "b", "10.77.0.2", enrolled);
    let of_others = || pod("web", "b", "10.77.0.2", as_is);
    // The order of the events must not matter.
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for (pod, expected) in
            [(web(), "10.77.0.0/16 10.96.0.1/32 fd96::1/128"), (of_others(), "10.77.0.0/16")]
        {
            let mut store = within(&["10.77.0.0/16"]);
            let changes = [service(as_is), endpoints(), pod];
            for index in order {
                store.apply_change(Change::Applied(changes[index].clone()));
                let _ = store.take_changed();
            }
            assert_eq!(ranges(&mut store), expected, "{order:?}");
        }
    }
    let mut store = within(&["10.77.0.0/16", "10.96.0.0/12", "fd96::/16"]);
    for object in [service(as_is), endpoints(), web()] {
        store.apply_change(Change::Applied(object));
    }
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.96.0.0/12 fd96::/16");
}

#[test]
fn external_and_load_balancer_addresses_are_captured_like_the_cluster_ip() {
    let mut store = within(&["10.77.0.0/16", "10.96.0.0/12", "fd96::/16"]);
    store.apply_change(Change::Applied(slice("web-1", "IPv4", 8080, json!([{"addresses": ["10.77.0.2"]}]))));
    store.apply_change(Change::Applied(pod("web", "b", "10.77.0.2", enrolled)));
    store.apply_change(Change::Applied(node("b", &[], &["192.0.2.2"])));
    let all = |value: &mut Value| {
        value["spec"]["externalIPs"] = json!(["203.0.113.1", "127.0.0.1", "192.0.2.2", "10.77.0.2"]);
        value["status"]["loadBalancer"]["ingress"] = json!([
            {"ip": "203.0.113.3", "ipMode": "VIP"}, {"ip": "fd78::3"}, {"hostname": "lb.example"},
            {"ip": "203.0.113.9", "ipMode": "Proxy"},
        ]);
    };
    store.apply_change(Change::Applied(service(all)));
    let found = ranges(&mut store);
    assert_eq!(found, "10.77.0.0/16 10.96.0.0/12 203.0.113.1/32 203.0.113.3/32 fd78::3/128 fd96::/16");
    for address in ["203.0.113.1:80", "203.0.113.3:80", "[fd78::3]:80"] {
        let service = store.directory.service_for(address.parse().expect("an address"));
        assert_eq!(service.map(|service| &*service.name), Some("web"), "{address}");
    }
    // Not the node's address, nor the pod's.
    assert_eq!(at(&store, "10.77.0.2"), Some("web"));
    store.apply_change(Change::Applied(service(as_is)));
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.96.0.0/12 fd96::/16");
}

/// An address that was left out would make the port there one of the node itself, which a STRICT pod reaches in clear.
#[test]
fn a_load_balancer_has_the_addresses_of_all_nodes() {
    let mut store = within(&["10.77.0.0/16", "10.96.0.0/12"]);
    let addresses: Vec<String> = (0..1000).map(|i| format!("192.0.{}.{}", i / 250, i % 250 + 1)).collect();
    for (number, address) in addresses.iter().enumerate() {
        store.apply_change(Change::Applied(node(&format!("n{number}"), &[], &[address])));
    }
    let ingress: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    store.apply_change(Change::Applied(service(|value| {
        value["status"]["loadBalancer"]["ingress"] = json!(ingress);
    })));
    let found: std::collections::BTreeSet<String> =
        store.directory.node_services().map(|(_, at, _)| at.ip().to_string()).collect();
    assert_eq!(found, addresses.into_iter().collect());
}

#[test]
fn a_namespace_has_a_share_of_the_ranges_for_external_addresses() {
    let mut store = within(&["10.77.0.0/16", "10.96.0.0/12"]);
    store.apply_change(Change::Applied(pod("web", "b", "10.77.0.2", enrolled)));
    let mut add = |namespace: &str, name: &str, number: usize| {
        let external: Vec<String> = (0..64).map(|i| format!("203.{}.{}.{}", i % 2, number, 2 * i)).collect();
        store.apply_change(Change::Applied(service(|value| {
            value["metadata"] = json!({"name": name, "namespace": namespace, "uid": name});
            value["spec"]["clusterIP"] = json!(format!("10.96.0.{number}"));
            value["spec"]["clusterIPs"] = json!([format!("10.96.0.{number}")]);
            value["spec"]["externalIPs"] = json!(external);
        })));
        store.apply_change(Change::Applied(object::<crate::directory::objects::Slice>(json!({
            "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.77.0.2"]}],
        }))));
        let _ = store.take_changed();
        let ranges = store.directory.ranges();
        external.iter().filter(|text| ranges.contains(text.parse().expect("an address"))).count()
    };
    for number in 0..OUTER_PER_NAMESPACE_MAX / 64 {
        assert_eq!(add("false", &format!("s{number}"), number), 64);
    }
    assert_eq!(add("false", "more", 100), 0, "beyond the share");
    assert_eq!(add("shop", "web", 101), 64, "of another namespace");
    assert_eq!(store.directory.uncovered(store.directory.ranges()).services, 1, "told");
    // Addresses that go make room.
    store.apply_change(Change::Deleted(service(|value| {
        value["metadata"] = json!({"name": "s0", "namespace": "false"});
    })));
    store.apply_change(Change::Applied(pod("next", "b", "10.77.0.3", enrolled)));
    let _ = store.take_changed();
    assert_eq!(store.directory.uncovered(store.directory.ranges()).services, 0);
}

/// Numbers without a pattern; the seed is of no importance.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn one_of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[usize::try_from(self.below(all.len() as u64)).expect("small")]
    }
}

const ADDRESSES: [&str; 6] = ["10.77.0.2", "10.78.0.2", "10.78.0.3", "10.79.0.2", "192.0.2.1", "203.0.113.1"];

/// Returns an object of a few names, made at random.
fn random_object(random: &mut Random) -> Object {
    match random.below(4) {
        0 => {
            let cidrs = ["10.78.0.0/24", "10.78.0.0/16", "10.79.0.0/24", "10.0.0.0/7", "203.0.113.0/24"];
            let cidrs: Vec<&str> = (0..random.below(3)).map(|_| random.one_of(&cidrs)).collect();
            let addresses: Vec<&str> = (0..random.below(3)).map(|_| random.one_of(&ADDRESSES)).collect();
            node(random.one_of(&["b", "c"]), &cidrs, &addresses)
        }
        1 => service(|value| {
            value["metadata"]["name"] = json!(random.one_of(&["web", "db"]));
            value["spec"]["clusterIPs"] = json!(["10.96.0.1"]);
            value["spec"]["externalIPs"] = json!([random.one_of(&ADDRESSES)]);
        }),
        2 => slice("web-1", "IPv4", 80, json!([{"addresses": [random.one_of(&ADDRESSES)]}])),
        _ => {
            let (name, on) = (random.one_of(&["p", "q", "r"]), random.one_of(&["a", "b", "c"]));
            let is_enrolled = random.below(3) > 0;
            pod(name, on, random.one_of(&ADDRESSES), |value| {
                value["metadata"]["labels"]["tacit.io/enrol"] = json!(is_enrolled.to_string());
            })
        }
    }
}

#[test]
fn whatever_comes_and_goes_addresses_in_use_are_in_ranges_and_nothing_is_left_in_the_end() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for round in 0..200 {
        let mut store = within(&["10.77.0.0/16"]);
        let mut before = store.take_changed().expect("complete");
        let mut objects: Vec<Object> = Vec::new();
        for _ in 0..40 {
            let object = random_object(&mut random);
            let is_same =
                |other: &Object| other.kind() == object.kind() && other.full_name() == object.full_name();
            objects.retain(|other| !is_same(other));
            if random.below(3) == 0 {
                store.apply_change(Change::Deleted(object));
            } else {
                objects.push(object.clone());
                store.apply_change(Change::Applied(object));
            }
            if random.below(2) == 0 {
                continue;
            }
            let Some(now) = store.take_changed() else { continue };
            for text in ADDRESSES {
                let address = text.parse().expect("an address");
                let of_service =
                    now.service_at(address).is_some_and(|service| now.has_enrolled_endpoint(service));
                if now.is_enrolled(address) || of_service {
                    assert!(now.ranges().contains(address), "round {round}: {text} in {:?}", now.ranges());
                }
            }
            assert!(now.ranges().contains("10.77.3.3".parse().expect("an address")), "configured");
            let is_later = now.ranges().generation() > before.ranges().generation();
            let is_changed = !now.ranges().iter().eq(before.ranges().iter());
            assert!(is_later || !is_changed, "round {round}: the kernel would not follow");
            before = now;
        }
        for object in objects {
            store.apply_change(Change::Deleted(object));
        }
        assert_eq!(ranges(&mut store), "10.77.0.0/16", "round {round}");
        assert!(store.invalid_objects().list.is_empty() && store.directory.conflicts().next().is_none());
    }
}
