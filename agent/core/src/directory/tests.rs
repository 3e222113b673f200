//! Tests of the snapshot: what is found by which address and name, and what a change leaves as it was.

use std::collections::BTreeSet;

use super::*;

const TEXT: &str = "\
workloads:
- {name: web, namespace: shop, serviceAccount: web, addresses: [10.77.1.2, 'fd77:1::2'], node: a, labels: {app: web}}
- {name: db, namespace: shop, addresses: ['fd77:2::3'], node: b, cgroup: shop/db, tunnel: none}
- {name: cart, namespace: shop, addresses: [10.77.1.4], node: a}
";

fn sample() -> Directory {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Directory::parse(TEXT, Path::new("directory.yaml"), &trust_domain).expect("valid")
}

#[test]
fn a_node_port_is_the_services_at_the_addresses_of_nodes_only() {
    let text = "\
workloads: [{name: web, namespace: shop, addresses: [10.77.1.2], node: a}]
nodes: [{name: a, addresses: [192.0.2.1, 'fd00::1']}, {name: b, addresses: [192.0.2.2]}]
services:
- {name: web, namespace: shop, addresses: [10.96.0.1], ports: [{port: 80, nodePort: 30080}], endpoints: []}
";
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    let mut directory = Directory::parse(text, Path::new("directory.yaml"), &domain).expect("valid");
    let service = |directory: &Directory, at: &str| {
        directory.service_for(at.parse().expect("an address")).map(|service| service.name.to_string())
    };
    for (at, expected) in [
        ("192.0.2.1:30080", true),
        ("[::ffff:192.0.2.2]:30080", true),
        ("[fd00::1]:30080", true),
        ("192.0.2.1:30081", false),
        ("192.0.2.1:80", false),
        ("192.0.2.3:30080", false),
        ("10.77.1.2:30080", false),
    ] {
        assert_eq!(service(&directory, at).is_some(), expected, "{at}");
    }
    let is_node_port = |at: &str| directory.is_node_port(at.parse().expect("an address"));
    assert!(is_node_port("192.0.2.1:32767") && !is_node_port("192.0.2.1:32768"));
    assert_eq!(directory.node_addresses().count(), 3);
    let others = text.replace("192.0.2.2", "192.0.2.4");
    let others = Directory::parse(&others, Path::new("directory.yaml"), &domain).expect("valid");
    assert_ne!(others.node_changes(), directory.node_changes());
    directory.remove_service("shop", "web");
    assert_eq!(service(&directory, "192.0.2.1:30080"), None);
}

#[test]
fn a_workload_is_found_by_each_of_its_addresses() {
    let directory = sample();
    for (address, name) in [
        ("10.77.1.2", Some("web")),
        ("fd77:1::2", Some("web")),
        ("::ffff:10.77.1.2", Some("web")),
        ("fd77:2::3", Some("db")),
        ("10.77.1.4", Some("cart")),
        ("10.77.1.3", None),
        ("fd77:1::3", None),
    ] {
        let found = directory.at(address.parse().expect("an address")).map(|workload| &*workload.name);
        assert_eq!(found, name, "{address}");
    }
}

