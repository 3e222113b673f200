//! A node: a shell in namespaces and cgroups of its own, and the daemons that run in them.
//!
//! Everything of a node is in one pid namespace, whose first process is the shell of `node.sh`: when that is killed, the
//! kernel ends the rest. What is left then are empty cgroups, which [`remove_cgroups`] removes.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::{Process, until};

const SHELL: &str = include_str!("node.sh");

/// A running node.
pub(super) struct Node {
    /// Its name and address.
    pub(super) plan: NodePlan,
    /// Its state and logs.
    pub(super) folder: PathBuf,
    /// The first process, as this machine numbers it.
    pub(super) pid: u32,
    /// Searched for programs before the machine's own places.
    programs: PathBuf,
    /// In the order of their start; all end with the first process.
    daemons: Vec<Process>,
    shell: Option<Process>,
}

/// The name and addresses of a node.
#[derive(Clone, Copy)]
pub(super) struct NodePlan {
    pub(super) name: &'static str,
    /// Its address on the wire between the nodes.
    pub(super) address: &'static str,
    /// Range of its pods' addresses.
    pub(super) pods: &'static str,
}

/// The lifetime of a node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Lifetime {
    /// As long as this program, however that ends.
    Run,
    /// Until it is taken down.
    Kept,
}

/// File in a node's folder: its first process, as this machine numbers it.
pub(super) const PID: &str = "pid";

impl Node {
    /// Starts the first process; `cgroup` is made in every hierarchy.
    pub(super) fn start(
        plan: NodePlan,
        folder: PathBuf,
        cgroup: &str,
        programs: &Path,
        lifetime: Lifetime,
    ) -> Result<Self> {
        fs::create_dir_all(folder.join("logs"))
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let log = File::create(folder.join("logs/node.log"))?;
        let mut command = match lifetime {
            Lifetime::Run => Command::new("setpriv"),
            Lifetime::Kept => Command::new("setsid"),
        };
        if lifetime == Lifetime::Run {
            command.args(["--pdeathsig", "KILL"]);
        }
        command.args(["unshare", "--net", "--mount", "--pid", "--uts", "--ipc"]);
        command.args(["--fork", "--kill-child", "--mount-proc", "bash", "-c", SHELL, "node", plan.name]);
        command.arg(&folder).arg(cgroup).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut shell = Process::spawn(&mut command)?;
        let ready = folder.join("ready");
        until(&format!("node {}", plan.name), || {
            if shell.ended()?.is_some() {
                bail!("{}", fs::read_to_string(folder.join("logs/node.log")).unwrap_or_default());
            }
            Ok(ready.exists().then_some(()))
        })?;
        let pid = first_child(shell.id())?;
        fs::write(folder.join(PID), pid.to_string())?;
        let programs = programs.to_owned();
        Ok(Self { plan, folder, pid, programs, daemons: Vec::new(), shell: Some(shell) })
    }

    /// A command that runs inside the node.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.pid.to_string(),
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--wd=/",
        ]);
        command.arg("--").arg(program).env("PATH", self.path());
        command.env("CONTAINERD_ADDRESS", SOCKET).env("CONTAINERD_NAMESPACE", "k8s.io");
        command
    }

    /// Starts a daemon; its output is `logs/<name>.log`.
    pub(super) fn daemon(&mut self, name: &str, arguments: &[String]) -> Result<()> {
        let log = File::create(self.log(name))?;
        let mut command = self.command(name);
        // A group of its own: it must not die of a ^C that was meant for this program.
        command.args(arguments).process_group(0);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.daemons.push(Process::spawn(&mut command)?);
        Ok(())
    }

    /// Returns the log file of a daemon.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("logs/{name}.log"))
    }

    /// Lets the node run on when this program ends.
    pub(super) fn keep(mut self) {
        std::mem::forget(self.shell.take());
        std::mem::take(&mut self.daemons).into_iter().for_each(std::mem::forget);
    }

    fn path(&self) -> String {
        format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.programs.display())
    }
}

/// Socket of containerd in every node.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";

impl Drop for Node {
    fn drop(&mut self) {
        // The first process goes, and with it the namespace; the handles of daemons have nothing left to end then.
        drop(self.shell.take());
        self.daemons.clear();
    }
}

fn first_child(parent: u32) -> Result<u32> {
    let file = format!("/proc/{parent}/task/{parent}/children");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    let pid = text.split_ascii_whitespace().next().context("the node has no first process")?;
    Ok(pid.parse()?)
}

/// Removes the cgroups that nodes were given, in every hierarchy, as soon as their processes are gone.
pub(super) fn remove_cgroups(cgroup: &str) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    for point in cgroup_mounts(&mounts) {
        let top = Path::new(point).join(cgroup);
        until(&format!("processes leave {}", top.display()), || {
            remove_tree(&top);
            Ok((!top.exists()).then_some(()))
        })?;
    }
    Ok(())
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

fn cgroup_mounts(mounts: &str) -> impl Iterator<Item = &str> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (point, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup" || kind == "cgroup2").then_some(point)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_hierarchies_are_swept() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n";
        let found: Vec<_> = cgroup_mounts(mounts).collect();
        assert_eq!(found, ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"]);
    }
}
