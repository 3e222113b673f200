//! UIDs of the pods of this node by identity, for SPIRE: its entries may select a single pod.

use std::{collections::BTreeSet, sync::Arc};

use tacit_core::directory::Directory;
use tacit_identity::spire::PodUids;
use tokio::sync::watch;

/// Pods of one identity that are kept. It is far above the pods of a node, and below the pod objects that can name one.
const OF_ONE_IDENTITY_MAX: usize = 256;

/// Returns the UIDs of the pods of `node`, which follow the directory until the receiver is dropped.
pub(super) fn follow(
    mut directory: watch::Receiver<Arc<Directory>>,
    node: Arc<str>,
) -> watch::Receiver<Arc<PodUids>> {
    let mut seen = directory.borrow_and_update().clone();
    let (sender, receiver) = watch::channel(Arc::new(of_node(&seen, &node)));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = directory.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
            let now = directory.borrow_and_update().clone();
            if !now.changes_on_node(&seen, &node).is_empty() {
                let uids = of_node(&now, &node);
                sender.send_if_modified(|old| {
                    let is_new = **old != uids;
                    if is_new {
                        *old = Arc::new(uids);
                    }
                    is_new
                });
            }
            seen = now;
        }
    });
    receiver
}

fn of_node(directory: &Directory, node: &str) -> PodUids {
    let mut uids = PodUids::new();
    for workload in directory.on_node(node) {
        if let Some(uid) = workload.pod_uid() {
            let of_identity: &mut BTreeSet<_> = uids.entry(workload.identity.clone()).or_default();
            if of_identity.len() < OF_ONE_IDENTITY_MAX {
                of_identity.insert(uid);
            }
        }
    }
    uids
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tacit_core::spiffe::{SpiffeId, TrustDomain};

    use super::*;

    fn directory(pods: &[(&str, &str, &str)]) -> Arc<Directory> {
        let workload = |(number, (account, node, cgroup)): (usize, &(&str, &str, &str))| {
            format!(
                "  - {{name: p{number}, namespace: shop, serviceAccount: {account}, addresses: [10.77.0.{}], node: {node}, \
                 cgroup: {cgroup}, tunnel: tacit}}\n",
                number + 2
            )
        };
        let text: String = pods.iter().enumerate().map(workload).collect();
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let text = format!("workloads:\n{text}");
        Arc::new(Directory::parse(&text, Path::new("directory.yaml"), &domain).expect("valid"))
    }

    #[tokio::test]
    async fn uids_follow_the_pods_of_the_node() {
        let one = directory(&[
            ("web", "a", "pod11-aa"),
            ("web", "a", "pod22-bb"),
            ("db", "b", "pod33-cc"),
            ("job", "a", "job"),
        ]);
        let (sender, receiver) = watch::channel(one);
        let mut uids = follow(receiver, "a".into());
        let web = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid");
        let of_web = |uids: &[&str]| {
            PodUids::from([(web.clone(), uids.iter().map(|uid| (*uid).to_owned()).collect())])
        };
        assert_eq!(**uids.borrow_and_update(), of_web(&["11-aa", "22-bb"]));
        sender.send_replace(directory(&[("web", "a", "pod22-bb")]));
        uids.changed().await.expect("followed");
        assert_eq!(**uids.borrow_and_update(), of_web(&["22-bb"]));
    }
}
