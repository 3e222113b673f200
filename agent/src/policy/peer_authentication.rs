//! PeerAuthentication of `security.istio.io`, exactly as Istio's API defines it.
//!
//! Refused are: other kinds and versions, unknown fields, and what Istio's own validation refuses (port modes
//! without a selector, an empty `portLevelMtls`, port 0, `*` or an empty name in a selector). `status` and
//! the parts of `metadata` that the Kubernetes API server fills in are accepted and not read, so that
//! exported objects work as they are.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use super::{Mode, Policies, Selecting, Setting};
use crate::yaml::{self, Entry, Fields, Mistakes, Value};

const FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
const METADATA_FIELDS: [&str; 15] = [
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
const SPEC_FIELDS: [&str; 3] = ["selector", "mtls", "portLevelMtls"];
const VERSIONS: [(&str, ()); 2] = [("security.istio.io/v1", ()), ("security.istio.io/v1beta1", ())];
const MODES: [(&str, Setting); 4] = [
    ("UNSET", Setting::Inherit),
    ("DISABLE", Setting::Set(Mode::Disable)),
    ("PERMISSIVE", Setting::Set(Mode::Permissive)),
    ("STRICT", Setting::Set(Mode::Strict)),
];

/// One PeerAuthentication.
struct Policy<'a> {
    namespace: &'a str,
    labels: BTreeMap<String, String>,
    mode: Setting,
    ports: BTreeMap<u16, Setting>,
}

pub(super) fn parse(text: &str, file: &Path, root_namespace: &str) -> Result<Policies, Mistakes> {
    yaml::decode_documents(text, file, |documents| {
        let mut lines = HashMap::new();
        // Not collected to an `Option`: that would stop at the first mistake. Empty documents are what a
        // closing `---` leaves.
        let filled = documents.iter().filter(|document| !document.is_null());
        let policies: Vec<_> = filled.map(|document| policy(document, &mut lines)).collect();
        let policies: Option<Vec<_>> = policies.into_iter().collect();
        Some(collect(policies?, root_namespace))
    })
}

/// Sorts policies by scope; within one scope the first wins.
fn collect(policies: Vec<Policy<'_>>, root_namespace: &str) -> Policies {
    let mut mesh = None;
    let mut collected = Policies::default();
    for Policy { namespace, labels, mode, ports } in policies {
        if !labels.is_empty() {
            let list = collected.selecting.entry(namespace.into()).or_default();
            list.push(Selecting { labels, mode, ports });
        } else if namespace == root_namespace {
            mesh.get_or_insert(mode);
        } else {
            collected.namespaces.entry(namespace.into()).or_insert(mode);
        }
    }
    collected.mesh = mesh.unwrap_or_default();
    collected
}

fn policy<'a>(document: &Value<'a>, lines: &mut HashMap<(&'a str, &'a str), usize>) -> Option<Policy<'a>> {
    // The kind goes first: the fields of another kind would only be a list of unknown ones.
    if let Some(kind) = document.peek("kind").filter(|kind| !kind.is_null()) {
        supported(&kind)?;
    }
    let mut fields = document.fields(&FIELDS)?;
    let version = fields.required("apiVersion", "security.istio.io/v1");
    let version = version.and_then(|value| value.choice(&VERSIONS));
    let kind = fields.required("kind", "PeerAuthentication");
    let metadata = fields.required("metadata", "{name: default, namespace: <namespace>}");
    let name = metadata.and_then(|value| name(&value, document, lines));
    let mut spec = match fields.optional("spec") {
        Some(value) => Some(value.fields(&SPEC_FIELDS)?),
        None => None,
    };
    let selector = spec.as_mut().and_then(|spec| spec.optional("selector"));
    let labels = selector.map_or(Some(BTreeMap::new()), |value| selector_labels(&value));
    let mode = spec.as_mut().map_or(Some(Setting::Inherit), mode);
    let ports = spec.as_mut().and_then(|spec| spec.optional("portLevelMtls"));
    let selects = labels.as_ref().is_none_or(|labels| !labels.is_empty());
    let ports = ports.map_or(Some(BTreeMap::new()), |value| port_modes(&value, selects));
    let (((), _), (_, namespace)) = (version.zip(kind)?, name?);
    Some(Policy { namespace, labels: labels?, mode: mode?, ports: ports? })
}

