//! `metadata` of a policy object: its name, its namespace, and the annotation for a dry run.

use crate::yaml::{Fields, Value};

const FIELDS: [&str; 15] = [
    "name",
    "namespace",
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];
/// Annotation that makes a policy decide nothing.
const DRY_RUN: &str = "istio.io/dry-run";

/// The metadata that Tacit uses.
pub(super) struct ObjectMeta<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) dry_run: bool,
}

impl<'a> ObjectMeta<'a> {
    /// Returns the metadata, or `None` if a field is invalid. Mistakes are recorded.
    pub(super) fn read(metadata: &Value<'a>) -> Option<Self> {
        let mut fields = metadata.fields(&FIELDS)?;
        let name = fields.required("name", "the policy's name").and_then(|value| value.name());
        let namespace =
            fields.required("namespace", "the namespace it holds in; the root namespace for the whole mesh");
        let namespace = namespace.and_then(|value| value.name());
        let dry_run = dry_run(&mut fields);
        Some(Self { namespace: namespace?, name: name?, dry_run: dry_run? })
    }
}

fn dry_run(fields: &mut Fields<'_>) -> Option<bool> {
    let annotation = fields.optional("annotations").and_then(|annotations| annotations.peek(DRY_RUN));
    annotation.map_or(Some(false), |value| match value.text()? {
        "true" => Some(true),
        "false" => Some(false),
        _ => {
            value.refuse("is neither \"true\" nor \"false\": write one of them");
            None
        }
    })
}
