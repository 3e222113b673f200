//! Tables: each matcher, negation, scope, action and field that needs HTTP; what a flow with this or that source meets.

mod trust_domains;

use std::path::Path;

use super::*;
use crate::{
    policy::{
        FlowSource, Modes, Policies, PolicyDenial, PolicyVerdict, decide,
        tests::{modes, workload},
    },
    spiffe::SpiffeId,
};

/// Policies in namespace `shop`, unless they say otherwise: each item is a `spec` in flow style.
fn policies(specs: &[&str]) -> Policies {
    let text: String = specs.iter().enumerate().map(|(i, spec)| document("shop", i, "", spec)).collect();
    read(&text)
}

fn document(namespace: &str, number: usize, metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: p{number}, namespace: {namespace}{metadata}}}\nspec: {spec}\n"
    )
}

fn read(text: &str) -> Policies {
    Policies::parse(text, Path::new("policy.yaml"), "istio-system")
        .unwrap_or_else(|mistakes| panic!("{mistakes}\n{text}"))
}

fn problems(spec: &str) -> Vec<String> {
    let text = document("shop", 0, "", spec);
    let read = Policies::parse(&text, Path::new("policy.yaml"), "istio-system");
    read.expect_err(spec).list.iter().map(ToString::to_string).collect()
}

fn identity(namespace: &str, account: &str) -> SpiffeId {
    let domain = crate::spiffe::TrustDomain::parse("cluster.local").expect("valid");
    SpiffeId::new(&domain, namespace, account).expect("valid")
}

/// Returns true if 10.77.1.9 may connect to 10.77.2.2:8080 as `who` (namespace and service account; `None` is
/// plaintext).
fn allows(policies: &Policies, who: Option<(&str, &str)>) -> bool {
    let identity = who.map(|(namespace, account)| identity(namespace, account));
    let source = identity.map_or(FlowSource::Plaintext, FlowSource::Tunnel);
    let authorization = policies.authorization(&workload("shop", &[("app", "web")]));
    let permissive = modes(crate::policy::Mode::Permissive);
    decide(&permissive, &authorization, &flow(source)) == PolicyVerdict::Allow
}

fn flow(source: FlowSource) -> Flow {
    Flow {
        source,
        client: "10.77.1.9".parse().expect("an address"),
        destination: "10.77.2.2:8080".parse().expect("an address"),
    }
}

const CART: Option<(&str, &str)> = Some(("shop", "cart"));
const BATCH: Option<(&str, &str)> = Some(("jobs", "batch"));
const CLEAR: Option<(&str, &str)> = None;

#[test]
fn cluster_local_stands_for_the_trust_domain_of_the_mesh_in_principals_only() {
    let domain = crate::spiffe::TrustDomain::parse("prod.example").expect("valid");
    let cart = SpiffeId::new(&domain, "shop", "cart").expect("valid");
    let denies = |field: &str, value: &str| {
        let spec = format!("{{action: DENY, rules: [{{from: [{{source: {{{field}: ['{value}']}}}}]}}]}}");
        let policies = policies(&[&spec]);
        let authorization = policies.authorization(&workload("shop", &[("app", "web")]));
        let permissive = modes(crate::policy::Mode::Permissive);
        decide(&permissive, &authorization, &flow(FlowSource::Tunnel(cart.clone()))) != PolicyVerdict::Allow
    };
    for (field, negation, value, matches) in [
        ("principals", "notPrincipals", "cluster.local/ns/shop/sa/cart", true),
        ("principals", "notPrincipals", "cluster.local/*", true),
        ("principals", "notPrincipals", "prod.example/ns/shop/sa/cart", true),
        ("principals", "notPrincipals", "cluster.local/ns/shop/sa/batch", false),
        ("principals", "notPrincipals", "other/ns/shop/sa/cart", false),
        ("trustDomains", "notTrustDomains", "prod.example", true),
        ("trustDomains", "notTrustDomains", "prod.*", true),
        ("trustDomains", "notTrustDomains", "cluster.local", false),
        ("trustDomains", "notTrustDomains", "cluster*", false),
    ] {
        assert_eq!((denies(field, value), denies(negation, value)), (matches, !matches), "{field} {value}");
    }
}

