//! Tests of `directory.yaml`: every mistake, the published schema, and the time a large file takes.

use std::time::{Duration, Instant};

use super::*;
use crate::directory::Directory;

fn read(text: &str) -> Result<Directory, Mistakes> {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Directory::parse(text, Path::new("directory.yaml"), &trust_domain)
}

fn problems(text: &str) -> Vec<String> {
    read(text).expect_err(text).list.iter().map(ToString::to_string).collect()
}

#[test]
fn an_empty_list_is_an_empty_directory_and_an_empty_file_a_mistake() {
    assert!(read("workloads: []").expect("valid").is_empty());
    assert_eq!(problems(""), ["line 1: is empty: write a mapping (`name: value` lines)"]);
    assert_eq!(
        problems("workloads:"),
        ["line 1: workloads: missing: write a list of workloads, or [] for none"]
    );
}

#[test]
fn all_mistakes_are_reported_together() {
    let text = "\
workloads:
- name: Web
  namespace: shop
  serviceAcount: web
  addresses: [10.77.1.2/32, 10.77.1.300]
- namespace: 5
  name: db
  serviceAccount: '-'
  addresses: []
  node: a
  tunnel: hbone
  labels: {app: 1.0}
  cgroup: ../db
";
    let rule =
        "write 1 to 253 characters of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit";
    let form = "no IP address: write an IPv4 or IPv6 address without prefix length or port";
    assert_eq!(
        problems(text),
        [
            format!("line 2: workloads[0].name: \"Web\" is no Kubernetes name: {rule}"),
            "line 2: workloads[0].node: missing: write the name of the node it runs on".to_owned(),
            "line 4: workloads[0].serviceAcount: unknown field: did you mean `serviceAccount`?".to_owned(),
            format!("line 5: workloads[0].addresses[0]: \"10.77.1.2/32\": {form}"),
            format!("line 5: workloads[0].addresses[1]: \"10.77.1.300\": {form}"),
            "line 6: workloads[1].namespace: 5 is a number where text is expected: write \"5\"".to_owned(),
            format!("line 8: workloads[1].serviceAccount: \"-\" is no Kubernetes name: {rule}"),
            "line 9: workloads[1].addresses: the list is empty: write at least one address".to_owned(),
            "line 11: workloads[1].tunnel: \"hbone\" is none of tacit, none: write one of them".to_owned(),
            "line 12: workloads[1].labels.app: 1.0 is a number where text is expected: write \"1.0\"".to_owned(),
            "line 13: workloads[1].cgroup: \"../db\": write a path relative to podsCgroup, without `.` and `..`"
                .to_owned(),
        ]
    );
}

#[test]
fn addresses_no_pod_has_are_refused() {
    for (text, error) in [
        ("0.0.0.0", AddressError::Special("unspecified")),
        ("127.0.0.1", AddressError::Special("loopback")),
        ("224.0.0.1", AddressError::Special("multicast")),
        ("169.254.1.1", AddressError::Special("link-local")),
        ("255.255.255.255", AddressError::Special("broadcast")),
        ("::", AddressError::Special("unspecified")),
        ("::1", AddressError::Special("loopback")),
        ("ff02::1", AddressError::Special("multicast")),
        ("fe80::1", AddressError::Special("link-local")),
        ("::ffff:10.77.1.2", AddressError::Mapped("10.77.1.2".parse().expect("an address"))),
        ("10.77.1.2:80", AddressError::Form),
        ("fe80::1%eth0", AddressError::Form),
    ] {
        assert_eq!(pod_address(text), Err(error), "{text}");
    }
}

#[test]
fn one_workload_has_at_most_one_address_of_each_family() {
    let text = "workloads: [{name: w, namespace: n, node: a, addresses: [10.77.1.2, 10.77.1.3, 'fd77::1', 'fd77::2']}]";
    assert_eq!(
        problems(text),
        [
            "line 1: workloads[0].addresses[1]: 10.77.1.3: 10.77.1.2 is of the same family: write at most one of each",
            "line 1: workloads[0].addresses[3]: fd77::2: fd77::1 is of the same family: write at most one of each",
        ]
    );
}

