//! Tests of `directory.yaml`: every mistake, the published schema, and the work of a large file.

use std::time::Duration;

use super::*;
use crate::{
    directory::{Affinity, Directory, InternalTrafficPolicy},
    yaml::visits,
};

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
  tunnel: istio
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
            "line 11: workloads[1].tunnel: \"istio\" is none of tacit, hbone, none: write one of them".to_owned(),
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
fn the_work_of_a_file_grows_with_its_workloads_alone() {
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
    let visits = |count: u32| {
        let text = "workloads:\n".to_owned() + &(0..count).map(workload).collect::<String>();
        let (directory, visits) = visits::during(|| read(&text).expect("valid"));
        assert_eq!(directory.len(), usize::try_from(count).expect("fits"));
        (directory, visits)
    };
    let (directory, of_ten_thousand) = visits(10_000);
    assert_eq!(directory.on_node("node-7").count(), 100);
    // The list itself, then each workload with 6 fields, 2 addresses and 2 labels.
    assert_eq!((of_ten_thousand, visits(1000).1), (1 + 10_000 * 11, 1 + 1000 * 11));
}

#[test]
fn mistakes_in_nodes_and_node_ports_are_reported() {
    let text = "\
workloads: [{name: web, namespace: shop, addresses: [10.77.1.2], node: a}]
nodes: [{name: a, addresses: [10.77.1.2]}, {name: b, addresses: []}, {addresses: [192.0.2.1]}]
services:
- {name: x, namespace: shop, ports: [{port: 80, nodePort: 30080}, {port: 81, nodePort: 30080}]}
- {name: y, namespace: shop, ports: [{port: 80, nodePort: 30080}, {port: 81, nodePort: 80}]}
";
    let found = problems(text);
    for problem in [
        "nodes[0].addresses[0]: 10.77.1.2 is already the address of shop/web (line 1): correct one",
        "nodes[1].addresses: the list is empty: write at least one address",
        "nodes[2].name: missing: write the node's name",
        "services[0].ports[1].nodePort: 30080 is already a node port of service shop/x (line 4): correct one",
        "services[1].ports[0].nodePort: 30080 is already a node port of service shop/x (line 4): correct one",
        "services[1].ports[1].nodePort: \"80\": no node port: write 30000 to 32767",
    ] {
        assert!(found.iter().any(|found| found.contains(problem)), "{problem}: {found:#?}");
    }
}

#[test]
fn the_schema_has_the_fields_and_defaults_of_the_code() {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/directory.schema.json"));
    let schema: serde_json::Value = serde_json::from_str(text).expect("the schema is JSON");
    let workload = &schema["properties"]["workloads"]["items"];
    let mut names: Vec<_> =
        workload["properties"].as_object().expect("properties").keys().map(String::as_str).collect();
    names.sort_unstable();
    let mut fields = FIELDS;
    fields.sort_unstable();
    assert_eq!(names, fields);
    let service = &schema["properties"]["services"]["items"]["properties"];
    let listed = |value: &serde_json::Value| {
        let names = value.as_object().expect("properties").keys();
        names.cloned().collect::<std::collections::BTreeSet<_>>()
    };
    let known = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    assert_eq!(listed(service), known(&services::FIELDS));
    assert_eq!(listed(&service["ports"]["items"]["properties"]), known(&services::PORT_FIELDS));
    assert_eq!(listed(&service["endpoints"]["items"]["properties"]), known(&services::ENDPOINT_FIELDS));
    assert_eq!(listed(&schema["properties"]["nodes"]["items"]["properties"]), known(&NODE_FIELDS));
    let node_port = &service["ports"]["items"]["properties"]["nodePort"];
    assert_eq!(node_port["minimum"], tacit_abi::node_port::FIRST);
    assert_eq!(node_port["maximum"], tacit_abi::node_port::LAST);
    assert_eq!(service["sessionAffinitySeconds"]["default"], services::AFFINITY_SECONDS);
    assert_eq!(workload["properties"]["serviceAccount"]["default"], SERVICE_ACCOUNT);
    assert_eq!(workload["properties"]["connect"]["enum"], serde_json::json!(CONNECT.map(|(name, _)| name)));
    assert_eq!(workload["properties"]["tunnel"]["enum"], serde_json::json!(PROTOCOLS.map(|(name, _)| name)));
}