/// Each rule as the only one of an ALLOW policy, of a DENY policy, and of an AUDIT policy.
#[test]
fn a_rule_matches_by_each_of_its_fields_and_negations() {
    // rule, and whether it matches cart of shop, batch of jobs, and plaintext
    let table = [
        ("{}", [true, true, true]),
        ("{from: [{source: {principals: [cluster.local/ns/shop/sa/cart]}}]}", [true, false, false]),
        ("{from: [{source: {principals: [cluster.local/ns/shop/*]}}]}", [true, false, false]),
        ("{from: [{source: {principals: ['*/sa/batch']}}]}", [false, true, false]),
        ("{from: [{source: {principals: ['*']}}]}", [true, true, false]),
        ("{from: [{source: {principals: [spiffe://cluster.local/ns/shop/sa/cart]}}]}", [false, false, false]),
        ("{from: [{source: {principals: [other/ns/shop/sa/cart]}}]}", [false, false, false]),
        ("{from: [{source: {notPrincipals: [cluster.local/ns/shop/sa/cart]}}]}", [false, true, true]),
        ("{from: [{source: {notPrincipals: ['*']}}]}", [false, false, true]),
        ("{from: [{source: {principals: ['*'], notPrincipals: ['*/cart']}}]}", [false, true, false]),
        ("{from: [{source: {namespaces: [shop]}}]}", [true, false, false]),
        ("{from: [{source: {namespaces: ['jo*', nobody]}}]}", [false, true, false]),
        ("{from: [{source: {namespaces: ['*']}}]}", [true, true, false]),
        ("{from: [{source: {notNamespaces: [shop]}}]}", [false, true, true]),
        ("{from: [{source: {serviceAccounts: [cart]}}]}", [true, false, false]),
        ("{from: [{source: {serviceAccounts: [jobs/batch]}}]}", [false, true, false]),
        ("{from: [{source: {serviceAccounts: [jobs/cart]}}]}", [false, false, false]),
        ("{from: [{source: {notServiceAccounts: [jobs/batch]}}]}", [true, false, true]),
        ("{from: [{source: {trustDomains: [cluster.local]}}]}", [true, true, false]),
        ("{from: [{source: {trustDomains: ['cluster*', other]}}]}", [true, true, false]),
        ("{from: [{source: {trustDomains: ['*']}}]}", [true, true, false]),
        ("{from: [{source: {trustDomains: [other]}}]}", [false, false, false]),
        ("{from: [{source: {notTrustDomains: [cluster.local]}}]}", [false, false, true]),
        ("{from: [{source: {notTrustDomains: [other]}}]}", [true, true, true]),
        ("{from: [{source: {namespaces: [shop], notTrustDomains: [other]}}]}", [true, false, false]),
        ("{from: [{source: {ipBlocks: [10.77.0.0/16]}}]}", [true, true, true]),
        ("{from: [{source: {ipBlocks: [10.77.1.9]}}]}", [true, true, true]),
        ("{from: [{source: {ipBlocks: [10.77.1.8, 'fd77::/16']}}]}", [false, false, false]),
        ("{from: [{source: {notIpBlocks: [10.77.1.0/24]}}]}", [false, false, false]),
        ("{from: [{source: {notIpBlocks: [10.78.0.0/16]}}]}", [true, true, true]),
        ("{from: [{source: {namespaces: [shop], ipBlocks: [10.99.0.1]}}]}", [false, false, false]),
        ("{from: [{source: {namespaces: [shop]}}, {source: {namespaces: [jobs]}}]}", [true, true, false]),
        ("{to: [{operation: {ports: ['8080']}}]}", [true, true, true]),
        ("{to: [{operation: {ports: ['80', '443']}}]}", [false, false, false]),
        ("{to: [{operation: {notPorts: ['8080']}}]}", [false, false, false]),
        ("{to: [{operation: {notPorts: ['80']}}]}", [true, true, true]),
        ("{to: [{operation: {ports: ['80']}}, {operation: {ports: ['8080']}}]}", [true, true, true]),
        (
            "{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['80']}}]}",
            [false, false, false],
        ),
        ("{when: [{key: source.ip, values: [10.77.1.9]}]}", [true, true, true]),
        ("{when: [{key: source.ip, notValues: [10.77.1.9]}]}", [false, false, false]),
        ("{when: [{key: source.namespace, values: [shop]}]}", [true, false, false]),
        ("{when: [{key: source.namespace, notValues: [shop]}]}", [false, true, true]),
        ("{when: [{key: source.serviceAccount, values: [cart, jobs/x]}]}", [true, false, false]),
        ("{when: [{key: source.serviceAccount, notValues: [jobs/batch]}]}", [true, false, true]),
        ("{when: [{key: source.principal, values: ['*/cart']}]}", [true, false, false]),
        ("{when: [{key: source.principal, notValues: ['*']}]}", [false, false, true]),
        ("{when: [{key: source.trustDomain, values: ['*.local']}]}", [true, true, false]),
        ("{when: [{key: source.trustDomain, notValues: [cluster.local]}]}", [false, false, true]),
        ("{when: [{key: destination.ip, values: [10.77.2.0/24]}]}", [true, true, true]),
        ("{when: [{key: destination.ip, notValues: [10.77.2.2]}]}", [false, false, false]),
        ("{when: [{key: destination.port, values: ['8080']}]}", [true, true, true]),
        ("{when: [{key: destination.port, notValues: ['8080']}]}", [false, false, false]),
        (
            "{when: [{key: source.namespace, values: [shop]}, {key: destination.port, values: ['80']}]}",
            [false, false, false],
        ),
        ("{when: [{key: source.namespace, values: [shop, jobs], notValues: [jobs]}]}", [true, false, false]),
    ];
    for (rule, expected) in table {
        for (who, matches) in [CART, BATCH, CLEAR].into_iter().zip(expected) {
            let of = |action| policies(&[&format!("{{action: {action}, rules: [{rule}]}}")]);
            assert_eq!(allows(&of("ALLOW"), who), matches, "ALLOW {rule} {who:?}");
            assert_eq!(allows(&of("DENY"), who), !matches, "DENY {rule} {who:?}");
            let audited = of("AUDIT");
            assert!(allows(&audited, who), "AUDIT {rule} {who:?}");
            let id = who.map(|(namespace, account)| identity(namespace, account));
            let source = id.map_or(FlowSource::Plaintext, FlowSource::SameNode);
            let authorization = audited.authorization(&workload("shop", &[]));
            assert_eq!(authorization.audits(&flow(source)).len(), usize::from(matches), "{rule} {who:?}");
        }
    }
}

