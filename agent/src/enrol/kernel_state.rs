//! Writes a pod's state to the kernel, in an order that leaves no gap, and removes it.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use tacit_core::directory::{Connect, Directory, Workload};
use tacit_kernel::{
    ConnectReturn, GuardedLink, HostEnd, KernelError, PodEntry, cgroup, host, netns::Netns, reset_sockets,
    socket::Listeners,
};

use crate::enrol::{
    Enroller, HeldPolicy, NotYet, PodPolicy, State,
    policy_publisher::{plaintext_handling, put_in_force, set_modes},
};

/// Steering of connections that arrive in a namespace.
#[derive(Clone, Copy)]
enum Steering {
    Attach,
    Leave,
}

impl Enroller {
    /// Writes the pod's entry, so that it sends nothing past the agent from then on. An entry of an earlier agent stays as
    /// it is: the pod's connections are captured, and refused until this agent listens.
    pub(super) fn cover(
        &self,
        state: &mut State,
        cgroup: u64,
        workload: &Arc<Workload>,
    ) -> Result<u32, NotYet> {
        if let Some(slot) = state.known.get(&cgroup) {
            return Ok(*slot);
        }
        // A pod that had the slot before may have connections left in its share of pending ones. A slot that does not exist is
        // refused by the kernel.
        let maps = &self.kernel.maps;
        let slot = state.free_slot(|slot| maps.pending(slot).is_some_and(|pending| pending.is_clear()));
        maps.remove_modes(slot);
        let policies = self.snapshots.policies.current();
        let policy = PodPolicy::configured(&policies, workload);
        let entry = |policy: &PodPolicy| entry(workload, cgroup, slot, (0, 0), policy);
        // Single ports can be stricter than the pod.
        let in_force = put_in_force(maps, entry, policy)
            .map_err(|closed| NotYet::Kernel(closed.not_applied.unwrap_or_default()))?;
        state.known.insert(cgroup, slot);
        self.decide_again(state, cgroup, &in_force);
        let (workload, policy) = (Arc::clone(workload), Arc::new(in_force));
        state.held.insert(cgroup, HeldPolicy { workload, policies, policy });
        Ok(slot)
    }

    /// Makes the kernel treat a pod as enrolled. Returns the policy in force and the pod's guarded links.
    pub(super) fn tell_kernel(
        &self,
        entry: impl Fn(&PodPolicy) -> PodEntry,
        netns: &Netns,
        listeners: &Listeners,
        policy: PodPolicy,
    ) -> Result<(PodPolicy, Vec<GuardedLink>), KernelError> {
        let maps = &self.kernel.maps;
        let mut policy = policy;
        let written = entry(&policy);
        if let Err(error) = set_modes(maps, &written, &policy) {
            policy = policy.fail_closed(error.to_string());
            set_modes(maps, &written, &policy)?;
        }
        listeners.publish(maps, written.slot)?;
        let links = self.guard(written.cgroup, netns, Steering::Attach)?;
        maps.set_pod(&entry(&policy))?;
        Ok((policy, links))
    }

    /// Steers what arrives in a pod's namespace, and guards the pod's links.
    fn guard(&self, cgroup: u64, netns: &Netns, steering: Steering) -> Result<Vec<GuardedLink>, KernelError> {
        // A bridge can take over the hardware address of a new port.
        self.kernel.refresh_node_hardware()?;
        let mut programs = self.kernel.programs();
        let steered = match steering {
            Steering::Attach => programs.steer(cgroup, netns),
            Steering::Leave => Ok(()),
        };
        // The guard is worth having alone.
        let tell = |end: &HostEnd| self.kernel.maps.set_link(cgroup, end);
        let links = programs.guard_links(cgroup, netns, &self.host, tell)?;
        steered.map(|()| links)
    }

    /// Guards the links of a pod that is not enrolled, or not yet: it sends from its own addresses only, and probes of the
    /// node are proven. What arrives at one that is to be enrolled is steered too. Without a namespace that has the pod's
    /// addresses this is tried again; what the kernel refuses is logged once.
    pub(super) fn guard_early(&self, state: &mut State, workload: &Arc<Workload>, cgroup: u64) {
        let path = self.pods_cgroup.path().join(&workload.cgroup);
        let processes = cgroup::processes(&path).unwrap_or_default();
        let Ok((netns, _)) = self.find_netns(processes, workload) else { return };
        if cgroup::id_at(&path) != Some(cgroup) {
            return;
        }
        state.guarded.insert(cgroup);
        let is_covered = state.known.contains_key(&cgroup);
        let steering = if is_covered { Steering::Attach } else { Steering::Leave };
        if let Err(error) = self.guard(cgroup, &netns, steering) {
            tracing::warn!(pod = %workload.name, namespace = %workload.namespace, %error, "links are not guarded before enrolment");
        }
    }

