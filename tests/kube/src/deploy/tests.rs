//! Checks of the promises about `deploy/` against its files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde_json::{Value, json};

use super::{chart::files, *};

pub(super) fn workspace() -> Workspace {
    Workspace::find().expect("workspace")
}

/// Kind, namespace and name decide which object it is.
pub(super) fn by_name(objects: Vec<Value>) -> BTreeMap<String, Value> {
    let key = |object: &Value| format!("{} {}", object["metadata"]["namespace"], name_of(object));
    let count = objects.len();
    let named: BTreeMap<String, Value> = objects.into_iter().map(|object| (key(&object), object)).collect();
    assert_eq!(named.len(), count, "two objects of one name");
    named
}

#[test]
fn chart_and_base_render_the_same_objects() {
    let base = by_name(base(&workspace()).expect("base"));
    let whole = json!({"namespace": {"create": true}});
    let chart = by_name(chart::objects(&workspace(), NAMESPACE, &whole).expect("chart"));
    assert_eq!(base.keys().collect::<Vec<_>>(), chart.keys().collect::<Vec<_>>());
    for (name, object) in &base {
        assert_eq!(object, &chart[name], "{name}");
    }
}

#[test]
fn values_reach_the_objects() {
    let changed = json!({
        "image": {"repository": "registry.example/tacit", "tag": "2"},
        "trustDomain": "example.org",
        "authority": {"replicas": 3, "staticPodNamespaces": ["kube-system"]},
    });
    let objects = by_name(chart::objects(&workspace(), "mesh", &changed).expect("chart"));
    let agent = &objects["\"mesh\" DaemonSet/tacit-agent"];
    assert_eq!(agent["spec"]["template"]["spec"]["containers"][0]["image"], "registry.example/tacit:2");
    assert_eq!(objects["\"mesh\" Deployment/tacit-authority"]["spec"]["replicas"], 3);
    let config = objects["\"mesh\" ConfigMap/tacit-agent"]["data"]["tacit.yaml"].as_str().expect("text");
    assert!(config.contains("trustDomain: example.org\n"), "{config}");
    let config =
        objects["\"mesh\" ConfigMap/tacit-authority"]["data"]["authority.yaml"].as_str().expect("text");
    let static_pods = json!({"namespaces": ["kube-system"]});
    assert_eq!(parse(config).expect("YAML")["staticPods"], static_pods, "{config}");
    assert!(!objects.keys().any(|name| name.contains("Namespace/")), "made by --create-namespace");
}

#[test]
fn revocation_lists_are_mounted_where_the_agent_reads_them() {
    let with = |crl: Value| {
        let objects = chart::objects(&workspace(), "mesh", &json!({ "crl": crl })).expect("chart");
        let objects = by_name(objects);
        let spec = objects["\"mesh\" DaemonSet/tacit-agent"]["spec"]["template"]["spec"].clone();
        let text = objects["\"mesh\" ConfigMap/tacit-agent"]["data"]["tacit.yaml"].as_str().expect("text");
        (parse(text).expect("YAML")["crl"].clone(), spec)
    };
    let named =
        |list: &Value| list.as_array().expect("a list").iter().find(|entry| entry["name"] == "crl").cloned();
    let (config, spec) = with(json!({}));
    assert_eq!((config, named(&spec["volumes"])), (Value::Null, None));
    let (config, spec) = with(json!({"configMap": "lists", "key": "all.pem", "unknownStatus": "ALLOW"}));
    assert_eq!(config, json!({"file": "/var/run/tacit/crl/all.pem", "unknownStatus": "ALLOW"}));
    let volume = named(&spec["volumes"]).expect("a volume");
    assert_eq!(volume, json!({"name": "crl", "configMap": {"name": "lists"}}), "not optional");
    let mount = named(&spec["containers"][0]["volumeMounts"]).expect("a mount");
    assert_eq!(mount, json!({"name": "crl", "mountPath": "/var/run/tacit/crl", "readOnly": true}));
}

