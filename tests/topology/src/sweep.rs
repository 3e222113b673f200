//! Removal of everything a topology made, by name.
//!
//! One script does it in all three cases: the owner drops the topology, the owner dies (a guard process holds the other
//! end of a pipe and notices), or both died and a later run finds the leftovers of a process that is gone.
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
/// Every name begins with it; the part after it is `<tag><pid>x<counter>`.
const MARK: &str = "tacit-";

/// The name that all parts of one topology share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Prefix(String);

impl Prefix {
    /// A prefix no other topology of this machine has now.
    pub(crate) fn fresh(tag: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if tag.is_empty() || tag.len() > 8 || !tag.bytes().all(|b| b.is_ascii_lowercase()) {
            bail!("topology tag {tag:?} must be 1 to 8 letters a-z");
        }
        let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
        Ok(Self(format!("{MARK}{tag}{}x{counter}", std::process::id())))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Directory of the topology's files.
    pub(crate) fn files(&self) -> PathBuf {
        std::env::temp_dir().join(&self.0)
    }

    /// The prefix a name was made from, and the process that made it; `None` for a name that is not ours.
    fn of(name: &str) -> Option<(Self, u32)> {
        let rest = name.strip_prefix(MARK)?;
        let stem = rest.split('-').next()?;
        let digits = stem.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let (pid, counter) = digits.split_once('x')?;
        counter.parse::<u32>().ok()?;
        let named = stem.len() > digits.len();
        Some((Self(format!("{MARK}{stem}")), pid.parse().ok().filter(|_| named)?))
    }
}

/// Removes what processes that are gone left behind.
///
/// # Errors
/// When something cannot be removed; the message says what.
pub fn cleanup_stale() -> Result<()> {
    let mount = cgroup::mount_point()?;
    let places =
        [PathBuf::from(NETNS_DIR), mount.clone(), std::env::temp_dir(), PathBuf::from("/sys/fs/bpf")];
    let mut stale = BTreeSet::new();
    for entry in places.iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten() {
        match entry.file_name().to_str().and_then(Prefix::of) {
            Some((prefix, pid)) if !Path::new("/proc").join(pid.to_string()).exists() => stale.insert(prefix),
            _ => false,
        };
    }
    stale.iter().try_for_each(|prefix| sweep(prefix, &mount))
}

/// Removes everything of one prefix.
pub(crate) fn sweep(prefix: &Prefix, mount: &Path) -> Result<()> {
    run(&mut script(prefix, mount)).with_context(|| format!("remove topology {}", prefix.as_str()))?;
    Ok(())
}

/// A process that sweeps as soon as its owner lets go of it or dies.
#[derive(Debug)]
pub(crate) struct Guard {
    child: Child,
    prefix: Prefix,
    mount: PathBuf,
}

impl Guard {
    pub(crate) fn start(prefix: &Prefix, mount: &Path) -> Result<Self> {
        let child = script(prefix, mount)
            .arg("wait")
            .stdin(Stdio::piped())
            // It outlives its owner: it must not keep the owner's pipes open, nor die of a ^C meant for the owner.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start the guard process")?;
        Ok(Self { child, prefix: prefix.clone(), mount: mount.to_owned() })
    }

    /// Removes everything now.
    pub(crate) fn release(&mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the guard process")?;
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
