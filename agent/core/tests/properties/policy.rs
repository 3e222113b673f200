//! Selectors and authorization against a model that follows Istio's documentation word by word, and the parser of policies.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Map, Value, json};
use tacit_core::{
    directory::{Labels, Protocol, Workload},
    policy::{Flow, FlowSource, Mode, Modes, Origin, Policies, PolicyObject, PolicyVerdict, decide},
    spiffe::{SpiffeId, TrustDomain},
};

use crate::damage::{assert_lines, damaged};

const ROOT: &str = "istio-system";
const NAMESPACES: [&str; 3] = ["shop", "jobs", ROOT];
const PRINCIPALS: [&str; 6] = [
    "cluster.local/ns/shop/sa/web",
    "cluster.local/ns/jobs/sa/batch",
    "cluster.local/ns/shop/*",
    "*/sa/batch",
    "*",
    "cluster.local",
];
const BLOCKS: [&str; 5] = ["10.77.1.1", "10.77.1.9/30", "10.77.0.0/16", "fd77::/16", "0.0.0.0/0"];
const CLIENTS: [&str; 4] = ["10.77.1.1", "10.77.1.9", "10.78.0.1", "fd77::9"];
const PORTS: [&str; 2] = ["80", "443"];

/// A list of a rule and its negation.
type Lists = (Vec<&'static str>, Vec<&'static str>);

/// One rule; a source or operation without a list is left out.
#[derive(Debug, Clone)]
struct Rule {
    sources: Vec<Source>,
    /// Ports of each operation.
    operations: Vec<Lists>,
}

/// One source of a rule.
#[derive(Debug, Clone)]
struct Source {
    principals: Lists,
    namespaces: Lists,
    blocks: Lists,
}

/// One policy of random scope.
#[derive(Debug, Clone)]
struct Policy {
    namespace: &'static str,
    labels: BTreeMap<String, String>,
    is_allow: bool,
    rules: Vec<Rule>,
}

fn lists<const N: usize>(of: [&'static str; N]) -> impl Strategy<Value = Lists> {
    (vec(select(of.to_vec()), 0..3), vec(select(of.to_vec()), 0..2))
}

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    proptest::collection::btree_map("[ab]", "[xy]?", 0..3)
}

