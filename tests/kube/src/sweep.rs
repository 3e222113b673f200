//! Clusters that are still there when the program that made them is gone: those that were kept, and those that were left.

use std::{env, fs, path::Path, path::PathBuf};

use anyhow::{Context as _, Result};
use tacit_topology::run;
use xtask_support::progress::note;

use super::{
    cluster::{self, KEPT, MARK},
    node::PID,
};

/// Takes all clusters of this machine down that no running program has.
pub(super) fn all() -> Result<()> {
    sweep_where(|_| true)
}

/// Takes those down that were left behind, not those that were kept.
pub(super) fn left_behind() -> Result<()> {
    sweep_where(|folder| !folder.join(KEPT).exists())
}

fn sweep_where(wanted: impl Fn(&Path) -> bool) -> Result<()> {
    for (folder, name, owner) in clusters()? {
        let is_owned = Path::new("/proc").join(owner.to_string()).exists();
        if is_owned || !wanted(&folder) {
            continue;
        }
        note(&format!("taking down {name}"));
        end_nodes(&folder)?;
        cluster::remove(&folder, &name)?;
    }
    Ok(())
}

fn clusters() -> Result<Vec<(PathBuf, String, u32)>> {
    let folder = env::temp_dir();
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_str()?.to_owned();
            let owner = name.strip_prefix(MARK)?.parse().ok()?;
            Some((entry.path(), name, owner))
        })
        .collect())
}

/// Ends the first process of each node, when it still is that.
fn end_nodes(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?.flatten()
    {
        let Ok(pid) = fs::read_to_string(entry.path().join(PID)) else { continue };
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // Its command line has the node's folder; another process that was given the number has not.
        if command.contains(&*entry.path().to_string_lossy()) {
            run(std::process::Command::new("kill").args(["-KILL", &pid]))?;
        }
    }
    Ok(())
}
