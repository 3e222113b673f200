//! Reduced policies: their verdicts, and the modes that their shapes show.

use std::{net::IpAddr, path::Path};

use proptest::prelude::*;

use super::*;
use crate::{
    directory::Workload,
    policy::{
        AuthorizationDecision, Flow, FlowSource, Mode, Modes, Policies, PolicyVerdict, ReducedListing,
        ReducedNamespace, decide, tests::workload,
    },
    spiffe::SpiffeId,
};

const NODE: &str = "a";
const WEB: &str = "cluster.local/ns/shop/sa/web";

fn texts(texts: &[&str]) -> Vec<TextMatch> {
    texts.iter().map(|text| TextMatch::Exact((*text).to_owned())).collect()
}

fn any<T>(any: Vec<T>) -> Listed<T> {
    Listed { any, none: Vec::new() }
}

fn none<T>(none: Vec<T>) -> Listed<T> {
    Listed { any: Vec::new(), none }
}

/// `notPrincipals: [presence]`.
fn unproven() -> ReducedMatch {
    ReducedMatch { principals: none(vec![TextMatch::Presence]), ..ReducedMatch::default() }
}

fn not_port(port: u16) -> ReducedMatch {
    ReducedMatch { destination_ports: none(vec![port]), ..ReducedMatch::default() }
}

fn policy(name: &str, action: ReducedAction, rules: ReducedRules) -> ReducedPolicy {
    ReducedPolicy::new(format!("shop/{name}"), (ReducedScope::Listed, action), false, rules, 100)
}

fn deny(rules: ReducedRules) -> ReducedPolicy {
    policy("deny", ReducedAction::Deny, rules)
}

fn allow(rules: ReducedRules) -> ReducedPolicy {
    policy("allow", ReducedAction::Allow, rules)
}

fn pod() -> Workload {
    Workload { addresses: vec![[10, 77, 2, 2].into()], ..workload("shop", &[]) }
}

fn listed(policies: Vec<ReducedPolicy>) -> ReducedListing {
    ReducedListing { addresses: pod().addresses, policies }
}

/// The policies of a mesh of which `web` lists these.
fn listing(policies: Vec<ReducedPolicy>) -> Policies {
    let mut all = Policies::reduced("istio-system", NODE.into());
    let listed = [("web".into(), listed(policies))].into_iter().collect();
    all.set_reduced_namespace("shop".into(), ReducedNamespace { listed, ..ReducedNamespace::default() });
    all
}

fn flow(identity: Option<&str>, client: &str, port: u16) -> Flow {
    let source = match identity {
        Some(id) => FlowSource::Tunnel(SpiffeId::parse(&format!("spiffe://{id}")).expect("valid")),
        None => FlowSource::Plaintext,
    };
    let client: IpAddr = client.parse().expect("an address");
    Flow { source, client, destination: ([10, 77, 2, 2], port).into() }
}

fn allows(policies: &Policies, flow: &Flow) -> bool {
    decide(&policies.modes(&pod()), &policies.authorization(&pod()), flow) == PolicyVerdict::Allow
}

#[test]
fn converted_peer_authentications_have_the_modes_of_their_originals() {
    let with_port = |mut one: ReducedMatch, port| {
        one.destination_ports = any(vec![port]);
        one
    };
    for (original, converted) in [
        ("mtls: {mode: STRICT}", vec![vec![vec![unproven()]]]),
        (
            "selector: {matchLabels: {}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: PERMISSIVE}}",
            vec![vec![vec![unproven()], vec![not_port(9090)], vec![unproven()]]],
        ),
        (
            "mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}}",
            vec![vec![vec![with_port(unproven(), 8080)]]],
        ),
        ("mtls: {mode: PERMISSIVE}", vec![]),
    ] {
        let spec = if original.contains("portLevel") {
            format!(
                "selector: {{matchLabels: {{app: web}}}}, {}",
                original.replace("selector: {matchLabels: {}}, ", "")
            )
        } else {
            original.to_owned()
        };
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: web, namespace: shop}}\nspec: {{{spec}}}\n"
        );
        let written = Policies::parse(&text, Path::new("policy.yaml"), "istio-system").expect("valid");
        let written = written.modes(&workload("shop", &[("app", "web")]));
        let reduced = listing(vec![deny(converted)]).modes(&pod());
        for port in (0..=u16::MAX).step_by(10) {
            assert_eq!(reduced.at(port), written.at(port), "{original}: {port}");
        }
        assert_eq!((reduced.at(8080), reduced.default), (written.at(8080), written.default), "{original}");
    }
}

