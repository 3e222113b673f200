//! Publishes policy: the default mode of the mesh to the kernel, and each pod's policy to the kernel and to its flows.
//!
//! The driver of enrolment calls this on each change of the policies. Nothing else writes policy.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tacit_core::{
    directory::Workload,
    policy::{Flow, FlowSource, Mode, Policies, PolicyVerdict},
    refusal::{Refusal, RefusalReason},
};
use tacit_kernel::{
    Kernel, KernelError, Maps, PlaintextHandling, PodEntry, host, netns::Netns, reset_sockets,
};

use crate::{
    enrol::{Enroller, HeldPolicy, LeftAlone, Pod, PodPolicy, State, kernel_state::entry},
    telemetry::{Ends, Reporter},
};

/// Time after a change of policy during which earlier connections are checked again. It exceeds the time in which a
/// client answers the kernel's SYN-ACK or gets another.
const SETTLING: Duration = Duration::from_secs(3);
const TUNNEL: u16 = tacit_abi::tcp_port::TUNNEL;

impl Enroller {
    /// Publishes the current policies if they have changed since the last time.
    pub(super) fn publish_new_policies(&self, state: &mut State) {
        let policies = self.snapshots.policies.current();
        if state.published.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &policies)) {
            self.publish_policies(state);
        }
    }

    /// Publishes the current policies, and ends connections of pods whose policy changed a short time ago. All policies are in
    /// force by then, and new ones come first.
    pub(super) fn publish_policies(&self, state: &mut State) {
        self.publish_changed(state);
        let pods = state.current.values();
        let unsettled: Vec<Arc<Pod>> =
            pods.filter(|pod| state.unsettled.contains_key(&pod.cgroup)).cloned().collect();
        for pod in unsettled {
            let published = state.published.as_ref();
            if published.is_none_or(|known| !Arc::ptr_eq(known, &self.snapshots.policies.current())) {
                self.publish_changed(state);
            }
            let Pod { workload, netns, .. } = &*pod;
            self.reset_denied(&workload.name, netns, &workload.addresses, &pod.policy());
        }
        for (cgroup, taken) in state.taken_ports.iter() {
            let held = state.held.get(&cgroup).filter(|_| state.unsettled.contains_key(&cgroup));
            if let Some(held) = held {
                self.reset_denied(&held.workload.name, &taken.netns, &taken.addresses, &held.policy);
            }
        }
    }

    /// Puts the current policies in force: the default mode, and the policies of enrolled pods and of those that are held. Only
    /// the policies of pods are built whose namespace or entry in the directory has changed since the last time.
    fn publish_changed(&self, state: &mut State) {
        let policies = self.snapshots.policies.current();
        let before = state.published.replace(Arc::clone(&policies));
        let is_same = |one: &LeftAlone, before| policies.is_same_for(&one.workload.namespace, before);
        if before.as_ref().is_some_and(|before| !state.left_alone.values().all(|one| is_same(one, before))) {
            // Policies decide on which pods are left alone. Those that are refused are held, see below.
            state.next_look = None;
        }
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
                if pod.rewrites_arrivals() {
                    // Its rules hide the port that a client asked for. So the clients connect again.
                    self.reset_rewritten(pod);
                }
            }
        }
        let mut held = Vec::new();
        for (cgroup, known) in &mut state.held {
            if policies.is_same_for(&known.workload.namespace, &known.policies) {
                // Earlier policies are not kept in memory.
                known.policies = Arc::clone(&policies);
            } else {
                held.push((*cgroup, Arc::clone(&known.workload)));
            }
        }
        for (cgroup, workload) in held {
            if self.replace_held(state, cgroup, &workload) {
                // The snapshot of the node's pods shows it.
                state.next_look = None;
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
        pod.policy.store(Arc::new(in_force));
        self.rechecks.policy_changed(pod.cgroup);
        true
    }

    /// Keeps the policy of a pod in force that the kernel has an entry of and that this agent does not serve yet. Its
    /// applications get plaintext as their modes allow. A policy that is not applied is tried again.
    pub(super) fn hold_policy(&self, state: &mut State, cgroup: u64, workload: &Arc<Workload>) {
        // New policies are published for held pods too.
        let is_kept =
            |held: &HeldPolicy| Arc::ptr_eq(&held.workload, workload) && held.policy.not_applied.is_none();
        if !state.held.get(&cgroup).is_some_and(is_kept) {
            self.replace_held(state, cgroup, workload);
        }
    }

    /// Returns true if the policy in force changed.
    fn replace_held(&self, state: &mut State, cgroup: u64, listed: &Arc<Workload>) -> bool {
        let Some(slot) = state.known.get(&cgroup).copied() else { return false };
        let policies = self.snapshots.policies.current();
        let wanted = PodPolicy::configured(&policies, listed);
        let before = state.held.get(&cgroup).map(|held| Arc::clone(&held.policy));
        if let Some(policy) = before.clone().filter(|before| **before == wanted) {
            state.held.insert(cgroup, HeldPolicy { workload: Arc::clone(listed), policies, policy });
            return false;
        }
        let maps = &self.kernel.maps;
        // Without an entry there is nothing to keep; the pod is covered anew.
        let Some(at) = maps.pod_place(cgroup) else { return false };
        // An earlier agent may have found the addresses in the pod's namespace.
        let found = if listed.addresses.is_empty() { maps.steered_addresses(slot) } else { Vec::new() };
        let addresses = if found.is_empty() { listed.addresses.clone() } else { found };
        let workload = Workload { addresses, ..(**listed).clone() };
        let entry = |policy: &PodPolicy| entry(&workload, cgroup, slot, at, policy);
        let in_force = put_in_force(maps, entry, wanted).unwrap_or_else(|closed| closed);
        let is_changed = before.is_none_or(|before| *before != in_force);
        if is_changed {
            log_policy(&workload, &in_force);
            self.decide_again(state, cgroup, &in_force);
        }
        let (workload, policy) = (Arc::clone(listed), Arc::new(in_force));
        state.held.insert(cgroup, HeldPolicy { workload, policies, policy });
        is_changed
    }

    /// Has the flows of a pod decided on by `policy` that it had when it was served, and resets the plaintext that a pod with a
    /// proxy has accepted and may not have any more.
    pub(super) fn decide_again(&self, state: &mut State, cgroup: u64, policy: &PodPolicy) {
        if let Some(in_force) = state.policies.get(&cgroup).and_then(Weak::upgrade) {
            in_force.store(Arc::new(policy.clone()));
            self.rechecks.policy_changed(cgroup);
        }
        state.unsettled.insert(cgroup, Instant::now());
    }

    /// Resets all plaintext connections that a pod has accepted whose own rules rewrite what arrives.
    fn reset_rewritten(&self, pod: &Pod) {
        let Pod { workload, netns, .. } = pod;
        let refusal = || {
            Refusal::new(RefusalReason::OwnRules, "policy has changed, and rules of the pod hide the port")
        };
        self.reset_if(&workload.name, netns, &workload.addresses, |_| Some(refusal()));
    }

    /// Resets plaintext connections that applications accepted in `netns` at the addresses `own`, without an agent between, while
    /// policy allowed them. Called for [`SETTLING`]: the handshake of one that the kernel let through may not have ended at the change.
    fn reset_denied(&self, name: &str, netns: &Netns, own: &[IpAddr], policy: &PodPolicy) {
        self.reset_if(name, netns, own, |flow| match policy.decide(flow) {
            PolicyVerdict::Deny(denial) => Some(Refusal::new(denial.reason(), denial)),
            PolicyVerdict::Allow => None,
        });
    }

    /// Resets plaintext connections that applications accepted, unless a node has opened them, if `denied` returns a refusal.
    fn reset_if(&self, name: &str, netns: &Netns, own: &[IpAddr], denied: impl Fn(&Flow) -> Option<Refusal>) {
        let nodes = host::addresses().unwrap_or_default();
        let party = |address: SocketAddr| self.snapshots.party(address, None);
        let denial = |local: SocketAddr, remote: SocketAddr| {
            let from_outside = own.contains(&local.ip()) && !own.contains(&remote.ip());
            let by_agent = remote.ip().is_loopback() || local.port() == TUNNEL;
            if !from_outside || by_agent || nodes.contains(&remote.ip()) {
                return None;
            }
            let flow = Flow { source: FlowSource::Plaintext, client: remote.ip(), destination: local };
            let refusal = denied(&flow)?;
            let ends =
                Ends { reporter: Reporter::Destination, source: party(remote), destination: party(local) };
            Some((ends, refusal))
        };
        let ended = |(ends, refusal): &(Ends, Refusal)| self.telemetry.revoked(ends, refusal);
        if let Err(error) =
            reset_sockets::reset_accepted(netns, &self.host, self.kernel.cgroup, denial, ended)
        {
            tracing::warn!(pod = %name, %error, "plaintext connections from before a policy changed are not reset");
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
        let modes = set_modes(maps, &entry, policy);
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
            tracing::warn!(pod = %workload.name, error, "policy not applied; STRICT holds until it is");
        }
        None => {
            let selected_by = in_force.authorization.first_names();
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

pub(super) fn set_modes(maps: &Maps, entry: &PodEntry, policy: &PodPolicy) -> Result<(), KernelError> {
    let default = (policy.modes.default, plaintext_handling(policy));
    let ports: BTreeMap<u16, Mode> = policy.modes.exceptions().collect();
    maps.set_modes(entry.cells(), &entry.addresses, default, &ports)
}
