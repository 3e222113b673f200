//! A rolling update while pods talk. The next agent of each node stands by beside the current one, and takes over when the
//! DaemonSet's controller has that one deleted.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use xtask_support::workspace::Workspace;

use super::{
    checks::{both_are, encrypted, is_enrolled, rolled_out},
    cluster::Cluster,
    install::{agent_on, status},
    load::{self, ECHO, Held, Stream},
    pods::{self, MARKER, SHOP},
    wire,
};
use crate::deploy::NAMESPACE;

/// New connections before, and after.
const STREAM: usize = 20;
/// Flows that are open when the agent is told to end; they may finish until the drain's deadline.
const HELD: usize = 2;

pub(super) fn taken_over(_: &Workspace, cluster: &Cluster) -> Result<String> {
    let [near, far] = cluster.nodes.as_slice() else { bail!("there are two nodes") };
    cluster.apply(&[
        pods::pod(SHOP, "host", far.plan.name, &load::serve()),
        pods::pod(SHOP, "caller", near.plan.name, "sleep infinity"),
    ])?;
    pods::ready(cluster, SHOP, &["pod/host", "pod/caller"])?;
    both_are(cluster, "enrolled", is_enrolled)?;
    let host = pods::address(cluster, SHOP, "host")?;
    load::reaches(cluster, SHOP, "caller", &host)?;
    let before = agents(cluster)?;
    let held = [Held { name: "held", to: &host, port: ECHO, line: MARKER, number: HELD }];
    load::begin(cluster, SHOP, "caller", &held, Some(&host))?;
    load::answered(cluster, SHOP, "caller", STREAM)?;

    let (since, begin) = (load::now()?, Instant::now());
    let traffic = wire::during(cluster, || {
        cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "daemonset/tacit-agent"])?;
        rolled_out(cluster, "daemonset/tacit-agent")?;
        cluster.eventually("both nodes have one agent, a new one, that serves", |cluster| {
            let now = agents(cluster)?;
            ensure!(now.iter().all(|agent| !before.contains(agent)), "agents {now:?}");
            for node in &cluster.nodes {
                let state = status(cluster, node.plan.name)?["state"].clone();
                ensure!(state == "ready", "{}: {state}", node.plan.name);
            }
            Ok(())
        })?;
        load::answered(cluster, SHOP, "caller", STREAM)
    })?;
    let took = begin.elapsed();
    encrypted(&traffic)?;
    let stream = Stream::of(cluster, SHOP, "caller", since)?;
    ensure!(stream.failed() == 0, "{} of {} new connections failed", stream.failed(), stream.made());
    pods::end(cluster, SHOP, &["caller", "host"])?;
    Ok(format!(
        "on both nodes within {:.0} s; {} new connections meanwhile: none failed",
        took.as_secs_f64(),
        stream.made()
    ))
}

/// Returns the agents' pods, of which each node has one.
fn agents(cluster: &Cluster) -> Result<Vec<String>> {
    cluster.nodes.iter().map(|node| agent_on(cluster, node.plan.name)).collect()
}
