//! The chart under Helm itself: lint, what it renders, and values that it rejects.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use crate::{
    checks::rolled_out,
    cluster::Cluster,
    deploy::{self, NAMESPACE, name_of},
    go_module::{Build, GoModule},
    install,
};

/// The version of Kubernetes that charts are rendered for.
const STAMP: &str = "k8s.io/client-go/pkg/version.gitVersion=v1.37.0";

/// The workloads of a release.
const ROLLOUTS: [&str; 2] = ["deployment/tacit-authority", "daemonset/tacit-agent"];

/// Values that the schema rejects, each with the key that the error must name.
const BAD_VALUES: [(&str, &str); 8] = [
    ("nosuch=1", "nosuch"),
    ("agent.nosuch=1", "nosuch"),
    ("trustDomain=Not A Domain", "trustDomain"),
    ("trustDomain=", "trustDomain"),
    ("meshRanges={10.0.0.0}", "meshRanges"),
    ("allowClear={dns:53}", "allowClear"),
    ("authority.replicas=0", "replicas"),
    ("image.pullPolicy=Sometimes", "pullPolicy"),
];

/// Returns Helm's path. Builds it when the cache does not have the pinned version.
pub(super) fn ensure_built(workspace: &Workspace) -> Result<PathBuf> {
    Ok(GoModule::open(workspace, "helm")?.programs(&Build::PureGo(vec![STAMP.to_owned()]))?.join("helm"))
}

/// Lints and renders the chart, and tries values that must be rejected.
pub(super) fn tried(workspace: &Workspace, _: &Cluster) -> Result<()> {
    chart(&ensure_built(workspace)?, workspace)
}

/// Installs the chart on a cluster that has the definitions of policies, changes the release, goes back, removes it, and installs it
/// again on a cluster without the definitions.
pub(super) fn released(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let (program, chart) = (ensure_built(workspace)?, workspace.root().join("deploy/helm/tacit"));
    let chart = chart.display().to_string();
    let helm = |arguments: &[&str]| {
        run(cluster.administrator(&program).args(arguments).args(["--namespace", NAMESPACE]))
    };
    let is_configured = |ranges: u64| {
        ROLLOUTS.iter().try_for_each(|what| rolled_out(cluster, what))?;
        cluster.eventually("the agents have the values", |cluster| {
            let mesh = &install::status(cluster, "node1")?["mesh"];
            ensure!(mesh["configured"] == ranges, "{mesh}");
            Ok(())
        })
    };
    helm(&["install", "tacit", &chart, "--create-namespace"]).context("beside the definitions")?;
    is_configured(0)?;
    helm(&["test", "tacit"]).context("helm test")?;
    let refused = helm(&["upgrade", "tacit", &chart, "--set", "nosuch=1"]);
    let said = refused.err().map(|error| format!("{error:#}")).context("`--set nosuch=1` was accepted")?;
    ensure!(said.contains("nosuch"), "{said}");
    helm(&["upgrade", "tacit", &chart, "--set", "meshRanges={10.244.0.0/16}"])?;
    is_configured(1).context("upgrade")?;
    helm(&["rollback", "tacit", "1"])?;
    is_configured(0).context("rollback")?;
    helm(&["uninstall", "tacit"])?;
    let definitions =
        ["authorizationpolicies", "peerauthentications"].map(|kind| format!("crd/{kind}.security.istio.io"));
    for definition in &definitions {
        cluster.kubectl(&["get", definition]).context("a definition went with the release")?;
        cluster.kubectl(&["delete", definition, "--timeout=60s"])?;
    }
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=90s"])?;
    helm(&["install", "tacit", &chart, "--create-namespace"]).context("without definitions")?;
    is_configured(0)?;
    helm(&["uninstall", "tacit"])?;
    definitions.iter().try_for_each(|definition| cluster.kubectl(&["get", definition]).map(drop))
}