#[test]
fn trust_domains_reach_the_configuration_with_their_roots() {
    let domains =
        json!([{"trustDomain": "partner.example", "rootFile": "/var/run/tacit/federation/partner.pem"}]);
    let changed = json!({
        "trustDomainAliases": ["old.example"],
        "federation": {"configMap": "roots", "domains": domains},
    });
    let objects = by_name(chart::objects(&workspace(), "mesh", &changed).expect("chart"));
    let text = objects["\"mesh\" ConfigMap/tacit-agent"]["data"]["tacit.yaml"].as_str().expect("text");
    let config = parse(text).expect("YAML");
    assert_eq!((&config["trustDomainAliases"], &config["federation"]), (&json!(["old.example"]), &domains));
    let spec = &objects["\"mesh\" DaemonSet/tacit-agent"]["spec"]["template"]["spec"];
    let volumes = spec["volumes"].as_array().expect("a list");
    assert!(volumes.contains(&json!({"name": "federation", "configMap": {"name": "roots"}})), "{volumes:?}");
    let mounts = spec["containers"][0]["volumeMounts"].as_array().expect("a list");
    let mount = json!({"name": "federation", "mountPath": "/var/run/tacit/federation", "readOnly": true});
    assert!(mounts.contains(&mount), "{mounts:?}");
}

#[test]
fn spire_takes_the_place_of_the_authority() {
    let changed = json!({"spire": {"socketFolder": "/run/spire/admin-sockets"}});
    let objects = by_name(chart::objects(&workspace(), "mesh", &changed).expect("chart"));
    let config = objects["\"mesh\" ConfigMap/tacit-agent"]["data"]["tacit.yaml"].as_str().expect("text");
    let socket = "/var/run/tacit/spire/admin.sock";
    assert_eq!(parse(config).expect("YAML")["issuer"], json!({"spire": {"socket": socket}}), "{config}");
    let pod = &objects["\"mesh\" DaemonSet/tacit-agent"]["spec"]["template"]["spec"];
    let named = |list: &Value| -> Vec<Value> {
        let list = list.as_array().expect("a list");
        list.iter().filter(|one| one["name"] == "spire").cloned().collect()
    };
    let volume =
        json!({"name": "spire", "hostPath": {"path": "/run/spire/admin-sockets", "type": "Directory"}});
    assert_eq!(named(&pod["volumes"]), [volume]);
    let mount = json!({"name": "spire", "mountPath": "/var/run/tacit/spire", "readOnly": true});
    assert_eq!(named(&pod["containers"][0]["volumeMounts"]), [mount]);
    let of_authority = ["Deployment", "Service", "ConfigMap", "PodDisruptionBudget"];
    for kind in of_authority {
        assert!(!objects.contains_key(&format!("\"mesh\" {kind}/tacit-authority")), "{kind}");
    }
    // Without SPIRE they are there.
    let objects = by_name(chart::objects(&workspace(), "mesh", &json!({})).expect("chart"));
    for kind in of_authority {
        assert!(objects.contains_key(&format!("\"mesh\" {kind}/tacit-authority")), "{kind}");
    }
}

/// Helm checks values with the patterns that the agent checks its configuration with, and knows every value.
#[test]
fn the_schema_of_values_is_that_of_the_configuration() {
    let root = workspace().root().join("deploy");
    let json = |path: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(root.join(path)).expect("text")).expect("JSON")
    };
    let (schema, config) = (json("helm/tacit/values.schema.json"), json("config.schema.json"));
    let fields = |schema: &Value| schema["properties"].clone();
    for name in ["trustDomain", "podsCgroup", "meshRanges", "serviceRanges", "allowClear", "minimumMode"] {
        let (value, field) = (&fields(&schema)[name], &fields(&config)[name]);
        assert_eq!(value["pattern"], field["pattern"], "{name}");
        assert_eq!(value["maxItems"], field["maxItems"], "{name}");
        assert_eq!(value["enum"], field["enum"], "{name}");
        assert_eq!(value["items"]["pattern"], field["items"]["pattern"], "{name}");
    }
    let namespaces =
        |schema: &Value, name: &str, list: &str| fields(schema)[name]["properties"][list].clone();
    let value = namespaces(&schema, "authority", "staticPodNamespaces");
    let field = namespaces(&json("authority.schema.json"), "staticPods", "namespaces");
    assert_eq!((&value["items"], &value["maxItems"]), (&field["items"], &field["maxItems"]));
    let values =
        parse(&fs::read_to_string(root.join("helm/tacit/values.yaml")).expect("text")).expect("YAML");
    every_value_is_known(&values, &schema, "values");
}

