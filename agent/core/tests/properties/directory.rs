//! The directory against a list that is searched from one end to the other, and its parser.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Component, Path},
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
/// Some contain others, one is no path below the cgroup of all pods.
const CGROUPS: [&str; 5] = ["x", "x/pod1", "x/pod1/inner", "y", "x/.."];
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
    let protocol = prop_oneof![Just(Protocol::Tacit), Just(Protocol::Hbone), Just(Protocol::None)];
    let cgroup = option::of(select(&CGROUPS).prop_map(str::to_owned));
    (select(&NAMES), select(&NAMESPACES), select(&NODES), addresses(), protocol, cgroup).prop_map(
        |(name, namespace, node, addresses, protocol, cgroup)| Workload {
            name: name.into(),
            namespace: namespace.into(),
            identity: SpiffeId::new(&domain(), namespace, "default").expect("names"),
            addresses,
            node: node.into(),
            labels: Labels::default(),
            cgroup: cgroup.unwrap_or_else(|| format!("{namespace}_{name}")).into(),
            protocol,
            egress: None,
            udp: None,
            connect: Default::default(),
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

/// Workloads with their claims, in the order in which they were added.
#[derive(Default, Clone)]
struct Model {
    workloads: Vec<(Workload, AddressConflict)>,
}

impl Model {
    fn change(&mut self, change: Change) {
        match change {
            Change::Remove(namespace, name) => {
                let name = format!("{namespace}/{name}");
                self.workloads.retain(|(workload, _)| workload.full_name() != name);
            }
            Change::Insert(workload, claim) => {
                let name = workload.full_name();
                self.workloads.retain(|(old, _)| old.full_name() != name);
                self.workloads.push((*workload, claim));
            }
        }
    }

    /// The only live claimant, or else the only one.
    fn at(&self, address: IpAddr) -> Option<&Workload> {
        let claims =
            || self.workloads.iter().filter(move |(workload, _)| workload.addresses.contains(&address));
        let live: Vec<_> = claims().filter(|(_, claim)| *claim == AddressConflict::Replace).collect();
        let all: Vec<_> = if live.is_empty() { claims().collect() } else { live };
        if let [(only, _)] = all[..] { Some(only) } else { None }
    }

    fn named(&self, namespace: &str, name: &str) -> Option<&Workload> {
        let mut all = self.workloads.iter().map(|(workload, _)| workload);
        all.find(|workload| *workload.namespace == *namespace && *workload.name == *name)
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
        let is_claimed = model.workloads.iter().any(|(workload, _)| workload.addresses.contains(&address));
        prop_assert_eq!(directory.is_unclear(address), is_claimed && expected.is_none());
        let is_enrolled = expected.is_some_and(|workload| workload.protocol.is_tunnelled());
        prop_assert_eq!(directory.is_enrolled(address), is_enrolled);
        if let IpAddr::V4(v4) = address {
            let mapped = directory.at(v4.to_ipv6_mapped().into());
            prop_assert_eq!(mapped.map(|found| &**found), expected);
        }
    }
    let mut told: Vec<_> = directory.conflicts().map(|conflict| conflict.to_string()).collect();
    for node in NODES {
        let all: Vec<&Workload> =
            model.workloads.iter().map(|(workload, _)| workload).filter(|w| *w.node == *node).collect();
        let held: Vec<&Workload> = directory.on_node(node).map(|found| &**found).collect();
        prop_assert!(held.iter().all(|workload| all.contains(workload)));
        for (at, one) in held.iter().enumerate() {
            prop_assert!(one.cgroup.components().all(|part| matches!(part, Component::Normal(_))));
            for other in &held[at + 1..] {
                let is_nested =
                    one.cgroup.starts_with(&other.cgroup) || other.cgroup.starts_with(&one.cgroup);
                prop_assert!(!is_nested, "{:?} and {:?}", one.cgroup, other.cgroup);
            }
        }
        // Each refused workload is reported with a reason.
        for refused in all.iter().filter(|workload| !held.contains(workload)) {
            let start = format!("pod {} is not enrolled", refused.full_name());
            let found = told.iter().position(|line| line.starts_with(&start));
            prop_assert!(found.is_some(), "{} is not told in {:?}", start, told);
            told.remove(found.unwrap_or_default());
            let is_in_the_way = held.iter().any(|holder| {
                holder.cgroup.starts_with(&refused.cgroup) || refused.cgroup.starts_with(&holder.cgroup)
            });
            prop_assert!(is_in_the_way || refused.cgroup.ends_with(".."), "{:?}", refused.cgroup);
        }
    }
    prop_assert!(told.iter().all(|line| line.starts_with("address ")), "{:?}", told);
    for (namespace, name) in NAMESPACES.iter().flat_map(|namespace| NAMES.map(|name| (namespace, name))) {
        prop_assert_eq!(directory.named(namespace, name).map(|found| &**found), model.named(namespace, name));
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
            let changed = match &change {
                Change::Insert(workload, _) => workload.full_name(),
                Change::Remove(namespace, name) => format!("{namespace}/{name}"),
            };
            let held: Vec<_> = NODES.iter().flat_map(|node| directory.on_node(node)).cloned().collect();
            match change.clone() {
                Change::Insert(workload, claim) => directory.insert(*workload, claim),
                Change::Remove(namespace, name) => {
                    let removed = directory.remove(namespace, name).as_deref().cloned();
                    prop_assert_eq!(removed.as_ref(), model.named(namespace, name));
                }
            }
            model.change(change);
            assert_agrees(&directory, &model)?;
            // Nobody loses its cgroup by a change of another.
            for holder in held.iter().filter(|holder| holder.full_name() != changed) {
                prop_assert!(directory.on_node(&holder.node).any(|other| Arc::ptr_eq(other, holder)));
            }
        }
        // Copies published before stay as they were, and the changes since are found.
        for (before, model) in copies {
            assert_agrees(&before, &model)?;
            for node in NODES {
                let changes = directory.changes_on_node(&before, node);
                let mut known: Vec<_> = before.on_node(node).cloned().collect();
                for change in changes {
                    prop_assert_ne!(&change.before, &change.now);
                    known.retain(|workload| Some(workload) != change.before.as_ref());
                    known.extend(change.now);
                }
                let name = |workload: &Arc<Workload>| workload.full_name();
                let mut now: Vec<_> = directory.on_node(node).cloned().collect();
                known.sort_by_key(name);
                now.sort_by_key(name);
                prop_assert_eq!(known, now);
            }
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