/// `Some` for the one kind there is.
fn supported(kind: &Value<'_>) -> Option<()> {
    match kind.text()? {
        "PeerAuthentication" => return Some(()),
        "AuthorizationPolicy" => kind.refuse(
            "AuthorizationPolicy is not supported yet: remove it, since skipping it would let through what it denies",
        ),
        "RequestAuthentication" => kind.refuse(
            "RequestAuthentication is not supported, it needs HTTP: remove it, since skipping it would let through what it denies",
        ),
        "List" => kind.refuse("List is not supported: write each object as a document of its own, with `---` between"),
        other => kind.refuse(format_args!(
            "{other:?} is not supported here: remove it, the only kind is PeerAuthentication of security.istio.io/v1"
        )),
    }
    None
}

/// Name and namespace, unique in the file.
fn name<'a>(
    metadata: &Value<'a>,
    document: &Value<'_>,
    lines: &mut HashMap<(&'a str, &'a str), usize>,
) -> Option<(&'a str, &'a str)> {
    let mut fields = metadata.fields(&METADATA_FIELDS)?;
    let name = fields.required("name", "the policy's name").and_then(|value| value.name());
    let namespace =
        fields.required("namespace", "the namespace it holds in; the root namespace for the whole mesh");
    let namespace = namespace.and_then(|value| value.name());
    let (name, namespace) = (name?, namespace?);
    if let Some(line) = lines.insert((name, namespace), document.line()) {
        document.refuse(format_args!(
            "PeerAuthentication {namespace}/{name} is already in line {line}: remove one"
        ));
    }
    Some((name, namespace))
}

/// The labels a workload must have; none when the policy holds for the whole namespace.
fn selector_labels(selector: &Value<'_>) -> Option<BTreeMap<String, String>> {
    let Some(labels) = selector.fields(&["matchLabels"])?.optional("matchLabels") else {
        return Some(BTreeMap::new());
    };
    let labels: Vec<_> = labels.entries()?.into_iter().map(selector_label).collect();
    labels.into_iter().collect()
}

fn selector_label(Entry { name, value, .. }: Entry<'_>) -> Option<(String, String)> {
    let text = value.text_or_empty()?;
    if name.is_empty() {
        value.refuse("the label has no name: write one");
        return None;
    }
    if name.contains('*') || text.contains('*') {
        value.refuse("`*` is not supported in a selector: write the label and its value out");
        return None;
    }
    Some((name.to_owned(), text.to_owned()))
}

/// `mtls: {mode: <mode>}` of a spec or a port.
fn mode(fields: &mut Fields<'_>) -> Option<Setting> {
    fields.optional("mtls").map_or(Some(Setting::Inherit), |value| mtls_mode(&value))
}

fn mtls_mode(mtls: &Value<'_>) -> Option<Setting> {
    let mode = mtls.fields(&["mode"])?.optional("mode");
    mode.map_or(Some(Setting::Inherit), |value| value.choice(&MODES))
}

fn port_modes(value: &Value<'_>, selects: bool) -> Option<BTreeMap<u16, Setting>> {
    let entries = value.entries()?;
    if entries.is_empty() {
        value.refuse("the mapping is empty: write at least one port, or remove the field");
    }
    if !selects {
        value.refuse("ports need a selector: add spec.selector.matchLabels, or remove the field");
    }
    let modes: Vec<_> = entries.into_iter().map(port_mode).collect();
    modes.into_iter().collect()
}

fn port_mode(Entry { name, value, .. }: Entry<'_>) -> Option<(u16, Setting)> {
    // One spelling for each port: `080` next to `80` would be two modes for one port.
    let port = name.parse::<u16>().ok().filter(|port| *port != 0 && port.to_string() == name);
    if port.is_none() {
        value.refuse(format_args!("{name:?} is no port: write a number from 1 to 65535"));
    }
    let mode = if value.is_null() { Some(Setting::Inherit) } else { mtls_mode(&value) };
    Some((port?, mode?))
}

#[cfg(test)]
mod tests;
