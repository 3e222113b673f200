//! Tests of what makes two entries one pod, and of addresses that a pod has before the directory knows them.

use tacit_core::spiffe::{SpiffeId, TrustDomain};

use super::*;

fn workload(account: &str, addresses: &[&str]) -> Workload {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: "web".into(),
        namespace: "shop".into(),
        identity: SpiffeId::new(&trust_domain, "shop", account).expect("valid"),
        addresses: addresses.iter().map(|text| text.parse().expect("an address")).collect(),
        node: "a".into(),
        labels: tacit_core::directory::Labels::default(),
        cgroup: "burstable/pod1".into(),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
    }
}

#[test]
fn a_pod_stays_the_same_while_its_addresses_become_known() {
    let enrolled = workload("web", &["10.77.1.2", "fd77::2"]);
    for (wanted, same) in [
        (workload("web", &["10.77.1.2", "fd77::2"]), true),
        (workload("web", &["fd77::2", "10.77.1.2"]), true),
        (workload("web", &[]), true),
        (workload("web", &["10.77.1.2"]), false),
        (workload("web", &["10.77.1.3", "fd77::2"]), false),
        (workload("api", &["10.77.1.2", "fd77::2"]), false),
        (Workload { cgroup: "burstable/pod2".into(), ..workload("web", &[]) }, false),
    ] {
        assert_eq!(is_same(&wanted, &enrolled), same, "{wanted:?}");
    }
}

#[test]
fn of_a_pods_interfaces_the_mesh_addresses_count() {
    let parse = |text: &&str| text.parse::<IpAddr>().expect("an address");
    let ranges = ["10.77.0.0/16", "fd77::/16"].map(|text| text.parse().expect("a range"));
    let ranges = Ranges::configured(&ranges);
    for (listed, found) in [
        (&["127.0.0.1", "::1", "fe80::1", "10.77.1.2", "fd77::2"][..], &["10.77.1.2", "fd77::2"][..]),
        (&["fd77::2", "10.77.1.2", "10.77.1.3"], &["10.77.1.2", "fd77::2"]),
        (&["10.78.1.2", "fd77::2"], &["fd77::2"]),
        (&["127.0.0.1", "fe80::1"], &[]),
    ] {
        let listed: Vec<IpAddr> = listed.iter().map(parse).collect();
        assert_eq!(
            mesh_addresses(&listed, &ranges),
            found.iter().map(parse).collect::<Vec<_>>(),
            "{listed:?}"
        );
    }
}

#[test]
fn an_address_that_is_somebody_elses_is_never_adopted() {
    let text = "\
workloads: [{name: other, namespace: shop, addresses: [10.77.1.2], node: b}]
services: [{name: web, namespace: shop, addresses: [10.96.0.1], ports: [{port: 80}], endpoints: []}]
";
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    let mut directory = Directory::parse(text, Path::new("directory.yaml"), &domain).expect("valid");
    let address = |text: &str| text.parse::<IpAddr>().expect("an address");
    for node in ["b", "c"] {
        let claim = Workload { name: node.into(), node: node.into(), ..workload("web", &["10.77.1.5"]) };
        directory.insert(claim, tacit_core::directory::AddressConflict::Replace);
    }
    directory.set_node_addresses(&"b".into(), &[], &[address("192.0.2.2")]);
    directory.insert(workload("web", &["10.77.1.4"]), tacit_core::directory::AddressConflict::Replace);
    let adopts = workload("web", &[]);
    for (text, expected) in [
        ("10.77.1.2", true),
        ("10.77.1.5", true),
        ("10.96.0.1", true),
        ("192.0.2.2", true),
        ("10.77.1.3", false),
        ("10.77.1.4", false),
    ] {
        assert_eq!(is_given_away(&directory, address(text), &adopts), expected, "{text}");
    }
}

#[test]
fn a_pod_that_waits_is_looked_at_again_after_half_as_long() {
    let ms = Duration::from_millis;
    for (waiting, expected) in [
        (&[][..], RESCAN),
        (&[0], ms(5)),
        (&[9], ms(5)),
        (&[40], ms(20)),
        (&[3_600_000], RESCAN),
        (&[3_600_000, 100], ms(50)),
    ] {
        assert_eq!(pause(waiting.iter().copied().map(ms)), expected, "{waiting:?}");
    }
}
