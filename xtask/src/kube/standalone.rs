//! The agents with a directory and a policy in files: ConfigMaps of this cluster, and a root that the nodes share.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::cluster::Cluster;
use crate::deploy::{NAMESPACE, name_of};

/// The files beside the configuration.
pub(super) fn change(objects: &mut [Value]) -> Result<()> {
    for object in objects.iter_mut().filter(|object| name_of(object) == "ConfigMap/tacit-agent") {
        object["data"]["directory.yaml"] = json!("workloads: []\n");
    }
    Ok(())
}

pub(super) fn change_config(config: &mut Value, node: &str) {
    config["node"] = json!(node);
    config["directory"] = json!({"file": "/etc/tacit/directory.yaml"});
}

/// Writes a file of the agents' ConfigMap.
pub(super) fn write(cluster: &Cluster, file: &str, content: &str) -> Result<()> {
    let patch = json!({"data": {file: content}}).to_string();
    cluster
        .kubectl(&["-n", NAMESPACE, "patch", "configmap", "tacit-agent", "--type=merge", "-p", &patch])
        .map(drop)
}

/// The directory's entry of a running pod.
pub(super) fn workload(cluster: &Cluster, namespace: &str, pod: &str) -> Result<Value> {
    let text = cluster.kubectl(&["-n", namespace, "get", "pod", pod, "-o", "json"])?;
    let pod: Value = serde_json::from_str(&text)?;
    let uid = pod["metadata"]["uid"].as_str().context("no uid")?;
    let class = pod["status"]["qosClass"].as_str().context("no class")?.to_lowercase();
    Ok(json!({
        "name": pod["metadata"]["name"],
        "namespace": namespace,
        "serviceAccount": pod["spec"]["serviceAccountName"],
        "addresses": [pod["status"]["podIP"]],
        "node": pod["spec"]["nodeName"],
        "cgroup": format!("{class}/pod{uid}"),
    }))
}
