//! Tacit on the cluster: the objects of `deploy/kustomize/base`, unchanged.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{cluster::Cluster, node::Node};
use crate::deploy::{self, NAMESPACE, name_of};

/// Compares the installed objects with the output of kustomize, which is part of kubectl.
pub(super) fn kustomized(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let folder = workspace.root().join("deploy/kustomize/base");
    let rendered = deploy::objects_of(&cluster.kubectl(&["kustomize", &folder.display().to_string()])?)?;
    let base = deploy::base(workspace)?;
    ensure!(rendered.len() == base.len(), "{} objects, not {}", rendered.len(), base.len());
    for object in &base {
        ensure!(rendered.contains(object), "kustomize renders another {}", name_of(object));
    }
    Ok(())
}

/// Creates the definitions of Istio's policies; those that are there stay as they are.
pub(super) fn define(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let folder = workspace.root().join("deploy/crds");
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        for definition in deploy::read_objects(&entry?.path())? {
            let name = name_of(&definition);
            if cluster.kubectl(&["get", &name, "--ignore-not-found", "-o", "name"])?.is_empty() {
                cluster.apply(&[definition])?;
            }
            cluster.kubectl(&["wait", "--for=condition=Established", &name, "--timeout=60s"])?;
        }
    }
    Ok(())
}

/// The address of the authority's Service.
pub(super) fn authority_address(cluster: &Cluster) -> Result<String> {
    let path = "jsonpath={.spec.clusterIP}";
    cluster.kubectl(&["-n", NAMESPACE, "get", "service", "tacit-authority", "-o", path])
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

/// Returns the output of `tacit` in the agent's pod on a node.
pub(super) fn tacit(cluster: &Cluster, node: &str, arguments: &[&str]) -> Result<String> {
    let pod = agent_on(cluster, node)?;
    let exec = ["-n", NAMESPACE, "exec", &pod, "--", "/usr/bin/tacit"];
    cluster.kubectl(&[&exec, arguments].concat())
}

/// The agent's status on a node.
pub(super) fn status(cluster: &Cluster, node: &str) -> Result<Value> {
    Ok(serde_json::from_str(&tacit(cluster, node, &["status", "-o", "json"])?)?)
}

/// The metrics of the agent on a node.
pub(super) fn metrics(node: &Node) -> Result<String> {
    run(node.command("curl").args(["-fsS", "--max-time", "5", "http://127.0.0.1:15020/metrics"]))
}
