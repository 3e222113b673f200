//! The Helm chart, rendered, so that tests can hold it against the kustomize base.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
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
    let templates = files(&folder.join("templates"))?;
    // The definitions depend on the cluster. Only Helm itself renders them.
    let is_rendered = |file: &&PathBuf| {
        file.extension().is_some_and(|extension| extension == "yaml") && !file.ends_with("definitions.yaml")
    };
    for file in templates.iter().filter(is_rendered) {
        let text = without_checksums(&read(file)?, &templates)?;
        let text = template::render(&text, &scope).with_context(|| file.display().to_string())?;
        objects.extend(yaml::documents(&text).with_context(|| format!("rendered {}", file.display()))?);
    }
    objects.retain(|object| !object.is_null());
    Ok(objects)
}

/// The template without its annotations `checksum/config`, which roll pods when a ConfigMap changes. The base has none.
/// Each must name a file of `templates`.
fn without_checksums(text: &str, templates: &[PathBuf]) -> Result<String> {
    const BEFORE: &str = "checksum/config: {{ include (print $.Template.BasePath \"/";
    const AFTER: &str = "\") . | sha256sum }}";
    let mut kept = String::new();
    for line in text.lines() {
        match line.trim_start().strip_prefix(BEFORE) {
            Some(rest) => {
                let name = rest.strip_suffix(AFTER).with_context(|| format!("`{line}` is no checksum"))?;
                ensure!(templates.iter().any(|file| file.ends_with(name)), "{name} is no template");
            }
            None => {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    Ok(kept)
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
