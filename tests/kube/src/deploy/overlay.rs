//! The overlay `deploy/kustomize/ambient`, rendered as kustomize does: resources, then patches by target. Of patches, JSON patches with
//! `add`, `replace` and `test`, and the strategic patch that deletes an object, are known. Anything else is an error.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask_support::workspace::Workspace;

use super::{base, parse, read, read_objects};

/// The objects of `deploy/kustomize/ambient`.
pub(super) fn ambient(workspace: &Workspace) -> Result<Vec<Value>> {
    let folder = workspace.root().join("deploy/kustomize/ambient");
    let kustomization = parse(&read(&folder.join("kustomization.yaml"))?)?;
    let known = ["apiVersion", "kind", "resources", "patches"];
    for field in kustomization.as_object().into_iter().flat_map(|fields| fields.keys()) {
        ensure!(known.contains(&field.as_str()), "`{field}` is not rendered here");
    }
    let mut objects = Vec::new();
    for resource in kustomization["resources"].as_array().context("no resources")? {
        match resource.as_str().context("a resource that is no file")? {
            "../base" => objects.extend(base(workspace)?),
            file => objects.extend(read_objects(&folder.join(file))?),
        }
    }
    for patch in kustomization["patches"].as_array().context("no patches")? {
        let target = patch["target"].clone();
        let is_target =
            |object: &Value| object["kind"] == target["kind"] && object["metadata"]["name"] == target["name"];
        ensure!(objects.iter().any(is_target), "a patch of nothing: {target}");
        match parse(patch["patch"].as_str().context("a patch that is no text")?)? {
            Value::Array(steps) => {
                for object in objects.iter_mut().filter(|object| is_target(object)) {
                    steps
                        .iter()
                        .try_for_each(|step| apply(object, step))
                        .with_context(|| target.to_string())?;
                }
            }
            other if other["$patch"] == "delete" => objects.retain(|object| !is_target(object)),
            other => bail!("not rendered here: {other}"),
        }
    }
    Ok(objects)
}

/// Applies one operation of a JSON patch (RFC 6902).
fn apply(object: &mut Value, step: &Value) -> Result<()> {
    let path = step["path"].as_str().context("no path")?;
    let absent = || format!("nothing at {path}");
    match step["op"].as_str() {
        Some("replace") => *object.pointer_mut(path).with_context(absent)? = step["value"].clone(),
        Some("test") => {
            ensure!(object.pointer(path).with_context(absent)? == &step["value"], "{path} differs")
        }
        Some("add") => {
            let (parent, name) = path.rsplit_once('/').context("the whole object")?;
            let fields = object.pointer_mut(parent).and_then(Value::as_object_mut).with_context(absent)?;
            fields.insert(name.replace("~1", "/").replace("~0", "~"), step["value"].clone());
        }
        _ => bail!("not rendered here: {step}"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::{
            NAMESPACE, chart, name_of,
            tests::{by_name, workspace},
        },
        *,
    };

    #[test]
    fn chart_and_overlay_beside_ambient_render_the_same_objects() {
        let root = workspace().root().join("deploy/helm/tacit");
        let mut values = parse(&read(&root.join("ambient.yaml")).expect("values")).expect("YAML");
        values["namespace"] = json!({"create": true});
        let chart = by_name(chart::objects(&workspace(), NAMESPACE, &values).expect("chart"));
        let overlay = by_name(ambient(&workspace()).expect("overlay"));
        assert_eq!(overlay.keys().collect::<Vec<_>>(), chart.keys().collect::<Vec<_>>());
        for (name, object) in &overlay {
            assert_eq!(object, &chart[name], "{name}");
        }
        assert!(!overlay.keys().any(|name| name.contains("tacit-authority")), "istiod signs");
    }

    /// The right to patch comes with the policy that bounds it, and without the overlay there is neither.
    #[test]
    fn the_right_to_patch_pods_comes_with_its_bounds() {
        let may_patch = |objects: &[Value]| {
            let rules = objects.iter().flat_map(|object| object["rules"].as_array().into_iter().flatten());
            let patching = rules
                .filter(|rule| rule["verbs"].as_array().is_some_and(|verbs| verbs.contains(&json!("patch"))));
            patching.map(|rule| rule["resources"].clone()).collect::<Vec<_>>()
        };
        assert!(may_patch(&base(&workspace()).expect("base")).is_empty());
        let objects = ambient(&workspace()).expect("overlay");
        assert_eq!(may_patch(&objects), [json!(["pods/status"])]);
        let named = |kind: &str| {
            let name = format!("{kind}/tacit-agent-announce");
            objects.iter().find(|object| name_of(object) == name).cloned().expect("it is there")
        };
        let policy = named("ValidatingAdmissionPolicy")["spec"].clone();
        assert_eq!(policy["failurePolicy"], "Fail");
        // A transformer that moves the overlay to another namespace leaves the texts of expressions as they are.
        let conditions = policy["matchConditions"].as_array().expect("a list");
        let conditions: Vec<_> = conditions.iter().map(|it| &it["expression"]).collect();
        assert_eq!(conditions, ["request.userInfo.username.endsWith(':tacit-agent')"]);
        assert!(!policy.to_string().contains(NAMESPACE), "bound to a namespace");
        let binding = named("ValidatingAdmissionPolicyBinding")["spec"].clone();
        assert_eq!(binding, json!({"policyName": "tacit-agent-announce", "validationActions": ["Deny"]}));
        let config =
            objects.iter().find(|object| name_of(object) == "ConfigMap/tacit-agent").expect("it is there");
        let config = parse(config["data"]["tacit.yaml"].as_str().expect("text")).expect("YAML");
        assert_eq!(config["directory"]["kubernetes"]["announce"], "ambient");
    }
}
