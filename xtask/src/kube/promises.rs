//! What a user is promised, each tried on the cluster. They run in this order, and later ones build on earlier ones.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tacit_topology::{Traffic, run};

use super::{
    cluster::Cluster,
    install::{self, status, tacit},
    leftovers,
    pods::{self, MARKER, OUTSIDE, SHOP, get_web},
    standalone, wire,
};
use crate::{
    deploy::{self, NAMESPACE},
    workspace::Workspace,
};

/// The authority's pods.
const AUTHORITY: &str = "app.kubernetes.io/name=tacit-authority";

/// One test.
pub(super) struct Promise {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    /// Do later ones need it?
    pub(super) is_ground: bool,
    pub(super) hold: fn(&Workspace, &Cluster) -> Result<()>,
}

const fn ground(
    name: &'static str,
    what: &'static str,
    hold: fn(&Workspace, &Cluster) -> Result<()>,
) -> Promise {
    Promise { name, what, is_ground: true, hold }
}

const fn leaf(
    name: &'static str,
    what: &'static str,
    hold: fn(&Workspace, &Cluster) -> Result<()>,
) -> Promise {
    Promise { name, what, is_ground: false, hold }
}

/// All of them.
pub(super) const ALL: [Promise; 10] = [
    ground("control", "without Tacit the marker is read on the wire", control),
    ground("install", "from nothing to ready agents on both nodes", install_all),
    leaf("doctor", "the agent's container has all that it needs", doctor),
    ground("enrol", "running pods are enrolled: the marker is on the wire no more", enrol),
    leaf("permissive", "plaintext of a pod outside is taken", permissive),
    ground("strict", "plaintext of a pod outside is refused, probes and enrolled pods are not", strict),
    leaf(
        "agent-killed",
        "while its agent is dead a pod sends nothing in clear, and later it talks again",
        agent_killed,
    ),
    leaf(
        "agent-rolled",
        "an update of the DaemonSet under load: nothing in clear, and afterwards it talks",
        agent_rolled,
    ),
    leaf(
        "authority-down",
        "without an authority pods talk on with the certificates that they have",
        authority_down,
    ),
    leaf("uninstall", "no program, pin, link, filter or rule is left", uninstall),
];

/// Those whose name contains `only`, and the ground that they stand on.
pub(super) fn chosen(only: Option<&str>) -> impl Iterator<Item = &'static Promise> {
    let wanted = only.unwrap_or_default().to_owned();
    ALL.iter().filter(move |promise| promise.is_ground || promise.name.contains(&wanted))
}

fn control(_: &Workspace, cluster: &Cluster) -> Result<()> {
    pods::start(cluster)?;
    let traffic = wire::during(cluster, || get_web(cluster, SHOP, "client"))?;
    ensure!(traffic.occurrences(MARKER.as_bytes()) > 0, "the recording would show nothing");
    Ok(())
}

fn install_all(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.apply(&install::definitions(workspace)?)?;
    cluster.apply(&install::objects(workspace, cluster)?)?;
    ["deployment/tacit-authority", "daemonset/tacit-agent"]
        .iter()
        .try_for_each(|what| rolled_out(cluster, what))
}

fn rolled_out(cluster: &Cluster, what: &str) -> Result<()> {
    cluster.kubectl(&["-n", NAMESPACE, "rollout", "status", what, "--timeout=120s"]).map(drop)
}

fn doctor(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.nodes.iter().try_for_each(|node| tacit(cluster, node.place.name, &["doctor"]).map(drop))
}

fn enrol(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let workloads =
        json!([standalone::workload(cluster, SHOP, "web")?, standalone::workload(cluster, SHOP, "client")?]);
    standalone::write(cluster, "directory.yaml", &json!({"workloads": workloads}).to_string())?;
    for (node, pod) in [("node1", "client"), ("node2", "web")] {
        cluster.eventually(&format!("{pod} is enrolled"), |cluster| {
            let found = pod_in(&status(cluster, node)?, pod)?;
            ensure!(found["state"] == "enrolled", "{found}");
            Ok(())
        })?;
    }
    encrypted(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)
}