#[test]
fn deny_goes_before_allow_and_allow_leaves_out_all_others() {
    let allow_shop = "{rules: [{from: [{source: {namespaces: [shop]}}]}]}";
    let allow_jobs = "{action: ALLOW, rules: [{from: [{source: {namespaces: [jobs]}}]}]}";
    let allow_nothing = "{}";
    let deny_cart = "{action: DENY, rules: [{from: [{source: {principals: ['*/cart']}}]}]}";
    let deny_nobody = "{action: DENY, rules: [{from: [{source: {namespaces: [nobody]}}]}]}";
    let audit_all = "{action: AUDIT, rules: [{}]}";
    let custom = "{action: CUSTOM, provider: {name: opa}, rules: [{from: [{source: {namespaces: [x]}}]}]}";
    for (specs, expected) in [
        (&[][..], [true, true, true]),
        (&[deny_nobody], [true, true, true]),
        (&[deny_cart], [false, true, true]),
        (&[allow_shop], [true, false, false]),
        (&[allow_shop, allow_jobs], [true, true, false]),
        (&[allow_shop, deny_cart], [false, false, false]),
        (&[deny_cart, allow_shop, allow_jobs], [false, true, false]),
        (&[allow_nothing], [false, false, false]),
        (&[allow_nothing, allow_shop], [true, false, false]),
        (&[audit_all], [true, true, true]),
        (&[audit_all, allow_shop], [true, false, false]),
        (&["{action: DENY, rules: [{}]}", "{rules: [{}]}"], [false, false, false]),
        (&["{rules: [{}]}"], [true, true, true]),
        // Without its provider a CUSTOM policy denies whatever its rules say.
        (&[custom, "{rules: [{}]}"], [false, false, false]),
    ] {
        for (who, expected) in [CART, BATCH, CLEAR].into_iter().zip(expected) {
            assert_eq!(allows(&policies(specs), who), expected, "{specs:?} {who:?}");
        }
    }
}