/// Mostly absent, so that sources with one field are frequent: the parser joins those.
fn some_lists<const N: usize>(of: [&'static str; N]) -> impl Strategy<Value = Lists> {
    prop_oneof![2 => Just((Vec::new(), Vec::new())), 1 => lists(of)]
}

fn is_absent((any, none): &Lists) -> bool {
    any.is_empty() && none.is_empty()
}

fn source() -> impl Strategy<Value = Source> {
    (some_lists(PRINCIPALS), some_lists(NAMESPACES), some_lists(BLOCKS))
        .prop_map(|(principals, namespaces, blocks)| Source { principals, namespaces, blocks })
}

fn rule() -> impl Strategy<Value = Rule> {
    (vec(source(), 0..4), vec(lists(PORTS), 0..3)).prop_map(|(mut sources, mut operations)| {
        sources.retain(|source| {
            ![&source.principals, &source.namespaces, &source.blocks].into_iter().all(is_absent)
        });
        operations.retain(|ports| !is_absent(ports));
        Rule { sources, operations }
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    let some = (select(&NAMESPACES), labels(), any::<bool>(), vec(rule(), 0..3));
    let some =
        some.prop_map(|(namespace, labels, is_allow, rules)| Policy { namespace, labels, is_allow, rules });
    some.prop_filter("a DENY policy has rules", |policy| policy.is_allow || !policy.rules.is_empty())
}

fn list(object: &mut Map<String, Value>, name: &str, values: &[&str]) {
    if !values.is_empty() {
        object.insert(name.to_owned(), json!(values));
    }
}

fn holds((any, none): &Lists, is: impl Fn(&str) -> bool) -> bool {
    (any.is_empty() || any.iter().any(|value| is(value))) && none.iter().all(|value| !is(value))
}

impl Source {
    fn json(&self) -> Value {
        let mut source = Map::new();
        list(&mut source, "principals", &self.principals.0);
        list(&mut source, "notPrincipals", &self.principals.1);
        list(&mut source, "namespaces", &self.namespaces.0);
        list(&mut source, "notNamespaces", &self.namespaces.1);
        list(&mut source, "ipBlocks", &self.blocks.0);
        list(&mut source, "notIpBlocks", &self.blocks.1);
        json!({ "source": source })
    }

    fn matches(&self, identity: Option<&SpiffeId>, client: IpAddr) -> bool {
        let principal = identity.map(|id| id.to_string().replace("spiffe://", ""));
        let is_in = |block: &str| match block.parse::<IpNet>() {
            Ok(net) => net.contains(&client),
            Err(_) => block.parse() == Ok(client),
        };
        holds(&self.principals, |pattern| principal.as_ref().is_some_and(|own| is_like(pattern, own)))
            && holds(&self.namespaces, |pattern| identity.is_some_and(|id| is_like(pattern, id.namespace())))
            && holds(&self.blocks, is_in)
    }
}

impl Rule {
    fn json(&self) -> Value {
        let mut rule = Map::new();
        if !self.sources.is_empty() {
            rule.insert("from".to_owned(), self.sources.iter().map(Source::json).collect());
        }
        let operations: Vec<Value> = self
            .operations
            .iter()
            .map(|ports| {
                let mut operation = Map::new();
                list(&mut operation, "ports", &ports.0);
                list(&mut operation, "notPorts", &ports.1);
                json!({ "operation": operation })
            })
            .collect();
        if !operations.is_empty() {
            rule.insert("to".to_owned(), operations.into());
        }
        Value::Object(rule)
    }

    fn matches(&self, identity: Option<&SpiffeId>, client: IpAddr, port: u16) -> bool {
        let from = self.sources.iter().any(|source| source.matches(identity, client));
        let to = self.operations.iter().any(|ports| holds(ports, |value| value.parse() == Ok(port)));
        (self.sources.is_empty() || from) && (self.operations.is_empty() || to)
    }
}

/// `*`, `prefix*`, `*suffix` or the exact text.
fn is_like(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        Some((start, end)) => text.starts_with(start) && text.ends_with(end),
        None => pattern == text,
    }
}

impl Policy {
    fn json(&self, number: usize) -> String {
        let rules: Vec<Value> = self.rules.iter().map(Rule::json).collect();
        let document = json!({
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("p{number}"), "namespace": self.namespace},
            "spec": {
                "selector": {"matchLabels": self.labels},
                "action": if self.is_allow { "ALLOW" } else { "DENY" },
                "rules": rules,
            },
        });
        format!("---\n{document}\n")
    }

    fn selects(&self, workload: &Workload) -> bool {
        (self.namespace == ROOT || *self.namespace == *workload.namespace) && has_all(&self.labels, workload)
    }
}

fn has_all(labels: &BTreeMap<String, String>, workload: &Workload) -> bool {
    labels.iter().all(|label| workload.labels.iter().any(|own| own == (label.0.as_str(), label.1.as_str())))
}

fn identity(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::parse("cluster.local").expect("a domain"), namespace, account).expect("names")
}

fn workload() -> impl Strategy<Value = Workload> {
    (select(&NAMESPACES), labels()).prop_map(|(namespace, labels)| Workload {
        name: "server".into(),
        namespace: namespace.into(),
        identity: identity(namespace, "server"),
        addresses: vec![IpAddr::from([10, 77, 2, 2])],
        node: "node-b".into(),
        labels: labels.into_iter().collect::<Labels>(),
        cgroup: "server".into(),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Default::default(),
    })
}

fn client() -> impl Strategy<Value = Option<SpiffeId>> {
    option::of(
        (select(&NAMESPACES), select(vec!["web", "batch"])).prop_map(|(ns, account)| identity(ns, account)),
    )
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Disable), Just(Mode::Permissive), Just(Mode::Strict)]
}

fn read(text: &str) -> Policies {
    Policies::parse(text, Path::new("policy.yaml"), ROOT)
        .unwrap_or_else(|mistakes| panic!("{mistakes}\n{text}"))
}