fn chart(helm: &Path, workspace: &Workspace) -> Result<()> {
    let folder = workspace.root().join("deploy/helm/tacit");
    let helm = |arguments: &[&str]| -> Result<Output> {
        let (verb, rest) = arguments.split_first().context("no command")?;
        let mut command = Command::new(helm);
        command
            .arg(verb)
            .args(if *verb == "template" { &["tacit"][..] } else { &[] })
            .arg(&folder)
            .args(rest);
        command.args(["--namespace", NAMESPACE]).output().context("cannot start Helm")
    };
    let linted = helm(&["lint", "--strict"])?;
    ensure!(linted.status.success(), "lint: {}", text(&linted));
    let rendered = helm(&["template", "--set", "namespace.create=true"])?;
    ensure!(rendered.status.success(), "template: {}", text(&rendered));
    let rendered = deploy::objects_of(&String::from_utf8_lossy(&rendered.stdout))?;
    is_the_base(workspace, rendered)?;
    let without = helm(&["template", "--set", "definitions=never"])?;
    ensure!(without.status.success(), "definitions=never: {}", text(&without));
    let without = deploy::objects_of(&String::from_utf8_lossy(&without.stdout))?;
    ensure!(
        without.iter().all(|object| object["kind"] != "CustomResourceDefinition"),
        "definitions=never has definitions"
    );
    for (value, key) in BAD_VALUES {
        let refused = helm(&["template", "--set", value])?;
        let said = text(&refused);
        ensure!(!refused.status.success(), "`--set {value}` was accepted");
        ensure!(said.contains(key), "`--set {value}`: the error does not name {key}: {said}");
    }
    Ok(())
}

/// The rendered objects are those of the kustomize base and the definitions, without what only a chart has.
fn is_the_base(workspace: &Workspace, rendered: Vec<Value>) -> Result<()> {
    let is_test = |object: &Value| object["metadata"]["annotations"]["helm.sh/hook"] == "test";
    let (tests, objects): (Vec<Value>, Vec<Value>) = rendered.into_iter().partition(is_test);
    ensure!(tests.len() == 1, "{} tests of the release, not 1", tests.len());
    let mut rendered: BTreeMap<String, Value> =
        objects.into_iter().map(|object| (name_of(&object), without_additions(object))).collect();
    let mut expected = deploy::base(workspace)?;
    for name in ["authorizationpolicies", "peerauthentications"] {
        expected.extend(deploy::read_objects(&workspace.root().join(format!("deploy/crds/{name}.yaml")))?);
    }
    for object in &expected {
        let name = name_of(object);
        match rendered.remove(&name) {
            Some(found) if found == *object => {}
            Some(found) => bail!("{name} is rendered as {found}"),
            None => bail!("{name} is not rendered"),
        }
    }
    ensure!(rendered.is_empty(), "the base lacks {:?}", rendered.keys());
    Ok(())
}

/// Takes away the checksums that roll pods, and the policy that keeps definitions.
fn without_additions(mut object: Value) -> Value {
    for pointer in ["/metadata", "/spec/template/metadata"] {
        let Some(metadata) = object.pointer_mut(pointer).and_then(Value::as_object_mut) else { continue };
        let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) else {
            continue;
        };
        annotations.retain(|name, _| name != "checksum/config" && name != "helm.sh/resource-policy");
        if annotations.is_empty() {
            metadata.remove("annotations");
        }
    }
    object
}

fn text(output: &Output) -> String {
    let streams = [&output.stdout, &output.stderr];
    streams.map(|stream| String::from_utf8_lossy(stream).trim().to_owned()).join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_a_chart_adds_is_taken_away() {
        let object = json!({
            "metadata": {"name": "a", "annotations": {"helm.sh/resource-policy": "keep"}},
            "spec": {"template": {"metadata": {"annotations": {"checksum/config": "1", "b": "2"}}}},
        });
        let plain = json!({
            "metadata": {"name": "a"},
            "spec": {"template": {"metadata": {"annotations": {"b": "2"}}}},
        });
        assert_eq!(without_additions(object), plain);
    }
}
