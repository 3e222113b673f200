//! Objects from a source that knows them one by one: what parses counts, what does not denies what it selects.

use super::*;
use crate::{
    directory::Workload,
    policy::{AuthorizationDecision, Mode, tests::workload},
};

const ORIGIN: Origin<'static> = Origin { name: "p", namespace: None, kind: None };

fn read(text: &str) -> (Policies, Option<Mistakes>) {
    let (object, mistakes) = PolicyObject::read(text, ORIGIN);
    (Policies::of(&[object], "istio-system"), mistakes)
}

fn is_denied(policies: &Policies, workload: &Workload) -> bool {
    let authorization = policies.authorization(workload);
    let flow = crate::policy::Flow {
        source: crate::policy::FlowSource::Plaintext,
        client: "10.77.1.9".parse().expect("an address"),
        destination: "10.77.2.2:80".parse().expect("an address"),
    };
    matches!(authorization.evaluate(&flow), AuthorizationDecision::Denied(_))
}

#[test]
fn an_object_is_read_from_json_as_the_api_server_writes_it() {
    for text in [
        r#"{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"annotations":{"a/b":"{\"x\":[1]}\n"},"creationTimestamp":"2026-01-01T00:00:00Z","generation":2,"managedFields":[{"apiVersion":"security.istio.io/v1","fieldsType":"FieldsV1","fieldsV1":{"f:spec":{".":{},"f:action":{}}},"manager":"kubectl","operation":"Update","time":"2026-01-01T00:00:00Z"}],"name":"deny","namespace":"shop","resourceVersion":"17","uid":"0c5e"},"spec":{"action":"DENY","rules":[{"to":[{"operation":{"ports":["80"]}}]}],"selector":{"matchLabels":{"app":"web"}}}}"#,
        "{\n  \"apiVersion\": \"security.istio.io/v1beta1\",\n  \"kind\": \"AuthorizationPolicy\",\n  \"metadata\": {\n    \"name\": \"deny\",\n    \"namespace\": \"shop\"\n  },\n  \"spec\": {\n    \"action\": \"DENY\",\n    \"selector\": {\"matchLabels\": {\"app\": \"web\"}},\n    \"rules\": [\n      {}\n    ]\n  },\n  \"status\": {}\n}\n",
    ] {
        let (policies, mistakes) = read(text);
        assert_eq!(mistakes, None, "{text}");
        assert!(is_denied(&policies, &workload("shop", &[("app", "web")])));
        assert!(!is_denied(&policies, &workload("shop", &[("app", "db")])));
    }
}

#[test]
fn an_object_that_does_not_parse_denies_what_it_selects_as_far_as_that_can_be_read() {
    let head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n";
    // Expected denials: web of shop, another of shop, web of another namespace.
    let table = [
        (
            format!(
                "{head}metadata: {{name: p, namespace: shop}}\nspec: {{selector: {{matchLabels: {{app: web}}}}, action: DENYY}}\n"
            ),
            [true, false, false],
        ),
        (
            format!("{head}metadata: {{name: p, namespace: shop}}\nspec: {{rules: [{{form: []}}]}}\n"),
            [true, true, false],
        ),
        // A selector that is wrong, or written twice, selects all.
        (
            format!(
                "{head}metadata: {{name: p, namespace: shop}}\nspec: {{selector: {{matchLabel: {{app: web}}}}}}\n"
            ),
            [true, true, false],
        ),
        (
            format!(
                "{head}metadata: {{name: p, namespace: shop}}\nspec: {{selector: {{matchLabels: {{app: web}}}}, selector: {{matchLabels: {{app: db}}}}}}\n"
            ),
            [true, true, false],
        ),
        (
            format!(
                "{head}metadata: {{name: p, namespace: istio-system}}\nspec: {{selector: {{matchLabels: {{app: web}}}}, x: 1}}\n"
            ),
            [true, false, true],
        ),
        (format!("{head}metadata: {{name: p, namespace: istio-system}}\nspec: 7\n"), [true, true, true]),
        // Without a namespace a selector says too little.
        (
            format!("{head}metadata: {{name: p}}\nspec: {{selector: {{matchLabels: {{app: web}}}}}}\n"),
            [true, true, true],
        ),
        ("kind: [".to_owned(), [true, true, true]),
        (String::new(), [true, true, true]),
        (format!("{head}metadata: {{name: p, namespace: shop}}\n---\n{head}"), [true, true, true]),
    ];
    for (text, expected) in table {
        let (policies, mistakes) = read(&text);
        assert!(mistakes.is_some_and(|mistakes| !mistakes.list.is_empty()), "{text}");
        let web: &[(&str, &str)] = &[("app", "web")];
        for ((namespace, labels), expected) in
            [("shop", web), ("shop", &[("app", "x")]), ("jobs", web)].into_iter().zip(expected)
        {
            assert_eq!(
                is_denied(&policies, &workload(namespace, labels)),
                expected,
                "{text}\n{namespace} {labels:?}"
            );
        }
    }
}

