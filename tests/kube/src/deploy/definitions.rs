//! The definitions of policies in `deploy/crds`: the fields of Istio 1.32, and unknown fields are kept.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{read_objects, tests::workspace};

/// Fields of AuthorizationPolicy's spec, each with the fields below it.
const AUTHORIZATION: [(&str, &[&str]); 9] = [
    ("", &["action", "provider", "rules", "selector", "targetRef", "targetRefs"]),
    ("provider", &["name"]),
    ("selector", &["matchLabels"]),
    ("targetRef", &["group", "kind", "name", "namespace"]),
    ("targetRefs", &["group", "kind", "name", "namespace"]),
    ("rules", &["from", "from.source", "to", "to.operation", "when"]),
    (
        "rules.from.source",
        &[
            "ipBlocks",
            "namespaces",
            "notIpBlocks",
            "notNamespaces",
            "notPrincipals",
            "notRemoteIpBlocks",
            "notRequestPrincipals",
            "notServiceAccounts",
            "notTrustDomains",
            "principals",
            "remoteIpBlocks",
            "requestPrincipals",
            "serviceAccounts",
            "trustDomains",
        ],
    ),
    (
        "rules.to.operation",
        &["hosts", "methods", "notHosts", "notMethods", "notPaths", "notPorts", "paths", "ports"],
    ),
    ("rules.when", &["key", "notValues", "values"]),
];

/// Fields of PeerAuthentication's spec.
const PEER_AUTHENTICATION: [(&str, &[&str]); 4] = [
    ("", &["mtls", "portLevelMtls", "selector"]),
    ("mtls", &["mode"]),
    ("portLevelMtls", &["mode"]),
    ("selector", &["matchLabels"]),
];

/// Paths of objects whose fields change what a policy means: a field that is dropped there makes a policy wider.
const RESTRICTING: [&str; 9] = [
    "",
    "rules",
    "rules.from",
    "rules.from.source",
    "rules.to",
    "rules.to.operation",
    "rules.when",
    "mtls",
    "portLevelMtls",
];

#[test]
fn definitions_have_the_fields_of_istio_and_keep_unknown_ones() {
    for (file, expected) in
        [("authorizationpolicies", &AUTHORIZATION[..]), ("peerauthentications", &PEER_AUTHENTICATION)]
    {
        let path = workspace().root().join(format!("deploy/crds/{file}.yaml"));
        let definition = read_objects(&path).expect("objects").remove(0);
        for version in definition["spec"]["versions"].as_array().expect("versions") {
            let mut found = Found::default();
            found.walk(&version["schema"]["openAPIV3Schema"]["properties"]["spec"], "");
            let names: BTreeSet<String> =
                expected.iter().flat_map(|(path, names)| names.iter().map(|name| join(path, name))).collect();
            assert_eq!(found.fields, names, "{file} {}", version["name"]);
            let wanted: BTreeSet<&str> =
                RESTRICTING.into_iter().filter(|path| path.is_empty() || names.contains(*path)).collect();
            let dropping: Vec<_> = wanted.iter().filter(|path| !found.keeping.contains(**path)).collect();
            assert!(dropping.is_empty(), "{file}: unknown fields are dropped in {dropping:?}");
        }
    }
}

/// The fields of a schema.
#[derive(Default)]
struct Found {
    /// Paths of all fields. Items of lists and values of maps have the path of their list or map.
    fields: BTreeSet<String>,
    /// Paths of the objects that keep unknown fields.
    keeping: BTreeSet<String>,
}

impl Found {
    fn walk(&mut self, schema: &Value, path: &str) {
        if schema["x-kubernetes-preserve-unknown-fields"] == json!(true) {
            self.keeping.insert(path.to_owned());
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = join(path, name);
            self.walk(field, &path);
            self.fields.insert(path);
        }
        for part in ["items", "additionalProperties"] {
            if schema[part].is_object() {
                self.walk(&schema[part], path);
            }
        }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
