//! Tests of `authority.yaml`: valid files, mistakes, and agreement with the published schema.

use serde_json::Value as Json;

use super::*;

const MINIMAL: &str = "\
trustDomain: cluster.local
root: {secret: {namespace: tacit-system, name: tacit-root}}
bundle: {configMap: tacit-roots}
agents: {serviceAccounts: [tacit-system/tacit-agent]}
";
const STANDALONE: &str = "\
trustDomain: cluster.local
root: {directory: root}
bundle: {file: /run/roots.pem}
agents: {tokens: agents.yaml, directory: directory.yaml}
";

fn parse(text: &str) -> Result<Config, Mistakes> {
    Config::parse(text, Path::new("/etc/tacit/authority.yaml"))
}

fn problems(text: &str) -> Vec<String> {
    parse(text).expect_err(text).list.iter().map(ToString::to_string).collect()
}

#[test]
fn a_minimal_file_gets_the_defaults() {
    let expected = Config {
        trust_domain: TrustDomain::parse("cluster.local").expect("valid"),
        listen: "0.0.0.0:15012".parse().expect("valid"),
        names: vec!["tacit-authority.tacit-system.svc".to_owned()],
        metrics: "127.0.0.1:15020".parse().expect("valid"),
        root: RootStorage::Secret { namespace: "tacit-system".to_owned(), name: "tacit-root".to_owned() },
        bundle: BundleTarget::ConfigMap {
            namespace: "tacit-system".to_owned(),
            name: "tacit-roots".to_owned(),
            key: "root-cert.pem".to_owned(),
        },
        agents: Agents::Kubernetes {
            service_accounts: vec![("tacit-system".to_owned(), "tacit-agent".to_owned())],
            audience: "tacit-authority".to_owned(),
            static_pods: Vec::new(),
        },
        lifetimes: Lifetimes { root: DAY * 3650, intermediate: DAY * 7, leaf: DAY },
        rate: Rate { per_second: 10, burst: 300 },
    };
    assert_eq!(parse(MINIMAL), Ok(expected));
}

#[test]
fn a_standalone_authority_has_files() {
    let config = parse(STANDALONE).expect("valid");
    assert_eq!(config.root, RootStorage::Directory("/etc/tacit/root".into()));
    assert_eq!(config.bundle, BundleTarget::File("/run/roots.pem".into()));
    let agents = Agents::Standalone {
        tokens: "/etc/tacit/agents.yaml".into(),
        directory: "/etc/tacit/directory.yaml".into(),
    };
    assert_eq!(config.agents, agents);
}

#[test]
fn every_field_can_be_set() {
    let text = MINIMAL
        .replace("tacit-root}}", "tacit-root}, lifetime: 100d}")
        .replace("configMap: tacit-roots", "configMap: roots, namespace: mesh, key: ca.pem")
        + "listen: \"[::]:1\"\nnames: [ca.mesh.svc, ca]\nmetrics: 0.0.0.0:2\nleafLifetime: 1h\nintermediateLifetime: 5h\n\
         rate: {perSecond: 1, burst: 2}\nstaticPods: {namespaces: [kube-system, edge]}\n";
    let config = parse(&text).expect("valid");
    assert_eq!((config.listen.port(), config.metrics.port()), (1, 2));
    assert_eq!(config.names, ["ca.mesh.svc", "ca"]);
    assert_eq!(config.lifetimes.root, DAY * 100);
    assert_eq!(config.rate, Rate { per_second: 1, burst: 2 });
    let Agents::Kubernetes { static_pods, .. } = &config.agents else { panic!("not of Kubernetes") };
    assert_eq!(static_pods, &["kube-system", "edge"]);
    let BundleTarget::ConfigMap { namespace, name, key } = config.bundle else { panic!("no ConfigMap") };
    assert_eq!((namespace.as_str(), name.as_str(), key.as_str()), ("mesh", "roots", "ca.pem"));
}

