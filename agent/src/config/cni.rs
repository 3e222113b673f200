//! The `cni` section: the CNI plugin of the node.

use std::{ops::RangeInclusive, path::Path, time::Duration};

use tacit_core::yaml::Value;

use super::absolute;
use crate::cni::CniConfig;

const FIELDS: [&str; 5] = ["enabled", "configFolder", "programFolder", "exemptNamespaces", "timeout"];
const SWITCH: [(&str, bool); 2] = [("true", true), ("false", false)];
/// The folders that container runtimes use by default.
const CONFIG_FOLDER: &str = "/etc/cni/net.d";
const PROGRAM_FOLDER: &str = "/opt/cni/bin";
/// Most namespaces in the list: each pod's sandbox costs a look at it.
const EXEMPT_MAX: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(5);
/// CRI-O reads a changed configuration only when no plugin runs, and everything that comes after waits for that.
const TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(20);

/// Longest `statePath` with a CNI plugin, in bytes: the agent's socket is two folders below it.
const STATE_PATH_MAX: usize = 60;

/// Decodes the section. All fields have defaults. The plugin finds the agent by a socket below `state_path`.
pub(super) fn decode(value: &Value<'_>, state_path: &Path) -> Option<CniConfig> {
    let len = state_path.as_os_str().len();
    if len > STATE_PATH_MAX {
        value.refuse(format_args!(
            "statePath {state_path:?} has {len} bytes, with a CNI plugin at most {STATE_PATH_MAX}: write a shorter one"
        ));
        return None;
    }
    let f = &mut value.fields(&FIELDS)?;
    let is_enabled = f.or("enabled", true, |v| v.choice(&SWITCH));
    let config_folder = f.or("configFolder", CONFIG_FOLDER.into(), absolute);
    let program_folder = f.or("programFolder", PROGRAM_FOLDER.into(), absolute);
    let exempt_namespaces = f.or("exemptNamespaces", Vec::new(), exempt_namespaces);
    let timeout = f.or("timeout", TIMEOUT, |v| v.duration(TIMEOUT_RANGE));
    Some(CniConfig {
        is_enabled: is_enabled?,
        config_folder: config_folder?,
        program_folder: program_folder?,
        exempt_namespaces: exempt_namespaces?,
        timeout: timeout?,
    })
}

fn exempt_namespaces(value: &Value<'_>) -> Option<Vec<String>> {
    let items = value.items()?;
    if items.len() > EXEMPT_MAX {
        value.refuse(format_args!("{} namespaces: write at most {EXEMPT_MAX}", items.len()));
    }
    let names: Vec<_> = items.iter().map(|item| item.name().map(str::to_owned)).collect();
    names.into_iter().collect()
}
