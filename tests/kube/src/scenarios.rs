//! The scenarios, each a promise to users that is tried on the cluster. They run in this order, and later ones build on
//! earlier ones.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{
    address_reuse, announce, authority,
    checks::{AUTHORITY, ENROLLED, both_are, encrypted, in_clear, is_enrolled, is_strict, rolled_out},
    cluster::{Cluster, SERVICES},
    enrol_latency, enrol_under_load, handover, helm,
    install::{self, status, tacit},
    leftovers, mesh_strict,
    pods::{self, MARKER, OUTSIDE, SHOP, get_web},
    policies, rotation, wire,
};
use crate::deploy::{self, NAMESPACE};

/// The ranges of both nodes' pods, joined.
const ALL_NODES_PODS: &str = "10.244.0.0/23";

/// One test.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    /// Do later ones need it?
    pub(super) is_required: bool,
    pub(super) test: Test,
}

/// The test of a scenario.
pub(super) enum Test {
    /// It holds or not.
    Plain(Try<()>),
    /// And there are numbers, for the table.
    Measured(Try<String>),
}

type Try<T> = fn(&Workspace, &Cluster) -> Result<T>;

impl Test {
    /// Tries it; returns what was measured.
    pub(super) fn on(&self, workspace: &Workspace, cluster: &Cluster) -> Result<String> {
        match self {
            Self::Plain(run) => run(workspace, cluster).map(|()| String::new()),
            Self::Measured(run) => run(workspace, cluster),
        }
    }
}

const fn required(name: &'static str, what: &'static str, run: Try<()>) -> Scenario {
    Scenario { name, what, is_required: true, test: Test::Plain(run) }
}

const fn independent(name: &'static str, what: &'static str, run: Try<()>) -> Scenario {
    Scenario { name, what, is_required: false, test: Test::Plain(run) }
}

const fn measured(name: &'static str, what: &'static str, run: Try<String>) -> Scenario {
    Scenario { name, what, is_required: false, test: Test::Measured(run) }
}

/// All of them.
pub(super) const ALL: &[Scenario] = &[
    required("control", "without Tacit the marker is read on the wire", control),
    independent("kustomize", "kubectl's own kustomize renders what is installed here", install::kustomized),
    independent(
        "helm",
        "Helm renders the same from the chart, and rejects values that are wrong",
        helm::tried,
    ),
    required("install", "from nothing to ready agents on both nodes", install_all),
    independent("doctor", "the agent's container has all that it needs", doctor),
    required("enrol", "running pods are enrolled: the marker is on the wire no more", enrol),
    independent("ranges", "the nodes' pod ranges and the services' are found, none is configured", ranges),
    measured(
        "enrol-under-load",
        "what is in clear into the mesh is reset, nothing else; the rest is tunnelled",
        enrol_under_load::enrolled,
    ),
    independent("service", "a ClusterIP leads through the tunnel to a pod on the other node", service),
    independent("permissive", "plaintext of a pod outside is taken", permissive),
    required("strict", "plaintext of a pod outside is refused, probes and enrolled pods are not", strict),
    independent(
        "policy",
        "a connection that a policy denies fails, until the policy is deleted",
        policies::denied,
    ),
    independent(
        "policy-unreadable",
        "it denies what it selects, and an Event says why",
        policies::unreadable,
    ),
    independent("policy-undefined", "policies that go with their definition hold on", policies::undefined),
    independent("job", "a Job that talks to the mesh completes, and never in clear", job),
    independent(
        "identity-elsewhere",
        "an agent is issued identities of its node's pods, no others",
        authority::elsewhere,
    ),
    independent(
        "announce-bounded",
        "an agent may patch two annotations of its node's pods, and nothing else",
        announce::bounded,
    ),
    independent("restarted", "pods made anew under STRICT are ready, enrolled, never in clear", restarted),
    measured(
        "address-reused",
        "a pod with another's old address has its own identity and policies",
        address_reuse::reused,
    ),
    independent("agent-killed", "its pods send nothing in clear, and talk again later", agent_killed),
    independent("agent-rolled", "an update without surge, under load: nothing in clear", agent_rolled),
    measured(
        "agent-handed-over",
        "an update with surge, under load: no connection fails, nothing in clear",
        handover::taken_over,
    ),
    independent(
        "mesh-strict",
        "STRICT for the mesh: DNS, the authority, hostNetwork and other pods outside talk on",
        mesh_strict::held,
    ),
    independent("authority-down", "pods talk on with the certificates that they have", authority_down),
    measured("root-rotated", "no connection fails; certificates lead to the new root", rotation::rotated),
    measured(
        "enrolled-in-time",
        "a pod is enrolled soon after its sandbox is there",
        enrol_latency::enrolled,
    ),
    independent("pods-wait", "a pod starts only when an agent covers it: nothing in clear", pods_wait),
    independent("un-enrolled", "without the label pods talk in clear again", un_enrolled),
    independent("uninstall", "no program, pin, link, filter or rule is left", uninstall),
    independent(
        "helm-released",
        "Helm installs with and without the definitions there, upgrades, goes back, uninstalls",
        helm_released,
    ),
];