#[test]
fn a_policy_selects_by_namespace_labels_and_root_namespace() {
    let select = |labels: &str| format!("{{selector: {{matchLabels: {{{labels}}}}}}}");
    let both: &[(&str, &str)] = &[("app", "web"), ("tier", "front")];
    for (policy_namespace, spec, namespace, labels, selects) in [
        ("shop", "{}".to_owned(), "shop", both, true),
        ("shop", "{selector: {}}".to_owned(), "shop", &[], true),
        ("shop", "{}".to_owned(), "jobs", both, false),
        ("shop", select("app: web"), "shop", both, true),
        ("shop", select("app: web, tier: front"), "shop", both, true),
        ("shop", select("app: web, tier: back"), "shop", both, false),
        ("shop", select("app: web"), "shop", &[], false),
        ("shop", select("app: web"), "jobs", both, false),
        ("istio-system", "{}".to_owned(), "shop", &[], true),
        ("istio-system", select("app: web"), "shop", both, true),
        ("istio-system", select("app: web"), "jobs", both, true),
        ("istio-system", select("app: db"), "shop", both, false),
    ] {
        let policies = read(&document(policy_namespace, 0, "", &spec));
        let selected = !policies.authorization(&workload(namespace, labels)).is_empty();
        assert_eq!(selected, selects, "{policy_namespace} {spec} {namespace} {labels:?}");
    }
}

#[test]
fn what_needs_http_never_allows_and_never_spares() {
    let fields = [
        "to: [{operation: {hosts: [a.example]}}]",
        "to: [{operation: {notHosts: [a.example], ports: ['8080']}}]",
        "to: [{operation: {methods: [GET]}}]",
        "to: [{operation: {notMethods: [GET]}}]",
        "to: [{operation: {paths: [/a]}}]",
        "to: [{operation: {notPaths: [/a]}}, {operation: {ports: ['8080']}}]",
        "from: [{source: {requestPrincipals: ['*']}}]",
        "from: [{source: {notRequestPrincipals: ['*'], namespaces: [shop]}}]",
        "from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}, {source: {namespaces: [shop]}}]",
        "from: [{source: {notRemoteIpBlocks: [10.0.0.0/8]}}]",
        "when: [{key: 'request.headers[x-user]', values: [root]}]",
        "when: [{key: request.auth.principal, values: [a]}]",
        "when: [{key: 'request.auth.claims[iss]', notValues: [a]}]",
        "when: [{key: remote.ip, values: [10.0.0.1]}]",
        "when: [{key: connection.sni, values: [a.example]}, {key: source.namespace, values: [shop]}]",
    ];
    for field in fields {
        let allow = policies(&[&format!("{{rules: [{{{field}}}]}}")]);
        assert!(!allows(&allow, CART), "ALLOW {field}");
        let beside =
            policies(&[&format!("{{rules: [{{{field}}}, {{from: [{{source: {{namespaces: [shop]}}}}]}}]}}")]);
        assert!(allows(&beside, CART) && !allows(&beside, BATCH), "ALLOW beside another rule: {field}");
        let deny = policies(&[&format!("{{action: DENY, rules: [{{{field}}}]}}")]);
        assert!(!allows(&deny, CART), "DENY {field}");
        for policies in [allow, deny] {
            assert!(policies.notes().len() == 1 && policies.notes()[0].contains("needs HTTP"), "{field}");
        }
    }
    // The rest of a DENY rule still holds.
    let deny = "{action: DENY, rules: [{from: [{source: {namespaces: [jobs]}}], to: [{operation: {methods: [GET]}}]}]}";
    let deny = policies(&[deny]);
    assert!(allows(&deny, CART) && !allows(&deny, BATCH) && allows(&deny, CLEAR));
}

