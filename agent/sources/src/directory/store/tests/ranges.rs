//! Tests of the ranges of the mesh: who tells of them, what is refused, and that they only grow.

use tacit_core::directory::Ranges;

use super::*;
use crate::directory::objects::{Node, ServiceCidr};

fn node(name: &str, cidrs: &[&str], addresses: &[&str]) -> Object {
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

/// A store that has listed everything, with these configured ranges.
fn within(configured: &[&str]) -> Store {
    let configured: Vec<_> = configured.iter().map(|range| range.parse().expect("a range")).collect();
    let place = Place { ranges: Ranges::configured(&configured).into(), ..store().place };
    let mut store = Store::new(EnrolLabel::default(), place);
    list_all(&mut store);
    store
}

fn list_all(store: &mut Store) {
    for kind in Kind::ALL {
        store.take(Change::Listing(kind));
        store.take(Change::Listed(kind));
    }
}

/// What is published, or was.
fn ranges(store: &mut Store) -> String {
    let directory = store.news().unwrap_or_else(|| store.directory.clone());
    directory.ranges().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn refused(store: &Store) -> Vec<String> {
    store.complaints().list
}

#[test]
fn nodes_and_service_cidrs_tell_of_ranges_beside_the_configured_ones() {
    let mut store = within(&["10.77.0.0/24", "fd77::/16"]);
    assert_eq!(ranges(&mut store), "10.77.0.0/24 fd77::/16");
    store.take(Change::Applied(node("a", &["10.77.0.0/25", "fd77:0:0:1::/64"], &["192.0.2.1"])));
    assert!(store.news().is_none(), "nothing that was not configured");
    store.take(Change::Applied(node("b", &["10.77.1.0/24", "fd78::/64"], &["192.0.2.2"])));
    store.take(Change::Applied(service_cidr(&["10.96.0.0/12"])));
    assert_eq!(ranges(&mut store), "10.77.0.0/23 10.96.0.0/12 fd77::/16 fd78::/64");
    let found = store.directory.ranges();
    assert_eq!((found.count_configured(), found.count_detected()), (2, 3));
    // A server before 1.16 has the one field alone.
    store.take(Change::Applied(object::<Node>(
        json!({"metadata": {"name": "old"}, "spec": {"podCIDR": "10.79.0.0/24", "podCIDRs": null}}),
    )));
    assert!(ranges(&mut store).contains("10.79.0.0/24"));
    assert_eq!(refused(&store), Vec::<String>::new());
}

#[test]
fn the_first_directory_has_the_ranges_of_all_that_was_listed() {
    let mut store = store();
    store.take(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
    for kind in Kind::ALL {
        store.take(Change::Listing(kind));
        if kind == Kind::Nodes {
            store.take(Change::Applied(node("a", &["10.77.0.0/24"], &["192.0.2.1"])));
        }
        if kind == Kind::ServiceCidrs {
            store.take(Change::Applied(service_cidr(&["10.96.0.0/12"])));
        }
        if kind == Kind::Pods {
            store.take(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
        }
        assert!(store.news().is_none(), "before {kind:?} is listed");
        store.take(Change::Listed(kind));
    }
    assert_eq!(ranges(&mut store), "10.77.0.0/24 10.78.0.2/32 10.96.0.0/12");
}

#[test]
fn a_range_stays_when_who_told_of_it_goes() {
    let mut store = within(&[]);
    store.take(Change::Applied(node("a", &["10.77.0.0/24"], &[])));
    store.take(Change::Applied(service_cidr(&["10.96.0.0/12"])));
    store.take(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
    let all = "10.77.0.0/24 10.78.0.2/32 10.96.0.0/12";
    assert_eq!(ranges(&mut store), all);
    store.take(Change::Deleted(node("a", &[], &[])));
    store.take(Change::Applied(service_cidr(&[])));
    store.take(Change::Deleted(pod("web", "b", "10.78.0.2", enrolled)));
    assert_eq!(ranges(&mut store), all);
    list_all(&mut store);
    assert_eq!(ranges(&mut store), all);
    store.take(Change::Applied(node("a", &["10.79.0.0/24"], &[])));
    assert_eq!(ranges(&mut store), "10.77.0.0/24 10.78.0.2/32 10.79.0.0/24 10.96.0.0/12");
}

#[test]
fn nonsense_is_refused_and_told_once_and_the_rest_is_taken() {
    let mut store = within(&[]);
    let nonsense =
        ["0.0.0.0/0", "127.0.0.0/8", "fe80::/64", "pods", "10.99.0.0/16", "224.0.0.0/4", "10.77.3.9/24"];
    store.take(Change::Applied(node("a", &nonsense, &["10.99.0.1", "a.example"])));
    store.take(Change::Applied(service_cidr(&["::/0", "fd96::/108"])));
    assert_eq!(ranges(&mut store), "10.77.3.0/24 fd96::/108");
    let expected = [
        "Node a: spec.podCIDRs[0]: \"0.0.0.0/0\": prefix length 0 covers every address: write the ranges the pods' addresses \
         are taken from",
        "Node a: spec.podCIDRs[1]: \"127.0.0.0/8\": overlaps 127.0.0.0/8 (loopback): write the ranges the pods' addresses \
         are taken from",
    ];
    let complaints = refused(&store);
    assert_eq!((&complaints[..2], complaints.len()), (&expected.map(str::to_owned)[..], 7), "{complaints:?}");
    let of_node = "Node a: spec.podCIDRs[4]: \"10.99.0.0/16\": a node has the address 10.99.0.1 in it";
    assert!(complaints.iter().any(|line| line == of_node), "{complaints:?}");
    let warnings = store.warnings();
    assert_eq!(warnings.len(), 7);
    assert!(warnings.contains(&format!("no range of the mesh: {of_node}")), "{warnings:?}");
    // The same again, with another status, is no news; nor is it told again with other ranges.
    store.take(Change::Applied(node("a", &nonsense, &["10.99.0.1", "b.example"])));
    assert!(store.news().is_none());
    store.take(Change::Applied(node("b", &["10.77.4.0/24"], &[])));
    assert!(store.news().is_some());
    assert_eq!(store.warnings(), Vec::<String>::new());
    store.take(Change::Deleted(node("a", &[], &[])));
    assert!(store.news().is_some(), "the operator sees that it is gone");
    assert_eq!(refused(&store).len(), 1);
}

#[test]
fn an_object_has_a_bounded_number_of_ranges_and_the_mesh_too() {
    let mut store = within(&[]);
    let many: Vec<String> = (0..100).map(|i| format!("10.{i}.1.0/24")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    store.take(Change::Applied(node("a", &many, &[])));
    assert_eq!(ranges(&mut store).split(' ').count(), 16);
    assert!(refused(&store)[0].ends_with("more than 16 ranges, which are not used"));
    // As many as fit, and some more: none can be joined with another.
    let fit = tacit_abi::limits::MESH_RANGES / 2;
    let ranges_of = |first: u32| -> Vec<String> {
        let address = |i: u32| std::net::Ipv4Addr::from(0x0b00_0000 + 2 * i);
        (first..first + 16).map(|i| format!("{}/32", address(i))).collect()
    };
    for first in (0..fit + 400).step_by(16) {
        let texts = ranges_of(first);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        store.take(Change::Applied(node(&format!("n-{first}"), &texts, &[])));
    }
    assert_eq!(ranges(&mut store).split(' ').count(), fit as usize);
    let complaints = refused(&store);
    assert_eq!(complaints.len(), 21, "the first twenty and how many more");
    assert!(complaints[1].contains("no room for more ranges"), "{complaints:?}");
    // What does not fit is uncovered, and seen as that.
    store.take(Change::Applied(pod("web", "b", "10.78.0.2", enrolled)));
    let directory = store.news().expect("a pod");
    assert_eq!(directory.uncovered(directory.ranges()).workloads, 1);
}

#[test]
fn an_enrolled_pod_outside_brings_its_address_along() {
    let mut store = within(&["10.77.0.0/16"]);
    store.take(Change::Applied(pod("inside", "b", "10.77.0.2", enrolled)));
    store.take(Change::Applied(pod("clear", "b", "10.78.0.1", as_is)));
    assert_eq!(ranges(&mut store), "10.77.0.0/16");
    store.take(Change::Applied(pod("web", "b", "10.78.0.2", |value| {
        enrolled(value);
        value["status"]["podIPs"] = json!([{"ip": "10.78.0.2"}, {"ip": "fd78::2"}]);
    })));
    let directory = store.news().expect("changed");
    assert!(directory.ranges().contains("10.78.0.2".parse().expect("an address")), "in the same directory");
    assert_eq!(directory.uncovered(directory.ranges()), tacit_core::directory::Uncovered::default());
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.2/32 fd78::2/128");
    // Its namespace enrols the other.
    store.take(Change::Applied(namespace("shop", Some("true"))));
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.78.0.1/32 10.78.0.2/32 fd78::2/128");
}

#[test]
fn the_addresses_of_nodes_and_of_pods_with_the_nodes_network_are_never_a_range() {
    let mut store = within(&[]);
    store.take(Change::Applied(node("b", &[], &["192.0.2.2", "fd00::2"])));
    for (name, on) in [("here", "a"), ("far", "b")] {
        store.take(Change::Applied(pod(name, on, "192.0.2.9", |value| {
            enrolled(value);
            value["spec"]["hostNetwork"] = json!(true);
        })));
    }
    // Whatever its status claims.
    store.take(Change::Applied(pod("claims", "b", "192.0.2.2", enrolled)));
    store.take(Change::Applied(pod("loops", "b", "127.0.0.1", enrolled)));
    assert_eq!(ranges(&mut store), "");
    assert_eq!(store.directory.uncovered(store.directory.ranges()).workloads, 2);
    store.take(Change::Applied(pod("honest", "b", "192.0.2.3", enrolled)));
    assert_eq!(ranges(&mut store), "192.0.2.3/32");
}

#[test]
fn a_service_outside_brings_its_addresses_when_it_leads_to_an_enrolled_pod() {
    let endpoints = || slice("web-1", "IPv4", 8080, json!([{"addresses": ["10.77.0.2"]}]));
    let web = || pod("web", "b", "10.77.0.2", enrolled);
    let of_others = || pod("web", "b", "10.77.0.2", as_is);
    // In whichever order they become known.
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for (pod, expected) in
            [(web(), "10.77.0.0/16 10.96.0.1/32 fd96::1/128"), (of_others(), "10.77.0.0/16")]
        {
            let mut store = within(&["10.77.0.0/16"]);
            let changes = [service(as_is), endpoints(), pod];
            for index in order {
                store.take(Change::Applied(changes[index].clone()));
                let _ = store.news();
            }
            assert_eq!(ranges(&mut store), expected, "{order:?}");
        }
    }
    let mut store = within(&["10.77.0.0/16", "10.96.0.0/12", "fd96::/16"]);
    for object in [service(as_is), endpoints(), web()] {
        store.take(Change::Applied(object));
    }
    assert_eq!(ranges(&mut store), "10.77.0.0/16 10.96.0.0/12 fd96::/16");
}