/// Those whose name contains one of `only`, or all when there is none; and the required ones.
pub(super) fn chosen(only: &[String]) -> impl Iterator<Item = &'static Scenario> {
    let is_wanted = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part));
    ALL.iter().filter(move |scenario| scenario.is_required || is_wanted(scenario.name))
}

fn control(_: &Workspace, cluster: &Cluster) -> Result<()> {
    pods::start(cluster)?;
    let traffic = wire::during(cluster, || get_web(cluster, SHOP, "client"))?;
    in_clear(&traffic).context("the recording would show nothing")
}

fn install_all(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.apply(&deploy::base(workspace)?)?;
    // Agents that cannot read policies wait, and say for what.
    cluster.eventually("an agent asks for the definitions", |cluster| {
        let status = status(cluster, "node1")?;
        let missing = policies::source(&status)?["last_error"].as_str().unwrap_or_default();
        ensure!(status["state"] == "starting" && missing.contains("apply deploy/crds"), "{status}");
        Ok(())
    })?;
    install::define(workspace, cluster)?;
    ["deployment/tacit-authority", "daemonset/tacit-agent"]
        .iter()
        .try_for_each(|what| rolled_out(cluster, what))?;
    // Pods wait for the agents from now on.
    cluster.eventually("the CNI plugin is in place", |cluster| {
        for node in ["node1", "node2"] {
            let cni = &status(cluster, node)?["cni"];
            ensure!(cni["configuration"].is_string() && cni["error"].is_null(), "{node}: {cni}");
        }
        Ok(())
    })
}

fn doctor(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.nodes.iter().try_for_each(|node| tacit(cluster, node.plan.name, &["doctor"]).map(drop))
}

fn enrol(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["label", "namespace", SHOP, ENROLLED])?;
    both_are(cluster, "enrolled", is_enrolled)?;
    encrypted(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)
}

fn permissive(_: &Workspace, cluster: &Cluster) -> Result<()> {
    get_web(cluster, OUTSIDE, "stranger").context("PERMISSIVE takes plaintext")
}

fn strict(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.apply(&[policies::strict()])?;
    both_are(cluster, "STRICT", is_strict)?;
    if get_web(cluster, OUTSIDE, "stranger").is_ok() {
        bail!("plaintext was answered under STRICT");
    }
    encrypted(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)?;
    // Its probe comes from the node each second, and two failures would show.
    cluster
        .kubectl(&["-n", SHOP, "wait", "--for=condition=Ready=false", "pod/web", "--timeout=5s"])
        .map_or(Ok(()), |_| bail!("the kubelet's probes are refused"))
}

fn ranges(_: &Workspace, cluster: &Cluster) -> Result<()> {
    for node in ["node1", "node2"] {
        cluster.eventually("the ranges are found", |cluster| {
            let mesh = &status(cluster, node)?["mesh"];
            let found = mesh["ranges"].as_array().context("a status without ranges")?;
            let is_found = [ALL_NODES_PODS, SERVICES].iter().all(|range| found.contains(&json!(range)));
            ensure!(mesh["configured"] == 0 && is_found, "{mesh}");
            Ok(())
        })?;
    }
    Ok(())
}

