//! The pods of this node with their annotations, for the announcer.

use std::{collections::BTreeMap, sync::Arc};

use tacit_core::directory::{Directory, Protocol};
use tokio::sync::watch;

use super::super::{announce::OwnPod, objects::Pod};

/// The pods of this node by `namespace/name`.
#[derive(Debug)]
pub(super) struct OwnPods {
    pods: BTreeMap<String, OwnPod>,
    has_changed: bool,
    published: watch::Sender<Arc<Vec<OwnPod>>>,
}

impl OwnPods {
    pub(super) fn new() -> (Self, watch::Receiver<Arc<Vec<OwnPod>>>) {
        let (published, receiver) = watch::channel(Arc::default());
        (Self { pods: BTreeMap::new(), has_changed: false, published }, receiver)
    }

    pub(super) fn set(&mut self, name: &str, pod: &Pod) {
        let own = OwnPod {
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            // Known once the directory has the pod.
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

    /// Publishes the pods if they, or the directory, have changed.
    pub(super) fn publish(&mut self, directory: &Directory, directory_has_changed: bool) {
        if !std::mem::take(&mut self.has_changed) && !directory_has_changed {
            return;
        }
        let with_workload = |pod: &OwnPod| {
            let workload = directory.named(&pod.namespace, &pod.name);
            OwnPod {
                cgroup: workload.map(|workload| workload.cgroup.clone()).unwrap_or_default(),
                is_enrolled: workload.is_some_and(|workload| workload.protocol == Protocol::Tacit),
                ..pod.clone()
            }
        };
        let pods: Vec<OwnPod> = self.pods.values().map(with_workload).collect();
        self.published.send_if_modified(|published| {
            let is_new = **published != pods;
            if is_new {
                *published = Arc::new(pods);
            }
            is_new
        });
    }
}