#[test]
fn a_match_without_fields_denies_always_and_allows_never() {
    let empty = || vec![vec![vec![ReducedMatch::default()]]];
    let unknown =
        ReducedMatch { has_unknown: true, principals: any(texts(&[WEB])), ..ReducedMatch::default() };
    let partly = vec![vec![vec![unknown]]];
    let by_web = flow(Some(WEB), "10.77.1.2", 80);
    for (policy, expected) in [
        (deny(empty()), false),
        (allow(empty()), false),
        (deny(partly.clone()), false),
        (allow(partly), false),
        // Without rules a policy matches nothing, and a rule without clauses matches everything.
        (deny(vec![]), true),
        (allow(vec![]), false),
        (deny(vec![vec![]]), false),
        (allow(vec![vec![]]), true),
        (allow(vec![vec![vec![]]]), true),
        (
            allow(vec![vec![vec![
                ReducedMatch::default(),
                ReducedMatch { principals: any(texts(&[WEB])), ..Default::default() },
            ]]]),
            true,
        ),
    ] {
        assert_eq!(allows(&listing(vec![policy.clone()]), &by_web), expected, "{policy:?}");
    }
}

#[test]
fn rules_are_alternatives_and_clauses_are_not() {
    let principal = |id: &str| ReducedMatch { principals: any(texts(&[id])), ..ReducedMatch::default() };
    let port = |port| ReducedMatch { destination_ports: any(vec![port]), ..ReducedMatch::default() };
    let other = "cluster.local/ns/jobs/sa/batch";
    // (web and 80) or (batch and (81 or 82))
    let policies = listing(vec![allow(vec![
        vec![vec![principal(WEB)], vec![port(80)]],
        vec![vec![principal(other)], vec![port(81), port(82)]],
    ])]);
    for (id, at, expected) in
        [(WEB, 80, true), (WEB, 81, false), (other, 80, false), (other, 81, true), (other, 82, true)]
    {
        assert_eq!(allows(&policies, &flow(Some(id), "10.77.1.2", at)), expected, "{id} {at}");
    }
}

#[test]
fn each_field_is_matched() {
    let block = |text: &str| -> IpNet { text.parse().expect("a range") };
    let namespace = TextMatch::Prefix("sh".to_owned());
    for (one, proven, unproven) in [
        (ReducedMatch { namespaces: any(vec![namespace.clone()]), ..Default::default() }, true, false),
        (ReducedMatch { namespaces: none(vec![namespace]), ..Default::default() }, false, true),
        (
            ReducedMatch { service_accounts: any(vec![("shop".into(), "web".into())]), ..Default::default() },
            true,
            false,
        ),
        (
            ReducedMatch {
                service_accounts: none(vec![("shop".into(), "web".into())]),
                ..Default::default()
            },
            false,
            true,
        ),
        (
            ReducedMatch { principals: any(vec![TextMatch::Suffix("/sa/web".into())]), ..Default::default() },
            true,
            false,
        ),
        (
            ReducedMatch { principals: any(vec![TextMatch::Prefix(String::new())]), ..Default::default() },
            true,
            false,
        ),
        (ReducedMatch { source_ips: any(vec![block("10.77.1.0/24")]), ..Default::default() }, true, true),
        (ReducedMatch { source_ips: none(vec![block("10.77.1.0/24")]), ..Default::default() }, false, false),
        (
            ReducedMatch { destination_ips: any(vec![block("10.77.2.2/32")]), ..Default::default() },
            true,
            true,
        ),
        (
            ReducedMatch { destination_ips: none(vec![block("10.77.0.0/16")]), ..Default::default() },
            false,
            false,
        ),
        (ReducedMatch { destination_ports: any(vec![80]), ..Default::default() }, true, true),
        (ReducedMatch { destination_ports: none(vec![80]), ..Default::default() }, false, false),
    ] {
        let policies = listing(vec![allow(vec![vec![vec![one.clone()]]])]);
        let allowed = |id| allows(&policies, &flow(id, "10.77.1.2", 80));
        assert_eq!((allowed(Some(WEB)), allowed(None)), (proven, unproven), "{one:?}");
    }
}

