//! A container runtime for nodes whose cgroup hierarchy lacks controllers, as beside cgroup v1: runc without limits.
//!
//! runc fails on a limit whose controller is absent, and every container of a kubelet has limits. So this program removes
//! them from a container's description, starts runc, and ignores updates. Device rules stay: they are programs and need no
//! controller. containerd starts this program under the name [`NAME`], beside the real runc.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

/// The name under which this program is a runtime.
pub(super) const NAME: &str = "runc-without-limits";

/// Returns the path under which this program was started, if that is a runtime's.
pub(super) fn called_as() -> Option<PathBuf> {
    env::args_os().next().map(PathBuf::from).filter(|path| path.file_name() == Some(OsStr::new(NAME)))
}

/// Does what runc was to do. It returns only if there is nothing to do, or if that fails.
pub(super) fn run(called_as: &Path) -> Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    if has("update") {
        return Ok(());
    }
    if has("create") || has("run") {
        let bundle = arguments.iter().skip_while(|argument| *argument != "--bundle").nth(1);
        unlimit(&Path::new(bundle.map_or(OsStr::new("."), |path| path)).join("config.json"))?;
    }
    let runc = called_as.with_file_name("runc");
    let failed = Command::new(&runc).args(arguments).exec();
    Err(failed).with_context(|| format!("cannot start {}", runc.display()))
}

fn unlimit(file: &Path) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let config = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))?;
    fs::write(file, without_limits(config).to_string())
        .with_context(|| format!("cannot write {}", file.display()))
}

fn without_limits(mut config: Value) -> Value {
    if let Some(resources) = config.pointer_mut("/linux/resources").and_then(Value::as_object_mut) {
        resources.retain(|kind, _| kind == "devices");
    }
    config
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_device_rules_are_left() {
        let limits =
            json!({"devices": [{"allow": false}], "cpu": {"shares": 2}, "unified": {"memory.high": "1"}});
        let config =
            json!({"process": {"args": ["a"]}, "linux": {"resources": limits, "cgroupsPath": "/kubepods/a"}});
        let left = json!({"process": {"args": ["a"]},
            "linux": {"resources": {"devices": [{"allow": false}]}, "cgroupsPath": "/kubepods/a"}});
        assert_eq!(without_limits(config), left);
        assert_eq!(without_limits(json!({"process": {}})), json!({"process": {}}));
    }
}