#[test]
fn mistakes_are_named() {
    for (text, problem) in [
        ("{}".to_owned(), "trustDomain: missing"),
        ("{}".to_owned(), "root: missing"),
        ("{}".to_owned(), "bundle: missing"),
        ("{}".to_owned(), "agents: missing"),
        (MINIMAL.replace("root: {secret", "root: {directory: a, secret"), "root: expected exactly one of"),
        (MINIMAL.replace("configMap: tacit-roots", ""), "bundle: expected exactly one of"),
        (STANDALONE.replace("tokens: agents.yaml, ", ""), "agents: expected exactly one of"),
        (STANDALONE.replace("file: /run/roots.pem", "configMap: a"), "bundle: missing namespace"),
        (
            MINIMAL.replace("tacit-system/tacit-agent", "tacit-agent"),
            "agents.serviceAccounts[0]: \"tacit-agent\": invalid",
        ),
        (MINIMAL.replace("[tacit-system/tacit-agent]", "[]"), "agents.serviceAccounts: 0 items"),
        (MINIMAL.to_owned() + "names: []\n", "names: 0 items"),
        (MINIMAL.to_owned() + "leafLifetime: 34h\n", "less than five times leafLifetime"),
        (MINIMAL.to_owned() + "leafLifetime: 10s\nintermediateLifetime: 49s\n", "intermediateLifetime: "),
        (MINIMAL.replace("name: tacit-root}}", "name: tacit-root}, lifetime: 30d}"), "less than five times"),
        (MINIMAL.to_owned() + "rate: {burst: 0}\n", "rate.burst: \"0\": invalid number of requests"),
        (MINIMAL.to_owned() + "metrics: 127.0.0.1:0\n", "port 0"),
        (MINIMAL.to_owned() + "staticPods: {}\n", "staticPods.namespaces: missing: write the namespaces"),
        (MINIMAL.to_owned() + "staticPods: [kube-system]\n", "staticPods: is a list"),
        (
            MINIMAL.to_owned() + "staticPods: {namespaces: []}\n",
            "staticPods.namespaces: 0 items: expected 1 to 16",
        ),
        (
            MINIMAL.to_owned() + "staticPods: {namespaces: kube-system}\n",
            "staticPods.namespaces: is the single value",
        ),
        (
            MINIMAL.to_owned() + "staticPods: {namespaces: [kube-system, \"*\"]}\n",
            "staticPods.namespaces[1]: \"*\": invalid namespace: expected 1 to 63 characters",
        ),
        (
            MINIMAL.to_owned() + "staticPods: {namespaces: [a.b]}\n",
            "staticPods.namespaces[0]: \"a.b\": invalid namespace",
        ),
        (MINIMAL.to_owned() + "staticPods: {namespaces: [\"\"]}\n", "staticPods.namespaces[0]: "),
        (MINIMAL.to_owned() + "staticPods: {namespace: a}\n", "staticPods.namespace: unknown field"),
        (
            STANDALONE.to_owned() + "staticPods: {namespaces: [kube-system]}\n",
            "staticPods: expected with agents.serviceAccounts only",
        ),
    ] {
        let found = problems(&text);
        assert!(found.iter().any(|found| found.contains(problem)), "{problem}: {found:?}");
    }
}

#[test]
fn the_schema_has_the_fields_and_defaults_of_the_code() {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/authority.schema.json"));
    let schema: Json = serde_json::from_str(text).expect("the schema is JSON");
    let properties = &schema["properties"];
    for (schema, fields) in [
        (&schema, &FIELDS[..]),
        (&properties["root"], &ROOT_FIELDS),
        (&properties["bundle"], &BUNDLE_FIELDS),
        (&properties["agents"], &AGENTS_FIELDS),
        (&properties["staticPods"], &STATIC_PODS_FIELDS),
        (&properties["rate"], &RATE_FIELDS),
    ] {
        let mut names: Vec<_> = schema["properties"].as_object().expect("properties").keys().collect();
        let mut fields = fields.to_vec();
        names.sort_unstable();
        fields.sort_unstable();
        assert_eq!(names, fields);
    }
    let namespaces = &properties["staticPods"]["properties"]["namespaces"];
    assert_eq!(namespaces["maxItems"], STATIC_POD_NAMESPACES_MAX);
    for (pointer, default) in [
        ("listen", Json::from(LISTEN.to_string())),
        ("metrics", METRICS.to_string().into()),
        ("names", vec![NAME].into()),
        ("root/properties/lifetime", "3650d".into()),
        ("bundle/properties/key", BUNDLE_KEY.into()),
        ("agents/properties/audience", AUDIENCE.into()),
        ("leafLifetime", "24h".into()),
        ("intermediateLifetime", "7d".into()),
        ("rate/properties/perSecond", RATE.per_second.into()),
        ("rate/properties/burst", RATE.burst.into()),
    ] {
        assert_eq!(
            properties.pointer(&format!("/{pointer}")).expect(pointer)["default"],
            default,
            "{pointer}"
        );
    }
}
