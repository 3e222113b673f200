//! cgroup v2: where it is mounted, and a cgroup's id, level and processes.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::KernelError;

mod find;
mod level;

pub use find::pods;

pub(super) use level::ancestors;

/// Depth to search below a pod's cgroup for its containers' processes: pod, container, and one more level for runtimes
/// that nest.
const PROCESS_DEPTH: usize = 3;
/// Cgroups looked through for the one this process is in: many times what a full node has.
const SEARCH_MAX: usize = 65_536;

/// A cgroup v2 directory.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens the cgroup at `path`, which must be an absolute path below a cgroup v2 mount.
    ///
    /// # Errors
    /// [`KernelError::Cgroup`] when it is missing or not of version 2.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let refuse = |problem: String| KernelError::Cgroup { path: path.to_owned(), problem };
        let real =
            fs::canonicalize(path).map_err(|e| refuse(format!("{e}; create it or correct the path")))?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| refuse(e.to_string()))?;
        if mount_of(&mounts, &real).is_none() {
            return Err(refuse(
                "not below a cgroup v2 mount; see the cgroup2 lines of /proc/self/mountinfo".to_owned(),
            ));
        }
        let id = fs::metadata(&real).map_err(|e| refuse(e.to_string()))?.ino();
        Ok(Self { path: real, id })
    }

    /// The cgroup this process is in, when the cgroup v2 hierarchy is mounted here.
    ///
    /// # Errors
    /// [`KernelError::Cgroup`] when it cannot be found.
    pub fn of_self() -> Result<Self, KernelError> {
        let refuse =
            |problem: &str| KernelError::Cgroup { path: "/proc/self/cgroup".into(), problem: problem.into() };
        let text = fs::read_to_string("/proc/self/cgroup").map_err(|e| refuse(&e.to_string()))?;
        let own =
            text.lines().find_map(|l| l.strip_prefix("0::")).ok_or_else(|| refuse("no cgroup v2 entry"))?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| refuse(&e.to_string()))?;
        let mount = cgroup2_mounts(&mounts).next().ok_or_else(|| refuse("cgroup v2 is not mounted"))?;
        let below =
            Path::new(own).strip_prefix(&mount.root).unwrap_or(Path::new(own.trim_start_matches('/')));
        let pid = std::process::id();
        if let Ok(found) = Self::open(&mount.point.join(below))
            && has_member(&found.path, pid)
        {
            return Ok(found);
        }
        // The name is not that of the node's hierarchy if this process has a cgroup namespace of its own, as containers on cgroup
        // v2, or if another mount covers the mount point. So the cgroup is searched by its members.
        let holder = holder_of(&mount.point, pid).ok_or_else(|| {
            refuse("this process is in no cgroup below the mount; mount the node's /sys/fs/cgroup")
        })?;
        Self::open(&holder)
    }

    /// Its path, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as BPF helpers report it: the directory's inode number.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Asks the kernel for its level, as BPF helpers count: 0 is the root of the whole hierarchy. A path does not show this, because the
    /// mount or the cgroup namespace can begin below that root.
    ///
    /// # Errors
    /// [`KernelError::Cgroup`] if the calling thread is in none of the cgroups from the mount down to this one.
    pub fn level(&self) -> Result<u32, KernelError> {
        let refuse = |problem: String| KernelError::Cgroup { path: self.path.clone(), problem };
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| refuse(e.to_string()))?;
        let mount = mount_of(&mounts, &self.path).map(|mount| mount.point).unwrap_or_default();
        let ancestors = ancestors().map_err(|e| refuse(format!("its level is not known: {e}")))?;
        let above = self.path.ancestors().take_while(|path| path.starts_with(&mount));
        level_in(above.map(|path| id_at(path).unwrap_or(0)), &ancestors).ok_or_else(|| {
            refuse("its level is not known: this process is in no cgroup above it that is mounted here; mount the node's whole /sys/fs/cgroup".to_owned())
        })
    }

    /// Returns the number of levels between `other` and this one; none if it is not within `other`.
    #[must_use]
    pub fn levels_below(&self, other: &Self) -> Option<u32> {
        let below = self.path.strip_prefix(&other.path).ok()?;
        u32::try_from(below.components().count()).ok()
    }

    /// Returns true if `self` is `other` or below it.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        self.path.starts_with(&other.path)
    }
}

