//! A named network namespace, as `ip netns` lists it.
//!
//! Programs enter it with `nsenter --net`. Unlike `ip netns exec`, it keeps the mount namespace, so bpffs and the cgroup
//! hierarchy stay visible. Code of this process enters it on a separate thread.

use crate::process::run_with_input;
use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use std::{fmt::Write, fs::File, path::PathBuf, process::Command};

/// Folder in which `ip netns` keeps its names.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// A network namespace, which is removed with its topology.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates namespaces with these names. Loopback is up, and IPv6 addresses are usable at once.
    pub(crate) fn create(names: &[String]) -> Result<Vec<Self>> {
        let batch = names.iter().fold(String::new(), |mut text, name| {
            let _ = writeln!(text, "netns add {name}");
            text
        });
        ip_batch(None, &batch)?;
        let made: Vec<_> = names.iter().map(|name| Self { name: name.clone() }).collect();
        for netns in &made {
            netns.prepare()?;
        }
        Ok(made)
    }

    /// Replaces the namespace by a new one with the same name.
    pub(crate) fn renew(&self) -> Result<()> {
        ip_batch(None, &format!("netns del {}\n", self.name))?;
        Self::create(std::slice::from_ref(&self.name)).map(drop)
    }

    /// Returns the name in `ip netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the namespace's file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NETNS_DIR).join(&self.name)
    }

    /// Returns a command that enters this namespace and `cgroup` and then executes `program`.
    pub(crate) fn command(&self, cgroup: &std::path::Path, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display()));
        // The shell joins the cgroup and then executes the program, so the program never runs outside its cgroup.
        command.args(["--", "sh", "-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#]);
        command.arg(cgroup).arg(program);
        command
    }

    /// Runs `work` on a thread of this process that is in the namespace. Sockets made there stay in the namespace; their
    /// cgroup is that of this process.
    ///
    /// # Errors
    /// Fails if the namespace does not exist or entering it is not permitted.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("open {}", self.path().display()))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || setns(file, CloneFlags::CLONE_NEWNET).map(|()| work()));
            let result =
                thread.join().map_err(|_| anyhow!("the work in namespace {} panicked", self.name))?;
            result.with_context(|| format!("enter namespace {}", self.name))
        })
    }

    /// Writes sysctls of the namespace, given as paths below `/proc/sys/net`.
    pub(crate) fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            settings.iter().try_for_each(|(path, value)| {
                let path = PathBuf::from("/proc/sys/net").join(path);
                std::fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
            })
        })?
    }

    /// Runs lines of `ip` commands in the namespace.
    pub(crate) fn ip(&self, batch: &str) -> Result<()> {
        ip_batch(Some(&self.name), batch)
    }

    fn prepare(&self) -> Result<()> {
        self.sysctl(&[
            ("ipv6/conf/all/disable_ipv6", "0"),
            ("ipv6/conf/default/disable_ipv6", "0"),
            // Duplicate address detection would keep link-local addresses unusable for a second.
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
        ])?;
        self.ip("link set lo up\n")
    }
}

fn ip_batch(netns: Option<&str>, batch: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    run_with_input(command.args(["-batch", "-"]), batch)?;
    Ok(())
}
