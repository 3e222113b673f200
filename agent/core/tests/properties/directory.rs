//! The directory against a list that is searched from one end to the other, and its parser.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::Arc,
};

use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Value, json};
use tacit_core::{
    directory::{AddressConflict, Directory, Labels, Protocol, Workload},
    spiffe::{SpiffeId, TrustDomain},
};

use crate::damage::{assert_lines, damaged};

const NODES: [&str; 2] = ["node-a", "node-b"];
const NAMESPACES: [&str; 2] = ["shop", "jobs"];
const NAMES: [&str; 4] = ["web", "cart", "db", "batch"];

/// A change of a source.
#[derive(Debug, Clone)]
enum Change {
    Insert(Box<Workload>, AddressConflict),
    Remove(&'static str, &'static str),
}

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 77, 1, last).into()
}

fn v6(last: u8) -> IpAddr {
    Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, last.into()).into()
}

fn addresses() -> impl Strategy<Value = Vec<IpAddr>> {
    let both = (option::of(1..6_u8), option::of(1..6_u8));
    let some = both.prop_filter("an address", |(one, other)| one.is_some() || other.is_some());
    some.prop_map(|(one, other)| one.map(v4).into_iter().chain(other.map(v6)).collect())
}

fn workload() -> impl Strategy<Value = Workload> {
    let protocol = prop_oneof![Just(Protocol::Tacit), Just(Protocol::None)];
    (select(&NAMES), select(&NAMESPACES), select(&NODES), addresses(), protocol).prop_map(
        |(name, namespace, node, addresses, protocol)| Workload {
            name: name.into(),
            namespace: namespace.into(),
            identity: SpiffeId::new(&domain(), namespace, "default").expect("names"),
            addresses,
            node: node.into(),
            labels: Labels::default(),
            cgroup: format!("{namespace}_{name}").into(),
            protocol,
            egress: None,
            udp: None,
        },
    )
}

fn change() -> impl Strategy<Value = Change> {
    let claim = prop_oneof![Just(AddressConflict::Replace), Just(AddressConflict::Keep)];
    prop_oneof![
        3 => (workload(), claim).prop_map(|(workload, claim)| Change::Insert(Box::new(workload), claim)),
        1 => (select(&NAMESPACES), select(&NAMES)).prop_map(|(namespace, name)| Change::Remove(namespace, name)),
    ]
}

fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").expect("a trust domain")
}

/// Workloads in the order in which they were added, and who holds which address.
#[derive(Default, Clone)]
struct Model {
    workloads: Vec<Workload>,
    holders: Vec<(IpAddr, String)>,
}

impl Model {
    fn change(&mut self, change: Change) {
        match change {
            Change::Remove(namespace, name) => self.remove(&format!("{namespace}/{name}")),
            Change::Insert(workload, claim) => {
                let name = workload.full_name();
                self.remove(&name);
                for address in &workload.addresses {
                    if claim == AddressConflict::Replace {
                        self.holders.retain(|(held, _)| held != address);
                    }
                    if self.holders.iter().all(|(held, _)| held != address) {
                        self.holders.push((*address, name.clone()));
                    }
                }
                self.workloads.push(*workload);
            }
        }
    }

    fn remove(&mut self, full_name: &str) {
        self.workloads.retain(|workload| workload.full_name() != full_name);
        self.holders.retain(|(_, holder)| holder != full_name);
    }

    fn at(&self, address: IpAddr) -> Option<&Workload> {
        let (_, holder) = self.holders.iter().find(|(held, _)| *held == address)?;
        self.workloads.iter().find(|workload| workload.full_name() == *holder)
    }
}

/// Compares every answer.
fn assert_agrees(directory: &Directory, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(directory.len(), model.workloads.len());
    prop_assert_eq!(directory.is_empty(), model.workloads.is_empty());
    prop_assert_eq!(directory.iter().count(), model.workloads.len());
    for address in (0..7).flat_map(|last| [v4(last), v6(last)]) {
        let expected = model.at(address);
        prop_assert_eq!(directory.at(address).map(|found| &**found), expected, "{}", address);
        prop_assert_eq!(directory.knows(address), expected.is_some());
        let is_enrolled = expected.is_some_and(|workload| workload.protocol == Protocol::Tacit);
        prop_assert_eq!(directory.is_enrolled(address), is_enrolled);
        if let IpAddr::V4(v4) = address {
            let mapped = directory.at(v4.to_ipv6_mapped().into());
            prop_assert_eq!(mapped.map(|found| &**found), expected);
        }
    }
    for node in NODES {
        let expected: Vec<&Workload> = model.workloads.iter().filter(|w| *w.node == *node).collect();
        prop_assert_eq!(directory.on_node(node).map(|found| &**found).collect::<Vec<_>>(), expected);
    }
    for (namespace, name) in NAMESPACES.iter().flat_map(|namespace| NAMES.map(|name| (namespace, name))) {
        let expected = model.workloads.iter().find(|w| *w.namespace == **namespace && *w.name == *name);
        prop_assert_eq!(directory.named(namespace, name).map(|found| &**found), expected);
    }
    Ok(())
}