#[test]
fn a_workload_has_what_the_file_says_and_the_defaults() {
    let directory = sample();
    let web = directory.named("shop", "web").expect("web");
    let db = directory.named("shop", "db").expect("db");
    assert_eq!(web.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(web.cgroup, Path::new("shop_web"));
    assert_eq!(web.protocol, Protocol::Tacit);
    assert_eq!(web.labels.iter().collect::<Vec<_>>(), [("app", "web")]);
    assert_eq!(web.ipv4(), Some(Ipv4Addr::new(10, 77, 1, 2)));
    assert_eq!(web.ipv6(), Some("fd77:1::2".parse().expect("an address")));
    assert_eq!(db.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!(db.cgroup, Path::new("shop/db"));
    assert_eq!(db.protocol, Protocol::None);
    assert_eq!((db.ipv4(), db.labels.iter().count()), (None, 0));
}

#[test]
fn a_node_has_its_workloads() {
    let directory = sample();
    let names = |node| directory.on_node(node).map(|workload| &*workload.name).collect::<BTreeSet<_>>();
    let names = |node| names(node).into_iter().collect::<Vec<_>>();
    assert_eq!(names("a"), ["cart", "web"]);
    assert_eq!(names("b"), ["db"]);
    assert!(names("c").is_empty());
    assert_eq!((directory.len(), directory.is_empty()), (3, false));
    assert!(Directory::default().is_empty());
}

fn workload(name: &str, node: &str, address: &str) -> Workload {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: name.into(),
        namespace: "shop".into(),
        identity: SpiffeId::new(&trust_domain, "shop", name).expect("valid"),
        addresses: vec![address.parse().expect("an address")],
        node: node.into(),
        labels: Labels::default(),
        cgroup: name.into(),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Default::default(),
    }
}

fn name_at(directory: &Directory, address: &str) -> Option<String> {
    directory.at(address.parse().expect("an address")).map(|workload| workload.name.to_string())
}

#[test]
fn a_change_is_not_seen_in_a_copy_made_before() {
    let mut directory = sample();
    let before = directory.clone();
    directory.insert(workload("web", "b", "10.77.1.9"), AddressConflict::Replace);
    directory.remove("shop", "cart");
    assert_eq!(name_at(&directory, "10.77.1.2"), None);
    assert_eq!(name_at(&directory, "10.77.1.9").as_deref(), Some("web"));
    assert_eq!(directory.on_node("a").count(), 0);
    assert_eq!(directory.on_node("b").count(), 2);
    assert_eq!(name_at(&before, "10.77.1.2").as_deref(), Some("web"));
    assert_eq!(name_at(&before, "10.77.1.4").as_deref(), Some("cart"));
    assert_eq!((before.len(), before.on_node("a").count(), directory.len()), (3, 2, 2));
}

#[test]
fn a_reused_address_belongs_to_the_pod_that_lives() {
    let mut directory = Directory::default();
    directory.insert(workload("old", "a", "10.77.1.2"), AddressConflict::Replace);
    assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some("old"));
    // Until another pod has the address, it is still that of the pod that has ended.
    directory.insert(workload("old", "a", "10.77.1.2"), AddressConflict::Keep);
    assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some("old"));
    directory.insert(workload("new", "a", "10.77.1.2"), AddressConflict::Replace);
    assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some("new"));
    // News of the old one, which is ending, takes nothing back; nor does its end take the address away.
    directory.insert(workload("old", "a", "10.77.1.2"), AddressConflict::Keep);
    assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some("new"));
    assert_eq!(directory.conflicts().count(), 0);
    assert!(directory.remove("shop", "old").is_some());
    assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some("new"));
    assert!(directory.remove("shop", "new").is_some());
    assert!(directory.is_empty() && directory.remove("shop", "new").is_none());
}

#[test]
fn an_address_that_two_live_workloads_claim_is_neithers_until_one_goes() {
    let address = "10.77.1.2".parse::<IpAddr>().expect("an address");
    for first_to_go in ["victim", "false"] {
        let mut directory = Directory::default();
        directory.insert(workload("victim", "a", "10.77.1.2"), AddressConflict::Replace);
        directory.insert(workload("false", "b", "10.77.1.2"), AddressConflict::Replace);
        assert_eq!((directory.at(address), directory.is_unclear(address)), (None, true));
        assert!(!directory.knows(address) && !directory.is_enrolled(address));
        // Its own node still enrols it: there its network namespace proves the address.
        assert_eq!(directory.on_node("a").count(), 1);
        let told: Vec<String> = directory.conflicts().map(|conflict| conflict.to_string()).collect();
        assert_eq!(
            told,
            [
                "address 10.77.1.2 is claimed by shop/false on node b and shop/victim on node a: connections to it are \
              refused; delete the pods that do not have it"
            ]
        );
        let before = directory.conflict_changes();
        directory.remove("shop", first_to_go);
        assert!(directory.conflict_changes() > before);
        let left = if first_to_go == "victim" { "false" } else { "victim" };
        assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some(left));
        assert!(!directory.is_unclear(address) && directory.conflicts().next().is_none());
    }
}