#[test]
fn a_dry_run_and_a_policy_of_a_waypoint_decide_nothing() {
    let deny_all = "{action: DENY, rules: [{}]}";
    let dry = |value: &str| format!(", annotations: {{istio.io/dry-run: '{value}'}}");
    let watched = read(&document("shop", 0, &dry("true"), deny_all));
    assert!(allows(&watched, CLEAR));
    let authorization = watched.authorization(&workload("shop", &[]));
    let audits: Vec<_> =
        authorization.audits(&flow(FlowSource::Plaintext)).iter().map(ToString::to_string).collect();
    assert_eq!(audits, ["dry run of rule 1 of DENY policy shop/p0"]);
    assert!(!allows(&read(&document("shop", 0, &dry("false"), deny_all)), CLEAR));
    let text = document("shop", 0, &dry("yes"), deny_all);
    assert!(Policies::parse(&text, Path::new("p"), "istio-system").is_err());
    for target in ["targetRefs: [{kind: Gateway, name: waypoint}]", "targetRef: {kind: Service, name: web}"] {
        let policies = policies(&[&format!("{{{target}, action: DENY, rules: [{{}}]}}")]);
        assert!(policies.authorization(&workload("shop", &[])).is_empty());
        assert!(policies.notes()[0].contains("waypoint"), "{:?}", policies.notes());
    }
}

#[test]
fn the_mode_goes_first() {
    let allow_nothing = policies(&["{}"]);
    let authorization = allow_nothing.authorization(&workload("shop", &[]));
    let strict = modes(crate::policy::Mode::Strict);
    let of = |modes: &Modes, source| decide(modes, &authorization, &flow(source));
    assert_eq!(of(&strict, FlowSource::Plaintext), PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict));
    let cart = identity("shop", "cart");
    for mode in [&strict, &modes(crate::policy::Mode::Disable)] {
        assert!(matches!(
            of(mode, FlowSource::SameNode(cart.clone())),
            PolicyVerdict::Deny(PolicyDenial::NotAllowed(_))
        ));
    }
}

#[test]
fn a_denial_names_policy_and_rule() {
    let deny = "{action: DENY, rules: [{from: [{source: {namespaces: [x]}}]}, {}]}";
    for (specs, expected, label) in [
        (&[deny][..], "denied by rule 2 of DENY policy shop/p0", "denied_by_policy"),
        (&["{}", "{}"], "no rule allows it of ALLOW shop/p0, shop/p1", "not_allowed_by_policy"),
    ] {
        let policies = policies(specs);
        let authorization = policies.authorization(&workload("shop", &[]));
        let permissive = modes(crate::policy::Mode::Permissive);
        let PolicyVerdict::Deny(reason) = decide(&permissive, &authorization, &flow(FlowSource::Plaintext))
        else {
            panic!("allowed: {specs:?}")
        };
        assert_eq!((reason.to_string().as_str(), reason.reason().label()), (expected, label));
    }
}

