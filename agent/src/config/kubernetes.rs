//! `{kubernetes: {..}}` of `directory` and `policy`: which API, what enrols a pod, and who is told of enrolled pods.

use std::path::{Path, PathBuf};

use tacit_sources::directory::{Announce, EnrolLabel};

use super::{DirectoryOptions, Fields, PolicyOptions, Value};

pub(super) const DIRECTORY_FIELDS: [&str; 3] = ["announce", "enrolLabel", "kubeconfig"];
pub(super) const POLICY_FIELDS: [&str; 1] = ["kubeconfig"];
/// Longest name part and longest value of a label, in bytes (Kubernetes' label syntax).
const PART_MAX_BYTES: usize = 63;
/// Longest prefix of a label's name, in bytes: a DNS subdomain.
const PREFIX_MAX_BYTES: usize = 253;

pub(super) fn directory(value: &Value<'_>, folder: &Path) -> Option<DirectoryOptions> {
    if value.is_null() {
        return Some(DirectoryOptions::default());
    }
    local(&mut value.fields(&DIRECTORY_FIELDS)?, folder)
}

/// Decodes the fields that a directory from istiod has too.
pub(super) fn local(fields: &mut Fields<'_>, folder: &Path) -> Option<DirectoryOptions> {
    let enrol_label = fields.or("enrolLabel", EnrolLabel::default(), |v| v.parse(label));
    let kubeconfig = kubeconfig(fields, folder);
    let announce = fields.or("announce", Announce::None, |v| v.parse(announce));
    Some(DirectoryOptions { announce: announce?, enrol_label: enrol_label?, kubeconfig: kubeconfig? })
}

pub(super) fn policy(value: &Value<'_>, folder: &Path) -> Option<PolicyOptions> {
    if value.is_null() {
        return Some(PolicyOptions::default());
    }
    let kubeconfig = kubeconfig(&mut value.fields(&POLICY_FIELDS)?, folder);
    Some(PolicyOptions { kubeconfig: kubeconfig? })
}

fn kubeconfig(fields: &mut Fields<'_>, folder: &Path) -> Option<Option<PathBuf>> {
    fields.or("kubeconfig", None, |value| Some(Some(folder.join(value.text()?))))
}

fn announce(text: &str) -> Result<Announce, &'static str> {
    match text {
        "none" => Ok(Announce::None),
        "ambient" => Ok(Announce::Ambient),
        _ => Err("no reader of announcements: write none or ambient"),
    }
}

fn label(text: &str) -> Result<EnrolLabel, &'static str> {
    let form = "no label with a value: write it as tacit.io/enrol=true";
    let (name, value) = text.split_once('=').ok_or(form)?;
    let (prefix, part) = name.split_once('/').map_or((None, name), |(prefix, part)| (Some(prefix), part));
    let prefix_is_good =
        prefix.is_none_or(|p| p.len() <= PREFIX_MAX_BYTES && tacit_core::yaml::is_object_name(p));
    if prefix_is_good && is_label_part(part) && is_label_part(value) {
        Ok(EnrolLabel { name: name.to_owned(), value: value.to_owned() })
    } else {
        Err(form)
    }
}

fn is_label_part(text: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    let clean = bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    clean && bytes.len() <= PART_MAX_BYTES && edge(bytes.first()) && edge(bytes.last())
}
