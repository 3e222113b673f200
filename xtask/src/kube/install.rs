//! Tacit on the cluster: the objects of `deploy/kustomize/base`, with what this cluster has other than a user's.
//!
//! | here | why |
//! |---|---|
//! | `podsCgroup` | the cgroup2 hierarchy may stand beside version 1's; the kubelet uses cgroupfs |
//! | PodDisruptionBudget of `policy/v1beta1` | the server is 1.20 |

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{cluster::Cluster, standalone};
use crate::{
    deploy::{self, NAMESPACE, name_of},
    workspace::Workspace,
};

/// The objects as they are applied here.
pub(super) fn objects(workspace: &Workspace) -> Result<Vec<Value>> {
    let mut objects = deploy::base(workspace)?;
    for object in &mut objects {
        match name_of(object).as_str() {
            "PodDisruptionBudget/tacit-authority" => object["apiVersion"] = json!("policy/v1beta1"),
            "ConfigMap/tacit-agent" => change_config(object, &json!({"podsCgroup": pods_cgroup()?}))?,
            _ => {}
        }
    }
    standalone::change(&mut objects)?;
    Ok(objects)
}

/// The definitions of Istio's policies.
pub(super) fn definitions(workspace: &Workspace) -> Result<Vec<Value>> {
    let folder = workspace.root().join("deploy/crds");
    let mut objects = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        objects.extend(deploy::read_objects(&entry?.path())?);
    }
    Ok(objects)
}

/// Changes fields of the agent's configuration.
pub(super) fn change_config(config_map: &mut Value, changed: &Value) -> Result<()> {
    let text = config_map["data"]["tacit.yaml"].as_str().context("a ConfigMap without tacit.yaml")?;
    let mut config = deploy::parse(text)?;
    deploy::merge(&mut config, changed);
    // JSON is YAML too.
    config_map["data"]["tacit.yaml"] = json!(config.to_string());
    Ok(())
}

/// Where the kubelet's pods are, for an agent in a container.
pub(super) fn pods_cgroup() -> Result<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    let point = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next().filter(|_| fields.next() == Some("cgroup2"))
    });
    Ok(format!("{}/kubepods", point.context("no cgroup v2 hierarchy is mounted")?))
}

/// The agent's pod on a node.
pub(super) fn agent_on(cluster: &Cluster, node: &str) -> Result<String> {
    let field = format!("--field-selector=spec.nodeName={node}");
    let name = "jsonpath={.items[*].metadata.name}";
    let label = "app.kubernetes.io/name=tacit-agent";
    let found = cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "-l", label, &field, "-o", name])?;
    ensure!(!found.is_empty() && !found.contains(' '), "agents on {node}: {found:?}");
    Ok(found)
}

/// What `tacit` prints in the agent's pod on a node.
pub(super) fn tacit(cluster: &Cluster, node: &str, arguments: &[&str]) -> Result<String> {
    let pod = agent_on(cluster, node)?;
    let exec = ["-n", NAMESPACE, "exec", &pod, "--", "/usr/bin/tacit"];
    cluster.kubectl(&[&exec, arguments].concat())
}

/// The agent's status on a node.
pub(super) fn status(cluster: &Cluster, node: &str) -> Result<Value> {
    Ok(serde_json::from_str(&tacit(cluster, node, &["status", "-o", "json"])?)?)
}