#[test]
fn a_dry_run_decides_nothing_and_sets_no_mode() {
    let dry = ReducedPolicy::new(
        "shop/dry".to_owned(),
        (ReducedScope::Listed, ReducedAction::Deny),
        true,
        vec![vec![vec![unproven()]]],
        0,
    );
    let policies = listing(vec![dry]);
    assert_eq!(policies.modes(&pod()).default, Mode::Permissive);
    assert!(allows(&policies, &flow(None, "10.77.1.2", 80)));
    assert_eq!(policies.authorization(&pod()).audits(&flow(None, "10.77.1.2", 80)).len(), 1);
}

#[test]
fn a_pod_that_is_not_named_and_a_policy_that_is_not_readable_are_closed() {
    let refused = |policies: &Policies| {
        policies.modes(&pod()).default == Mode::Strict && !allows(policies, &flow(Some(WEB), "10.77.1.2", 80))
    };
    let mut policies = Policies::reduced("istio-system", NODE.into());
    assert!(refused(&policies), "nobody has named it");
    policies = listing(vec![]);
    assert!(!refused(&policies));
    policies.set_reduced_global(vec![ReducedPolicy::unreadable(
        "istio-system/p".to_owned(),
        ReducedScope::Global,
        "rules[0]: no field".to_owned(),
    )]);
    assert!(refused(&policies));
    let mut policies = listing(vec![]);
    let usage = PolicyUsage { objects: 5000, ..PolicyUsage::default() };
    let listed = [("web".into(), listed(Vec::new()))].into_iter().collect();
    policies.set_reduced_namespace("shop".into(), ReducedNamespace { usage, listed, scoped: Vec::new() });
    assert!(refused(&policies) && policies.why_not_applied("shop").is_some());
    // A workload of another node is not this agent's to admit.
    let far = Workload { node: "b".into(), ..pod() };
    assert_eq!(Policies::reduced("istio-system", NODE.into()).modes(&far).default, Mode::Permissive);
}

#[test]
fn a_list_is_not_that_of_a_later_workload_of_the_same_name() {
    let policies = listing(vec![]);
    let later = |addresses: &[[u8; 4]]| Workload {
        addresses: addresses.iter().map(|ip| (*ip).into()).collect(),
        ..pod()
    };
    let mode = |workload: &Workload| policies.modes(workload).default;
    assert_eq!(mode(&pod()), Mode::Permissive);
    assert_eq!(mode(&later(&[[10, 99, 9, 9]])), Mode::Strict);
    assert_eq!(mode(&later(&[])), Mode::Strict);
    let flow = flow(Some(WEB), "10.77.1.1", 80);
    let authorization = policies.authorization(&later(&[[10, 99, 9, 9]]));
    assert_ne!(decide(&policies.modes(&pod()), &authorization, &flow), PolicyVerdict::Allow);
}

#[test]
fn a_change_of_one_namespace_leaves_others_as_they_are() {
    let before = listing(vec![]);
    let mut after = before.clone();
    after.set_reduced_namespace(
        "jobs".into(),
        ReducedNamespace { scoped: vec![deny(vec![])], ..Default::default() },
    );
    assert!(after.is_same_for("shop", &before) && !after.is_same_for("jobs", &before));
    after.set_reduced_global(vec![deny(vec![])]);
    assert!(!after.is_same_for("shop", &before));
    assert!(
        !Policies::empty("istio-system").is_same_for("shop", &Policies::reduced("istio-system", NODE.into()))
    );
}

