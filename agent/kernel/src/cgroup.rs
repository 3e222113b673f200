//! cgroup v2: where it is mounted, and a cgroup's id, level and processes.

use std::{
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
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

    /// Returns the cgroup of the calling thread, if the cgroup v2 hierarchy is mounted here. Text of the kernel does not show it: in a
    /// cgroup namespace, as containers have on cgroup v2, or below another mount at the same point, a process has another name for it.
    ///
    /// # Errors
    /// [`KernelError::Cgroup`] if it is not below the mount.
    pub fn of_self() -> Result<Self, KernelError> {
        let mount = mount_point()?;
        let refuse = |problem: String| KernelError::Cgroup { path: mount.clone(), problem };
        let ancestors =
            ancestors().map_err(|e| refuse(format!("the agent's own cgroup is not known: {e}")))?;
        let own = below(&mount, &ancestors).ok_or_else(|| {
            refuse("this process is in no cgroup below the mount; mount the node's /sys/fs/cgroup".to_owned())
        })?;
        Self::open(&own)
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
        let mount = mount_of(&mounts, &self.path).unwrap_or_default();
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
    let first = cgroup2_mounts(&mounts).next();
    first.ok_or_else(|| refuse("cgroup v2 is not mounted".to_owned()))
}

/// Returns the path of the last of `ancestors`, the cgroups of a thread by level, if one of them is mounted at `mount`.
fn below(mount: &Path, ancestors: &[u64]) -> Option<PathBuf> {
    let at = ancestors.iter().position(|id| Some(*id) == id_at(mount))?;
    ancestors.iter().skip(at + 1).try_fold(mount.to_owned(), |cgroup, id| {
        let entries = fs::read_dir(&cgroup).ok()?.filter_map(Result::ok);
        entries.into_iter().find(|entry| entry.ino() == *id).map(|entry| entry.path())
    })
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

/// Returns the mount points of cgroup v2.
fn cgroup2_mounts(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?;
        (right.split(' ').next() == Some("cgroup2")).then(|| point.into())
    })
}

/// Returns the mount point that `path` is below.
fn mount_of(mountinfo: &str, path: &Path) -> Option<PathBuf> {
    cgroup2_mounts(mountinfo).filter(|point| path.starts_with(point)).max_by_key(|p| p.components().count())
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
    fn a_cgroup_is_found_by_the_ids_of_those_above_it() {
        let root = std::env::temp_dir().join(format!("tacit-cgroup-{}", std::process::id()));
        let (pod, beside) = (root.join("kubepods/pod1"), root.join("kubepods/pod2"));
        for path in [&pod, &beside] {
            fs::create_dir_all(path).expect("folders");
        }
        let id = |path: &Path| id_at(path).expect("it is there");
        let ids = [1, id(&root), id(&root.join("kubepods")), id(&pod)];
        // The last one can be outside, or the mount in none of them.
        let found = [&ids[..], &ids[..2], &[1, id(&root), 7], &[1, 7]].map(|ids| below(&root, ids));
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!(found, [Some(pod), Some(root), None, None]);
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
