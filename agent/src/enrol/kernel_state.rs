//! What the kernel is told about a pod, in which order, and what it is told no more.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use tacit_core::{
    directory::{Connect, Directory, Egress, Udp, Workload},
    policy::{Mode, Modes},
};
use tacit_kernel::{
    ConnectReturn, GuardedLink, HostEnd, KernelError, PlaintextEgress, PodEntry, cgroup, host, netns::Netns,
    reset_sockets, socket::Listeners,
};

use crate::enrol::{
    Enroller, NotYet, PodPolicy, State,
    policy_publisher::{plaintext_handling, set_modes},
};

/// Steering of connections that arrive in a namespace.
#[derive(Clone, Copy)]
enum Steering {
    Attach,
    Leave,
}

impl Enroller {
    /// Makes sure that the kernel knows the pod, so that it sends nothing past the agent from here on. An entry of an
    /// earlier agent stays as it is: its connections are captured, and refused until this agent listens.
    pub(super) fn cover(&self, state: &mut State, cgroup: u64, workload: &Workload) -> Result<u32, NotYet> {
        if let Some(slot) = state.known.get(&cgroup) {
            return Ok(*slot);
        }
        let slot = state.free_slot();
        let policy = PodPolicy::configured(&self.policies.current(), workload);
        let entry = entry(workload, cgroup, slot, (0, 0), &policy);
        let maps = &self.kernel.maps;
        // Single ports can be stricter than the pod.
        let covered = set_modes(maps, slot, &workload.addresses, &policy).and_then(|()| maps.set_pod(&entry));
        covered.map_err(|e| NotYet::Kernel(e.to_string()))?;
        state.known.insert(cgroup, slot);
        Ok(slot)
    }

    pub(super) fn tell_kernel(
        &self,
        entry: &PodEntry,
        netns: &Netns,
        listeners: &Listeners,
        policy: &PodPolicy,
    ) -> Result<Vec<GuardedLink>, KernelError> {
        let maps = &self.kernel.maps;
        set_modes(maps, entry.slot, &entry.addresses, policy)?;
        listeners.publish(maps, entry.slot)?;
        let links = self.guard(entry.cgroup, netns, Steering::Attach)?;
        maps.set_pod(entry)?;
        Ok(links)
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

    /// Takes over the ranges that the directory has found. What enrolled pods have in clear with addresses that are of the
    /// mesh since is ended, as at an enrolment.
    pub(super) fn grow(&self, state: &mut State, directory: &Directory) {
        self.mesh.follow(directory);
        let ranges = self.mesh.ranges();
        let before = state.ranges.replace(Arc::clone(&ranges));
        let Some(before) = before.filter(|before| !Arc::ptr_eq(before, &ranges)) else { return };
        for pod in state.current.values() {
            let is_new = |address| ranges.contains(address) && !before.contains(address);
            self.reset_plaintext(&pod.netns, &pod.workload, is_new);
        }
    }

    /// Ends what the pod opened or accepted in clear before, with addresses of which `is_mesh` tells that they are of the
    /// mesh. Without the kernel's help its packets meet the guard.
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

/// What a pod may send in clear into the mesh: what its entry says, else what goes with its mode.
#[must_use]
pub fn in_clear(workload: &Workload, modes: &Modes) -> PlaintextEgress {
    let is_strict = modes.default == Mode::Strict;
    let default = if is_strict { Egress::Strict } else { Egress::Open };
    let egress = workload.egress.unwrap_or(default);
    let default = if is_strict || egress == Egress::Strict { Udp::Deny } else { Udp::Allow };
    match (egress, workload.udp.unwrap_or(default)) {
        (Egress::Strict, Udp::Deny) => PlaintextEgress::Nothing,
        (Egress::Strict, Udp::Allow) => PlaintextEgress::Udp,
        (Egress::Open, Udp::Deny) => PlaintextEgress::AllButUdp,
        (Egress::Open, Udp::Allow) => PlaintextEgress::All,
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
        mode: kernel_mode(policy.modes.default),
        clear: in_clear(workload, &policy.modes),
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

/// The kernel's number of a mode.
#[must_use]
pub fn kernel_mode(mode: Mode) -> tacit_abi::Mode {
    match mode {
        Mode::Disable => tacit_abi::Mode::Disable,
        Mode::Permissive => tacit_abi::Mode::Permissive,
        Mode::Strict => tacit_abi::Mode::Strict,
    }
}
