//! Removal of everything that a topology made, by name.
//!
//! One script runs in three cases: the owner drops the topology; the owner dies, which a sweeper process notices because
//! it reads the other end of a pipe; or both died, and a later run finds resources of a process that no longer exists.
//! Processes are found through the topology's cgroups, never by their names.

use crate::{cgroup, netns::NETNS_DIR, process::run};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

const SCRIPT: &str = include_str!("sweep.sh");
/// First part of every name. The rest is `<tag><pid>x<counter>`.
const NAME_PREFIX: &str = "tacit-";

/// The prefix of all names of one topology.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Prefix(String);

impl Prefix {
    /// Returns a prefix that no other topology of this machine has.
    pub(crate) fn fresh(tag: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if tag.is_empty() || tag.len() > 8 || !tag.bytes().all(|b| b.is_ascii_lowercase()) {
            bail!("invalid topology tag {tag:?}: expected 1 to 8 letters a-z");
        }
        let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
        Ok(Self(format!("{NAME_PREFIX}{tag}{}x{counter}", std::process::id())))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the directory of the topology's files.
    pub(crate) fn files(&self) -> PathBuf {
        std::env::temp_dir().join(&self.0)
    }

    /// Returns the prefix in a name and the process id in the prefix; `None` for names that no topology made.
    fn of(name: &str) -> Option<(Self, u32)> {
        let rest = name.strip_prefix(NAME_PREFIX)?;
        let stem = rest.split('-').next()?;
        let digits = stem.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let (pid, counter) = digits.split_once('x')?;
        counter.parse::<u32>().ok()?;
        let named = stem.len() > digits.len();
        Some((Self(format!("{NAME_PREFIX}{stem}")), pid.parse().ok().filter(|_| named)?))
    }
}

/// Removes resources of topologies whose process no longer exists.
///
/// # Errors
/// Fails if a resource cannot be removed; the message names it.
pub fn cleanup_stale() -> Result<()> {
    let mount = cgroup::mount_point()?;
    let folders =
        [PathBuf::from(NETNS_DIR), mount.clone(), std::env::temp_dir(), PathBuf::from("/sys/fs/bpf")];
    let mut stale = BTreeSet::new();
    for entry in folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten() {
        match entry.file_name().to_str().and_then(Prefix::of) {
            Some((prefix, pid)) if !Path::new("/proc").join(pid.to_string()).exists() => stale.insert(prefix),
            _ => false,
        };
    }
    stale.iter().try_for_each(|prefix| sweep(prefix, &mount))
}

/// Removes all resources of one prefix.
pub(crate) fn sweep(prefix: &Prefix, mount: &Path) -> Result<()> {
    run(&mut script(prefix, mount)).with_context(|| format!("remove topology {}", prefix.as_str()))?;
    Ok(())
}

/// A process that removes all resources of a prefix once its owner closes a pipe or dies.
#[derive(Debug)]
pub(crate) struct Sweeper {
    child: Child,
    prefix: Prefix,
    mount: PathBuf,
}

impl Sweeper {
    pub(crate) fn start(prefix: &Prefix, mount: &Path) -> Result<Self> {
        let child = script(prefix, mount)
            .arg("wait")
            .stdin(Stdio::piped())
            // It outlives its owner, so it must not keep the owner's pipes open, nor get a ^C that is meant for the owner.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start the sweeper process")?;
        Ok(Self { child, prefix: prefix.clone(), mount: mount.to_owned() })
    }

    /// Removes all resources now.
    pub(crate) fn release(&mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the sweeper process")?;
        if status.success() { Ok(()) } else { sweep(&self.prefix, &self.mount) }
    }
}

fn script(prefix: &Prefix, mount: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "tacit-sweep", prefix.as_str()]).arg(mount).arg(prefix.files());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_topology_and_owner() {
        let of = |name: &str| Prefix::of(name).map(|(prefix, pid)| (prefix.0, pid));
        assert_eq!(of("tacit-demo42x7-a-shop_web"), Some(("tacit-demo42x7".into(), 42)));
        assert_eq!(of("tacit-t42x0"), Some(("tacit-t42x0".into(), 42)));
        for other in
            ["tacit", "tacit-", "tacit-a", "tacit-42x0", "tacit-demo42", "tacit-demo42xx", "cni-demo42x7"]
        {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
