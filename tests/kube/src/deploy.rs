//! The manifests in `deploy/`, rendered: the kustomize base and the Helm chart, as objects.
//!
//! Neither kustomize nor helm is needed: the base is a list of files, and the chart uses the few constructs of Helm's
//! templates that `template` knows. Whatever is not known is refused, so that what is compared is what they render.

#[cfg(test)]
mod chart;
#[cfg(test)]
mod definitions;
#[cfg(test)]
mod documents;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod overlay;
#[cfg(test)]
mod template;
#[cfg(test)]
mod tests;
mod yaml;

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask_support::workspace::Workspace;

/// The namespace of the base.
pub(crate) const NAMESPACE: &str = "tacit-system";

/// The objects of `deploy/kustomize/base`, in the order in which they are applied.
pub(crate) fn base(workspace: &Workspace) -> Result<Vec<Value>> {
    let folder = workspace.root().join("deploy/kustomize/base");
    let file = folder.join("kustomization.yaml");
    let documents = yaml::documents(&read(&file)?).with_context(|| file.display().to_string())?;
    let [kustomization] = documents.as_slice() else { bail!("{}: not one document", file.display()) };
    let known = ["apiVersion", "kind", "resources"];
    for field in kustomization.as_object().into_iter().flat_map(|fields| fields.keys()) {
        ensure!(known.contains(&field.as_str()), "{}: `{field}` is not rendered here", file.display());
    }
    let names = kustomization["resources"].as_array().context("kustomization.yaml has no resources")?;
    let mut objects = Vec::new();
    for name in names {
        objects.extend(read_objects(&folder.join(name.as_str().context("a resource that is no file")?))?);
    }
    Ok(objects)
}

/// The objects of one file.
pub(crate) fn read_objects(file: &Path) -> Result<Vec<Value>> {
    objects_of(&read(file)?).with_context(|| file.display().to_string())
}

/// The objects of a text.
pub(crate) fn objects_of(text: &str) -> Result<Vec<Value>> {
    let mut objects = yaml::documents(text)?;
    objects.retain(|object| !object.is_null());
    Ok(objects)
}

/// One document as a value.
pub(crate) fn parse(text: &str) -> Result<Value> {
    let documents = yaml::documents(text)?;
    let [document] = documents.as_slice() else { bail!("{} documents, not one", documents.len()) };
    Ok(document.clone())
}

/// Kind and name, as kubectl takes them.
pub(crate) fn name_of(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}
