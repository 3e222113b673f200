//! Publishes policy: the default mode of the mesh to the kernel, and each pod's policy to the kernel and to its flows.
//!
//! The driver of enrolment calls this on each change of the policies. Nothing else writes policy.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tacit_core::{
    directory::Workload,
    policy::{Flow, FlowSource, Mode, Policies, PolicyVerdict},
    refusal::Refusal,
};
use tacit_kernel::{Kernel, KernelError, Maps, PlaintextHandling, PodEntry, host, reset_sockets};

use crate::{
    enrol::{Enroller, Pod, PodPolicy, State, kernel_state::entry},
    telemetry::{Ends, Reporter},
};

/// Time after a change of policy during which earlier connections are checked again. It exceeds the time in which a
/// client answers the kernel's SYN-ACK or gets another.
const SETTLING: Duration = Duration::from_secs(3);
const TUNNEL: u16 = tacit_abi::tcp_port::TUNNEL;

impl Enroller {
    /// Publishes the current policies if they have changed since the last time.
    pub(super) fn publish_new_policies(&self, state: &mut State, kept: &HashMap<&Path, &Arc<Workload>>) {
        let policies = self.snapshots.policies.current();
        if state.published.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &policies)) {
            self.publish_policies(state, kept);
        }
    }

    /// Publishes the current policies: the default mode, and the policy of each enrolled pod. `kept` has the directory's
    /// workloads by cgroup.
    pub(super) fn publish_policies(&self, state: &mut State, kept: &HashMap<&Path, &Arc<Workload>>) {
        let policies = self.snapshots.policies.current();
        state.published = Some(Arc::clone(&policies));
        if let Err(error) = publish_mesh_default(&self.kernel, &policies) {
            tracing::error!(%error, "mode of the mesh not applied to pods without an entry; trying again");
        }
        state.unsettled.retain(|_, since| since.elapsed() < SETTLING);
        for pod in state.current.values() {
            // Labels may have changed since the pod was enrolled.
            let entry = kept.get(pod.workload.cgroup.as_path()).map_or(&*pod.workload, |entry| entry);
            let wanted = PodPolicy::configured(&policies, entry);
            if wanted != *pod.policy() && self.replace_policy(pod, wanted) {
                state.unsettled.insert(pod.cgroup, Instant::now());
            }
            if state.unsettled.contains_key(&pod.cgroup) {
                self.reset_denied(pod);
            }
        }
    }

    /// Puts a policy in force, in the kernel first. What the kernel rejects is tried again at the next look. Returns true if
    /// the policy in force changed.
    fn replace_policy(&self, pod: &Pod, wanted: PodPolicy) -> bool {
        let before = pod.policy();
        let at = (pod.netns.cookie(), pod.capture_port);
        let entry = |policy: &PodPolicy| entry(&pod.workload, pod.cgroup, pod.slot, at, policy);
        let in_force = put_in_force(&self.kernel.maps, entry, wanted).unwrap_or_else(|closed| closed);
        // A failure that lasts is logged once.
        if in_force == *before {
            return false;
        }
        log_policy(&pod.workload, &in_force);
        pod.policy.send_replace(Arc::new(in_force));
        true
    }

    /// Keeps the policy of a pod in force that the kernel has an entry of and that this agent does not serve yet. Its
    /// applications get plaintext as their modes allow.
    pub(super) fn hold_policy(&self, state: &mut State, cgroup: u64, workload: &Workload) {
        let Some(slot) = state.known.get(&cgroup).copied() else { return };
        let wanted = PodPolicy::configured(&self.snapshots.policies.current(), workload);
        let before = state.held.get(&cgroup);
        if before.is_some_and(|before| **before == wanted) {
            return;
        }
        let maps = &self.kernel.maps;
        // Without an entry there is nothing to keep; the pod is covered anew.
        let Some(at) = maps.pod_place(cgroup) else { return };
        // An earlier agent may have found the addresses in the pod's namespace.
        let found = if workload.addresses.is_empty() { maps.steered_addresses(slot) } else { Vec::new() };
        let addresses = if found.is_empty() { workload.addresses.clone() } else { found };
        let workload = Workload { addresses, ..workload.clone() };
        let entry = |policy: &PodPolicy| entry(&workload, cgroup, slot, at, policy);
        let in_force = put_in_force(maps, entry, wanted).unwrap_or_else(|closed| closed);
        if before.is_none_or(|before| **before != in_force) {
            log_policy(&workload, &in_force);
            state.held.insert(cgroup, Arc::new(in_force));
        }
    }

    /// Resets plaintext connections that the pod's applications accepted, without an agent between, while policy allowed them.
    /// Called for [`SETTLING`]: the handshake of one that the kernel let through may not have ended at the change.
    fn reset_denied(&self, pod: &Pod) {
        let nodes = host::addresses().unwrap_or_default();
        let policy = pod.policy();
        let party = |address: SocketAddr| self.snapshots.party(address, None);
        let denial = |local: SocketAddr, remote: SocketAddr| {
            let own = &pod.workload.addresses;
            let from_outside = own.contains(&local.ip()) && !own.contains(&remote.ip());
            let by_agent = remote.ip().is_loopback() || local.port() == TUNNEL;
            if !from_outside || by_agent || nodes.contains(&remote.ip()) {
                return None;
            }
            let flow = Flow { source: FlowSource::Plaintext, client: remote.ip(), destination: local };
            let PolicyVerdict::Deny(denial) = policy.decide(&flow) else { return None };
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

/// Writes a pod's policy to the kernel and returns the policy in force. A policy that the kernel rejects is replaced by
/// [`PodPolicy::fail_closed`].
///
/// # Errors
/// The policy that was to be in force, if the kernel rejects that one too. The kernel keeps what it had.
pub(super) fn put_in_force(
    maps: &Maps,
    entry: impl Fn(&PodPolicy) -> PodEntry,
    wanted: PodPolicy,
) -> Result<PodPolicy, PodPolicy> {
    // Both maps are written, the second also after the first has failed.
    let write = |policy: &PodPolicy| {
        let entry = entry(policy);
        let modes = set_modes(maps, entry.slot, &entry.addresses, policy);
        modes.and(maps.set_pod(&entry))
    };
    let Err(error) = write(&wanted) else { return Ok(wanted) };
    let closed = wanted.clone().fail_closed(error.to_string());
    match write(&closed) {
        Ok(()) => Ok(closed),
        Err(second) => {
            let both = format!("{error}; STRICT neither: {second}; the kernel keeps what it had");
            Err(wanted.fail_closed(both))
        }
    }
}

fn log_policy(workload: &Workload, in_force: &PodPolicy) {
    match &in_force.not_applied {
        Some(error) => {
            tracing::error!(pod = %workload.name, error, "policy not applied, STRICT instead; trying again");
        }
        None => {
            let selected_by: Vec<_> = in_force.authorization.names().collect();
            tracing::info!(pod = %workload.name, mode = ?in_force.modes.default, ?selected_by, "policy changed");
        }
    }
}

/// Writes the mode of the mesh, which holds for pods that the kernel has no entry of.
///
/// # Errors
/// [`KernelError::Map`].
pub fn publish_mesh_default(kernel: &Kernel, policies: &Policies) -> Result<(), KernelError> {
    kernel.maps.set_default_mode(policies.mesh_default())
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
    let default = (policy.modes.default, plaintext_handling(policy));
    let ports: BTreeMap<u16, Mode> = policy.modes.exceptions().collect();
    maps.set_modes(slot, addresses, default, &ports)
}