const FILE: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: web, namespace: shop}
spec:
  selector:
    matchLabels: {app: web}
  mtls: {mode: STRICT}
  portLevelMtls: {8080: {mode: DISABLE}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: web
  namespace: shop
  annotations: {istio.io/dry-run: \"true\"}
spec:
  action: DENY
  rules:
  - from:
    - source: {principals: [\"*\"], notNamespaces: [jobs], ipBlocks: [10.0.0.0/8]}
    to: [{operation: {ports: [\"80\"], notPorts: [\"443\"]}}]
    when: [{key: source.ip, notValues: [10.1.2.3]}]
";

/// The second document of the file.
fn object() -> &'static str {
    FILE.split("---\n").nth(1).expect("two documents")
}

proptest! {
    #![proptest_config(crate::config())]

    #[test]
    fn the_verdict_on_a_flow_agrees_with_the_rules_as_documented(
        policies in vec(policy(), 0..4), workload in workload(), mode in mode(), client_identity in client(),
        client in select(&CLIENTS), port in select(vec![80_u16, 443, 8080]),
    ) {
        let text: String = policies.iter().enumerate().map(|(number, policy)| policy.json(number)).collect();
        let authorization = read(&text).authorization(&workload);
        let modes = Modes { default: mode, ports: BTreeMap::new() };
        let client: IpAddr = client.parse().expect("an address");
        let source = match &client_identity {
            Some(id) => FlowSource::Tunnel(id.clone()),
            None => FlowSource::Plaintext,
        };
        let flow = Flow { source, client, destination: (workload.addresses[0], port).into() };

        let selecting: Vec<&Policy> = policies.iter().filter(|policy| policy.selects(&workload)).collect();
        let matches = |policy: &&&Policy| {
            policy.rules.iter().any(|rule| rule.matches(client_identity.as_ref(), client, port))
        };
        let is_denied = selecting.iter().filter(|policy| !policy.is_allow).any(|policy| matches(&policy));
        let mut allows = selecting.iter().filter(|policy| policy.is_allow).peekable();
        let is_allowed = allows.peek().is_none() || allows.any(|policy| matches(&policy));
        let expected = match flow.source {
            FlowSource::Plaintext if mode == Mode::Strict => false,
            _ => !is_denied && is_allowed,
        };
        prop_assert_eq!(authorization.is_empty(), selecting.is_empty());
        prop_assert_eq!(decide(&modes, &authorization, &flow) == PolicyVerdict::Allow, expected, "{}", text);
    }

    #[test]
    fn a_mode_holds_for_the_workloads_of_its_namespace_that_have_its_labels(
        workload in workload(), labels in labels(), namespace in select(&NAMESPACES), ports in any::<bool>(),
    ) {
        let selector = json!({"matchLabels": labels});
        let mut spec = json!({"selector": selector, "mtls": {"mode": "STRICT"}});
        if ports && !labels.is_empty() {
            spec["portLevelMtls"] = json!({"80": {"mode": "DISABLE"}});
        }
        let document = json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": namespace}, "spec": spec,
        });
        let modes = read(&document.to_string()).modes(&workload);
        let is_selected = (*workload.namespace == *namespace || labels.is_empty() && namespace == ROOT)
            && has_all(&labels, &workload);
        let strict = if is_selected { Mode::Strict } else { Mode::Permissive };
        prop_assert_eq!(modes.at(443), strict);
        let has_port = is_selected && ports && !labels.is_empty();
        prop_assert_eq!(modes.at(80), if has_port { Mode::Disable } else { strict });
    }

    #[test]
    fn a_damaged_policy_file_is_read_or_refused_with_lines_of_the_file(text in damaged(FILE)) {
        if let Err(mistakes) = Policies::parse(&text, Path::new("policy.yaml"), ROOT) {
            assert_lines(&text, &mistakes)?;
        }
    }

    #[test]
    fn a_damaged_object_denies_what_it_selects(text in damaged(object()), workload in workload()) {
        let origin = Origin { name: "web", namespace: Some(&workload.namespace), kind: None };
        let (object, mistakes) = PolicyObject::read(&text, origin);
        let Some(mistakes) = mistakes else { return Ok(()) };
        assert_lines(&text, &mistakes)?;
        let all = Workload { labels: Labels::default(), ..workload };
        let policies = Policies::of(&[object], ROOT);
        let flow = Flow { source: FlowSource::Plaintext, client: all.addresses[0], destination: (all.addresses[0], 80).into() };
        let verdict_is_allow = decide(&policies.modes(&all), &policies.authorization(&all), &flow) == PolicyVerdict::Allow;
        prop_assert!(!verdict_is_allow, "{}", text);
    }
}
