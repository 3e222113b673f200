//! Checks shared by several scenarios: the agents' view of pods, and a recording of the wire.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tacit_topology::Traffic;

use super::{cluster::Cluster, install::status, pods::MARKER};
use crate::deploy::NAMESPACE;

/// The label that enrols.
pub(super) const ENROLLED: &str = "tacit.io/enrol=true";
/// The authority's pods.
pub(super) const AUTHORITY: &str = "app.kubernetes.io/name=tacit-authority";

/// Waits until a rollout is complete.
pub(super) fn rolled_out(cluster: &Cluster, what: &str) -> Result<()> {
    cluster.kubectl(&["-n", NAMESPACE, "rollout", "status", what, "--timeout=120s"]).map(drop)
}

/// Waits until the agents say so of the client and of the server.
pub(super) fn both_are(cluster: &Cluster, what: &str, is_so: fn(&Value) -> bool) -> Result<()> {
    [("node1", "client"), ("node2", "web")]
        .iter()
        .try_for_each(|(node, pod)| is(cluster, node, pod, what, is_so))
}

/// Waits until a node's agent says so of a pod.
pub(super) fn is(
    cluster: &Cluster,
    node: &str,
    pod: &str,
    what: &str,
    is_so: fn(&Value) -> bool,
) -> Result<()> {
    cluster.eventually(&format!("{pod} is {what}"), |cluster| {
        let found = pod_in(&status(cluster, node)?, pod)?;
        ensure!(is_so(&found), "{found}");
        Ok(())
    })
}

pub(super) fn is_enrolled(pod: &Value) -> bool {
    pod["state"] == "enrolled"
}

pub(super) fn is_strict(pod: &Value) -> bool {
    pod["mode"].as_str().is_some_and(|mode| mode.eq_ignore_ascii_case("strict"))
}

/// Both a request and its answer can be read: so a client that leaks is seen even when no server answers it.
pub(super) fn in_clear(traffic: &Traffic) -> Result<()> {
    let seen = traffic.occurrences(MARKER.as_bytes());
    ensure!(
        seen >= 2,
        "the marker is in the request and in the answer, and was read on the wire {seen} times"
    );
    Ok(())
}

pub(super) fn encrypted(traffic: &Traffic) -> Result<()> {
    let seen = traffic.occurrences(MARKER.as_bytes());
    ensure!(seen == 0, "the marker was read on the wire {seen} times");
    ensure!(traffic.tunnel_bytes > 0 && traffic.tunnel_is_tls(), "nothing went through the tunnel");
    Ok(())
}

/// Returns a pod's entry in an agent's status.
pub(super) fn pod_in(status: &Value, name: &str) -> Result<Value> {
    let pods = status["pods"].as_array().context("a status without pods")?;
    pods.iter().find(|pod| pod["name"] == name).cloned().with_context(|| format!("the agent knows no {name}"))
}
