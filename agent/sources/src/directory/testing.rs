//! A node, objects of the API, and a directory of istiod's resources alone.

use std::{path::Path, sync::Arc};

use serde_json::Value;
use tacit_core::{directory::Directory, spiffe::TrustDomain};
use tokio::sync::mpsc;

use super::{
    CgroupLayout, DirectoryStore, EnrolLabel, LocalNode, MeshPlace,
    objects::{Object, ResourceKind},
};
use crate::{
    kubernetes::{Change, ObjectStore as _, Resource, Update, publish},
    reload::Opening,
};

/// The node `a` of a mesh without configured ranges.
pub(crate) fn local_node() -> LocalNode {
    LocalNode {
        node: "a".into(),
        trust_domain: TrustDomain::parse("cluster.local").expect("valid"),
        cgroups: CgroupLayout::of(Path::new("/sys/fs/cgroup/kubepods")),
        ranges: Arc::default(),
    }
}

/// Returns an object of the API.
pub(crate) fn object<K: Resource<Object = Object>>(value: Value) -> Object {
    serde_json::from_value::<K>(value).expect("an object").into_object()
}

/// Publishes a directory from the resources of istiod, on the node `a` of the cluster `c`, whose API has no objects.
pub(crate) fn publish_istiod(updates: mpsc::Receiver<Update<ResourceKind, Object>>) -> Opening<Directory> {
    let place = MeshPlace { cluster: "c".to_owned(), network: String::new() };
    let mut store = DirectoryStore::with_istiod(EnrolLabel::default(), local_node(), place);
    for kind in ResourceKind::ISTIOD.into_iter().filter(|kind| *kind != ResourceKind::Addresses) {
        store.apply_change(Change::Listing(kind));
        store.apply_change(Change::Listed(kind));
    }
    publish("istiod".to_owned(), store, updates)
}