#[test]
fn mistakes_are_refused_with_field_and_remedy() {
    for (spec, problem) in [
        (
            "{action: allow}",
            "spec.action: \"allow\" is none of ALLOW, DENY, AUDIT, CUSTOM: did you mean ALLOW?",
        ),
        ("{action: ''}", "spec.action: \"\" is none of"),
        ("{action: DENY}", "spec: a DENY policy without rules denies nothing"),
        ("{action: DENY, rules: []}", "spec: a DENY policy without rules denies nothing"),
        ("{rule: []}", "spec.rule: unknown field: did you mean `rules`?"),
        ("{rules: {}}", "spec.rules: is a mapping"),
        ("{rules: [form: []]}", "spec.rules[0].form: unknown field: did you mean `from`?"),
        ("{rules: [~]}", "spec.rules[0]: is empty"),
        ("{rules: [{from: []}]}", "spec.rules[0].from: the list is empty"),
        ("{rules: [{to: []}]}", "spec.rules[0].to: the list is empty"),
        ("{rules: [{from: }]}", "spec.rules[0].from: is empty"),
        ("{rules: [{to: ~}]}", "spec.rules[0].to: is empty"),
        ("{rules: [{when: ~}]}", "spec.rules[0].when: is empty"),
        (
            "{rules: [{from: [{source: {namespaces: [shop], principals: }}]}]}",
            "spec.rules[0].from[0].source.principals: is empty",
        ),
        (
            "{rules: [{to: [{operation: {ports: ['80'], paths: }}]}]}",
            "spec.rules[0].to[0].operation.paths: is empty",
        ),
        ("{rules: [{from: [{}]}]}", "spec.rules[0].from[0].source: missing"),
        ("{rules: [{from: [{source: {}}]}]}", "spec.rules[0].from[0].source: says nothing"),
        ("{rules: [{to: [{operation: {ports: }}]}]}", "spec.rules[0].to[0].operation.ports: is empty"),
        (
            "{rules: [{from: [{source: {principals: []}}]}]}",
            "spec.rules[0].from[0].source.principals: the list is empty",
        ),
        (
            "{rules: [{from: [{source: {principals: ['']}}]}]}",
            "spec.rules[0].from[0].source.principals[0]: the text is empty",
        ),
        (
            "{rules: [{from: [{source: {ipBlocks: [10.1.2]}}]}]}",
            "spec.rules[0].from[0].source.ipBlocks[0]: is no address",
        ),
        (
            "{rules: [{to: [{operation: {ports: [80]}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]: 80 is a number where text",
        ),
        (
            "{rules: [{to: [{operation: {ports: ['65536']}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]: \"65536\" is no port",
        ),
        (
            "{rules: [{to: [{operation: {ports: ['+80']}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]: \"+80\" is no port",
        ),
        (
            "{rules: [{when: [{key: source.port, values: [a]}]}]}",
            "spec.rules[0].when[0].key: is no attribute",
        ),
        (
            "{rules: [{when: [{key: 'request.headers[]', values: [a]}]}]}",
            "spec.rules[0].when[0].key: is no attribute",
        ),
        ("{rules: [{when: [{key: source.ip}]}]}", "spec.rules[0].when[0]: has neither values"),
        ("{rules: [{when: [{values: [a]}]}]}", "spec.rules[0].when[0].key: missing"),
        (
            "{rules: [{from: [{source: {serviceAccounts: ['a/b/c']}}]}]}",
            "spec.rules[0].from[0].source.serviceAccounts[0]: \"a/b/c\" is no service",
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: ['a*']}}]}]}",
            "spec.rules[0].from[0].source.serviceAccounts[0]: ",
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}",
            "spec.rules[0].from[0].source: service accounts stand",
        ),
        (
            "{selector: {}, targetRef: {kind: Gateway, name: g}}",
            "spec.targetRef: a policy has a selector or targets",
        ),
        ("{provider: {name: opa}}", "spec.provider: only a CUSTOM policy"),
        ("{action: CUSTOM}", "spec: a CUSTOM policy needs a provider"),
        ("{action: CUSTOM, provider: {}}", "spec.provider.name: missing"),
    ] {
        let list = problems(spec);
        assert!(list.len() == 1 && list[0].starts_with(&format!("line 5: {problem}")), "{spec}: {list:#?}");
    }
    let two = problems(
        "{action: DENIED, rules: [{from: [{source: {ipBlocks: [a, b]}}]}, {to: [{operation: {ports: [x]}}]}]}",
    );
    assert_eq!(two.len(), 4, "{two:#?}");
}

#[test]
fn a_policy_has_a_bounded_number_of_notes() {
    let when = "{key: connection.sni, values: [a]}, ".repeat(100);
    let rules = format!("{{when: [{when}]}}, ").repeat(100);
    let policies = policies(&[&format!("{{action: CUSTOM, provider: {{name: opa}}, rules: [{rules}]}}")]);
    let notes = policies.notes();
    assert_eq!(notes.len(), 7, "{notes:?}");
    assert!(
        notes[0].contains("denies all") && notes[6].ends_with("and 95 more notes on its rules"),
        "{notes:?}"
    );
    assert!(notes.iter().all(|note| note.len() < 300), "{notes:?}");
}

#[test]
fn what_looks_as_if_it_matched_is_noted() {
    for (spec, part) in [
        ("{rules: [{from: [{source: {principals: ['spiffe://a/ns/b/sa/c']}}]}]}", "without spiffe://"),
        ("{rules: [{from: [{source: {namespaces: ['a*b']}}]}]}", "only a `*` at one end"),
        ("{action: AUDIT}", "never matches"),
        ("{action: CUSTOM, provider: {name: opa}}", "denies all"),
    ] {
        let policies = policies(&[spec]);
        let notes = policies.notes();
        assert!(notes.len() == 1 && notes[0].contains(part), "{spec}: {notes:?}");
    }
    assert!(policies(&["{rules: [{from: [{source: {namespaces: ['a*']}}]}]}"]).notes().is_empty());
}
