//! The Helm chart, rendered, so that tests can hold it against the kustomize base.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use xtask_support::workspace::Workspace;

use super::{read, template, yaml};

/// The objects, as `helm template --namespace` renders them with `changed` over the chart's values.
pub(super) fn objects(workspace: &Workspace, namespace: &str, changed: &Value) -> Result<Vec<Value>> {
    let folder = workspace.root().join("deploy/helm/tacit");
    let values = yaml::documents(&read(&folder.join("values.yaml"))?)?;
    let mut values = values.into_iter().next().context("values.yaml is empty")?;
    merge(&mut values, changed);
    let scope = json!({"Values": values, "Release": {"Namespace": namespace}});
    let mut objects = Vec::new();
    for file in files(&folder.join("templates"))? {
        let text = template::render(&read(&file)?, &scope).with_context(|| file.display().to_string())?;
        objects.extend(yaml::documents(&text).with_context(|| format!("rendered {}", file.display()))?);
    }
    objects.retain(|object| !object.is_null());
    Ok(objects)
}

/// Lays `changed` over `value`: mappings by key, everything else as a whole.
fn merge(value: &mut Value, changed: &Value) {
    match (value, changed) {
        (Value::Object(fields), Value::Object(changes)) => {
            for (key, change) in changes {
                merge(fields.entry(key.clone()).or_insert(Value::Null), change);
            }
        }
        (value, changed) => *value = changed.clone(),
    }
}

/// The files of a folder, by name.
pub(super) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.sort();
    Ok(found)
}
