//! STRICT for the whole mesh, as meshes are run: it concerns enrolled pods. All others talk as without Tacit.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{
    checks::{encrypted, rolled_out},
    cluster::Cluster,
    dns,
    pods::{self, MARKER, OUTSIDE, PORT, SHOP, get_web},
    wire,
};
use crate::deploy::NAMESPACE;

/// Namespace of mesh-wide policies.
const ROOT: &str = "istio-system";
/// Port of the pod with the node's network.
const NODE_PORT: u16 = 18_080;

pub(super) fn held(_: &Workspace, cluster: &Cluster) -> Result<()> {
    cluster.apply(&[pods::namespace(ROOT), policy()])?;
    cluster.eventually("STRICT is the mode of the mesh", |cluster| {
        for node in &cluster.nodes {
            let kept = run(node.command("cat").arg("/var/lib/tacit/state/node-state.yaml"))?;
            ensure!(kept.contains("meshMode: STRICT"), "{kept}");
        }
        Ok(())
    })?;
    let talk = talk(cluster);
    cluster.kubectl(&["-n", ROOT, "delete", "peerauthentication", "default"])?;
    pods::delete(cluster, OUTSIDE, &["listener", "host"])?;
    talk
}

fn talk(cluster: &Cluster) -> Result<()> {
    // These are made under STRICT, and no source has named them before.
    let serve =
        |port: u16| format!("mkdir /www; echo {MARKER} >/www/index.html; exec httpd -f -p {port} -h /www");
    let listener = pods::pod(OUTSIDE, "listener", "node2", &serve(PORT));
    let mut host = pods::pod(OUTSIDE, "host", "node1", &serve(NODE_PORT));
    host["spec"]["hostNetwork"] = json!(true);
    cluster.apply(&[listener, host])?;
    pods::ready(cluster, OUTSIDE, &["pod/listener", "pod/host"])?;
    let (listener, host) =
        (pods::address(cluster, OUTSIDE, "listener")?, pods::address(cluster, OUTSIDE, "host")?);
    for (from, to, port) in
        [("stranger", &listener, PORT), ("host", &listener, PORT), ("stranger", &host, NODE_PORT)]
    {
        let what = format!("{from} to {to}, neither is enrolled");
        cluster.eventually(&what, |cluster| {
            let answer = pods::get(cluster, OUTSIDE, from, to, port)?;
            ensure!(answer.contains(MARKER), "{answer:?}");
            Ok(())
        })?;
    }
    for (namespace, pod) in [(OUTSIDE, "stranger"), (SHOP, "client")] {
        let ask = format!("nslookup web.{SHOP}.svc.cluster.local {}", dns::ADDRESS);
        let answer = pods::exec(cluster, namespace, pod, &ask).context("cluster DNS")?;
        ensure!(answer.contains("Address"), "{pod}: {answer}");
    }
    // The authority is not enrolled, and needs the API.
    cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "deployment/tacit-authority"])?;
    rolled_out(cluster, "deployment/tacit-authority")?;
    for pod in ["stranger", "host"] {
        if get_web(cluster, OUTSIDE, pod).is_ok() {
            bail!("a STRICT pod has answered {pod}, which is not enrolled");
        }
    }
    encrypted(&wire::during(cluster, || get_web(cluster, SHOP, "client"))?)
}

fn policy() -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": ROOT}, "spec": {"mtls": {"mode": "STRICT"}},
    })
}