    /// Makes the kernel leave a cgroup alone that no source names. Until it does, the cgroup is held, and shown as held.
    pub(super) fn leave_unnamed(&self, state: &mut State, cgroup: u64) {
        match self.kernel.maps.set_exempt(cgroup, &[]) {
            Ok(()) => {
                tracing::warn!(cgroup, limit = ?self.unnamed_pod_timeout, "no source names this pod: it is left alone, as without Tacit");
                state.known.remove(&cgroup);
                state.held.remove(&cgroup);
                state.exempt.insert(cgroup, Vec::new());
            }
            Err(error) => tracing::debug!(cgroup, %error, "held on, though no source names this pod"),
        }
    }

    /// Adopts the ranges that the directory has found. Resets plaintext connections of enrolled pods with addresses that
    /// are new in the mesh, as an enrolment does.
    pub(super) fn grow(&self, state: &mut State, directory: &Directory) {
        self.snapshots.mesh.follow(directory);
        let ranges = self.snapshots.mesh.ranges();
        let before = state.ranges.replace(Arc::clone(&ranges));
        let Some(before) = before.filter(|before| !Arc::ptr_eq(before, &ranges)) else { return };
        state.ranges_changed = true;
        for pod in state.current.values() {
            let is_new = |address| ranges.contains(address) && !before.contains(address);
            self.reset_plaintext(&pod.netns, &pod.workload, is_new);
        }
    }

    /// Resets plaintext connections of the pod with addresses of the mesh, which `is_mesh` reports. If the kernel cannot
    /// reset them, the guard drops their packets.
    pub(super) fn reset_plaintext(
        &self,
        netns: &Netns,
        workload: &Workload,
        is_mesh: impl Fn(IpAddr) -> bool,
    ) {
        let nodes = host::addresses().unwrap_or_default();
        let is_mesh = |address: IpAddr| {
            is_mesh(address) && !workload.addresses.contains(&address) && !nodes.contains(&address)
        };
        match reset_sockets::reset_plaintext(netns, &self.host, self.kernel.cgroup, is_mesh) {
            Ok(ended) => self.telemetry.reset_at_enrolment(ended),
            Err(error) => {
                tracing::warn!(pod = %workload.name, %error, "connections from before enrolment are not reset; the guard drops their packets");
            }
        }
    }

    /// Pods, by cgroup id, that programs are attached for: after a restart also those that are gone.
    pub(super) fn attached(&self) -> HashSet<u64> {
        let programs = self.kernel.programs();
        let (steered, guarded) = (programs.steered(), programs.guarded());
        steered.unwrap_or_default().into_iter().chain(guarded.unwrap_or_default()).collect()
    }

    /// Removes all that the kernel holds for a pod. `links` are its guarded links, as far as this agent knows them.
    pub(super) fn remove(&self, cgroup: u64, slot: Option<u32>, links: &[GuardedLink]) {
        let mut programs = self.kernel.programs();
        programs.unsteer(cgroup);
        programs.unguard_links(cgroup, links);
        drop(programs);
        self.kernel.maps.remove_links(cgroup);
        if let Some(slot) = slot {
            self.kernel.maps.remove_modes(slot);
        }
        self.kernel.maps.remove_pod(cgroup);
    }
}

pub(super) fn entry(
    workload: &Workload,
    cgroup: u64,
    slot: u32,
    (netns_cookie, capture_port): (u64, u16),
    policy: &PodPolicy,
) -> PodEntry {
    PodEntry {
        cgroup,
        netns_cookie,
        addresses: workload.addresses.clone(),
        slot,
        mode: policy.modes.default,
        clear: policy.plaintext_egress(workload),
        plaintext: plaintext_handling(policy),
        connect: connect_return(workload),
        capture_port,
    }
}

/// When `connect()` of a pod returns.
fn connect_return(workload: &Workload) -> ConnectReturn {
    match workload.connect {
        Connect::Truthful => ConnectReturn::Truthful,
        Connect::Early => ConnectReturn::Early,
    }
}
