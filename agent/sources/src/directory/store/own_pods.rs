//! The pods of this node with their annotations, for the announcer. Pure.

use std::collections::BTreeMap;

use tacit_core::directory::{Directory, Protocol};

use super::super::{announce::OwnPod, objects::Pod};

/// The pods of this node by `namespace/name`.
#[derive(Debug, Default)]
pub(super) struct OwnPods {
    pods: BTreeMap<String, OwnPod>,
    has_changed: bool,
}

impl OwnPods {
    pub(super) fn set(&mut self, name: &str, pod: &Pod) {
        let own = OwnPod {
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            // The directory has both.
            cgroup: Default::default(),
            is_enrolled: false,
            is_redirected: pod.is_redirected(),
            is_marked: pod.is_marked(),
        };
        self.has_changed |= self.pods.get(name) != Some(&own);
        self.pods.insert(name.to_owned(), own);
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.has_changed |= self.pods.remove(name).is_some();
    }

    /// Returns the pods, with what the directory has of them, if either has changed.
    pub(super) fn take_changed(
        &mut self,
        directory: &Directory,
        directory_has_changed: bool,
    ) -> Option<Vec<OwnPod>> {
        if !std::mem::take(&mut self.has_changed) && !directory_has_changed {
            return None;
        }
        let with_workload = |pod: &OwnPod| {
            let workload = directory.named(&pod.namespace, &pod.name);
            OwnPod {
                cgroup: workload.map(|workload| workload.cgroup.clone()).unwrap_or_default(),
                is_enrolled: workload.is_some_and(|workload| workload.protocol == Protocol::Tacit),
                ..pod.clone()
            }
        };
        Some(self.pods.values().map(with_workload).collect())
    }
}