/// A file in which most addresses and names are free, as JSON, of which YAML is a superset.
fn file() -> impl Strategy<Value = Value> {
    let item = (select(&NAMES), select(&NAMESPACES), select(&NODES), addresses(), "[a-z]{0,3}").prop_map(
        |(name, namespace, node, addresses, label)| {
            json!({
                "name": name, "namespace": namespace, "node": node, "addresses": addresses, "labels": {"app": label},
            })
        },
    );
    vec(item, 0..4).prop_map(|workloads| json!({"workloads": workloads}))
}

const FILE: &str = "\
workloads:
  - name: web
    namespace: shop
    serviceAccount: web
    addresses: [10.77.1.2, \"fd77:1::2\"]
    node: node-a
    labels: {app: web, tier: \"\"}
  - {name: db, namespace: shop, addresses: [10.77.2.2], node: node-b, cgroup: shop/db, egress: strict, udp: deny}
services:
  - name: web
    namespace: shop
    addresses: [10.96.0.10]
    ports:
      - port: 80
        endpoints: [\"10.77.1.2:8080\", \"10.77.2.2:80\"]
";

proptest! {
    #![proptest_config(crate::config())]

    #[test]
    fn a_lookup_agrees_with_a_search_of_all_workloads(changes in vec(change(), 0..20)) {
        let (mut directory, mut model) = (Directory::default(), Model::default());
        let mut copies = Vec::new();
        for change in changes {
            copies.push((directory.clone(), model.clone()));
            match change.clone() {
                Change::Insert(workload, claim) => directory.insert(*workload, claim),
                Change::Remove(namespace, name) => {
                    let removed = directory.remove(namespace, name).as_deref().cloned();
                    let known = model.workloads.iter().find(|w| *w.namespace == *namespace && *w.name == *name);
                    prop_assert_eq!(removed.as_ref(), known);
                }
            }
            model.change(change);
            assert_agrees(&directory, &model)?;
        }
        // What was published before stays as it was.
        for (directory, model) in copies {
            assert_agrees(&directory, &model)?;
        }
    }

    #[test]
    fn a_file_is_read_unless_two_workloads_contradict_each_other(file in file()) {
        let items = file["workloads"].as_array().expect("a list").clone();
        let is_clear = |one: &Value, other: &Value| {
            let addresses = |item: &Value| item["addresses"].as_array().expect("a list").clone();
            let is_named = one["name"] == other["name"] && one["namespace"] == other["namespace"];
            !is_named && addresses(one).iter().all(|address| !addresses(other).contains(address))
        };
        let pairs = (0..items.len()).flat_map(|one| (0..one).map(move |other| (one, other)));
        let is_good = pairs.into_iter().all(|(one, other)| is_clear(&items[one], &items[other]));
        let text = file.to_string();
        match Directory::parse(&text, Path::new("directory.yaml"), &domain()) {
            Ok(directory) => {
                prop_assert!(is_good, "{}", text);
                prop_assert_eq!(directory.len(), items.len());
                for item in &items {
                    for address in item["addresses"].as_array().expect("a list") {
                        let address: IpAddr = address.as_str().expect("a text").parse().expect("an address");
                        let found = directory.at(address).map(Arc::as_ref).expect("known");
                        prop_assert_eq!(item["name"].as_str(), Some(&*found.name));
                        prop_assert_eq!(item["labels"]["app"].as_str(), found.labels.get("app"));
                    }
                }
            }
            Err(mistakes) => {
                prop_assert!(!is_good, "{}", mistakes);
                assert_lines(&text, &mistakes)?;
            }
        }
    }

    #[test]
    fn a_damaged_directory_is_read_or_refused_with_lines_of_the_file(text in damaged(FILE)) {
        if let Err(mistakes) = Directory::parse(&text, Path::new("directory.yaml"), &domain()) {
            assert_lines(&text, &mistakes)?;
        }
    }
}
