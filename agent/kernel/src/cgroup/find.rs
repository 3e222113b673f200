//! Finds the cgroup of all pods, as kubelets name it.
//!
//! | kubelet | below the mount of cgroup v2 |
//! |---|---|
//! | cgroupfs driver | `kubepods` |
//! | systemd driver | `kubepods.slice` |
//! | with a cgroup root of its own, as in kind | `kubelet/kubepods`, `kubelet.slice/kubelet-kubepods.slice` |
//!
//! An agent that is a pod takes the one that it is in. Deeper ones are those of other nodes, such as containers of kind on this machine, or
//! of users, who can make cgroups of any name below their own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Cgroup, is_populated, mount_point};
use crate::KernelError;

/// Levels below the mount that are searched.
const LEVELS: usize = 2;

/// Finds the cgroup of all pods: the one that this process is in, or else the one below the mount. Of several the one that has processes.
///
/// # Errors
/// [`KernelError::Cgroup`] if there is none, or if it cannot be told which one it is.
pub fn pods() -> Result<Cgroup, KernelError> {
    let mount = mount_point()?;
    let own = Cgroup::of_self().ok();
    if let Some(holder) = own.and_then(|own| outermost(own.path())) {
        return Cgroup::open(&holder);
    }
    let found = candidates(&mount);
    let populated: Vec<PathBuf> = found.iter().filter(|path| is_populated(path)).cloned().collect();
    let problem = match (found.as_slice(), populated.as_slice()) {
        ([only], _) | (_, [only]) => return Cgroup::open(only),
        ([], _) => "at most two levels below it, no cgroup is named kubepods, kubepods.slice or *-kubepods.slice: start the kubelet \
                    first, or write podsCgroup"
            .to_owned(),
        _ => {
            let all: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
            format!("several may hold the node's pods, write one as podsCgroup: {}", all.join(", "))
        }
    };
    Err(KernelError::Cgroup { path: mount, problem })
}

/// Returns the first part of a cgroup's path that is named as that of all pods. A pod can have another one inside.
fn outermost(cgroup: &Path) -> Option<PathBuf> {
    cgroup.ancestors().filter(|path| is_of_pods(path)).last().map(Path::to_owned)
}

/// Returns the cgroups near the mount that are named as that of all pods. None is in another.
fn candidates(mount: &Path) -> Vec<PathBuf> {
    let (mut found, mut unseen) = (Vec::new(), vec![(mount.to_owned(), 0)]);
    while let Some((cgroup, level)) = unseen.pop() {
        if level > 0 && is_of_pods(&cgroup) {
            found.push(cgroup);
        } else if level < LEVELS {
            let below = fs::read_dir(&cgroup).into_iter().flatten().filter_map(Result::ok);
            let folders = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            unseen.extend(folders.map(|entry| (entry.path(), level + 1)));
        }
    }
    found.sort();
    found
}

fn is_of_pods(cgroup: &Path) -> bool {
    let name = cgroup.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    matches!(name, "kubepods" | "kubepods.slice") || name.ends_with("-kubepods.slice")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_of_pods_are_found_where_kubelets_make_them() {
        let root = std::env::temp_dir().join(format!("tacit-find-{}", std::process::id()));
        let made = [
            "kubepods.slice/kubepods-pod1.slice/kubepods",
            "kubelet.slice/kubelet-kubepods.slice",
            "kubelet/kubepods",
            "system.slice/kubepods.service",
            "system.slice/docker-0123.scope/kubelet.slice/kubelet-kubepods.slice",
            "user.slice/user-1000.slice/x-kubepods.slice",
        ];
        for path in made {
            fs::create_dir_all(root.join(path)).expect("folders");
        }
        let found = candidates(&root);
        fs::remove_dir_all(&root).expect("removed");
        let below: Vec<_> = found.iter().filter_map(|path| path.strip_prefix(&root).ok()?.to_str()).collect();
        assert_eq!(below, ["kubelet/kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubepods.slice"]);
    }

    #[test]
    fn an_agent_that_is_a_pod_is_in_the_outermost_one() {
        for (own, pods) in [
            ("/sys/fs/cgroup/system.slice/tacit.service", None),
            (
                "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-1.scope",
                Some("/sys/fs/cgroup/kubepods.slice"),
            ),
            ("/sys/fs/cgroup/kubepods/pod1/c/kubepods/pod2", Some("/sys/fs/cgroup/kubepods")),
            ("/sys/fs/cgroup/docker/1/kubepods/pod2", Some("/sys/fs/cgroup/docker/1/kubepods")),
        ] {
            assert_eq!(outermost(Path::new(own)).as_deref(), pods.map(Path::new), "{own}");
        }
    }
}