#[test]
fn a_claim_to_an_address_of_the_pods_node_or_the_own_node_is_void() {
    let mut directory = Directory::default();
    directory.set_own_node("a".into());
    let addresses = |texts: &[&str]| -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().expect("an address")).collect()
    };
    directory.insert(workload("victim", "c", "10.77.3.2"), AddressConflict::Replace);
    directory.insert(workload("of-its-node", "b", "192.0.2.2"), AddressConflict::Replace);
    directory.insert(workload("of-this-node", "b", "192.0.2.1"), AddressConflict::Replace);
    let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
    directory.set_node_addresses(&a, &[], &addresses(&["192.0.2.1"]));
    // A node cannot take the address of another node's pod by listing it.
    directory.set_node_addresses(&b, &[], &addresses(&["192.0.2.2", "10.77.3.2"]));
    assert_eq!(name_at(&directory, "10.77.3.2").as_deref(), Some("victim"));
    assert_eq!((name_at(&directory, "192.0.2.1"), name_at(&directory, "192.0.2.2")), (None, None));
    directory.insert(workload("false", "b", "10.77.3.2"), AddressConflict::Replace);
    assert_eq!(name_at(&directory, "10.77.3.2").as_deref(), Some("victim"), "not unclear either");
    directory.set_node_addresses(&b, &addresses(&["192.0.2.2", "10.77.3.2"]), &[]);
    assert_eq!(name_at(&directory, "192.0.2.2").as_deref(), Some("of-its-node"));
    // Contested claims are judged anew when the addresses of a node change.
    let contested = "10.77.3.2".parse().expect("an address");
    assert!(directory.is_unclear(contested) && directory.at(contested).is_none());
    directory.set_node_addresses(&b, &[], &addresses(&["10.77.3.2"]));
    assert!(!directory.is_unclear(contested));
    assert_eq!(name_at(&directory, "10.77.3.2").as_deref(), Some("victim"));
    directory.set_own_node(b);
    assert!(!directory.is_unclear(contested) && directory.at(contested).is_none(), "an address of this node");
}

#[test]
fn a_conflict_of_many_claimants_is_one_short_line() {
    let mut directory = Directory::default();
    for i in 0..1000 {
        directory.insert(workload(&format!("false-{i:03}"), "b", "10.77.3.2"), AddressConflict::Replace);
    }
    let lines: Vec<String> = directory.conflicts().map(|conflict| conflict.to_string()).collect();
    assert!(lines.len() == 1 && lines[0].len() < 300, "{lines:?}");
    assert!(lines[0].contains("shop/false-003 on node b and 996 more:"), "{lines:?}");
}

fn with_cgroup(name: &str, cgroup: &str) -> Workload {
    Workload { cgroup: cgroup.into(), addresses: Vec::new(), ..workload(name, "a", "10.77.1.2") }
}

#[test]
fn a_cgroup_is_one_workloads_and_none_is_inside_another() {
    let on_node = |directory: &Directory| {
        directory.on_node("a").map(|workload| workload.name.to_string()).collect::<Vec<_>>()
    };
    for false_claim in ["burstable/pod1", "burstable", "burstable/pod1/inner", "burstable/pod1/.."] {
        let mut directory = Directory::default();
        directory.insert(with_cgroup("victim", "burstable/pod1"), AddressConflict::Replace);
        directory.insert(with_cgroup("false", false_claim), AddressConflict::Replace);
        assert_eq!(on_node(&directory), ["victim"], "{false_claim}");
        let told: Vec<String> = directory.conflicts().map(|conflict| conflict.to_string()).collect();
        assert!(told.len() == 1 && told[0].starts_with("pod shop/false is not enrolled"), "{told:?}");
        // An update of either changes nothing, and the claim ends with its workload.
        directory.insert(with_cgroup("victim", "burstable/pod1"), AddressConflict::Replace);
        directory.insert(with_cgroup("false", false_claim), AddressConflict::Replace);
        assert_eq!((on_node(&directory), directory.conflicts().count()), (vec!["victim".to_owned()], 1));
        let copy = directory.clone();
        directory.remove("shop", "victim");
        let expected: &[&str] = if false_claim.ends_with("..") { &[] } else { &["false"] };
        assert_eq!(on_node(&directory), expected, "{false_claim}");
        assert_eq!(on_node(&copy), ["victim"], "a copy keeps its own");
        directory.remove("shop", "false");
        assert_eq!(directory.conflicts().count(), 0);
        directory.insert(with_cgroup("next", "burstable/pod1"), AddressConflict::Replace);
        assert_eq!(on_node(&directory), ["next"], "nothing is left of {false_claim}");
    }
}

