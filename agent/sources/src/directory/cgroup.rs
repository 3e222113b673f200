//! Cgroup paths of pods, as the kubelet creates them. Pure.
//!
//! | driver | guaranteed | burstable |
//! |---|---|---|
//! | cgroupfs | `kubepods/pod<UID>` | `kubepods/burstable/pod<UID>` |
//! | systemd | `kubepods.slice/kubepods-pod<UID>.slice` | `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID>.slice` |
//!
//! A name of systemd repeats the names of its parents. A `-` in a UID would add a level, so it is replaced by `_`
//! (kubernetes, pkg/kubelet/cm/cgroup_manager_linux.go). containerd and CRI-O differ below the pod's cgroup. This does not
//! matter, because the agent searches for processes at every depth.

use std::path::{Path, PathBuf};

use super::objects::QosClass;

/// The cgroup driver of the node's kubelet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupLayout {
    /// The cgroupfs driver.
    Cgroupfs,
    /// The systemd driver, with the name of the slice of all pods, without `.slice`.
    Systemd(String),
}

impl CgroupLayout {
    /// Detects the layout from the cgroup of all pods. A name that ends with `.slice` belongs to systemd.
    #[must_use]
    pub fn of(pods_cgroup: &Path) -> Self {
        let name = pods_cgroup.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        match name.strip_suffix(".slice") {
            Some(slice) => Self::Systemd(slice.to_owned()),
            None => Self::Cgroupfs,
        }
    }

    /// Returns the cgroup of a pod, relative to the cgroup of all pods.
    pub(super) fn pod(&self, uid: &str, qos: QosClass) -> PathBuf {
        let class = match qos {
            QosClass::Guaranteed => None,
            QosClass::Burstable => Some("burstable"),
            QosClass::BestEffort => Some("besteffort"),
        };
        match (self, class) {
            (Self::Cgroupfs, None) => format!("pod{uid}").into(),
            (Self::Cgroupfs, Some(class)) => format!("{class}/pod{uid}").into(),
            (Self::Systemd(pods), None) => format!("{pods}-pod{}.slice", uid.replace('-', "_")).into(),
            (Self::Systemd(pods), Some(class)) => {
                let uid = uid.replace('-', "_");
                format!("{pods}-{class}.slice/{pods}-{class}-pod{uid}.slice").into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_cgroup_is_where_the_kubelet_makes_it() {
        use QosClass::{BestEffort, Burstable, Guaranteed};
        let uid = "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b";
        let slice = "0b4c1d9e_6c1f_4a6e_9d8a_2f1f3c5d7e9b";
        for (pods, qos, path) in [
            ("/sys/fs/cgroup/kubepods", Guaranteed, format!("pod{uid}")),
            ("/sys/fs/cgroup/kubepods", Burstable, format!("burstable/pod{uid}")),
            ("/sys/fs/cgroup/unified/kubepods/", BestEffort, format!("besteffort/pod{uid}")),
            ("/sys/fs/cgroup/kubepods.slice", Guaranteed, format!("kubepods-pod{slice}.slice")),
            (
                "/sys/fs/cgroup/kubepods.slice",
                Burstable,
                format!("kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice"),
            ),
            (
                "/sys/fs/cgroup/kubelet.slice/kubelet-kubepods.slice",
                BestEffort,
                format!("kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{slice}.slice"),
            ),
            // A static pod's UID is a hash without dashes.
            ("/sys/fs/cgroup/kubepods.slice", Guaranteed, format!("kubepods-pod{slice}.slice")),
        ] {
            assert_eq!(
                CgroupLayout::of(Path::new(pods)).pod(uid, qos),
                PathBuf::from(path),
                "{pods} {qos:?}"
            );
        }
    }
}
