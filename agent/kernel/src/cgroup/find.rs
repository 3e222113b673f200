//! Finds the cgroup of all pods, as kubelets name it.
//!
//! | kubelet | below the cgroup root |
//! |---|---|
//! | cgroupfs driver | `kubepods` |
//! | systemd driver | `kubepods.slice` |
//! | with a cgroup root of its own, as in kind | `kubelet/kubepods`, `kubelet.slice/kubelet-kubepods.slice` |
//! | in a container, as of k3d | any of these, below the container's cgroup |

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Cgroup, SEARCH_MAX, is_populated, mount_point};
use crate::KernelError;

/// Levels below the mount that are searched.
const LEVELS: usize = 6;

/// Finds the cgroup of all pods: the one that has processes. Of several the one that this process is in.
///
/// # Errors
/// [`KernelError::Cgroup`] if there is none, or if it cannot be told which one it is.
pub fn pods() -> Result<Cgroup, KernelError> {
    let mount = mount_point()?;
    let found = candidates(&mount);
    let refuse = |problem: String| Err(KernelError::Cgroup { path: mount.clone(), problem });
    let populated: Vec<PathBuf> = found.iter().filter(|path| is_populated(path)).cloned().collect();
    match (found.as_slice(), populated.as_slice()) {
        ([only], _) | (_, [only]) => Cgroup::open(only),
        ([], _) => refuse(
            "no cgroup below it is named kubepods, kubepods.slice or *-kubepods.slice: start the kubelet first, or write podsCgroup"
                .to_owned(),
        ),
        _ => {
            let own = Cgroup::of_self().ok();
            let holds = |path: &&PathBuf| own.as_ref().is_some_and(|own| own.path().starts_with(path));
            match found.iter().find(holds) {
                Some(holder) => Cgroup::open(holder),
                None => {
                    let all: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
                    refuse(format!("several may hold the node's pods, write one as podsCgroup: {}", all.join(", ")))
                }
            }
        }
    }
}

/// Returns the cgroups that are named as a kubelet names that of all pods. None is in another: pods can make cgroups of any name.
fn candidates(mount: &Path) -> Vec<PathBuf> {
    let (mut found, mut unseen) = (Vec::new(), vec![(mount.to_owned(), 0)]);
    for _ in 0..SEARCH_MAX {
        let Some((cgroup, level)) = unseen.pop() else { break };
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
            "docker/0123/kubepods/burstable",
            "system.slice/kubepods.service",
            "1/2/3/4/5/6/kubepods",
        ];
        for path in made {
            fs::create_dir_all(root.join(path)).expect("folders");
        }
        let found = candidates(&root);
        fs::remove_dir_all(&root).expect("removed");
        let below: Vec<_> = found.iter().filter_map(|path| path.strip_prefix(&root).ok()?.to_str()).collect();
        assert_eq!(
            below,
            [
                "docker/0123/kubepods",
                "kubelet/kubepods",
                "kubelet.slice/kubelet-kubepods.slice",
                "kubepods.slice"
            ]
        );
    }
}
