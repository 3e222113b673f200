//! Publishes policy: the default mode of the mesh to the kernel, and each pod's policy to the kernel and to its flows.
//!
//! The driver of enrolment calls this on each change of the policies. Nothing else writes policy.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tacit_core::{
    policy::{Flow, FlowSource, Policies, Verdict},
    refusal::Refusal,
};
use tacit_kernel::{Kernel, KernelError, Maps, PlaintextHandling, host, reset_sockets};

use crate::{
    enrol::{
        Enroller, Pod, PodPolicy, State,
        kernel_state::{entry, kernel_mode},
    },
    telemetry::{Ends, Party, Reporter},
};

/// How long after a change of policy connections are looked for that came before it: above the time in which a client
/// answers the kernel's SYN-ACK or is sent another.
const SETTLING: Duration = Duration::from_secs(3);
const TUNNEL: u16 = tacit_abi::tcp_port::TUNNEL;

impl Enroller {
    /// Publishes the current policies if they have changed since the last time.
    pub(super) fn publish_new_policies(&self, state: &mut State) {
        let policies = self.policies.current();
        if state.published.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &policies)) {
            self.publish_policies(state);
        }
    }

    /// Publishes the current policies, and ends connections of pods whose policy changed a short time ago. All policies are in
    /// force by then, and new ones come first.
    pub(super) fn publish_policies(&self, state: &mut State) {
        self.put_in_force(state);
        let pods = state.current.values();
        let unsettled: Vec<Arc<Pod>> =
            pods.filter(|pod| state.unsettled.contains_key(&pod.cgroup)).cloned().collect();
        for pod in unsettled {
            let published = state.published.as_ref();
            if published.is_none_or(|known| !Arc::ptr_eq(known, &self.policies.current())) {
                self.put_in_force(state);
            }
            self.reset_denied(&pod);
        }
    }

    /// Puts the current policies in force: the default mode, and the policy of each enrolled pod. Only the policies of pods are
    /// built whose namespace or entry in the directory has changed since the last time.
    fn put_in_force(&self, state: &mut State) {
        let policies = self.policies.current();
        let before = state.published.replace(Arc::clone(&policies));
        if let Err(error) = publish_mesh_default(&self.kernel, &policies) {
            tracing::error!(%error, "mode of the mesh not applied to pods without an entry; trying again");
        }
        state.unsettled.retain(|_, since| since.elapsed() < SETTLING);
        for pod in state.current.values() {
            // Labels may have changed since the pod was enrolled.
            let entry = state.pods.entry(&pod.workload.cgroup).unwrap_or(&pod.workload);
            let is_same =
                before.as_ref().is_some_and(|before| policies.is_same_for(&entry.namespace, before));
            let known = state.policy_entries.get(&pod.cgroup);
            let is_known = known.is_some_and(|known| Arc::ptr_eq(known, entry));
            if is_same && is_known && pod.policy().not_applied.is_none() {
                continue;
            }
            state.policy_entries.insert(pod.cgroup, Arc::clone(entry));
            let wanted = PodPolicy::configured(&policies, entry);
            if wanted != *pod.policy() && self.replace_policy(pod, wanted) {
                state.unsettled.insert(pod.cgroup, Instant::now());
            }
        }
    }

    /// Puts a policy in force, in the kernel first. A policy that the kernel rejects is replaced by
    /// [`PodPolicy::fail_closed`] and tried again at the next look. Returns true if the policy in force changed.
    fn replace_policy(&self, pod: &Pod, wanted: PodPolicy) -> bool {
        let before = pod.policy();
        let in_force = match self.set_policy(pod, &wanted) {
            Ok(()) => wanted,
            Err(error) => {
                let closed = wanted.fail_closed(error.to_string());
                if let Err(error) = self.set_policy(pod, &closed) {
                    tracing::error!(pod = %pod.workload.name, %error, "STRICT not applied; the kernel keeps the policy before");
                }
                closed
            }
        };
        // A failure that lasts is logged once.
        if in_force == *before {
            return false;
        }
        match &in_force.not_applied {
            Some(error) => {
                tracing::error!(pod = %pod.workload.name, error, "policy not applied, STRICT instead; trying again");
            }
            None => {
                let selected_by = in_force.authorization.first_names();
                tracing::info!(pod = %pod.workload.name, mode = ?in_force.modes.default, ?selected_by, "policy changed");
            }
        }
        pod.policy.store(Arc::new(in_force));
        self.rechecks.policy_changed(pod.cgroup);
        true
    }

    /// Writes both maps, the second also after the first has failed.
    fn set_policy(&self, pod: &Pod, policy: &PodPolicy) -> Result<(), KernelError> {
        let maps = &self.kernel.maps;
        let at = (pod.netns.cookie(), pod.capture_port);
        let entry = entry(&pod.workload, pod.cgroup, pod.slot, at, policy);
        let modes = set_modes(maps, pod.slot, &pod.workload.addresses, policy);
        modes.and(maps.set_pod(&entry))
    }

    /// Ends connections that the pod's applications accepted in clear, with no agent between, while that was allowed.
    /// Called for [`SETTLING`]: the handshake of one that the kernel let through may not have ended at the change.
    fn reset_denied(&self, pod: &Pod) {
        let nodes = host::addresses().unwrap_or_default();
        let policy = pod.policy();
        let directory = self.directory.current();
        let party = |address: SocketAddr| Party {
            address,
            workload: directory.at(address.ip()).cloned(),
            identity: None,
        };
        let denial = |local: SocketAddr, remote: SocketAddr| {
            let own = &pod.workload.addresses;
            let from_outside = own.contains(&local.ip()) && !own.contains(&remote.ip());
            let by_agent = remote.ip().is_loopback() || local.port() == TUNNEL;
            if !from_outside || by_agent || nodes.contains(&remote.ip()) {
                return None;
            }
            let flow = Flow { source: FlowSource::Plaintext, client: remote.ip(), destination: local };
            let Verdict::Deny(denial) = policy.decide(&flow) else { return None };
            let ends =
                Ends { reporter: Reporter::Destination, source: party(remote), destination: party(local) };
            Some((ends, Refusal::new(denial.reason(), denial)))
        };
        let ended = |(ends, refusal): &(Ends, Refusal)| self.telemetry.revoked(ends, refusal);
        if let Err(error) =
            reset_sockets::reset_accepted(&pod.netns, &self.host, self.kernel.cgroup, denial, ended)
        {
            tracing::warn!(pod = %pod.workload.name, %error, "connections in clear from before a policy changed are not reset");
        }
    }
}

/// Writes the mode of the mesh, which holds for pods that the kernel has no entry of.
///
/// # Errors
/// [`KernelError::Map`].
pub fn publish_mesh_default(kernel: &Kernel, policies: &Policies) -> Result<(), KernelError> {
    kernel.maps.set_default_mode(kernel_mode(policies.mesh_default()))
}

/// Authorization needs the identity or the addresses of a connection, which the agent sees.
pub(super) fn plaintext_handling(policy: &PodPolicy) -> PlaintextHandling {
    match policy.authorizes_plaintext() {
        true => PlaintextHandling::Authorized,
        false => PlaintextHandling::Direct,
    }
}

pub(super) fn set_modes(
    maps: &Maps,
    slot: u32,
    addresses: &[IpAddr],
    policy: &PodPolicy,
) -> Result<(), KernelError> {
    let plaintext = plaintext_handling(policy);
    let ports: BTreeMap<u16, tacit_abi::Mode> =
        policy.modes.ports.iter().map(|(port, mode)| (*port, kernel_mode(*mode))).collect();
    maps.set_modes(slot, addresses, (kernel_mode(policy.modes.default), plaintext), &ports)
}
