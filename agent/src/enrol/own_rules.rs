//! Pods whose own rules rewrite the destination of what arrives (`REDIRECT`, `DNAT`), for example to a virtual machine in the pod.
//!
//! The agent delivers inside the pod, where those rules do not run. Peers therefore connect to such a pod as plaintext where its mode
//! and its policies admit that. Elsewhere a tunnel reaches what listens in the pod itself.
//!
//! A pod can have links of its own to containers or virtual machines. Their ranges may also be the mesh's. What the pod sends there
//! does not leave it.

use std::sync::{Arc, atomic::Ordering};

use tacit_kernel::{netns::Netns, rewrites_arrivals};

use crate::enrol::{Enroller, Pod};

impl Enroller {
    /// Looks at the rules and links of a pod, which can change at any time: containers start after their sandbox.
    pub(super) fn look_into(&self, pod: &Pod) {
        match pod.netns.inner_ranges(&self.host, &pod.workload.addresses) {
            Ok(ranges) if ranges != **pod.inner_ranges.load() => pod.inner_ranges.store(Arc::new(ranges)),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "links of a pod are not known"),
        }
        self.look_for_own_rules(pod);
    }

    fn look_for_own_rules(&self, pod: &Pod) {
        let Some(has) = self.has_own_rules(&pod.netns) else { return };
        if pod.rewrites_arrivals.swap(has, Ordering::Relaxed) == has {
            return;
        }
        let (name, namespace) = (&pod.workload.name, &pod.workload.namespace);
        if has {
            tracing::info!(pod = %name, %namespace, "rules of the pod rewrite what arrives: peers reach it as plaintext where its mode admits that");
        } else {
            tracing::info!(pod = %name, %namespace, "no rules of the pod rewrite what arrives any more: peers reach it by the tunnel");
        }
    }

    /// Returns true if rules of the namespace rewrite what arrives; `None` if the kernel does not answer.
    fn has_own_rules(&self, netns: &Netns) -> Option<bool> {
        rewrites_arrivals(netns, &self.host)
            .inspect_err(|error| tracing::debug!(%error, "rules of a pod are not known"))
            .ok()
    }
}
