//! Policy files that are accepted or rejected.

use std::path::Path;

use super::*;
use crate::{
    policy::{Modes, Policies, tests::workload},
    yaml::Mistakes,
};

fn read(text: &str) -> Result<Policies, Mistakes> {
    Policies::parse(text, Path::new("policy.yaml"), "istio-system")
}

fn problems(text: &str) -> Vec<String> {
    read(text).expect_err(text).list.iter().map(ToString::to_string).collect()
}

/// A policy in namespace `shop` with this spec, in flow style.
fn with_spec(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n"
    )
}

#[test]
fn examples_of_istios_documentation_are_read() {
    let text = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: foo
spec:
  mtls:
    mode: PERMISSIVE
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: finance
  namespace: foo
spec:
  selector:
    matchLabels:
      app: finance
  mtls:
    mode: STRICT
  portLevelMtls:
    8080:
      mode: DISABLE
    '8443': {}
";
    let policies = read(text).expect("valid");
    let modes = |labels: &[_]| policies.modes(&workload("foo", labels));
    assert_eq!(modes(&[]), Modes { default: Mode::Permissive, ports: BTreeMap::new() });
    let ports = BTreeMap::from([(8080, Mode::Disable), (8443, Mode::Strict)]);
    assert_eq!(modes(&[("app", "finance")]), Modes { default: Mode::Strict, ports });
}

#[test]
fn an_object_exported_from_a_cluster_is_read() {
    let text = "\
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}
  creationTimestamp: \"2026-01-01T00:00:00Z\"
  generation: 1
  managedFields: [{manager: kubectl, fieldsV1: {f:spec: {f:mtls: {}}}}]
  name: default
  namespace: istio-system
  resourceVersion: \"1\"
  uid: 0c5e
spec: {mtls: {mode: STRICT}}
status: {}
";
    assert_eq!(read(text).expect("valid").mesh_default(), Mode::Strict);
    let created_by_hand =
        with_spec("\nstatus:").replace("namespace: shop", "namespace: shop, creationTimestamp: null");
    let by_hand = read(&created_by_hand).expect("valid");
    assert_eq!(by_hand.modes(&workload("shop", &[])).default, Mode::Permissive);
}

#[test]
fn other_kinds_are_refused_by_name() {
    for (kind, problem) in [
        ("RequestAuthentication", "RequestAuthentication is not supported, it needs HTTP: "),
        ("List", "List is not supported: "),
        ("peerauthentication", "\"peerauthentication\" is not supported here: "),
    ] {
        let text = with_spec("{action: DENY, rules: [{}]}")
            .replace("kind: PeerAuthentication", &format!("kind: {kind}"));
        let list = problems(&text);
        assert!(list.len() == 1 && list[0].starts_with(&format!("line 2: kind: {problem}")), "{list:?}");
    }
}

#[test]
fn one_bad_document_refuses_the_file() {
    let text = with_spec("{mtls: {mode: STRICT}}")
        + "---\n"
        + &with_spec("{mtls: {mode: strict}}").replace("name: p", "name: q");
    assert_eq!(
        problems(&text),
        [
            "line 9: spec.mtls.mode: \"strict\" is none of UNSET, DISABLE, PERMISSIVE, STRICT: did you mean STRICT?"
        ]
    );
}

#[test]
fn all_mistakes_are_reported_together() {
    let text = "\
apiVersion: security.istio.io/v2
kind: PeerAuthentication
metadata: {name: P, nmaespace: shop}
spec:
  selector: {matchLabel: {app: web}}
  mtls: STRICT
  mode: STRICT
---
kind: PeerAuthentication
---
just text
---
apiVersion: security.istio.io/v1
spec: {}
";
    let found = problems(text);
    for (line, part) in [
        (1, "apiVersion: \"security.istio.io/v2\" is none of"),
        (3, "metadata.name: \"P\" is no Kubernetes name"),
        (3, "metadata.nmaespace: unknown field: did you mean `namespace`?"),
        (3, "metadata.namespace: missing"),
        (5, "spec.selector.matchLabel: unknown field: did you mean `matchLabels`?"),
        (6, "spec.mtls: is the single value \"STRICT\""),
        (7, "spec.mode: unknown field"),
        (9, "apiVersion: missing"),
        (9, "metadata: missing"),
        (11, "is the single value \"just text\""),
        (13, "kind: missing: write PeerAuthentication or AuthorizationPolicy"),
        (13, "metadata: missing"),
    ] {
        let begins = format!("line {line}: {part}");
        assert!(found.iter().any(|problem| problem.starts_with(&begins)), "{begins}: {found:#?}");
    }
    assert_eq!(found.len(), 12, "{found:#?}");
}

#[test]
fn what_istios_validation_refuses_is_refused() {
    for (spec, problem) in [
        ("{portLevelMtls: {80: {mode: STRICT}}}", "spec.portLevelMtls: ports need a selector"),
        ("{selector: {}, portLevelMtls: {80: {mode: STRICT}}}", "spec.portLevelMtls: ports need a selector"),
        ("{selector: {matchLabels: {a: b}}, portLevelMtls: {}}", "spec.portLevelMtls: the mapping is empty"),
        (
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {}}}",
            "spec.portLevelMtls.0: \"0\" is no port",
        ),
        ("{selector: {matchLabels: {a: b}}, portLevelMtls: {65536: {}}}", "spec.portLevelMtls.65536: "),
        ("{selector: {matchLabels: {a: b}}, portLevelMtls: {+80: {}}}", "spec.portLevelMtls[\"+80\"]: "),
        ("{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {}}}", "spec.portLevelMtls.http: "),
        (
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {80: STRICT}}",
            "spec.portLevelMtls.80: is the single",
        ),
        ("{selector: {matchLabels: {a: '*'}}}", "spec.selector.matchLabels.a: `*` is not supported"),
        ("{selector: {matchLabels: {'a*': b}}}", "spec.selector.matchLabels[\"a*\"]: `*` is not supported"),
        ("{selector: {matchLabels: {'': b}}}", "spec.selector.matchLabels[\"\"]: the label has no name"),
        ("{selector: {matchLabels: {a: 1}}}", "spec.selector.matchLabels.a: 1 is a number"),
        ("{selector: {matchLabels: [a]}}", "spec.selector.matchLabels: is a list"),
    ] {
        let list = problems(&with_spec(spec));
        assert!(list.len() == 1 && list[0].starts_with(&format!("line 4: {problem}")), "{spec}: {list:?}");
    }
}

#[test]
fn ports_written_twice_are_refused_in_any_spelling() {
    let list = problems(&with_spec("{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {}, \"80\": {}}}"));
    assert!(list.len() == 1 && list[0].contains("written twice"), "{list:?}");
    let list = problems(&with_spec("{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {}, 080: {}}}"));
    assert!(list.len() == 1 && list[0].contains("\"080\" is no port"), "{list:?}");
}

#[test]
fn a_repeated_field_is_reported_once() {
    let text =
        with_spec("{mtls: {mode: STRICT}}") + "spec: {mtls: {mode: DISABLE}}\nkind: PeerAuthentication\n";
    assert_eq!(
        problems(&text),
        [
            "line 5: spec: written twice, first in line 4: keep one of them",
            "line 6: kind: written twice, first in line 2: keep one of them",
        ]
    );
}

#[test]
fn a_name_is_given_once() {
    let text = with_spec("{}") + "---\n" + &with_spec("{mtls: {mode: STRICT}}");
    assert_eq!(problems(&text), ["line 6: PeerAuthentication shop/p is already in line 1: remove one"]);
}
