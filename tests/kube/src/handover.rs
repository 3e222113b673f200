//! An agent takes over from another one on its node while pods talk. The server has no `maxSurge`, so what a DaemonSet's
//! controller does with it is done here: one more agent of the same template beside the first, and the first one's end.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use xtask_support::workspace::Workspace;

use super::{
    checks::{both_are, encrypted, is_enrolled},
    cluster::Cluster,
    install::{agent_on, objects, status},
    load::{self, ECHO, Held, Stream},
    pods::{self, MARKER, SHOP},
    wire,
};
use crate::deploy::{NAMESPACE, name_of};

const NODE: &str = "node1";
const SURGE: &str = "tacit-agent-surge";
/// New connections before, and after.
const STREAM: usize = 20;
/// Flows that are open when the agent is told to end; they may finish until the drain's deadline.
const HELD: usize = 2;

pub(super) fn taken_over(workspace: &Workspace, cluster: &Cluster) -> Result<String> {
    let [near, far] = cluster.nodes.as_slice() else { anyhow::bail!("there are two nodes") };
    ensure!(near.plan.name == NODE, "{NODE} is not the first");
    cluster.apply(&[
        pods::pod(SHOP, "host", far.plan.name, &load::serve()),
        pods::pod(SHOP, "caller", near.plan.name, "sleep infinity"),
    ])?;
    pods::ready(cluster, SHOP, &["pod/host", "pod/caller"])?;
    both_are(cluster, "enrolled", is_enrolled)?;
    let host = pods::address(cluster, SHOP, "host")?;
    load::reaches(cluster, SHOP, "caller", &host)?;
    let first = agent_on(cluster, NODE)?;
    cluster.apply(&[surge(workspace, cluster)?])?;
    wait_ready(cluster, SURGE)?;
    let held = [Held { name: "held", to: &host, port: ECHO, line: MARKER, number: HELD }];
    load::begin(cluster, SHOP, "caller", &held, Some(&host))?;
    load::answered(cluster, SHOP, "caller", STREAM)?;

    let (since, begin) = (load::now()?, Instant::now());
    let traffic = wire::during(cluster, || {
        cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", &first, "--timeout=90s"])?;
        load::answered(cluster, SHOP, "caller", STREAM)?;
        // The DaemonSet has made one again meanwhile, which stands by in its turn, and takes over from the surge.
        cluster.eventually("the DaemonSet's next agent stands by", |cluster| {
            wait_ready(cluster, &agent_on(cluster, NODE)?)
        })?;
        cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", SURGE, "--timeout=90s"])?;
        load::answered(cluster, SHOP, "caller", STREAM)
    })?;
    let took = begin.elapsed();
    encrypted(&traffic)?;
    cluster.eventually("the DaemonSet's agent serves", |cluster| {
        let state = status(cluster, NODE)?["state"].clone();
        ensure!(state == "ready", "{state}");
        Ok(())
    })?;
    let stream = Stream::of(cluster, SHOP, "caller", since)?;
    ensure!(stream.failed() == 0, "{} of {} new connections failed", stream.failed(), stream.made());
    pods::end(cluster, SHOP, &["caller", "host"])?;
    Ok(format!(
        "twice within {:.0} s; {} new connections meanwhile: none failed",
        took.as_secs_f64(),
        stream.made()
    ))
}

/// A pod as the DaemonSet makes them, which is not its own.
fn surge(workspace: &Workspace, cluster: &Cluster) -> Result<serde_json::Value> {
    let objects = objects(workspace, cluster)?;
    let daemonset = objects.iter().find(|object| name_of(object) == "DaemonSet/tacit-agent");
    let template = &daemonset.context("no DaemonSet")?["spec"]["template"];
    let mut spec = template["spec"].clone();
    spec["nodeName"] = json!(NODE);
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": SURGE,
            "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/name": SURGE},
            "annotations": template["metadata"]["annotations"],
        },
        "spec": spec,
    }))
}

fn wait_ready(cluster: &Cluster, pod: &str) -> Result<()> {
    let name = format!("pod/{pod}");
    cluster
        .kubectl(&["-n", NAMESPACE, "wait", "--for=condition=Ready", &name, "--timeout=90s"])
        .map(drop)
        .with_context(|| format!("{pod} is not ready"))
}