/// Returns where the cgroup v2 hierarchy is mounted here.
///
/// # Errors
/// [`KernelError::Cgroup`] when it is not.
pub fn mount_point() -> Result<PathBuf, KernelError> {
    let refuse = |problem: String| KernelError::Cgroup { path: "/proc/self/mountinfo".into(), problem };
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| refuse(e.to_string()))?;
    let first = cgroup2_mounts(&mounts).next().map(|mount| mount.point.to_owned());
    first.ok_or_else(|| refuse("cgroup v2 is not mounted".to_owned()))
}

fn has_member(cgroup: &Path, pid: u32) -> bool {
    // A threaded cgroup does not list processes; no process of Tacit is in one.
    let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    members.lines().any(|member| member.parse() == Ok(pid))
}

/// The cgroup below `root` that has process `pid` as a member.
fn holder_of(root: &Path, pid: u32) -> Option<PathBuf> {
    let mut unseen = vec![root.to_owned()];
    for _ in 0..SEARCH_MAX {
        let cgroup = unseen.pop()?;
        if has_member(&cgroup, pid) {
            return Some(cgroup);
        }
        let below = fs::read_dir(&cgroup).into_iter().flatten().filter_map(Result::ok);
        unseen.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    None
}

/// Id of the cgroup at `path`, which is below one that [`Cgroup::open`] has opened; `None` when there is none.
#[must_use]
pub fn id_at(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|found| found.ino())
}

/// Returns true if the cgroup at `path`, or one below it, has a process.
#[must_use]
pub fn is_populated(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Processes in the cgroup at `path` and below it, nearest first.
///
/// # Errors
/// Fails if the directory cannot be read, for instance because it is gone.
pub fn processes(path: &Path) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    collect(path, PROCESS_DEPTH, &mut found)?;
    Ok(found)
}

fn collect(path: &Path, depth: usize, found: &mut Vec<u32>) -> io::Result<()> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    found.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
    if depth == 0 {
        return Ok(());
    }
    for entry in fs::read_dir(path)?.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            // A container that ends meanwhile is no error of the pod.
            let _ = collect(&entry.path(), depth - 1, found);
        }
    }
    Ok(())
}

struct Mount {
    root: PathBuf,
    point: PathBuf,
}

fn cgroup2_mounts(mountinfo: &str) -> impl Iterator<Item = Mount> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = left.split(' ').skip(3);
        Some(Mount { root: fields.next()?.into(), point: fields.next()?.into() })
    })
}

/// Returns the mount that `path` is below.
fn mount_of(mountinfo: &str, path: &Path) -> Option<Mount> {
    let depth = |p: &Path| p.components().count();
    cgroup2_mounts(mountinfo).filter(|m| path.starts_with(&m.point)).max_by_key(|m| depth(&m.point))
}

/// Returns the level of the first of the cgroups `upwards`, of which each is in the next. `ancestors` are the cgroups of a thread, by
/// level.
fn level_in(upwards: impl Iterator<Item = u64>, ancestors: &[u64]) -> Option<u32> {
    let levels = upwards.enumerate().find_map(|(below, id)| {
        let level = ancestors.iter().position(|ancestor| *ancestor == id)?;
        Some(level + below)
    })?;
    u32::try_from(levels).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    #[test]
    fn a_level_counts_from_the_root_that_the_kernel_knows() {
        // The thread is in 1/20/300. The mount begins at 20.
        let ancestors = [1, 20, 300];
        for (upwards, level) in [
            (&[20][..], Some(1)),
            (&[300, 20], Some(2)),
            (&[31, 30, 20], Some(3)),
            (&[5, 4], None),
            (&[], None),
        ] {
            assert_eq!(level_in(upwards.iter().copied(), &ancestors), level, "{upwards:?}");
        }
    }

    #[test]
    fn a_process_is_found_by_the_members_of_the_hierarchy() {
        let root = std::env::temp_dir().join(format!("tacit-cgroup-{}", std::process::id()));
        let pod = root.join("kubepods/pod1/agent");
        fs::create_dir_all(&pod).expect("folders");
        for (folder, members) in [(&root, "1\n0\n"), (&pod, "712\n713\n")] {
            fs::write(folder.join("cgroup.procs"), members).expect("members");
        }
        let found = [713, 71, 1].map(|pid| holder_of(&root, pid));
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!(found, [Some(pod), None, Some(root)]);
    }

    #[test]
    fn a_version_1_cgroup_is_refused() {
        for (path, is_of_version_2) in
            [("/sys/fs/cgroup/unified/a", true), ("/sys/fs/cgroup/cpu/x", false), ("/tmp", false)]
        {
            assert_eq!(mount_of(HYBRID, Path::new(path)).is_some(), is_of_version_2, "{path}");
        }
    }
}