fn every_value_is_known(values: &Value, schema: &Value, path: &str) {
    let Some(properties) = schema["properties"].as_object() else { return };
    assert_eq!(schema["additionalProperties"], json!(false), "{path}: unknown keys are accepted");
    for (key, value) in values.as_object().into_iter().flatten() {
        let known =
            properties.get(key).unwrap_or_else(|| panic!("{path}.{key} is not in values.schema.json"));
        every_value_is_known(value, known, &format!("{path}.{key}"));
    }
}

#[test]
fn apparmor_is_a_field_or_on_old_servers_an_annotation() {
    let agent = |annotation: bool| {
        let changed = json!({"agent": {"appArmorAnnotation": annotation}});
        let objects = by_name(chart::objects(&workspace(), NAMESPACE, &changed).expect("chart"));
        objects["\"tacit-system\" DaemonSet/tacit-agent"]["spec"]["template"].clone()
    };
    let annotation = "container.apparmor.security.beta.kubernetes.io/agent";
    let field = |pod: &Value| pod["spec"]["containers"][0]["securityContext"]["appArmorProfile"].clone();
    let (new, old) = (agent(false), agent(true));
    assert_eq!(
        (&new["metadata"]["annotations"][annotation], field(&new)),
        (&Value::Null, json!({"type": "Unconfined"}))
    );
    assert_eq!(
        (&old["metadata"]["annotations"][annotation], field(&old)),
        (&json!("unconfined"), Value::Null)
    );
}

#[test]
fn the_image_that_is_made_is_the_one_that_is_asked_for() {
    for object in base(&workspace()).expect("base") {
        for container in object["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten() {
            assert_eq!(container["image"], json!(xtask_image::default_name()), "{}", name_of(&object));
        }
    }
}

