//! PeerAuthentication of `security.istio.io`, exactly as Istio's API defines it.
//!
//! Refused are unknown fields and what Istio's own validation refuses: port modes without a selector, an empty
//! `portLevelMtls`, port 0.

use std::{collections::BTreeMap, sync::Arc};

use super::{Mode, ModeSetting};
use crate::yaml::{Entry, Fields, Value};

const SPEC_FIELDS: [&str; 3] = ["selector", "mtls", "portLevelMtls"];
const MODES: [(&str, ModeSetting); 4] = [
    ("UNSET", ModeSetting::Inherit),
    ("DISABLE", ModeSetting::Set(Mode::Disable)),
    ("PERMISSIVE", ModeSetting::Set(Mode::Permissive)),
    ("STRICT", ModeSetting::Set(Mode::Strict)),
];

/// One PeerAuthentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PeerAuthentication {
    pub(super) namespace: Arc<str>,
    /// Labels a workload must have; none selects the whole namespace.
    pub(super) labels: BTreeMap<String, String>,
    pub(super) mode: ModeSetting,
    pub(super) ports: BTreeMap<u16, ModeSetting>,
    /// It could not be read.
    pub(super) unreadable: bool,
}

impl PeerAuthentication {
    /// Returns the policy that stands in for an unreadable one: STRICT.
    pub(super) fn strict(namespace: &str, labels: BTreeMap<String, String>) -> Self {
        let mode = ModeSetting::Set(Mode::Strict);
        Self { namespace: namespace.into(), labels, mode, ports: BTreeMap::new(), unreadable: true }
    }
}

/// The modes in the `spec` of a PeerAuthentication.
pub(super) struct PeerAuthenticationSpec {
    pub(super) mode: ModeSetting,
    pub(super) ports: BTreeMap<u16, ModeSetting>,
}

/// Reads `spec`; `labels` are those of its selector, `None` when they are wrong.
pub(super) fn spec(
    spec: Option<&Value<'_>>,
    labels: Option<&BTreeMap<String, String>>,
) -> Option<PeerAuthenticationSpec> {
    let mut fields = match spec {
        Some(value) => Some(value.fields(&SPEC_FIELDS)?),
        None => None,
    };
    let mode = fields.as_mut().map_or(Some(ModeSetting::Inherit), mode);
    let ports = fields.as_mut().and_then(|fields| fields.optional("portLevelMtls"));
    let selects = labels.is_none_or(|labels| !labels.is_empty());
    let ports = ports.map_or(Some(BTreeMap::new()), |value| port_modes(&value, selects));
    Some(PeerAuthenticationSpec { mode: mode?, ports: ports? })
}

/// `mtls: {mode: <mode>}` of a spec or a port.
fn mode(fields: &mut Fields<'_>) -> Option<ModeSetting> {
    fields.optional("mtls").map_or(Some(ModeSetting::Inherit), |value| mtls_mode(&value))
}

fn mtls_mode(mtls: &Value<'_>) -> Option<ModeSetting> {
    let mode = mtls.fields(&["mode"])?.optional("mode");
    mode.map_or(Some(ModeSetting::Inherit), |value| value.choice(&MODES))
}

fn port_modes(value: &Value<'_>, selects: bool) -> Option<BTreeMap<u16, ModeSetting>> {
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

fn port_mode(Entry { name, value, .. }: Entry<'_>) -> Option<(u16, ModeSetting)> {
    // One spelling for each port: `080` next to `80` would be two modes for one port.
    let port = name.parse::<u16>().ok().filter(|port| *port != 0 && port.to_string() == name);
    if port.is_none() {
        value.refuse(format_args!("{name:?} is no port: write a number from 1 to 65535"));
    }
    let mode = if value.is_null() { Some(ModeSetting::Inherit) } else { mtls_mode(&value) };
    Some((port?, mode?))
}

#[cfg(test)]
mod tests;
