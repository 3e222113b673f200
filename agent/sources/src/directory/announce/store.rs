//! The directory's store, which also publishes the pods of this node for the announcer.

use std::sync::Arc;

use tacit_core::directory::Directory;
use tokio::sync::watch;

use super::{
    super::{
        objects::{Object, ResourceKind},
        store::{Change, DirectoryStore},
    },
    OwnPod,
};
use crate::kubernetes::{InvalidObjects, ObjectStore};

/// A store with an announcer.
pub(in super::super) struct AnnouncedStore {
    store: DirectoryStore,
    pods: watch::Sender<Arc<Vec<OwnPod>>>,
}

impl AnnouncedStore {
    /// Returns the store, and the pods of this node as it publishes them.
    pub(in super::super) fn new(mut store: DirectoryStore) -> (Self, watch::Receiver<Arc<Vec<OwnPod>>>) {
        store.follow_own_pods();
        let (pods, receiver) = watch::channel(Arc::default());
        (Self { store, pods }, receiver)
    }
}

impl ObjectStore for AnnouncedStore {
    type Kind = ResourceKind;
    type Object = Object;
    type Value = Directory;

    fn apply_change(&mut self, change: Change) {
        self.store.apply_change(change);
    }

    fn take_changed(&mut self) -> Option<Directory> {
        let directory = self.store.take_changed();
        if let Some(pods) = self.store.take_own_pods(directory.is_some()) {
            self.pods.send_if_modified(|published| {
                let is_new = **published != pods;
                if is_new {
                    *published = Arc::new(pods);
                }
                is_new
            });
        }
        directory
    }

    fn warnings(&mut self) -> Vec<String> {
        self.store.warnings()
    }

    fn invalid_objects(&self) -> InvalidObjects {
        self.store.invalid_objects()
    }
}
