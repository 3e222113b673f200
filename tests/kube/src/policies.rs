//! Policies, written to the cluster's API as their authors write them.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use xtask_support::workspace::Workspace;

use super::{
    checks::{both_are, is_strict},
    cluster::Cluster,
    install::{self, status},
    pods::{OUTSIDE, SHOP, get_web},
};

/// Namespace shop takes no plaintext.
pub(super) fn strict() -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": SHOP}, "spec": {"mtls": {"mode": "STRICT"}},
    })
}

/// Pods of an app deny these operations.
fn deny(version: &str, app: &str, operation: &Value) -> Value {
    json!({
        "apiVersion": format!("security.istio.io/{version}"), "kind": "AuthorizationPolicy",
        "metadata": {"name": "deny", "namespace": SHOP},
        "spec": {
            "selector": {"matchLabels": {"app": app}}, "action": "DENY",
            "rules": [{"to": [{"operation": operation}]}],
        },
    })
}

fn take_back(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicies", "deny"])?;
    cluster.eventually("the client talks again", |cluster| get_web(cluster, SHOP, "client"))
}

/// Waits until the server is not reached any more.
fn refused(cluster: &Cluster) -> Result<()> {
    cluster.eventually("the client is refused", |cluster| {
        ensure!(get_web(cluster, SHOP, "client").is_err(), "the server answered");
        Ok(())
    })
}

pub(super) fn denied(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let other = json!({"ports": ["81"]});
    cluster.apply(&[deny("v1beta1", "web", &other)])?;
    both_are(cluster, "as it was", |pod| pod["name"] != "web" || pod["policies"] == json!(["shop/deny"]))?;
    get_web(cluster, SHOP, "client").context("the policy is about another port")?;
    cluster.apply(&[deny("v1", "web", &json!({"ports": ["8080"]}))])?;
    refused(cluster)?;
    take_back(cluster)
}

pub(super) fn unreadable(_: &Workspace, cluster: &Cluster) -> Result<()> {
    // The definition takes any text for a port.
    let wrong = json!({"ports": ["http"]});
    cluster.apply(&[deny("v1", "other", &wrong)])?;
    let says = "AuthorizationPolicy shop/deny: spec.rules[0].to[0].operation.ports[0]: \"http\" is no port";
    for node in ["node1", "node2"] {
        cluster.eventually("the agent tells of the policy", |cluster| {
            let told = unreadable_on(cluster, node)?;
            ensure!(told.contains(says), "{told}");
            Ok(())
        })?;
    }
    get_web(cluster, SHOP, "client").context("the policy selects no pod that takes part")?;
    cluster.apply(&[deny("v1", "web", &wrong)])?;
    refused(cluster)?;
    for_each_version_one_event(cluster)?;
    take_back(cluster)?;
    ensure!(unreadable_on(cluster, "node2")? == "[]", "the agent still tells of a policy that is gone");
    Ok(())
}

fn unreadable_on(cluster: &Cluster, node: &str) -> Result<String> {
    Ok(source(&status(cluster, node)?)?["unreadable"].to_string().replace("\\\"", "\""))
}

/// Returns the policy source in an agent's status.
pub(super) fn source(status: &Value) -> Result<&Value> {
    let sources = status["sources"].as_array().context("a status without sources")?;
    sources.iter().find(|source| source["kind"] == "policy").context("no source of policies")
}

/// There were two unreadable versions, and two agents.
fn for_each_version_one_event(cluster: &Cluster) -> Result<()> {
    let path = "jsonpath={range .items[*]}{.type} {.involvedObject.kind}/{.involvedObject.name} {.message}{\"\\n\"}{end}";
    let ask = ["-n", SHOP, "get", "events", "--field-selector=reason=InvalidPolicy", "-o", path];
    cluster.eventually("events tell of the policy", |cluster| {
        let events = cluster.kubectl(&ask)?;
        let start =
            "Warning AuthorizationPolicy/deny spec.rules[0].to[0].operation.ports[0]: \"http\" is no port";
        ensure!(events.lines().all(|event| event.starts_with(start)), "{events}");
        ensure!(events.lines().count() == 2, "{events}");
        Ok(())
    })
}

pub(super) fn undefined(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let definition = "customresourcedefinition/peerauthentications.security.istio.io";
    cluster.kubectl(&["delete", definition, "--timeout=60s"])?;
    for node in ["node1", "node2"] {
        cluster.eventually("the agent misses the definition", |cluster| {
            let status = status(cluster, node)?;
            let error = source(&status)?["last_error"].as_str().unwrap_or_default();
            ensure!(error.contains("peerauthentications"), "{error}");
            Ok(())
        })?;
    }
    both_are(cluster, "STRICT all the same", is_strict)?;
    ensure!(get_web(cluster, OUTSIDE, "stranger").is_err(), "plaintext was answered under STRICT");
    install::define(workspace, cluster)?;
    cluster.apply(&[strict()])?;
    for node in ["node1", "node2"] {
        cluster.eventually("the agent follows again", |cluster| {
            let status = status(cluster, node)?;
            ensure!(source(&status)?["last_error"].is_null(), "{status}");
            Ok(())
        })?;
    }
    both_are(cluster, "STRICT", is_strict)
}