#[test]
fn what_the_source_knows_of_an_object_bounds_what_it_denies() {
    let (object, mistakes) =
        PolicyObject::read("kind: [", Origin { name: "p", namespace: Some("shop"), kind: None });
    let policies = Policies::of(&[object], "istio-system");
    assert!(mistakes.is_some());
    assert!(is_denied(&policies, &workload("shop", &[])) && !is_denied(&policies, &workload("jobs", &[])));
    let authorization = policies.authorization(&workload("shop", &[]));
    assert_eq!(authorization.names().collect::<Vec<_>>(), ["shop/p"]);
}

#[test]
fn a_source_that_knows_the_kind_need_not_write_it() {
    let read = |text: &str, kind| {
        let (object, mistakes) =
            PolicyObject::read(text, Origin { name: "p", namespace: Some("shop"), kind: Some(kind) });
        let policies = Policies::of(&[object], "istio-system");
        let web = workload("shop", &[]);
        (mistakes.map(|m| m.list[0].to_string()), is_denied(&policies, &web), policies.modes(&web).default)
    };
    let item = r#"{"metadata":{"name":"p","namespace":"shop"},"spec":{"action":"DENY","rules":[{}]}}"#;
    assert_eq!(read(item, PolicyKind::AuthorizationPolicy), (None, true, Mode::Permissive));
    let item = r#"{"metadata":{"name":"p","namespace":"shop"},"spec":{"mtls":{"mode":"STRICT"}}}"#;
    assert_eq!(read(item, PolicyKind::PeerAuthentication), (None, false, Mode::Strict));
    // The wrong kind, and no text at all: what the source knows decides what it counts as.
    let other = r#"{"kind":"AuthorizationPolicy","metadata":{"name":"p","namespace":"shop"}}"#;
    let problem = Some("line 1: kind: is not the kind of this object: write PeerAuthentication".to_owned());
    assert_eq!(read(other, PolicyKind::PeerAuthentication), (problem, false, Mode::Strict));
    assert!(read("[", PolicyKind::AuthorizationPolicy).1);
}

#[test]
fn a_peer_authentication_that_does_not_parse_is_strict_for_what_it_selects() {
    let text = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\n\
                spec: {selector: {matchLabels: {app: web}}, mtls: {mode: PERMISIVE}}\n";
    let (policies, mistakes) = read(text);
    assert!(mistakes.is_some());
    let mode = |namespace, labels| policies.modes(&workload(namespace, labels)).default;
    assert_eq!(mode("shop", &[("app", "web")]), Mode::Strict);
    assert_eq!(mode("shop", &[]), Mode::Permissive);
    assert_eq!(mode("jobs", &[("app", "web")]), Mode::Permissive);
    assert!(!is_denied(&policies, &workload("shop", &[("app", "web")])));
}

#[test]
fn a_peer_authentication_whose_selector_is_unreadable_is_strict_for_all_it_may_select() {
    let object = |name: &str, namespace: &str, spec: &str| {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {spec}\n"
        );
        PolicyObject::read(&text, Origin { name, namespace: Some(namespace), kind: None }).0
    };
    let older = |namespace: &str| {
        [
            object("default", namespace, "{mtls: {mode: PERMISSIVE}}"),
            object(
                "db",
                namespace,
                "{selector: {matchLabels: {app: db}}, mtls: {mode: DISABLE}, portLevelMtls: {'80': {mode: DISABLE}}}",
            ),
        ]
    };
    let unreadable = "{selector: {matchLabels: {app: '*'}}, mtls: {mode: STRICT}}";
    let (web, db) = ([("app", "web")], [("app", "db")]);
    for (namespace, elsewhere) in [("shop", Mode::Permissive), ("istio-system", Mode::Strict)] {
        let mut objects = older("shop").to_vec();
        objects.extend(older("istio-system"));
        let before = Policies::of(&objects, "istio-system");
        assert_eq!(before.modes(&workload("shop", &web)).default, Mode::Permissive);
        objects.push(object("web", namespace, unreadable));
        let policies = Policies::of(&objects, "istio-system");
        for labels in [&web, &db] {
            assert_eq!(
                policies.modes(&workload("shop", labels)).at(80),
                Mode::Strict,
                "{namespace} {labels:?}"
            );
        }
        assert_eq!(policies.modes(&workload("jobs", &[])).default, elsewhere);
        assert_eq!(policies.mesh_default(), elsewhere);
    }
}

#[test]
fn two_kinds_may_share_a_name_and_two_objects_of_a_kind_may_not() {
    let of = |kind: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\n"
        )
    };
    let parse = |text: &str| Policies::parse(text, Path::new("policy.yaml"), "istio-system");
    assert!(parse(&(of("PeerAuthentication") + &of("AuthorizationPolicy"))).is_ok());
    let twice = parse(&(of("AuthorizationPolicy") + &of("AuthorizationPolicy"))).expect_err("twice");
    assert_eq!(
        twice.to_string(),
        "policy.yaml:6: AuthorizationPolicy shop/p is already in line 2: remove one"
    );
}
