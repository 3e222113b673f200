//! Tests of `tacit.yaml`: what is accepted, every mistake, and that the published schema says the same.

use serde_json::Value as Json;
use tacit_sources::directory::Announce;

use super::*;

mod identity;

const MINIMAL: &str = "\
trustDomain: cluster.local
node: a
podsCgroup: /sys/fs/cgroup/unified/pods
meshRanges: [10.77.0.0/16, \"fd77::/16\"]
directory: {file: directory.yaml}
policy: {file: /etc/tacit/policy.yaml}
issuer: {embedded: {directory: issuer}}
";

fn parse(text: &str) -> Result<Config, Mistakes> {
    Config::parse(text, Path::new("/etc/tacit/conf/tacit.yaml"))
}

fn problems(text: &str) -> Vec<String> {
    parse(text).expect_err(text).list.iter().map(ToString::to_string).collect()
}

#[test]
fn a_minimal_file_gets_the_defaults() {
    let expected = Config {
        trust_domain: TrustDomain::parse("cluster.local").expect("valid"),
        trust_domain_aliases: Vec::new(),
        federation: Vec::new(),
        node: "a".into(),
        pods_cgroup: Some("/sys/fs/cgroup/unified/pods".into()),
        mesh_ranges: vec!["10.77.0.0/16".parse().expect("valid"), "fd77::/16".parse().expect("valid")],
        service_ranges: Vec::new(),
        directory: DirectorySource::File("/etc/tacit/conf/directory.yaml".into()),
        policy: PolicySource::File("/etc/tacit/policy.yaml".into()),
        root_namespace: "istio-system".into(),
        minimum_mode: Mode::Disable,
        issuer: IssuerConfig::Embedded {
            directory: "/etc/tacit/conf/issuer".into(),
            leaf_lifetime: Duration::from_secs(24 * 3600),
        },
        crl: None,
        pin_path: "/sys/fs/bpf/tacit".into(),
        state_path: "/var/lib/tacit".into(),
        socket: "/run/tacit/agent.sock".into(),
        cni: None,
        metrics: "127.0.0.1:15020".parse().expect("valid"),
        health: "127.0.0.1:15022".parse().expect("valid"),
        successor_timeout: Duration::from_secs(10),
        drain_timeout: Duration::from_secs(10),
        tunnel_timeout: Duration::from_secs(900),
        heartbeat_timeout: Duration::from_secs(3),
        unnamed_pod_timeout: Duration::from_secs(60),
        allow_clear: Vec::new(),
        workers: None,
        busy_poll: Duration::from_micros(200),
    };
    assert_eq!(parse(MINIMAL), Ok(expected));
}

#[test]
fn every_field_can_be_set() {
    let text = MINIMAL.replace("directory: issuer}", "directory: issuer, leafLifetime: 1h30m}")
        + "rootNamespace: mesh\npinPath: /sys/fs/bpf/b/\nsocket: b.sock\nmetrics: \"[::1]:9\"\nhealth: \"[::1]:8\"\ndrainTimeout: 0s\nsuccessorTimeout: 5m\n\
           heartbeatTimeout: 1s\nallowClear: [\"10.96.0.10:53/udp\"]\nworkers: 2\nserviceRanges: [10.96.0.0/12]\n\
           busyPollMicroseconds: 0\nminimumMode: STRICT\nstatePath: /var/lib/mesh/\ntunnelTimeout: 30s\n";
    let config = parse(&text).expect("valid");
    assert_eq!(&*config.root_namespace, "mesh");
    assert_eq!(config.minimum_mode, Mode::Strict);
    assert_eq!(config.state_path, Path::new("/var/lib/mesh"));
    assert_eq!(config.pin_path, Path::new("/sys/fs/bpf/b"));
    assert_eq!(config.socket, Path::new("/etc/tacit/conf/b.sock"));
    assert_eq!(config.metrics, "[::1]:9".parse().expect("valid"));
    assert_eq!(config.health, "[::1]:8".parse().expect("valid"));
    assert_eq!(config.drain_timeout, Duration::ZERO);
    assert_eq!(config.successor_timeout, Duration::from_secs(300));
    assert_eq!(config.tunnel_timeout, Duration::from_secs(30));
    assert_eq!(config.heartbeat_timeout, Duration::from_secs(1));
    assert_eq!(config.allow_clear.len(), 1);
    assert_eq!(config.captured_ranges().len(), 3);
    assert_eq!(config.busy_poll, Duration::ZERO);
    assert_eq!(config.workers.map(std::num::NonZeroUsize::get), Some(2));
    let IssuerConfig::Embedded { leaf_lifetime, .. } = config.issuer else { panic!("another issuer") };
    assert_eq!(leaf_lifetime, Duration::from_secs(90 * 60));
}

#[test]
fn a_cni_section_has_defaults_and_refuses_mistakes() {
    let section = |text: &str| MINIMAL.to_owned() + text;
    let cni = |text: &str| parse(&section(text)).expect("valid").cni.expect("a section");
    let defaults = CniConfig {
        is_enabled: true,
        config_folder: "/etc/cni/net.d".into(),
        program_folder: "/opt/cni/bin".into(),
        exempt_namespaces: Vec::new(),
        timeout: Duration::from_secs(5),
    };
    assert_eq!(cni("cni: {}\n"), defaults);
    // As the manifests write it.
    let text = "cni: {\"configFolder\":\"/a\",\"enabled\":false,\"exemptNamespaces\":[\"kube-system\"],\"programFolder\":\"/b\"}\n";
    let expected = CniConfig {
        is_enabled: false,
        config_folder: "/a".into(),
        program_folder: "/b".into(),
        exempt_namespaces: vec!["kube-system".to_owned()],
        ..defaults
    };
    assert_eq!(cni(text), expected);
    let mistakes = problems(&section(
        "cni: {enabled: maybe, configFolder: etc, programFolder: /opt/../x, exemptNamespaces: [A], timeout: 30s, folder: x}\n",
    ));
    let fields = [
        "cni.folder",
        "cni.enabled",
        "cni.configFolder",
        "cni.programFolder",
        "cni.exemptNamespaces[0]",
        "cni.timeout",
    ];
    for field in fields {
        assert!(
            mistakes.iter().any(|mistake| mistake.contains(&format!(": {field}: "))),
            "{field}: {mistakes:?}"
        );
    }
    assert_eq!(mistakes.len(), fields.len(), "{mistakes:?}");
    let long = format!("statePath: /{}\ncni: {{}}\n", "a".repeat(60));
    assert!(problems(&section(&long))[0].contains("statePath"), "{:?}", problems(&section(&long)));
}

#[test]
fn overlapping_ranges_are_accepted() {
    assert!(parse(&MINIMAL.replace("[10.77.0.0/16,", "[10.77.0.0/16, 10.77.1.0/24, 10.0.0.0/8,")).is_ok());
}

#[test]
fn all_mistakes_are_reported_together() {
    let text = "\
trustdomain: cluster.local
node: A
podsCgroup: pods
meshRanges: [10.77.1.0/16, 127.0.0.0/8, 0.0.0.0/0]
directory: directory.yaml
policy: {url: policy.yaml}
issuer: {embedded: {directory: 7, leafLifetime: 5s}}
pinPath: /sys/../bpf
metrics: 15020
drainTimeout: 10
";
    assert_eq!(
        problems(text),
        [
            "line 1: trustdomain: unknown field: did you mean `trustDomain`?",
            "line 1: trustDomain: missing: write the SPIFFE trust domain, such as cluster.local",
            "line 2: node: \"A\" is no Kubernetes name: write 1 to 253 characters of a-z, 0-9, '-' and '.', beginning and \
             ending with a letter or digit",
            "line 3: podsCgroup: \"pods\" is relative: write the whole path, beginning with /",
            "line 4: meshRanges[0]: \"10.77.1.0/16\": bits are set after the prefix: write 10.77.0.0/16",
            "line 4: meshRanges[1]: \"127.0.0.0/8\": overlaps 127.0.0.0/8 (loopback): write the ranges the pods' \
             addresses are taken from",
            "line 4: meshRanges[2]: \"0.0.0.0/0\": prefix length 0 covers every address: write the ranges the pods' \
             addresses are taken from",
            "line 5: directory: is the single value \"directory.yaml\": write a mapping (`name: value` lines)",
            "line 6: policy.url: unknown field: known here: file, kubernetes, istiod",
            "line 6: policy: nothing in it: write {file: policy.yaml}, {kubernetes: {}} or {istiod: {..}}",
            "line 7: issuer.embedded.directory: 7 is a number where text is expected: write \"7\"",
            "line 7: issuer.embedded.leafLifetime: \"5s\": outside the range: write a duration from 10s to 30d",
            "line 8: pinPath: \"/sys/../bpf\" has a `..`: write the path without it",
            "line 9: metrics: \"15020\": no address with a port: write it as 127.0.0.1:15020 or \"[::1]:15020\"",
            "line 10: drainTimeout: \"10\": no duration: write whole numbers with the units d, h, m, s, ms from large to \
             small, such as 1h30m or 500ms",
        ]
    );
}

#[test]
fn an_empty_mapping_misses_every_required_field() {
    let missing = problems("{}");
    for field in ["trustDomain", "node", "meshRanges", "directory", "policy", "issuer"] {
        assert!(
            missing.iter().any(|problem| problem.contains(&format!("{field}: missing"))),
            "{field}: {missing:?}"
        );
    }
    assert_eq!(missing.len(), 6, "{missing:?}");
}

#[test]
fn bounds_of_single_fields_hold() {
    for (line, problem) in [
        ("socket: /".to_owned() + &"s".repeat(107), "a unix socket's path at most 107"),
        ("metrics: 127.0.0.1:0".to_owned(), "port 0"),
        ("metrics: localhost:15020".to_owned(), "no address with a port"),
        ("health: 127.0.0.1:0".to_owned(), "port 0"),
        ("health: 0.0.0.0:15022".to_owned(), "no loopback address: write 127.0.0.1:15022"),
        ("health: \"[::]:15022\"".to_owned(), "no loopback address"),
        ("health: \"[::ffff:127.0.0.1]:15022\"".to_owned(), "no loopback address"),
        ("drainTimeout: 601s".to_owned(), "from 0s to 10m"),
        ("successorTimeout: 301s".to_owned(), "from 0s to 5m"),
        ("tunnelTimeout: 901s".to_owned(), "from 1s to 15m"),
        ("tunnelTimeout: 999ms".to_owned(), "from 1s to 15m"),
        ("heartbeatTimeout: 500ms".to_owned(), "from 1s to 1m"),
        ("unnamedPodTimeout: 0s".to_owned(), "from 1s to 1h"),
        ("allowClear: [\"10.0.0.1:53\"]".to_owned(), "write address, port and protocol"),
        ("workers: 0".to_owned(), "write 1 to 256"),
        ("workers: 257".to_owned(), "write 1 to 256"),
        ("busyPollMicroseconds: 1001".to_owned(), "write 0 (never) to 1000"),
        ("busyPollMicroseconds: 60us".to_owned(), "write 0 (never) to 1000"),
        ("rootNamespace: Istio".to_owned(), "no Kubernetes name"),
        ("rootNamespace: [a]".to_owned(), "is a list"),
        (
            "minimumMode: UNSET".to_owned(),
            "minimumMode: \"UNSET\" is none of DISABLE, PERMISSIVE, STRICT: write one of them",
        ),
        ("minimumMode: strict".to_owned(), "did you mean STRICT?"),
        ("statePath: state".to_owned(), "write the whole path"),
    ] {
        let list = problems(&format!("{MINIMAL}{line}\n"));
        assert!(
            list.len() == 1 && list[0].starts_with("line 8: ") && list[0].contains(problem),
            "{line}: {list:?}"
        );
    }
    let many =
        (0..=RANGES_MAX).map(|i| format!("10.{}.{}.0/24", i / 256, i % 256)).collect::<Vec<_>>().join(",");
    let list = problems(&MINIMAL.replace("10.77.0.0/16", &many));
    assert!(list.len() == 1 && list[0].contains("at most 256"), "{list:?}");
    let list = problems(&MINIMAL.replace("[10.77.0.0/16, \"fd77::/16\"]", "[]"));
    assert!(list.len() == 1 && list[0].contains("nothing would be protected"), "{list:?}");
}

#[test]
fn health_and_metrics_have_ports_of_their_own() {
    for (lines, port) in [
        ("metrics: 0.0.0.0:15022\n", 15022),
        ("health: 127.0.0.1:15020\n", 15020),
        ("metrics: \"[::1]:7\"\nhealth: 127.0.0.1:7\n", 7),
    ] {
        let list = problems(&format!("{MINIMAL}{lines}"));
        let expected = format!("health: port {port} is that of metrics: write another port for one of them");
        assert!(list.len() == 1 && list[0].ends_with(&expected), "{lines}: {list:?}");
    }
}

#[test]
fn the_manifests_probe_the_default_health_port() {
    let probe = format!("httpGet: {{host: {}, port: {}, path: /healthz/ready}}", HEALTH.ip(), HEALTH.port());
    for manifest in [
        include_str!("../../../deploy/kustomize/base/agent.yaml"),
        include_str!("../../../deploy/helm/tacit/templates/agent.yaml"),
    ] {
        assert_eq!(manifest.matches(&probe).count(), 1, "{manifest}");
    }
}

/// An agent with a mistake in it does not start.
#[test]
fn the_overlay_beside_ambient_has_a_valid_configuration_that_announces() {
    let overlay = include_str!("../../../deploy/kustomize/ambient/kustomization.yaml");
    let (_, rest) = overlay.split_once("path: /data/tacit.yaml\n        value: |\n").expect("the patch");
    let (indented, _) = rest.split_once("      # ").expect("the end of the text");
    let lines = indented.lines().map(|line| line.trim_start_matches(' ').len().abs_diff(line.len()));
    let indent = lines.min().expect("a line");
    let text: Vec<&str> = indented.lines().map(|line| &line[indent..]).collect();
    let file = Path::new("/etc/tacit/tacit.yaml");
    let config = Config::parse_in(&text.join("\n"), file, Path::new("/etc/tacit"), Some("a")).expect("valid");
    let DirectorySource::Kubernetes(options) = config.directory else { panic!("{:?}", config.directory) };
    assert_eq!(options.announce, Announce::Ambient);
    assert_eq!(options.enrol_label.to_string(), "istio.io/dataplane-mode=ambient");
}

#[test]
fn reading_resolves_paths_against_the_folder_of_the_file() {
    let folder = std::env::temp_dir().join(format!("tacit-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the test");
    let path = folder.join("tacit.yaml");
    std::fs::write(&path, MINIMAL).expect("a file for the test");
    let directory = DirectorySource::File(folder.join("directory.yaml"));
    assert_eq!(Config::read(&path).expect("valid").directory, directory);
    assert!(matches!(Config::read(&folder.join("absent.yaml")), Err(LoadError::Read(_))));
    std::fs::write(&path, "{}").expect("a file for the test");
    assert!(matches!(Config::read(&path), Err(LoadError::Invalid(_))));
    std::fs::remove_dir_all(&folder).expect("removable");
}

#[test]
fn the_schema_has_the_fields_and_defaults_of_the_code() {
    let schema: Json = serde_json::from_str(include_str!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/config.schema.json"
    )))
    .expect("the schema is JSON");
    let names = |schema: &Json| -> Vec<String> {
        let mut names: Vec<_> =
            schema["properties"].as_object().expect("properties").keys().cloned().collect();
        names.sort_unstable();
        names
    };
    let sorted = |names: &[&str]| {
        let mut names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(names(&schema), sorted(&FIELDS));
    let embedded = &schema["properties"]["issuer"]["properties"]["embedded"];
    assert_eq!(names(&schema["properties"]["issuer"]), sorted(&issuer::FIELDS));
    assert_eq!(names(embedded), sorted(&issuer::EMBEDDED_FIELDS));
    let istio = &schema["properties"]["issuer"]["properties"]["istio"];
    assert_eq!(names(istio), sorted(&issuer::ISTIO_FIELDS));
    assert_eq!(names(&schema["properties"]["federation"]["items"]), sorted(&trust::FEDERATION_FIELDS));
    assert_eq!(names(&schema["properties"]["crl"]), sorted(&crl::FIELDS));
    assert_eq!(schema["properties"]["crl"]["properties"]["unknownStatus"]["default"], "DENY");
    let spire = &schema["properties"]["issuer"]["properties"]["spire"];
    assert_eq!(names(spire), sorted(&issuer::SPIRE_FIELDS));
    assert_eq!(names(&istio["properties"]["rootConfigMap"]), sorted(&issuer::CONFIG_MAP_FIELDS));
    assert_eq!(istio["properties"]["leafLifetime"]["default"], "24h");
    let kubernetes = |field: &str| names(&schema["properties"][field]["properties"]["kubernetes"]);
    assert_eq!(kubernetes("directory"), sorted(&kubernetes::DIRECTORY_FIELDS));
    assert_eq!(kubernetes("policy"), sorted(&kubernetes::POLICY_FIELDS));
    let istiod = |field: &str| &schema["properties"][field]["properties"]["istiod"];
    assert_eq!(names(istiod("directory")), sorted(&istiod::DIRECTORY_FIELDS));
    assert_eq!(names(istiod("policy")), Vec::<String>::new());
    assert_eq!(istiod("directory")["properties"]["clusterId"]["default"], "Kubernetes");
    for (field, default) in [
        ("rootNamespace", ROOT_NAMESPACE),
        ("minimumMode", MINIMUM_MODES[0].0),
        ("pinPath", PIN_PATH),
        ("statePath", STATE_PATH),
        ("socket", SOCKET),
        ("metrics", "127.0.0.1:15020"),
        ("health", "127.0.0.1:15022"),
        ("successorTimeout", "10s"),
        ("drainTimeout", "10s"),
        ("tunnelTimeout", "15m"),
        ("heartbeatTimeout", "3s"),
        ("unnamedPodTimeout", "60s"),
    ] {
        assert_eq!(schema["properties"][field]["default"], default, "{field}");
    }
    let modes: Vec<&str> = MINIMUM_MODES.iter().map(|(name, _)| *name).collect();
    assert_eq!(schema["properties"]["minimumMode"]["enum"], serde_json::json!(modes));
    assert_eq!(embedded["properties"]["leafLifetime"]["default"], "24h");
    assert_eq!(schema["properties"]["meshRanges"]["maxItems"], RANGES_MAX);
    assert_eq!(schema["if"]["properties"]["directory"]["required"], serde_json::json!(["file"]));
    assert_eq!(schema["then"]["required"], serde_json::json!(["meshRanges"]));
    assert_eq!(schema["properties"]["allowClear"]["maxItems"], ALLOW_CLEAR_MAX);
    assert_eq!(schema["properties"]["workers"]["maximum"], WORKERS_MAX);
    let busy_poll = &schema["properties"]["busyPollMicroseconds"];
    assert_eq!(busy_poll["maximum"], BUSY_POLL_MAX_US);
    assert_eq!(busy_poll["default"], BUSY_POLL_DEFAULT_US);
}

#[test]
fn the_directory_can_come_from_kubernetes_and_the_node_from_the_environment() {
    let text = MINIMAL.replace("node: a\n", "");
    let parse = |directory: &str, node: Option<&str>| {
        let text = text.replace("{file: directory.yaml}", directory);
        Config::parse_in(&text, Path::new("tacit.yaml"), Path::new("/etc/tacit"), node)
    };
    let options = |config: Config| match config.directory {
        DirectorySource::Kubernetes(options) => options,
        other => panic!("{other:?}"),
    };
    let config = parse("{kubernetes: {}}", Some("worker-1.example")).expect("valid");
    assert_eq!(&*config.node, "worker-1.example");
    assert_eq!(options(config), DirectoryOptions::default());
    assert_eq!(DirectoryOptions::default().enrol_label.to_string(), "tacit.io/enrol=true");
    let ambient = "{kubernetes: {announce: ambient, enrolLabel: istio.io/dataplane-mode=ambient, kubeconfig: admin.conf}}";
    let ambient = options(parse(ambient, Some("a")).expect("valid"));
    assert_eq!(ambient.enrol_label.to_string(), "istio.io/dataplane-mode=ambient");
    assert_eq!((DirectoryOptions::default().announce, ambient.announce), (Announce::None, Announce::Ambient));
    assert_eq!(ambient.kubeconfig.as_deref(), Some(Path::new("/etc/tacit/admin.conf")));
    for (directory, node, problem) in [
        (
            "{kubernetes: {}}",
            None,
            "node: missing: write this node's name, as the directory has it, or set NODE_NAME",
        ),
        (
            "{kubernetes: {}}",
            Some("A b"),
            "NODE_NAME=\"A b\" is no name of a node: set it from spec.nodeName",
        ),
        (
            "{}",
            Some("a"),
            "directory: nothing in it: write {file: directory.yaml}, {kubernetes: {}} or {istiod: {..}}",
        ),
        (
            "{file: d.yaml, kubernetes: {}}",
            Some("a"),
            "directory: more than one of `file`, `kubernetes` and `istiod`: leave one",
        ),
        (
            "{kubernetes: {label: x}}",
            Some("a"),
            "directory.kubernetes.label: unknown field: known here: announce, enrolLabel, kubeconfig",
        ),
        (
            "{kubernetes: {announce: istio}}",
            Some("a"),
            "directory.kubernetes.announce: \"istio\": no reader of announcements: write none or ambient",
        ),
        (
            "{kubernetes: {enrolLabel: tacit.io/enrol}}",
            Some("a"),
            "directory.kubernetes.enrolLabel: \"tacit.io/enrol\": no label with a value: write it as tacit.io/enrol=true",
        ),
    ] {
        let mistakes = parse(directory, node).expect_err(directory).to_string();
        assert!(mistakes.contains(problem), "{directory}: {mistakes}");
    }
}

#[test]
fn ranges_can_be_left_out_where_they_are_detected_and_nowhere_else() {
    let ranges = |directory: &str, ranges: &str| {
        let text = MINIMAL.replace("{file: directory.yaml}", directory);
        parse(&text.replace("meshRanges: [10.77.0.0/16, \"fd77::/16\"]\n", ranges))
    };
    for text in ["", "meshRanges: []\n", "meshRanges: []\nserviceRanges: []\n"] {
        let config = ranges("{kubernetes: {}}", text).expect("valid");
        assert_eq!(config.captured_ranges(), [], "{text:?}");
        let problem = ranges("{file: directory.yaml}", text).expect_err(text).to_string();
        let expected = if text.is_empty() {
            "meshRanges: missing: write the ranges of pod addresses, such as [10.77.0.0/16]; they are detected with \
             a directory from kubernetes or istiod alone"
        } else {
            "meshRanges: the list is empty, nothing would be protected: write the ranges of pod addresses"
        };
        assert!(problem.contains(expected), "{text:?}: {problem}");
    }
    let config = ranges("{kubernetes: }", "meshRanges: [10.77.0.0/16]\n").expect("valid");
    assert_eq!(config.captured_ranges().len(), 1);
    // A range that is written has to be right all the same.
    let problem = ranges("{kubernetes: {}}", "meshRanges: [127.0.0.0/8]\n").expect_err("loopback");
    assert!(problem.to_string().contains("meshRanges[0]: \"127.0.0.0/8\": overlaps"), "{problem}");
    // A mistake in the directory is one mistake.
    let mistakes = ranges("{kubernetes: {label: x}}", "").expect_err("unknown field");
    assert_eq!(mistakes.list.len(), 1, "{mistakes}");
}

#[test]
fn policies_can_come_from_kubernetes() {
    let policy = |text: &str| {
        parse(&MINIMAL.replace("{file: /etc/tacit/policy.yaml}", text)).map(|config| config.policy)
    };
    assert_eq!(policy("{kubernetes: {}}"), Ok(PolicySource::Kubernetes(PolicyOptions::default())));
    assert_eq!(policy("{kubernetes: }"), Ok(PolicySource::Kubernetes(PolicyOptions::default())));
    let kubeconfig = Some("/etc/tacit/conf/admin.conf".into());
    assert_eq!(
        policy("{kubernetes: {kubeconfig: admin.conf}}"),
        Ok(PolicySource::Kubernetes(PolicyOptions { kubeconfig }))
    );
    for (text, problem) in [
        ("{}", "policy: nothing in it: write {file: policy.yaml}, {kubernetes: {}} or {istiod: {..}}"),
        (
            "{file: p.yaml, kubernetes: {}}",
            "policy: more than one of `file`, `kubernetes` and `istiod`: leave one",
        ),
        (
            "{istiod: {}}",
            "policy: {istiod: {}} uses the connection of the directory: write `directory: {istiod: {address: ..}}`",
        ),
        (
            "{kubernetes: {enrolLabel: a=b}}",
            "policy.kubernetes.enrolLabel: unknown field: known here: kubeconfig",
        ),
    ] {
        let mistakes = policy(text).expect_err(text).to_string();
        assert!(mistakes.contains(problem), "{text}: {mistakes}");
    }
}

#[test]
fn directory_and_policies_can_come_from_istiod() {
    let config = |directory: &str| {
        let text = MINIMAL
            .replace("{file: directory.yaml}", directory)
            .replace("{file: /etc/tacit/policy.yaml}", "{istiod: {}}")
            .replace("meshRanges: [10.77.0.0/16, \"fd77::/16\"]\n", "");
        parse(&text)
    };
    let istiod = |directory: &str| {
        let config = config(directory).expect("valid");
        assert_eq!(config.captured_ranges().len(), 0);
        assert_eq!(config.policy, PolicySource::Istiod(()));
        let DirectorySource::Istiod(istiod) = config.directory else { panic!("another source") };
        *istiod
    };
    let tls =
        istiod("{istiod: {address: istiod.istio-system.svc:15012, rootFile: root.pem, tokenFile: token}}");
    let istiod::IstiodAccess::Tls(access, None) = &tls.access else { panic!("{:?}", tls.access) };
    assert_eq!(access.server_name, "istiod.istio-system.svc");
    assert_eq!(access.root_file, Path::new("/etc/tacit/conf/root.pem"));
    assert_eq!(access.cluster_id.as_ref().and_then(|id| id.to_str().ok()), Some("Kubernetes"));
    assert_eq!((tls.place.cluster.as_str(), tls.place.network.as_str()), ("Kubernetes", ""));
    assert_eq!(tls.local, DirectoryOptions::default());
    let clear = istiod(
        "{istiod: {address: \"[::1]:15010\", plaintext: true, clusterId: c, network: n, \
         announce: ambient, enrolLabel: a=b, kubeconfig: k}}",
    );
    assert_eq!(clear.access, istiod::IstiodAccess::Plaintext { address: "[::1]:15010".to_owned() });
    assert_eq!((clear.place.cluster.as_str(), clear.place.network.as_str()), ("c", "n"));
    assert_eq!(
        (clear.local.enrol_label.to_string(), clear.local.announce),
        ("a=b".to_owned(), Announce::Ambient)
    );
    for (directory, problem) in [
        ("{istiod: {}}", "directory.istiod.address: missing"),
        ("{istiod: {address: istiod, plaintext: true}}", "no host with a port"),
        (
            "{istiod: {address: \"a:15012\"}}",
            "directory.istiod.rootFile: missing: write the PEM file of istiod's roots",
        ),
        ("{istiod: {address: \"a:15012\", rootFile: r}}", "directory.istiod.tokenFile: missing"),
        (
            "{istiod: {address: \"a:15010\", plaintext: true, tokenFile: t, rootFile: r}}",
            "plaintext uses no rootFile, tokenFile: remove them",
        ),
        ("{istiod: {address: \"a:15010\", plaintext: yes}}", "directory.istiod.plaintext"),
        (
            "{istiod: {address: \"a:15010\", plaintext: true, clusterId: \"\\u00e4\\n\"}}",
            "no cluster id: write ASCII",
        ),
    ] {
        let mistakes = config(directory).expect_err(directory).to_string();
        assert!(mistakes.contains(problem), "{directory}: {mistakes}");
    }
}