const PORTS: [u16; 4] = [80, 81, 443, 65_535];

fn some_ports() -> impl Strategy<Value = Listed<u16>> {
    let list = || prop::collection::vec(prop::sample::select(&PORTS[..]), 0..3);
    (list(), list()).prop_map(|(any, none)| Listed { any, none })
}

fn some_texts() -> impl Strategy<Value = Listed<TextMatch>> {
    let text = prop_oneof![
        Just(TextMatch::Presence),
        Just(TextMatch::Exact(WEB.to_owned())),
        Just(TextMatch::Prefix("cluster.local/ns/shop".to_owned())),
        Just(TextMatch::Suffix("web".to_owned())),
    ];
    let list = || prop::collection::vec(text.clone(), 0..2);
    (list(), list()).prop_map(|(any, none)| Listed { any, none })
}

fn some_blocks() -> impl Strategy<Value = Listed<IpNet>> {
    let block = prop::sample::select(vec!["10.77.1.0/24", "10.0.0.0/8", "fd77::/16"]);
    let list = || prop::collection::vec(block.clone().prop_map(|text| text.parse().expect("a range")), 0..2);
    (list(), list()).prop_map(|(any, none)| Listed { any, none })
}

fn some_match(with_addresses: bool) -> impl Strategy<Value = ReducedMatch> {
    let accounts = prop::collection::vec(Just(("shop".to_owned(), "web".to_owned())), 0..2);
    let accounts = (accounts.clone(), accounts).prop_map(|(any, none)| Listed { any, none });
    let all = (some_texts(), some_texts(), accounts, some_ports(), some_blocks(), prop::bool::weighted(0.1));
    all.prop_map(move |(namespaces, principals, service_accounts, destination_ports, blocks, has_unknown)| {
        let source_ips = if with_addresses { blocks } else { Listed::default() };
        ReducedMatch {
            namespaces,
            service_accounts,
            principals,
            source_ips,
            destination_ips: Listed::default(),
            destination_ports,
            has_unknown,
        }
    })
}

fn some_policies(with_addresses: bool) -> impl Strategy<Value = Vec<ReducedPolicy>> {
    let clause = prop::collection::vec(some_match(with_addresses), 0..3);
    let rules = prop::collection::vec(prop::collection::vec(clause, 0..3), 0..3);
    let action = prop_oneof![3 => Just(ReducedAction::Deny), 1 => Just(ReducedAction::Allow)];
    let policy = (action, rules).prop_map(|(action, rules)| policy("p", action, rules));
    prop::collection::vec(policy, 0..4)
}

/// Returns true if a DENY policy denies a source without an identity.
fn is_denied(policies: &Policies, client: &str, port: u16) -> bool {
    let authorization = policies.authorization(&pod());
    matches!(authorization.evaluate(&flow(None, client, port)), AuthorizationDecision::Denied(_))
}

proptest! {
    #[test]
    fn modes_are_the_verdicts_on_sources_without_identity(policies in some_policies(false)) {
        let policies = listing(policies);
        let modes: Modes = policies.modes(&pod());
        for port in PORTS.into_iter().chain([0, 1, 8080]) {
            let is_strict = modes.at(port) == Mode::Strict;
            prop_assert_eq!(is_strict, is_denied(&policies, "10.77.1.2", port), "{}: {:?}", port, modes);
        }
    }

    #[test]
    fn a_strict_port_denies_sources_without_identity_at_every_address(policies in some_policies(true)) {
        let policies = listing(policies);
        let modes: Modes = policies.modes(&pod());
        for port in PORTS.into_iter().chain([0, 1, 8080]) {
            for client in ["10.77.1.2", "10.1.1.1", "192.0.2.1", "fd77::1", "fd78::1"] {
                prop_assert!(modes.at(port) != Mode::Strict || is_denied(&policies, client, port));
            }
        }
    }
}