fn service_address(cluster: &Cluster) -> Result<String> {
    cluster.kubectl(&["-n", SHOP, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])
}

fn service(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let address = service_address(cluster)?;
    encrypted(&wire::during(cluster, || {
        let answer = pods::get(cluster, SHOP, "client", &address, 80)?;
        ensure!(answer.contains(MARKER), "the service answered {answer:?}");
        Ok(())
    })?)
}

fn job(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let web = pods::address(cluster, SHOP, "web")?;
    let traffic = wire::during(cluster, || {
        cluster.apply(&[pods::job(SHOP, "fetch", "node1", &web)])?;
        cluster
            .kubectl(&["-n", SHOP, "wait", "--for=condition=Complete", "job/fetch", "--timeout=60s"])
            .map(drop)
    })?;
    encrypted(&traffic)
}

/// New pods under old names, with addresses that others may have had.
fn restarted(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["-n", SHOP, "delete", "pods", "client", "web", "--timeout=60s"])?;
    let traffic = wire::during(cluster, || {
        pods::start(cluster)?;
        both_are(cluster, "enrolled and STRICT", |pod| is_enrolled(pod) && is_strict(pod))?;
        get_web(cluster, SHOP, "client")
    })?;
    encrypted(&traffic)?;
    ensure!(get_web(cluster, OUTSIDE, "stranger").is_err(), "plaintext was answered under STRICT");
    Ok(())
}

/// The nodes as after a reboot: no agent, nothing pinned.
fn pods_wait(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let agents_on = |selector: Value| {
        let patch = json!({"spec": {"template": {"spec": {"nodeSelector": selector}}}}).to_string();
        let daemonset = ["-n", NAMESPACE, "patch", "daemonset/tacit-agent", "--type=merge", "-p", &patch];
        cluster.kubectl(&daemonset).map(drop)
    };
    let web = pods::address(cluster, SHOP, "web")?;
    agents_on(json!({"kubernetes.io/os": "none"}))?;
    let agents = "app.kubernetes.io/name=tacit-agent";
    cluster.kubectl(&["-n", NAMESPACE, "wait", "--for=delete", "pod", "-l", agents, "--timeout=90s"])?;
    let node = &cluster.nodes[0];
    run(node.command("rm").args(["-r", "/sys/fs/bpf/tacit"]))?;
    let traffic = wire::during(cluster, || {
        cluster.apply(&[pods::job(SHOP, "late", "node1", &web)])?;
        cluster.eventually("the pod waits, and says for what", |cluster| {
            let messages = "jsonpath={.items[*].message}";
            let events = cluster.kubectl(&["-n", SHOP, "get", "events", "-o", messages])?;
            ensure!(events.contains("has to wait for the Tacit agent of its node"), "{events}");
            Ok(())
        })?;
        agents_on(json!({"kubernetes.io/os": "linux"}))?;
        rolled_out(cluster, "daemonset/tacit-agent")?;
        let done = ["-n", SHOP, "wait", "--for=condition=Complete", "job/late", "--timeout=120s"];
        cluster.kubectl(&done).map(drop)
    })?;
    encrypted(&traffic)
}

fn un_enrolled(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["label", "namespace", SHOP, "tacit.io/enrol-"])?;
    // Not recorded: what is refused is on the wire too.
    cluster.eventually("plaintext is taken again", |cluster| get_web(cluster, OUTSIDE, "stranger"))?;
    cluster.eventually("the client talks", |cluster| get_web(cluster, SHOP, "client"))?;
    in_clear(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)?;
    cluster.kubectl(&["label", "namespace", SHOP, ENROLLED])?;
    both_are(cluster, "enrolled", is_enrolled)
}

