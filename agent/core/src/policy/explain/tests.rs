//! Every way a connection comes, and every kind of verdict, in the words an operator reads.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use super::*;
use crate::spiffe::TrustDomain;

const DIRECTORY: &str = "\
workloads:
- {name: web, namespace: shop, serviceAccount: web, addresses: [10.77.1.2, 'fd77:1::2'], node: a, labels: {app: web}}
- {name: near, namespace: shop, serviceAccount: near, addresses: [10.77.1.3], node: a}
- {name: far, namespace: shop, serviceAccount: far, addresses: [10.77.2.2, 'fd77:2::2'], node: b}
- {name: old, namespace: shop, serviceAccount: old, addresses: [10.77.2.3], node: b, tunnel: none}
- {name: six, namespace: shop, serviceAccount: six, addresses: ['fd77:2::6'], node: b}
";
const POLICY: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: web, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, portLevelMtls: {81: {mode: STRICT}, 82: {mode: DISABLE}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from: [{source: {principals: ['*/sa/far']}}]
  - to: [{operation: {methods: [GET]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-83, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, action: DENY, rules: [{to: [{operation: {ports: ['83']}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: six-only, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules: [{when: [{key: destination.ip, values: ['fd77::/16']}], to: [{operation: {ports: ['84']}}]}]
";

fn ask(from: &str, to: &str, port: u16) -> Result<Explanation, ExplainError> {
    ask_with(Mode::Disable, from, to, port)
}

fn ask_with(minimum: Mode, from: &str, to: &str, port: u16) -> Result<Explanation, ExplainError> {
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    let directory = Directory::parse(DIRECTORY, Path::new("directory.yaml"), &domain).expect("valid");
    let policies = Policies::parse(POLICY, Path::new("policy.yaml"), "istio-system").expect("valid");
    let policies = policies.with_minimum(minimum);
    let in_force = |workload: &Workload| PolicyInForce::Held {
        modes: policies.modes(workload),
        authorization: policies.authorization(workload),
        not_applied: None,
        waits_for: None,
    };
    ask_of(&directory, &policies, &in_force, (from, to, port))
}

fn ask_of(
    directory: &Directory,
    policies: &Policies,
    in_force: &dyn Fn(&Workload) -> PolicyInForce,
    (from, to, port): (&str, &str, u16),
) -> Result<Explanation, ExplainError> {
    let is_node = |address: IpAddr| address.to_string() == "10.77.1.1";
    let known = ExplainContext { directory, policies, in_force, node: "a", is_node: &is_node };
    explain(known, &WorkloadRef::parse(from)?, &WorkloadRef::parse(to)?, port)
}

#[test]
fn a_mode_that_the_minimum_raised_is_told() {
    for (minimum, port, why) in [
        (Mode::Strict, 80, Some("Raised by minimumMode: the policies set PERMISSIVE.")),
        (Mode::Permissive, 82, Some("Raised by minimumMode: the policies set DISABLE.")),
        (Mode::Permissive, 80, None),
        (Mode::Strict, 81, None),
    ] {
        let explanation = ask_with(minimum, "10.77.9.9", "shop/web", port).expect("an answer");
        let told = explanation.paths[0].why.iter().find(|why| why.contains("minimumMode"));
        assert_eq!(told.map(String::as_str), why, "{minimum:?} {port}");
    }
}

#[test]
fn a_policy_that_is_not_applied_is_not_told_as_raised() {
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    let directory = Directory::parse(DIRECTORY, Path::new("directory.yaml"), &domain).expect("valid");
    let policies = Policies::parse(POLICY, Path::new("policy.yaml"), "istio-system").expect("valid");
    let refused = |workload: &Workload| PolicyInForce::Held {
        modes: Modes { default: Mode::Strict, ports: BTreeMap::new() },
        authorization: policies.authorization(workload),
        not_applied: Some("the map is full".to_owned()),
        waits_for: None,
    };
    for (minimum, is_raised) in [(Mode::Disable, false), (Mode::Strict, true)] {
        let policies = policies.clone().with_minimum(minimum);
        let asked = ("10.77.9.9", "shop/web", 80);
        let explanation = ask_of(&directory, &policies, &refused, asked).expect("an answer");
        let why = &explanation.paths[0].why;
        assert_eq!(why.iter().any(|why| why.contains("minimumMode")), is_raised, "{why:?}");
        assert!(why.iter().any(|why| why.contains("the map is full")), "{why:?}");
    }
}

#[test]
fn each_way_and_each_verdict_is_explained() {
    let mut texts = String::new();
    for (from, to, port, allow) in [
        ("shop/far", "shop/web", 80, true),
        ("10.77.2.2", "10.77.1.2", 80, true),
        ("shop/near", "shop/web", 80, false),
        ("shop/far", "shop/web", 83, false),
        ("shop/far", "shop/web", 82, false),
        ("10.99.0.1", "shop/web", 80, false),
        ("shop/old", "shop/web", 81, false),
        ("10.77.1.1", "shop/web", 81, true),
        ("shop/web", "shop/far", 80, true),
        ("shop/web", "shop/old", 80, true),
        ("shop/web", "10.99.0.1", 80, true),
        // Allowed over one family only is not allowed.
        ("shop/far", "shop/web", 84, false),
    ] {
        let explanation = ask(from, to, port).expect("known");
        assert_eq!(explanation.allow, allow, "{from} {to} {port}: {explanation}");
        let _ = writeln!(texts, "$ tacit policy explain {from} {to} {port}\n{explanation}");
    }
    insta::with_settings!({ omit_expression => true }, { insta::assert_snapshot!("verdicts", texts) });
}

#[test]
fn the_policy_in_force_is_explained_and_not_the_one_that_was_read() {
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    let directory = Directory::parse(DIRECTORY, Path::new("directory.yaml"), &domain).expect("valid");
    let policies = Policies::parse(POLICY, Path::new("policy.yaml"), "istio-system").expect("valid");
    let ask = |in_force: PolicyInForce, node: &str, from: &str| {
        let known = ExplainContext {
            directory: &directory,
            policies: &policies,
            in_force: &|_| in_force.clone(),
            node,
            is_node: &|_| false,
        };
        let end = |text| WorkloadRef::parse(text).expect("valid");
        explain(known, &end(from), &end("10.77.1.2"), 82).expect("both are known")
    };
    let held = |default, not_applied: Option<&str>, waits_for: Option<&str>| PolicyInForce::Held {
        modes: Modes { default, ports: std::collections::BTreeMap::new() },
        authorization: Policies::default().authorization(directory.named("shop", "web").expect("known")),
        not_applied: not_applied.map(str::to_owned),
        waits_for: waits_for.map(str::to_owned),
    };
    let old = "10.77.2.3";
    let table = [
        // What was read denies all of these: port 82 is DISABLE, and an ALLOW policy has another principal.
        (held(Mode::Permissive, None, None), old, true, "Allowed"),
        (
            held(Mode::Strict, Some("map full"), None),
            old,
            false,
            "not applied, STRICT is in force at all ports: map full",
        ),
        (
            held(Mode::Permissive, None, Some("no certificate")),
            old,
            true,
            "not enrolled yet, tunnels to it fail: no certificate",
        ),
        (PolicyInForce::Nothing { waits_for: "no cgroup".to_owned() }, old, false, "No policy is in force"),
    ];
    for (in_force, from, allow, expected) in table {
        let explanation = ask(in_force, "a", from);
        assert_eq!(explanation.allow, allow, "{explanation}");
        assert!(explanation.to_string().contains(expected), "{explanation}");
    }
    let elsewhere = ask(held(Mode::Permissive, None, None), "b", old);
    assert!(!elsewhere.allow, "{elsewhere}");
    assert!(elsewhere.to_string().contains("the agent of node a knows what is in force"), "{elsewhere}");
}

#[test]
fn questions_without_an_answer_say_what_is_wrong() {
    for (from, to, expected) in [
        ("shop/none", "shop/web", ExplainError::Unknown("shop/none".to_owned())),
        ("web", "shop/web", ExplainError::WorkloadRef("web".to_owned())),
        ("a/b/c", "shop/web", ExplainError::WorkloadRef("a/b/c".to_owned())),
    ] {
        assert_eq!(ask(from, to, 80), Err(expected));
    }
    assert!(matches!(ask("shop/near", "shop/six", 80), Err(ExplainError::Families { .. })));
    for text in ["", "0", "65536", "http"] {
        assert_eq!(port(text), Err(ExplainError::Port(text.to_owned())));
    }
}

#[test]
fn an_address_that_two_pods_claim_is_explained_as_refused() {
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    let mut directory = Directory::parse(DIRECTORY, Path::new("directory.yaml"), &domain).expect("valid");
    let web = directory.named("shop", "web").expect("known");
    let other = crate::directory::Workload {
        name: "false".into(),
        node: "c".into(),
        addresses: vec!["10.77.1.2".parse().expect("an address")],
        ..(**web).clone()
    };
    directory.insert(other, crate::directory::AddressConflict::Replace);
    let known = ExplainContext {
        directory: &directory,
        policies: &Policies::default(),
        in_force: &|_| PolicyInForce::Nothing { waits_for: "not asked".to_owned() },
        node: "a",
        is_node: &|_| false,
    };
    for to in ["shop/web", "shop/false", "10.77.1.2"] {
        let to = WorkloadRef::parse(to).expect("valid");
        let from = WorkloadRef::parse("shop/far").expect("valid");
        let explanation = explain(known, &from, &to, 80).expect("both are known");
        assert!(!explanation.allow, "{to:?}");
        let refused = explanation.paths.iter().find(|path| !path.allow).expect("a refused path");
        assert!(refused.why[0].contains("destination_unclear"), "{refused:?}");
    }
}