#[test]
fn the_agent_is_given_the_capabilities_and_mounts_that_are_listed_and_no_others() {
    let objects = by_name(base(&workspace()).expect("base"));
    let spec = &objects["\"tacit-system\" DaemonSet/tacit-agent"]["spec"]["template"]["spec"];
    let context = &spec["containers"][0]["securityContext"];
    assert_eq!(
        context["capabilities"],
        json!({"drop": ["ALL"], "add": ["SYS_ADMIN", "NET_ADMIN", "NET_RAW", "SYS_PTRACE"]})
    );
    assert_eq!(context["privileged"], Value::Null);
    assert_eq!(context["readOnlyRootFilesystem"], true);
    let mounts: Vec<&Value> = spec["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|volume| &volume["hostPath"]["path"])
        .filter(|path| !path.is_null())
        .collect();
    assert_eq!(mounts, ["/sys/fs/cgroup", "/sys/fs/bpf", "/var/lib/tacit", "/etc/cni/net.d", "/opt/cni/bin"]);
}

#[test]
fn the_agent_may_only_list_look_at_two_definitions_and_make_events() {
    let objects = by_name(base(&workspace()).expect("base"));
    let rules = objects["null ClusterRole/tacit-agent"]["rules"].as_array().expect("rules").clone();
    let others: Vec<&Value> = rules.iter().filter(|rule| rule["verbs"] != json!(["list", "watch"])).collect();
    let definitions = json!({
        "apiGroups": ["apiextensions.k8s.io"],
        "resources": ["customresourcedefinitions"],
        "resourceNames": [
            "peerauthentications.security.istio.io",
            "authorizationpolicies.security.istio.io",
        ],
        "verbs": ["get"],
    });
    let events = json!({"apiGroups": [""], "resources": ["events"], "verbs": ["create"]});
    assert_eq!(others, [&definitions, &events]);
    let listed: BTreeSet<String> = rules
        .iter()
        .filter(|rule| rule["verbs"] == json!(["list", "watch"]))
        .flat_map(|rule| rule["resources"].as_array().into_iter().flatten())
        .map(|resource| resource.as_str().unwrap_or_default().to_owned())
        .collect();
    let expected = [
        "authorizationpolicies",
        "endpointslices",
        "namespaces",
        "nodes",
        "peerauthentications",
        "pods",
        "servicecidrs",
        "services",
    ];
    assert_eq!(listed, expected.map(str::to_owned).into());
}

#[test]
fn an_installation_needs_no_ranges_and_takes_those_that_are_given() {
    let config = |objects: Vec<Value>| {
        let objects = by_name(objects);
        let text =
            objects["\"tacit-system\" ConfigMap/tacit-agent"]["data"]["tacit.yaml"].as_str().expect("text");
        parse(text).expect("YAML")
    };
    let base = config(base(&workspace()).expect("base"));
    assert_eq!((&base["meshRanges"], &base["serviceRanges"]), (&json!([]), &json!([])));
    let given = json!({"meshRanges": ["10.1.0.0/16"], "serviceRanges": ["10.2.0.0/16"]});
    let chart = config(chart::objects(&workspace(), NAMESPACE, &given).expect("chart"));
    assert_eq!(
        (&chart["meshRanges"], &chart["serviceRanges"]),
        (&given["meshRanges"], &given["serviceRanges"])
    );
}

#[test]
fn dashboards_and_alerts_ask_for_metrics_that_exist() {
    let root = workspace().root().to_owned();
    let telemetry = root.join("agent/src/telemetry");
    let parts = files(&telemetry.join("metrics")).expect("metrics");
    let sources = parts.into_iter().chain([telemetry.join("metrics.rs")]);
    let declared: BTreeSet<String> =
        sources.flat_map(|file| metrics::declared(&fs::read_to_string(file).expect("text"))).collect();
    assert!(declared.contains("tacit_pods_enrolled"), "{declared:?}");
    for file in files(&root.join("deploy/monitoring")).expect("monitoring") {
        let asked = metrics::asked_for(&fs::read_to_string(&file).expect("text"));
        let unknown: Vec<&String> = asked.difference(&declared).collect();
        assert!(unknown.is_empty(), "{}: {unknown:?} do not exist", file.display());
        assert!(!asked.is_empty(), "{}: asks for nothing", file.display());
    }
}

/// Operators have to see refusals, and plaintext that passes.
#[test]
fn the_dashboard_shows_every_refusal_verdict_and_exception() {
    let dashboard = workspace().root().join("deploy/monitoring/dashboard.json");
    let asked = metrics::asked_for(&fs::read_to_string(&dashboard).expect("text"));
    for name in ["connections_refused", "kernel_verdicts", "kernel_exceptions"] {
        assert!(asked.contains(&format!("tacit_{name}_total")), "{name}: no panel");
    }
}

#[test]
fn every_file_of_objects_can_be_read() {
    let root = workspace().root().join("deploy");
    for folder in ["crds", "network", "helm/tacit/definitions"] {
        for file in files(&root.join(folder)).expect("folder") {
            let objects = read_objects(&file).unwrap_or_else(|error| panic!("{error:#}"));
            assert!(objects.iter().all(|object| object["kind"].is_string()), "{}", file.display());
            assert!(!objects.is_empty(), "{}", file.display());
        }
    }
}

#[test]
fn both_policies_are_defined_in_both_versions_and_the_chart_brings_them() {
    let root = workspace().root().join("deploy");
    let definitions = |folder: &str| -> Vec<Value> {
        let files = files(&root.join(folder)).expect("folder");
        files.iter().flat_map(|file| read_objects(file).expect("objects")).collect()
    };
    let all = definitions("crds");
    let mut kinds: Vec<&str> = all.iter().filter_map(|crd| crd["spec"]["names"]["kind"].as_str()).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["AuthorizationPolicy", "PeerAuthentication"]);
    for definition in &all {
        assert_eq!(definition["spec"]["group"], "security.istio.io");
        let versions = definition["spec"]["versions"].as_array().expect("versions");
        let served: Vec<&Value> = versions
            .iter()
            .filter(|version| version["served"] == true)
            .map(|version| &version["name"])
            .collect();
        assert_eq!(served, ["v1", "v1beta1"], "{}", name_of(definition));
        assert_eq!(versions[0]["schema"], versions[1]["schema"], "{}", name_of(definition));
    }
    assert_eq!(all, definitions("helm/tacit/definitions"));
}