fn agent_killed(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let before = restarts(cluster)?;
    let traffic = wire::during(cluster, || {
        let kill = "for p in /proc/[0-9]*; do [ \"$(readlink $p/exe)\" != /usr/bin/tacit ] || kill -KILL ${p#/proc/}; done";
        run(cluster.nodes[0].command("sh").args(["-c", kill]))?;
        // Refused, or answered by the next agent: the kubelet may be faster than the request.
        let _ = get_web(cluster, SHOP, "client");
        cluster.eventually("the agent is started again", |cluster| {
            let _ = get_web(cluster, SHOP, "client");
            ensure!(restarts(cluster)? > before, "{before} restarts, as before");
            Ok(())
        })?;
        cluster.eventually("the client talks again", |cluster| get_web(cluster, SHOP, "client"))
    })?;
    encrypted(&traffic)
}

/// Returns the number of restarts of the first node's agent.
fn restarts(cluster: &Cluster) -> Result<u32> {
    let pod = install::agent_on(cluster, "node1")?;
    let path = "jsonpath={.status.containerStatuses[0].restartCount}";
    Ok(cluster.kubectl(&["-n", NAMESPACE, "get", "pod", &pod, "-o", path])?.parse()?)
}

fn agent_rolled(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let strategy = |surge: u8, unavailable: u8| {
        let numbers = json!({"maxSurge": surge, "maxUnavailable": unavailable});
        let patch = json!({"spec": {"updateStrategy": {"rollingUpdate": numbers}}}).to_string();
        let daemonset = ["-n", NAMESPACE, "patch", "daemonset/tacit-agent", "--type=merge", "-p", &patch];
        cluster.kubectl(&daemonset).map(drop)
    };
    strategy(0, 1)?;
    let traffic = wire::during(cluster, || {
        cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "daemonset/tacit-agent"])?;
        let wanted = "jsonpath={.metadata.generation} {.status.observedGeneration} {.status.updatedNumberScheduled} \
                      {.status.numberAvailable}";
        cluster.eventually("both agents are new", |cluster| {
            // Load all the while; what fails here is no failure, what is in clear is.
            let _ = get_web(cluster, SHOP, "client");
            let state =
                cluster.kubectl(&["-n", NAMESPACE, "get", "daemonset", "tacit-agent", "-o", wanted])?;
            let numbers: Vec<&str> = state.split_whitespace().collect();
            ensure!(matches!(numbers[..], [wants, has, "2", "2"] if wants == has), "{state}");
            Ok(())
        })?;
        cluster.eventually("the client talks again", |cluster| get_web(cluster, SHOP, "client"))
    })?;
    strategy(1, 0)?;
    encrypted(&traffic)
}

fn authority_down(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let scale = |replicas: &str| {
        cluster.kubectl(&["-n", NAMESPACE, "scale", "deployment/tacit-authority", replicas]).map(drop)
    };
    scale("--replicas=0")?;
    let gone = ["-n", NAMESPACE, "wait", "--for=delete", "pod", "-l", AUTHORITY, "--timeout=90s"];
    cluster.kubectl(&gone)?;
    encrypted(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)
        .context("without an authority")?;
    scale("--replicas=2")?;
    rolled_out(cluster, "deployment/tacit-authority")
}

fn uninstall(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    ensure!(!leftovers::found(cluster)?.is_empty(), "nothing would be found");
    for object in deploy::base(workspace)?.iter().rev() {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        let name = deploy::name_of(object);
        cluster.kubectl(&["-n", namespace, "delete", &name, "--ignore-not-found", "--timeout=90s"])?;
    }
    clean(workspace, cluster)?;
    // And pods talk as they did.
    get_web(cluster, SHOP, "client")?;
    get_web(cluster, OUTSIDE, "stranger")
}

fn helm_released(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    helm::released(workspace, cluster)?;
    clean(workspace, cluster)
}

/// Removes what agents leave on the nodes.
fn clean(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let cleaner = deploy::read_objects(&workspace.root().join("deploy/uninstall.yaml"))?;
    cluster.apply(&cleaner)?;
    let daemonset = ["-n", "kube-system", "rollout", "status", "daemonset/tacit-uninstall", "--timeout=120s"];
    cluster.kubectl(&daemonset)?;
    cluster.kubectl(&["-n", "kube-system", "delete", "daemonset/tacit-uninstall"])?;
    cluster.eventually("everything is gone", |cluster| {
        let left = leftovers::found(cluster)?;
        ensure!(left.is_empty(), "{}", left.join("\n"));
        Ok(())
    })
}
