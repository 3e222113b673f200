//! The cgroup of a node: a directory of this machine's cgroup v2 hierarchy, which is the root in the node's own view.
//!
//! ```text
//! <cgroup2>/tacit-kube-<pid>-node1   no process: controllers can be enabled for what is below
//!     daemons                        the node's first process, containerd, kubelet, ..
//!     kubepods                       made by the kubelet
//! ```

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use tacit_topology::{cgroup_mount, until};

/// Enters the cgroup `$0`, then becomes the program that the arguments name.
const ENTER: &str = "echo $$ >\"$0/cgroup.procs\" && exec \"$@\"";
/// Controllers without which a container's limits cannot be set.
const FOR_LIMITS: [&str; 3] = ["cpu", "memory", "pids"];

/// The cgroup of a node, as this machine sees it.
pub(super) struct NodeCgroup(PathBuf);

impl NodeCgroup {
    /// Creates the cgroup.
    pub(super) fn create(name: &str) -> Result<Self> {
        let path = cgroup_mount()?.join(name);
        fs::create_dir_all(path.join("daemons"))
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// Returns a command that starts a program as the first process of the cgroup.
    pub(super) fn first(&self, program: &str) -> Command {
        enter(&self.0, program.as_ref())
    }

    /// Returns a command that starts a daemon as `command` would.
    pub(super) fn daemon(&self, command: &Command) -> Command {
        let mut entered = enter(&self.0.join("daemons"), command.get_program());
        entered.args(command.get_args());
        entered.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        entered
    }

    /// Returns true if the machine gives the cgroup the controllers that limits need.
    pub(super) fn has_controllers(&self) -> Result<bool> {
        let file = self.0.join("cgroup.controllers");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(has_controllers(&text))
    }
}

fn enter(cgroup: &Path, program: &OsStr) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", ENTER]).arg(cgroup).arg(program);
    command
}

fn has_controllers(text: &str) -> bool {
    let enabled: Vec<&str> = text.split_ascii_whitespace().collect();
    FOR_LIMITS.iter().all(|controller| enabled.contains(controller))
}

/// Removes a node's cgroup as soon as its processes are gone.
pub(super) fn remove(name: &str) -> Result<()> {
    let top = cgroup_mount()?.join(name);
    until(&format!("processes leave {}", top.display()), || {
        remove_tree(&top);
        Ok((!top.exists()).then_some(()))
    })
}

fn remove_tree(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // Busy as long as a process is in it: the caller comes again.
    let _ = fs::remove_dir(cgroup);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hierarchy_beside_cgroup_v1_has_no_controllers_for_limits() {
        assert!(has_controllers("cpuset cpu io memory hugetlb pids\n"));
        assert!(!has_controllers("hugetlb\n"));
        assert!(!has_controllers("\n"));
    }
}
