//! A node: a shell in namespaces and a cgroup of its own, and the daemons that run in them.
//!
//! Everything of a node is in one pid namespace, whose first process is the shell of `node.sh`: when that is killed, the
//! kernel ends the rest. What is left then is an empty cgroup, which `cgroup::remove` removes.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::{Process, until};

use super::cgroup::NodeCgroup;

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
    cgroup: NodeCgroup,
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
    /// Mode of its kube-proxy.
    pub(super) proxy_mode: &'static str,
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
    /// Starts the first process, which is the first one of `cgroup` too.
    pub(super) fn start(
        plan: NodePlan,
        folder: PathBuf,
        cgroup: NodeCgroup,
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
        command.args(["--fork", "--kill-child", "--mount-proc"]);
        // The root of a cgroup namespace is the cgroup of the process that makes it.
        let mut first = cgroup.first("unshare");
        first.args(["--cgroup", "bash", "-c", SHELL, "node", plan.name]).arg(&folder);
        command.arg(first.get_program()).args(first.get_args());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
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
        Ok(Self { plan, folder, pid, programs, cgroup, daemons: Vec::new(), shell: Some(shell) })
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
            "--cgroup",
            "--wd=/",
        ]);
        command.arg("--").arg(program).env("PATH", self.path());
        command.env("CONTAINERD_ADDRESS", SOCKET).env("CONTAINERD_NAMESPACE", "k8s.io");
        command
    }

    /// Starts a daemon; its output is `logs/<name>.log`.
    pub(super) fn daemon(&mut self, name: &str, arguments: &[String]) -> Result<()> {
        let log = File::create(self.log(name))?;
        let mut command = self.cgroup.daemon(self.command(name).args(arguments));
        // A group of its own: it must not die of a ^C that was meant for this program.
        command.process_group(0);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.daemons.push(Process::spawn(&mut command)?);
        Ok(())
    }

    /// Returns true if containers on the node can have limits.
    pub(super) fn has_limits(&self) -> Result<bool> {
        self.cgroup.has_controllers()
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