#[test]
fn the_cgroup_of_a_pod_with_the_nodes_network_is_no_other_pods() {
    let mut directory = Directory::default();
    assert!(directory.set_host_network(with_cgroup("proxy", "burstable/pod1")));
    directory.insert(with_cgroup("false", "burstable/pod1"), AddressConflict::Replace);
    assert_eq!((directory.on_node("a").count(), directory.conflicts().count()), (0, 1));
    assert!(directory.unset_host_network("shop", "proxy"));
    assert_eq!((directory.on_node("a").count(), directory.conflicts().count()), (1, 0));
}

#[test]
fn a_service_is_found_by_its_addresses_until_it_is_removed() {
    let mut directory = Directory::default();
    let vip = |text: &str| text.parse::<IpAddr>().expect("an address");
    let service = |name: &str, addresses: &[&str]| Service {
        name: name.into(),
        namespace: "shop".into(),
        addresses: addresses.iter().map(|text| vip(text)).collect(),
        external_ips: Vec::new(),
        ingress_ips: Vec::new(),
        ports: Vec::new(),
        udp_ports: Vec::new(),
        traffic: InternalTrafficPolicy::Cluster,
        affinity: Affinity::None,
    };
    directory.insert_service(service("web", &["10.96.0.1", "fd96::1"]));
    directory.insert_service(service("headless", &[]));
    for address in ["10.96.0.1", "::ffff:10.96.0.1", "fd96::1"] {
        assert_eq!(&*directory.service_at(vip(address)).expect(address).name, "web");
        assert!(directory.knows(vip(address)));
    }
    directory.insert_service(service("web", &["10.96.0.2"]));
    assert!(directory.service_at(vip("fd96::1")).is_none());
    // The address went to another service before this one is known to be gone.
    directory.insert_service(service("next", &["10.96.0.2"]));
    directory.remove_service("shop", "web");
    assert_eq!(&*directory.service_at(vip("10.96.0.2")).expect("next").name, "next");
    assert_eq!(directory.services().count(), 2);
    assert!(directory.service_named("shop", "web").is_none());
}