#[test]
fn workloads_that_contradict_each_other_are_refused() {
    let text = "\
workloads:
- {name: web, namespace: shop, node: a, addresses: [10.77.1.1]}
- {name: web, namespace: shop, node: a, addresses: [10.77.1.2]}
- {name: c, namespace: shop, node: a, addresses: [10.77.1.1]}
- {name: d, namespace: shop, node: a, addresses: [10.77.1.4], cgroup: shop_web}
- {name: e, namespace: shop, node: a, addresses: [10.77.1.5], cgroup: shop_c/e}
";
    assert_eq!(
        problems(text),
        [
            "line 3: workloads[1]: workload shop/web is already in line 2: remove one or rename it",
            "line 4: workloads[2].addresses[0]: 10.77.1.1 is already the address of shop/web (line 2): correct one",
            "line 5: workloads[3].cgroup: cgroup \"shop_web\" on node a is already that of shop/web (line 2): correct one",
            "line 6: workloads[4].cgroup: cgroup \"shop_c/e\" on node a is inside that of shop/c (line 4): correct one",
        ]
    );
}

#[test]
fn the_same_cgroup_on_two_nodes_is_no_conflict() {
    let text = "\
workloads:
- {name: web, namespace: shop, node: a, addresses: [10.77.1.1], cgroup: pod}
- {name: web, namespace: cart, node: b, addresses: [10.77.1.2], cgroup: pod}
";
    assert_eq!(read(text).expect("valid").len(), 2);
}

#[test]
fn a_cgroup_cannot_leave_the_pods_cgroup() {
    for cgroup in ["/shop", "..", "a/../../b", "./a", "a/.."] {
        let text = format!(
            "workloads: [{{name: w, namespace: n, node: a, addresses: [10.7.1.2], cgroup: {cgroup}}}]"
        );
        assert!(read(&text).is_err(), "{cgroup}");
    }
}

#[test]
fn ten_thousand_workloads_are_read_at_once() {
    let workload = |i: u32| {
        let (high, low) = (i / 256, i % 256);
        format!(
            "- name: pod-{i}\n  namespace: ns-{}\n  serviceAccount: sa-{}\n  addresses: [10.77.{high}.{low}, \
             \"fd77::{high:x}:{low:x}\"]\n  node: node-{}\n  labels: {{app: app-{}, tier: web}}\n",
            i % 50,
            i % 500,
            i % 100,
            i % 500
        )
    };
    let text = "workloads:\n".to_owned() + &(0..10_000).map(workload).collect::<String>();
    let begin = Instant::now();
    let directory = read(&text).expect("valid");
    let took = begin.elapsed();
    assert_eq!(directory.len(), 10_000);
    assert_eq!(directory.on_node("node-7").count(), 100);
    // Without optimisation the bound holds with less room on a busy machine.
    let limit = if cfg!(debug_assertions) { Duration::from_secs(20) } else { Duration::from_secs(1) };
    assert!(took < limit, "took {took:?}");
}

#[test]
fn the_schema_has_the_fields_and_defaults_of_the_code() {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/directory.schema.json"));
    let schema: serde_json::Value = serde_json::from_str(text).expect("the schema is JSON");
    let workload = &schema["properties"]["workloads"]["items"];
    let mut names: Vec<_> =
        workload["properties"].as_object().expect("properties").keys().map(String::as_str).collect();
    names.sort_unstable();
    let mut fields = FIELDS;
    fields.sort_unstable();
    assert_eq!(names, fields);
    assert_eq!(workload["properties"]["serviceAccount"]["default"], SERVICE_ACCOUNT);
    assert_eq!(workload["properties"]["tunnel"]["enum"], serde_json::json!(PROTOCOLS.map(|(name, _)| name)));
}
