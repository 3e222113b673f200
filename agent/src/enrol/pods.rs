//! The pods of this node as the data path and the operator see them.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;
use tacit_core::directory::{Directory, Workload};
use tacit_kernel::{GuardedLink, PlaintextEgress, netns::Netns};
use tokio_util::sync::CancellationToken;

use crate::enrol::{Absent, LeftAlone, PodPolicy, Unnamed};

/// An enrolled pod, as the data path sees it.
#[derive(Debug)]
pub struct Pod {
    /// Its entry in the directory.
    pub workload: Arc<Workload>,
    /// Id of its cgroup.
    pub cgroup: u64,
    /// Its network namespace.
    pub netns: Netns,
    /// Links of it whose host ends are guarded.
    pub links: Vec<GuardedLink>,
    /// Cancelled when the pod is no longer enrolled.
    pub closed: CancellationToken,
    /// The policy in force. A pod that is enrolled again in the same cgroup shares it with its earlier enrolment, whose flows continue.
    pub(super) policy: Arc<ArcSwap<PodPolicy>>,
    pub(super) slot: u32,
    /// Time of its enrolment.
    pub(super) since: Instant,
    /// Port of the agent's listener for its captured connections.
    pub(super) capture_port: u16,
    /// The reason for which peers reach the pod as plaintext; none while a tunnel serves it.
    pub(super) not_tunnelled: ArcSwapOption<String>,
    /// True if rules of the pod rewrite the destination of what arrives.
    pub(super) rewrites_arrivals: AtomicBool,
    /// Ranges of links to containers or virtual machines in the pod.
    pub(super) inner_ranges: ArcSwap<Vec<IpNet>>,
}

impl Pod {
    /// Returns true if the pod sends no plaintext into the mesh. The entry of `directory` counts, because a flow outlives the
    /// enrolment that it began in.
    #[must_use]
    pub fn is_strict(&self, directory: &Directory) -> bool {
        let address = self.workload.addresses.first();
        let entry = address.and_then(|address| directory.at(*address));
        let entry = entry.filter(|entry| entry.cgroup == self.workload.cgroup).unwrap_or(&self.workload);
        let clear = self.policy.load().plaintext_egress(entry);
        matches!(clear, PlaintextEgress::Nothing | PlaintextEgress::Udp)
    }

    /// Returns the pod's slot, which its shares of the kernel's tables go by.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Returns the port of the agent's listener for its captured connections.
    #[must_use]
    pub fn capture_port(&self) -> u16 {
        self.capture_port
    }

    /// Returns the reason for which peers must reach the pod as plaintext. `None` while a tunnel serves it.
    #[must_use]
    pub fn not_tunnelled(&self) -> Option<Arc<String>> {
        self.not_tunnelled.load_full()
    }

    /// Returns true if rules of the pod (`REDIRECT`, `DNAT`) rewrite the destination of what arrives. They do not run for what the
    /// agent delivers.
    #[must_use]
    pub fn rewrites_arrivals(&self) -> bool {
        self.rewrites_arrivals.load(Ordering::Relaxed)
    }

    /// Returns true for an address that the pod's own routes lead to a link inside the pod, whoever else has the address.
    #[must_use]
    pub fn is_inside(&self, address: IpAddr) -> bool {
        let ranges = self.inner_ranges.load();
        !ranges.is_empty()
            && !self.workload.addresses.contains(&address)
            && ranges.iter().any(|range| range.contains(&address))
    }

    /// Returns the one of `workers` threads that accepts its connections.
    #[must_use]
    pub fn home(&self, workers: usize) -> usize {
        self.slot as usize % workers
    }

    /// Returns the policy in force.
    #[must_use]
    pub fn policy(&self) -> Arc<PodPolicy> {
        self.policy.load_full()
    }

    /// Returns the place of the policy in force, now and later.
    #[must_use]
    pub fn policy_in_force(&self) -> Arc<ArcSwap<PodPolicy>> {
        Arc::clone(&self.policy)
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
    /// The missing condition.
    pub reason: String,
    /// The policy that the kernel holds for the pod; `None` while it has no entry of the pod.
    pub policy: Option<Arc<PodPolicy>>,
}

/// Snapshot of all pods of this node.
#[derive(Debug, Default)]
pub struct Pods {
    /// Enrolled pods.
    pub pods: Vec<Arc<Pod>>,
    /// Pods that have a cgroup, should be enrolled and are not yet.
    pub waiting: Vec<Waiting>,
    /// Pods that should be enrolled and have no cgroup, each namespace up to its share.
    pub absent: Arc<Absent>,
    /// Pods that no source names.
    pub unnamed: Unnamed,
    /// Pods that are left alone because they have a proxy of their own.
    pub left_alone: Vec<LeftAlone>,
    by_address: HashMap<IpAddr, Arc<Pod>>,
}

impl Pods {
    pub(super) fn new(
        pods: Vec<Arc<Pod>>,
        waiting: Vec<Waiting>,
        absent: Arc<Absent>,
        unnamed: Unnamed,
        left_alone: Vec<LeftAlone>,
    ) -> Self {
        // Enrolled pods come last and so win.
        let known = left_alone.iter().filter_map(|one| one.pod.as_ref()).chain(&pods);
        let by_address =
            known.flat_map(|p| p.workload.addresses.iter().map(move |a| (*a, p.clone()))).collect();
        Self { pods, waiting, absent, unnamed, left_alone, by_address }
    }

    /// Returns the policy that the data path and the kernel hold for a workload of this node, and why the pod is not
    /// enrolled. `None` for a workload that enrolment does not have.
    #[must_use]
    pub fn policy_of(&self, workload: &Workload) -> Option<(Option<Arc<PodPolicy>>, Option<&str>)> {
        if let Some(pod) = self.pods.iter().find(|pod| pod.workload.cgroup == workload.cgroup) {
            return Some((Some(pod.policy()), None));
        }
        if let Some(left) = self.left_alone.iter().find(|left| left.workload.cgroup == workload.cgroup) {
            return Some((Some(Arc::clone(&left.policy)), Some(&left.reason)));
        }
        let mut waiting = self.waiting.iter().chain(&self.absent.listed);
        let waiting = waiting.find(|waiting| waiting.workload.cgroup == workload.cgroup)?;
        Some((waiting.policy.clone(), Some(&waiting.reason)))
    }

    /// The pod that has `address` and is enrolled, or left alone because it has a proxy of its own.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&Arc<Pod>> {
        self.by_address.get(&address.to_canonical())
    }
}