#[test]
fn external_addresses_are_a_services_unless_somebody_else_has_them() {
    let address = |text: &str| text.parse::<IpAddr>().expect("an address");
    let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let service = |name: &str, port: u16, external: &[&str], ingress: &[&str]| Service {
        name: name.into(),
        namespace: "shop".into(),
        addresses: Vec::new(),
        external_ips: external.iter().map(|text| address(text)).collect(),
        ingress_ips: ingress.iter().map(|text| address(text)).collect::<BTreeSet<_>>().into_iter().collect(),
        udp_ports: vec![port],
        ports: vec![ServicePort {
            port,
            node_port: None,
            ipv4: Endpoints::default(),
            ipv6: Endpoints::default(),
        }],
        traffic: InternalTrafficPolicy::Cluster,
        affinity: Affinity::None,
    };
    let name =
        |directory: &Directory, text: &str| directory.service_for(at(text)).map(|s| s.name.to_string());
    let mut directory = Directory::default();
    directory.insert_service(service("web", 80, &["203.0.113.1"], &["203.0.113.2"]));
    directory.insert_service(service("mail", 25, &[], &["203.0.113.2"]));
    assert_eq!(name(&directory, "203.0.113.1:80").as_deref(), Some("web"));
    assert_eq!(name(&directory, "203.0.113.2:80").as_deref(), Some("web"), "shared by port");
    assert_eq!(name(&directory, "203.0.113.2:25").as_deref(), Some("mail"));
    assert_eq!((name(&directory, "203.0.113.2:443"), directory.conflicts().count()), (None, 0));
    assert!(directory.knows(address("203.0.113.2")));
    // Another service at the same port: neither, and refused.
    directory.insert_service(service("false", 80, &["203.0.113.2"], &[]));
    assert_eq!(
        (name(&directory, "203.0.113.2:80"), directory.is_unclear_at(at("203.0.113.2:80"))),
        (None, true)
    );
    assert!(!directory.is_unclear_at(at("203.0.113.2:25")) && directory.conflicts().count() == 1);
    // An external address takes nothing from a pod, nor from a node.
    directory.insert(workload("victim", "a", "10.77.1.2"), AddressConflict::Replace);
    directory.insert_service(service("false", 80, &["10.77.1.2", "192.0.2.1"], &[]));
    directory.set_node_addresses(&"b".into(), &[], &[address("192.0.2.1")]);
    assert_eq!(name_at(&directory, "10.77.1.2").as_deref(), Some("victim"));
    assert!(
        directory.service_at(address("10.77.1.2")).is_none() && !directory.is_unclear(address("10.77.1.2"))
    );
    assert!(directory.service_at(address("192.0.2.1")).is_none() && !directory.knows(address("192.0.2.1")));
    assert_eq!(directory.conflicts().count(), 2);
    directory.remove_service("shop", "false");
    assert_eq!(directory.conflicts().count(), 0);
    assert_eq!(name(&directory, "203.0.113.2:80").as_deref(), Some("web"), "the port is web's again");
    // A node that lists the address of a load balancer has its other ports.
    let shared = [address("203.0.113.2")];
    directory.set_node_addresses(&"c".into(), &[], &shared);
    assert_eq!(name(&directory, "203.0.113.2:80").as_deref(), Some("web"));
    assert_eq!((name(&directory, "203.0.113.2:6443"), directory.knows(shared[0])), (None, false));
    let mut services: Vec<_> = directory.node_services().collect();
    services.sort_unstable();
    let both = |text: &str| [("shop", at(text), IpProtocol::Tcp), ("shop", at(text), IpProtocol::Udp)];
    assert_eq!(services, [both("203.0.113.2:25"), both("203.0.113.2:80")].concat());
    let changes = directory.conflict_changes();
    directory.set_node_addresses(&"c".into(), &shared, &[]);
    assert!(directory.node_services().next().is_none() && directory.conflict_changes() > changes);
    // Nor does a pod's claim take the address of a load balancer.
    directory.insert(workload("false", "b", "203.0.113.2"), AddressConflict::Replace);
    assert!(directory.is_unclear(address("203.0.113.2")) && !directory.knows(address("203.0.113.2")));
    assert!(name(&directory, "203.0.113.2:80").is_none() && directory.conflicts().count() == 1);
}

#[test]
fn who_is_in_no_range_of_the_mesh_is_found_if_it_is_enrolled() {
    let text = format!(
        "{TEXT}services:\n\
         - {{name: web, namespace: shop, addresses: [10.96.0.1], ports: [{{port: 80}}], endpoints: [{{addresses: [10.77.1.2]}}]}}\n\
         - {{name: db, namespace: shop, addresses: [10.96.0.2], ports: [{{port: 80}}], endpoints: [{{addresses: ['fd77:2::3']}}]}}\n"
    );
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    let directory = Directory::parse(&text, Path::new("directory.yaml"), &trust_domain).expect("valid");
    let uncovered = |ranges: &[&str]| {
        let ranges: Vec<_> = ranges.iter().map(|range| range.parse().expect("a range")).collect();
        let Uncovered { workloads, services, example } = directory.uncovered(&Ranges::configured(&ranges));
        (workloads, services, example.unwrap_or_default())
    };
    // db is not enrolled, and so is what leads to it alone.
    assert_eq!(uncovered(&["10.77.0.0/16", "fd77:1::/32", "10.96.0.1/32"]), (0, 0, String::new()));
    assert_eq!(uncovered(&["10.77.0.0/16", "fd77::/16"]), (0, 1, "service shop/web (10.96.0.1)".to_owned()));
    assert_eq!(uncovered(&["10.77.0.0/16", "10.96.0.0/16"]), (1, 0, "pod shop/web (fd77:1::2)".to_owned()));
    assert_eq!((uncovered(&[]).0, uncovered(&[]).1), (2, 1));
}
