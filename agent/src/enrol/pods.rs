//! The pods of this node as the data path and the operator see them.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use tacit_core::directory::{Directory, Workload};
use tacit_kernel::{GuardedLink, PlaintextEgress, netns::Netns};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::enrol::{PodPolicy, in_clear};

/// An enrolled pod, as the data path sees it.
#[derive(Debug)]
pub struct Pod {
    /// Who it is.
    pub workload: Arc<Workload>,
    /// Id of its cgroup.
    pub cgroup: u64,
    /// Its network namespace.
    pub netns: Netns,
    /// Links of it whose host ends are guarded.
    pub links: Vec<GuardedLink>,
    /// Cancelled when the pod is no longer enrolled.
    pub closed: CancellationToken,
    /// The policy in force. Pods that are enrolled anew in their cgroup share it with their former selves, whose flows go on.
    pub(super) policy: Arc<watch::Sender<Arc<PodPolicy>>>,
    /// Index of its listeners and modes in the kernel's maps.
    pub slot: u32,
    /// Where the agent listens for its captured connections.
    pub capture_port: u16,
}

impl Pod {
    /// Returns true if the pod sends no plaintext into the mesh. The entry of `directory` counts, because a flow outlives the
    /// enrolment that it began in.
    #[must_use]
    pub fn is_strict(&self, directory: &Directory) -> bool {
        let address = self.workload.addresses.first();
        let entry = address.and_then(|address| directory.at(*address));
        let entry = entry.filter(|entry| entry.cgroup == self.workload.cgroup).unwrap_or(&self.workload);
        let clear = in_clear(entry, &self.policy.borrow().modes);
        matches!(clear, PlaintextEgress::Nothing | PlaintextEgress::Udp)
    }

    /// Which of `workers` threads accepts its connections.
    #[must_use]
    pub fn home(&self, workers: usize) -> usize {
        self.slot as usize % workers
    }

    /// Returns the policy in force.
    #[must_use]
    pub fn policy(&self) -> Arc<PodPolicy> {
        Arc::clone(&self.policy.borrow())
    }

    /// Returns a receiver of the policy in force and all later ones.
    #[must_use]
    pub fn policy_changes(&self) -> watch::Receiver<Arc<PodPolicy>> {
        self.policy.subscribe()
    }

    /// Its address of the same family as `other`.
    #[must_use]
    pub fn address_like(&self, other: IpAddr) -> Option<IpAddr> {
        self.workload.addresses.iter().copied().find(|a| a.is_ipv4() == other.is_ipv4())
    }
}

/// A workload of this node that is not enrolled yet, and why.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// The workload.
    pub workload: Arc<Workload>,
    /// What is missing.
    pub reason: String,
}

/// Snapshot of all pods of this node.
#[derive(Debug, Default)]
pub struct Pods {
    /// Enrolled pods.
    pub pods: Vec<Arc<Pod>>,
    /// Pods that should be enrolled and are not yet.
    pub waiting: Vec<Waiting>,
    by_address: HashMap<IpAddr, Arc<Pod>>,
}

impl Pods {
    pub(super) fn new(pods: Vec<Arc<Pod>>, waiting: Vec<Waiting>) -> Self {
        let by_address =
            pods.iter().flat_map(|p| p.workload.addresses.iter().map(move |a| (*a, p.clone()))).collect();
        Self { pods, waiting, by_address }
    }

    /// The enrolled pod that has `address`.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&Arc<Pod>> {
        self.by_address.get(&address.to_canonical())
    }
}
