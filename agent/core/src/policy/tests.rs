//! Tables of all combinations: which scope's mode holds, and what is decided.

use super::*;

const MODES: [Option<Mode>; 4] = [None, Some(Mode::Disable), Some(Mode::Permissive), Some(Mode::Strict)];

pub(in crate::policy) fn workload(namespace: &str, labels: &[(&str, &str)]) -> Workload {
    let trust_domain = crate::spiffe::TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: "web".into(),
        namespace: namespace.into(),
        identity: SpiffeId::new(&trust_domain, namespace, "web").expect("valid"),
        addresses: Vec::new(),
        node: "a".into(),
        labels: labels.iter().copied().collect(),
        cgroup: "web".into(),
        protocol: crate::directory::Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Default::default(),
    }
}

pub(in crate::policy) fn modes(everywhere: Mode) -> Modes {
    Modes { default: everywhere, ports: BTreeMap::new() }
}

fn word(mode: Option<Mode>) -> &'static str {
    match mode {
        None => "UNSET",
        Some(Mode::Disable) => "DISABLE",
        Some(Mode::Permissive) => "PERMISSIVE",
        Some(Mode::Strict) => "STRICT",
    }
}

/// A PeerAuthentication as YAML; `spec` is written in flow style.
fn document(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

fn policies(text: &str) -> Policies {
    Policies::parse(text, Path::new("policy.yaml"), "istio-system").expect(text)
}

/// The three ways to leave a mode to the wider scope, and the one to set it.
fn mtls(mode: Option<Mode>) -> Vec<String> {
    let set = format!("mtls: {{mode: {}}}", word(mode));
    if mode.is_some() {
        vec![set]
    } else {
        vec![set, "mtls: {}".to_owned(), "mtls: ".to_owned(), String::new()]
    }
}

#[test]
fn the_narrowest_scope_that_says_something_holds() {
    let web = workload("shop", &[("app", "web"), ("tier", "front")]);
    for mesh in MODES {
        for namespace in MODES {
            for selected in MODES {
                for port in MODES {
                    let text = document("istio-system", "mesh", &mtls(mesh)[0])
                        + &document("shop", "namespace", &mtls(namespace)[0])
                        + &document(
                            "shop",
                            "selected",
                            &format!(
                                "selector: {{matchLabels: {{app: web}}}}, {}, portLevelMtls: {{80: {{mode: {}}}}}",
                                mtls(selected)[0],
                                word(port)
                            ),
                        );
                    let modes = policies(&text).modes(&web);
                    let default = selected.or(namespace).or(mesh).unwrap_or(Mode::Permissive);
                    assert_eq!(modes.at(81), default, "{text}");
                    assert_eq!(modes.at(80), port.unwrap_or(default), "{text}");
                }
            }
        }
    }
}

#[test]
fn an_absent_policy_says_what_unset_says() {
    let web = workload("shop", &[("app", "web")]);
    for mesh in MODES {
        for namespace in MODES {
            for spec_mesh in mtls(mesh) {
                for spec_namespace in mtls(namespace) {
                    let text =
                        document("istio-system", "m", &spec_mesh) + &document("shop", "n", &spec_namespace);
                    let expected = namespace.or(mesh).unwrap_or(Mode::Permissive);
                    assert_eq!(policies(&text).modes(&web).at(80), expected, "{text}");
                }
            }
        }
    }
    for text in ["", "---\n", "# nothing\n---\n---\n"] {
        assert_eq!(policies(text).modes(&web), Modes { default: Mode::Permissive, ports: BTreeMap::new() });
    }
    assert_eq!(Policies::default().modes(&web).at(80), Mode::Permissive);
}

#[test]
fn no_policy_sets_a_mode_below_the_minimum() {
    let web = workload("shop", &[("app", "web")]);
    let text = document("istio-system", "m", "mtls: {mode: DISABLE}")
        + &document("shop", "n", "mtls: {mode: PERMISSIVE}")
        + &document(
            "shop",
            "w",
            "selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}",
        );
    let other = workload("cart", &[]);
    for (minimum, mesh, port) in [
        (Mode::Disable, Mode::Disable, Mode::Disable),
        (Mode::Permissive, Mode::Permissive, Mode::Permissive),
        (Mode::Strict, Mode::Strict, Mode::Strict),
    ] {
        let raised = policies(&text).with_minimum(minimum);
        assert_eq!((raised.mesh_default(), raised.modes(&other).default), (mesh, mesh), "{minimum:?}");
        let modes = raised.modes(&web);
        assert_eq!((modes.default, modes.at(80)), (Mode::Strict, port), "{minimum:?}");
        assert_eq!(raised.written_modes(&web).at(80), Mode::Disable, "what was written stays known");
    }
    for (minimum, web_is_raised, other_is_raised) in
        [(Mode::Disable, false, false), (Mode::Permissive, true, false), (Mode::Strict, true, true)]
    {
        let raised = policies(&document("shop", "w", "mtls: {mode: DISABLE}")).with_minimum(minimum);
        assert_eq!((raised.is_raised(&web), raised.is_raised(&other)), (web_is_raised, other_is_raised));
    }
    let strict = Policies::default().with_minimum(Mode::Strict);
    assert_eq!(strict.modes(&web), modes(Mode::Strict));
    assert!(strict.may_be_strict() && !Policies::default().may_be_strict());
}

#[test]
fn a_policy_that_makes_anything_strict_is_known() {
    for (text, expected) in [
        (document("shop", "p", "mtls: {mode: PERMISSIVE}"), false),
        (document("shop", "p", "mtls: {mode: STRICT}"), true),
        (document("istio-system", "p", "mtls: {mode: STRICT}"), true),
        (document("shop", "p", "selector: {matchLabels: {a: b}}, mtls: {mode: STRICT}"), true),
        (document("shop", "p", "selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: STRICT}}"), true),
        (
            document("shop", "p", "selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: DISABLE}}"),
            false,
        ),
    ] {
        assert_eq!(policies(&text).may_be_strict(), expected, "{text}");
    }
}

#[test]
fn a_selector_needs_every_label_and_its_own_namespace() {
    let strict = |namespace, labels| {
        policies(&document(
            namespace,
            "p",
            &format!("selector: {{matchLabels: {{{labels}}}}}, mtls: {{mode: STRICT}}"),
        ))
    };
    let both: &[(&str, &str)] = &[("app", "web"), ("tier", "front")];
    for (policy, namespace, labels, expected) in [
        (strict("shop", "app: web"), "shop", both, Mode::Strict),
        (strict("shop", "app: web, tier: front"), "shop", both, Mode::Strict),
        (strict("shop", "app: web, tier: back"), "shop", both, Mode::Permissive),
        (strict("shop", "app: web, zone: x"), "shop", both, Mode::Permissive),
        (strict("shop", "app: db"), "shop", both, Mode::Permissive),
        (strict("shop", "app: web"), "shop", &[], Mode::Permissive),
        (strict("shop", "app: web"), "cart", both, Mode::Permissive),
        // No selector, spelt with an empty one: the whole namespace.
        (strict("shop", ""), "shop", &[], Mode::Strict),
        // With a selector the root namespace is a namespace like any other.
        (strict("istio-system", "app: web"), "shop", both, Mode::Permissive),
        (strict("istio-system", "app: web"), "istio-system", both, Mode::Strict),
        (strict("istio-system", ""), "shop", &[], Mode::Strict),
    ] {
        assert_eq!(
            policy.modes(&workload(namespace, labels)).default,
            expected,
            "{policy:?} {namespace} {labels:?}"
        );
    }
}

#[test]
fn the_first_policy_of_a_scope_wins_even_unset() {
    let select = "selector: {matchLabels: {app: web}}, ";
    let web = workload("shop", &[("app", "web")]);
    for (namespace, selector) in [("istio-system", ""), ("shop", ""), ("shop", select)] {
        for first in MODES {
            for second in MODES {
                let spec = |mode| format!("{selector}mtls: {{mode: {}}}", word(mode));
                let text =
                    document(namespace, "one", &spec(first)) + &document(namespace, "two", &spec(second));
                assert_eq!(policies(&text).modes(&web).default, first.unwrap_or(Mode::Permissive), "{text}");
            }
        }
    }
}

#[test]
fn another_root_namespace_can_be_named() {
    let text = document("mesh", "m", "mtls: {mode: STRICT}")
        + &document("istio-system", "n", "mtls: {mode: DISABLE}");
    let policies = Policies::parse(&text, Path::new("policy.yaml"), "mesh").expect("valid");
    assert_eq!(policies.modes(&workload("shop", &[])).default, Mode::Strict);
    assert_eq!(policies.modes(&workload("istio-system", &[])).default, Mode::Disable);
}

#[test]
fn plaintext_is_denied_in_strict_and_nothing_else_is() {
    let id = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid");
    let deny = PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict);
    for (mode, plaintext) in [
        (Mode::Disable, PolicyVerdict::Allow),
        (Mode::Permissive, PolicyVerdict::Allow),
        (Mode::Strict, deny),
    ] {
        for (source, expected) in [
            (FlowSource::Tunnel(id.clone()), PolicyVerdict::Allow),
            (FlowSource::SameNode(id.clone()), PolicyVerdict::Allow),
            (FlowSource::Plaintext, plaintext.clone()),
        ] {
            let asked = Flow {
                source,
                client: "10.77.1.9".parse().expect("an address"),
                destination: "10.77.2.2:80".parse().expect("an address"),
            };
            let none = Authorization::default();
            assert_eq!(decide(&modes(mode), &none, &asked), expected, "{mode:?} {asked:?}");
            for other in MODES.into_iter().flatten() {
                let port = Modes { default: other, ports: BTreeMap::from([(80, mode)]) };
                let met = decide(&port, &none, &asked);
                assert_eq!(met, expected, "{mode:?} on the port, {other:?} elsewhere");
            }
        }
    }
}
