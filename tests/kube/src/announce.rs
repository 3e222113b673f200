//! The right to announce pods: patches of the status of pods as the agents make them, each with an agent's own token. The admission policy
//! of the overlay beside Istio ambient bounds them.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{cluster::Cluster, install, node::Node, pods::SHOP};
use crate::deploy::{self, NAMESPACE};

/// Pods of the first and of the second node.
const OWN: &str = "client";
const OTHER: &str = "web";

pub(super) fn bounded(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let file = workspace.root().join("deploy/kustomize/ambient/announce.yaml");
    cluster.apply(&deploy::read_objects(&file)?)?;
    let result = tried(cluster);
    cluster.kubectl(&["delete", "-f", &file.display().to_string(), "--ignore-not-found"])?;
    result
}

fn tried(cluster: &Cluster) -> Result<()> {
    let node = &cluster.nodes[0];
    let pod = install::agent_on(cluster, node.plan.name)?;
    let account = ["-n", NAMESPACE, "create", "token", "tacit-agent"];
    let token = cluster
        .kubectl(&[&account[..], &["--bound-object-kind=Pod", "--bound-object-name", &pod]].concat())?;
    let unbound = cluster.kubectl(&account)?;
    let announced = json!({"ambient.istio.io/redirection": "enabled", "tacit.io/announced": "true"});
    let withdrawn = json!({"ambient.istio.io/redirection": null, "tacit.io/announced": null});
    let metadata = |annotations: &Value| json!({"metadata": {"annotations": annotations}});
    let refused = |token: &str, pod: &str, patch: &Value, why: &str| {
        let answer = patched(cluster, node, token, pod, patch)?;
        let message = answer["message"].as_str().unwrap_or_default();
        ensure!(
            answer["kind"] == "Status" && message.contains(why),
            "{pod}: {patch} was answered with {answer}"
        );
        Ok(())
    };
    let foreign = "pods of its own node only";
    // The API server needs a moment for a new policy.
    cluster
        .eventually("the policy is in force", |_| refused(&token, OTHER, &metadata(&announced), foreign))?;
    refused(&unbound, OWN, &metadata(&announced), foreign)?;
    for annotations in [&announced, &withdrawn] {
        let answer = patched(cluster, node, &token, OWN, &metadata(annotations))?;
        let has = &answer["metadata"]["annotations"]["tacit.io/announced"];
        ensure!(answer["kind"] == "Pod" && *has == annotations["tacit.io/announced"], "{answer}");
    }
    let annotations = "may change only the annotations";
    for (patch, why) in [
        (metadata(&json!({"other": "x"})), annotations),
        (metadata(&json!({"ambient.istio.io/redirection": "pending"})), "only to enabled"),
        (json!({"metadata": {"labels": {"app": "other"}}}), "may not change labels"),
        (json!({"metadata": {"finalizers": ["example.org/held"]}}), "may not change finalizers"),
        (json!({"status": {"phase": "Failed"}}), "may not change the status"),
        (
            json!({"status": {"podIP": "192.0.2.1", "podIPs": [{"ip": "192.0.2.1"}]}}),
            "may not change the status",
        ),
    ] {
        refused(&token, OWN, &patch, why)?;
    }
    Ok(())
}

/// Returns the answer of the API server to a merge patch of the status of a pod.
fn patched(cluster: &Cluster, node: &Node, token: &str, pod: &str, patch: &Value) -> Result<Value> {
    let mut curl = node.command("curl");
    curl.args(["-sS", "--max-time", "10", "-X", "PATCH", "-H", "content-type: application/merge-patch+json"]);
    curl.args(["-H", &format!("authorization: Bearer {token}"), "-d", &patch.to_string()]);
    curl.arg("--cacert").arg(cluster.authority());
    let answer = run(curl.arg(format!("https://127.0.0.1:6443/api/v1/namespaces/{SHOP}/pods/{pod}/status")))?;
    serde_json::from_str(&answer).with_context(|| format!("the API server answered {answer:?}"))
}
