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

/// Maximum length of a UID in bytes, above that of a UUID.
const UID_MAX: usize = 64;

/// The UID of a pod: text that is safe in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PodUid<'a>(&'a str);

impl<'a> PodUid<'a> {
    /// Accepts hexadecimal digits and dashes, as in the UUIDs that the API server makes.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let is_valid = text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        (is_valid && (1..=UID_MAX).contains(&text.len())).then_some(Self(text))
    }

    /// Accepts the UIDs of static pods: the kubelet's hash of 32 hexadecimal digits, or a UUID from the pod's file.
    pub(super) fn of_static_pod(text: &'a str) -> Option<Self> {
        const UUID: [usize; 5] = [8, 4, 4, 4, 12];
        let is_hash = text.len() == 32 && !text.contains('-');
        let is_uuid = text.split('-').map(str::len).eq(UUID);
        Self::parse(text).filter(|_| is_hash || is_uuid)
    }
}

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
    pub(super) fn pod(&self, PodUid(uid): PodUid<'_>, qos: QosClass) -> PathBuf {
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
                CgroupLayout::of(Path::new(pods)).pod(PodUid::parse(uid).expect("a UID"), qos),
                PathBuf::from(path),
                "{pods} {qos:?}"
            );
        }
    }

    #[test]
    fn only_hexadecimal_digits_and_dashes_are_a_uid() {
        let uuid = "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b";
        let hash = "0123456789abcdef0123456789ABCDEF";
        assert!([uuid, hash, "1"].iter().all(|text| PodUid::parse(text).is_some()));
        let long = "0".repeat(UID_MAX + 1);
        for text in ["", ".", "..", "0/..", "../0", "a b", "0\0", "g", "0.slice", "ä", &long] {
            assert_eq!((PodUid::parse(text), PodUid::of_static_pod(text)), (None, None), "{text:?}");
        }
        assert!([uuid, hash].iter().all(|text| PodUid::of_static_pod(text).is_some()));
        let half = "0123456789abcdef0123456789abcdef-";
        for text in [
            "1",
            "0123abcd",
            half,
            "0b4c1d9e6c1f-4a6e-9d8a-2f1f-3c5d7e9b",
            "--------------------------------",
        ] {
            assert_eq!(PodUid::of_static_pod(text), None, "{text:?}");
        }
    }
}