#[test]
fn a_service_has_what_the_file_says_and_the_defaults() {
    let text = "\
workloads:
- {name: web-1, namespace: shop, node: a, addresses: [10.77.1.2, 'fd77::2']}
services:
- name: web
  namespace: shop
  addresses: [10.96.0.1, 'fd96::1']
  ports: [{port: 80, targetPort: http}, {port: 443, targetPort: 8443}, {port: 22}]
  endpoints:
  - {addresses: [10.77.1.2, 'fd77::2'], ports: {http: 8080}}
  - {addresses: [10.77.2.2], node: b, ports: {http: 8081}}
  - {addresses: [10.77.2.3], ready: false, ports: {http: 1}}
- {name: db, namespace: shop, ports: [{port: 3306}], internalTrafficPolicy: Local, sessionAffinity: ClientIP, sessionAffinitySeconds: 60}
";
    let directory = read(text).expect("valid");
    let web = directory.service_at("10.96.0.1".parse().expect("an address")).expect("web");
    let usable = |port: usize| {
        let ports = &web.ports[port];
        let all = ports.ipv4.usable().iter().chain(ports.ipv6.usable());
        all.map(|endpoint| format!("{} {}", endpoint.address, endpoint.node)).collect::<Vec<_>>()
    };
    assert_eq!(usable(0), ["10.77.1.2:8080 a", "10.77.2.2:8081 b", "[fd77::2]:8080 a"]);
    assert_eq!(usable(1), ["10.77.1.2:8443 a", "10.77.2.2:8443 b", "[fd77::2]:8443 a"]);
    assert_eq!(usable(2), ["10.77.1.2:22 a", "10.77.2.2:22 b", "[fd77::2]:22 a"]);
    assert_eq!((web.traffic, web.affinity), (InternalTrafficPolicy::Cluster, Affinity::None));
    let db = directory.service_named("shop", "db").expect("db");
    assert!(db.addresses.is_empty() && db.ports[0].ipv4.usable().is_empty());
    assert_eq!(
        (db.traffic, db.affinity),
        (InternalTrafficPolicy::Local, Affinity::ClientIp(Duration::from_secs(60)))
    );
}

#[test]
fn all_mistakes_of_services_are_reported_together() {
    let text = "\
workloads:
- {name: web-1, namespace: shop, node: a, addresses: [10.77.1.2]}
services:
- {name: web, namespace: shop, addresses: [10.77.1.2], ports: [{port: 80, targetPort: http}], endpoints: [{addresses: [10.77.1.2]}]}
- {name: web, namespace: shop, addresses: [127.0.0.1], ports: []}
- namespace: shop
  ports: [{port: 0}, {targetPort: 70000}, {port: 81}, {port: 81}]
  endpoints: [{addresses: [x], ready: yes, ports: {http: web}}]
  internalTrafficPolicy: local
  sessionAffinity: Client
  sessionAffinitySeconds: 0
";
    let port = "no port: write 1 to 65535";
    assert_eq!(
        problems(text),
        [
            "line 4: services[0].addresses[0]: 10.77.1.2 is already the address of shop/web-1 (line 2): correct one".to_owned(),
            "line 4: services[0].endpoints[0]: no port \"http\", the targetPort of 80: write ports: {http: 8080}".to_owned(),
            "line 5: services[1].addresses[0]: \"127.0.0.1\": a loopback address, which no pod has: write the pod's own address".to_owned(),
            "line 5: services[1]: service shop/web is already in line 4: remove one or rename it".to_owned(),
            "line 6: services[2].name: missing: write the service's name".to_owned(),
            format!("line 7: services[2].ports[0].port: \"0\": {port}"),
            "line 7: services[2].ports[1].port: missing: write the port that clients ask for".to_owned(),
            format!("line 7: services[2].ports[1].targetPort: \"70000\": {port}"),
            "line 7: services[2].ports[3]: port 81 is already in line 7: remove one".to_owned(),
            "line 8: services[2].endpoints[0].addresses[0]: \"x\": no IP address: write an IPv4 or IPv6 address without prefix length or port".to_owned(),
            "line 8: services[2].endpoints[0].ready: \"yes\" is none of true, false: write one of them".to_owned(),
            format!("line 8: services[2].endpoints[0].ports.http: \"web\": {port}"),
            "line 9: services[2].internalTrafficPolicy: \"local\" is none of Cluster, Local: did you mean Local?".to_owned(),
            "line 10: services[2].sessionAffinity: \"Client\" is none of None, ClientIP: did you mean ClientIP?".to_owned(),
            "line 11: services[2].sessionAffinitySeconds: \"0\": no number of seconds: write 1 to 86400".to_owned(),
        ]
    );
}