fn encrypted(traffic: &Traffic) -> Result<()> {
    let seen = traffic.occurrences(MARKER.as_bytes());
    ensure!(seen == 0, "the marker was read on the wire {seen} times");
    ensure!(traffic.tunnel_bytes > 0 && traffic.tunnel_is_tls(), "nothing went through the tunnel");
    Ok(())
}

/// What an agent says of a pod.
fn pod_in(status: &Value, name: &str) -> Result<Value> {
    let pods = status["pods"].as_array().context("a status without pods")?;
    pods.iter().find(|pod| pod["name"] == name).cloned().with_context(|| format!("the agent knows no {name}"))
}

fn permissive(_: &Workspace, cluster: &Cluster) -> Result<()> {
    get_web(cluster, OUTSIDE, "stranger").context("PERMISSIVE takes plaintext")
}

fn strict(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": SHOP}, "spec": {"mtls": {"mode": "STRICT"}},
    });
    standalone::write(cluster, "policy.yaml", &policy.to_string())?;
    for (node, pod) in [("node1", "client"), ("node2", "web")] {
        cluster.eventually(&format!("{pod} is STRICT"), |cluster| {
            let found = pod_in(&status(cluster, node)?, pod)?;
            ensure!(
                found["mode"].as_str().is_some_and(|mode| mode.eq_ignore_ascii_case("strict")),
                "{found}"
            );
            Ok(())
        })?;
    }
    if get_web(cluster, OUTSIDE, "stranger").is_ok() {
        bail!("plaintext was answered under STRICT");
    }
    encrypted(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)?;
    // Its probe comes from the node each second, and two failures would show.
    cluster
        .kubectl(&["-n", SHOP, "wait", "--for=condition=Ready=false", "pod/web", "--timeout=5s"])
        .map_or(Ok(()), |_| bail!("the kubelet's probes are refused"))
}

fn agent_killed(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let before = restarts(cluster)?;
    let traffic = wire::during(cluster, || {
        let kill = "for p in /proc/[0-9]*; do [ \"$(readlink $p/exe)\" != /usr/bin/tacit ] || kill -KILL ${p#/proc/}; done";
        run(cluster.nodes[0].command("sh").args(["-c", kill]))?;
        // Refused, or answered by the next agent: the kubelet may be faster than the request.
        let _ = get_web(cluster, SHOP, "client");
        cluster.eventually("the agent is started again", |cluster| {
            ensure!(restarts(cluster)? > before, "{before} restarts, as before");
            Ok(())
        })?;
        cluster.eventually("the client talks again", |cluster| get_web(cluster, SHOP, "client"))
    })?;
    encrypted(&traffic)
}

/// How often the agent of the first node was started again.
fn restarts(cluster: &Cluster) -> Result<u32> {
    let pod = install::agent_on(cluster, "node1")?;
    let path = "jsonpath={.status.containerStatuses[0].restartCount}";
    Ok(cluster.kubectl(&["-n", NAMESPACE, "get", "pod", &pod, "-o", path])?.parse()?)
}

fn agent_rolled(_: &Workspace, cluster: &Cluster) -> Result<()> {
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
    for object in install::objects(workspace, cluster)?.iter().rev() {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        let name = deploy::name_of(object);
        cluster.kubectl(&["-n", namespace, "delete", &name, "--ignore-not-found", "--timeout=90s"])?;
    }
    let cleaner = deploy::read_objects(&workspace.root().join("deploy/uninstall.yaml"))?;
    cluster.apply(&cleaner)?;
    let daemonset = ["-n", "kube-system", "rollout", "status", "daemonset/tacit-uninstall", "--timeout=120s"];
    cluster.kubectl(&daemonset)?;
    cluster.kubectl(&["-n", "kube-system", "delete", "daemonset/tacit-uninstall"])?;
    cluster.eventually("everything is gone", |cluster| {
        let left = leftovers::found(cluster)?;
        ensure!(left.is_empty(), "{}", left.join("\n"));
        Ok(())
    })?;
    // And pods talk as they did.
    get_web(cluster, SHOP, "client")?;
    get_web(cluster, OUTSIDE, "stranger")
}
