//! What the kernel is told about a pod, in which order, and what it is told no more.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tacit_core::{
    directory::{Directory, Egress, Udp, Workload},
    policy::{Authorization, Flow, FlowSource, Mode, Modes, Verdict, decide},
    refusal::Refusal,
};
use tacit_kernel::{
    GuardedLink, KernelError, PlaintextEgress, PlaintextHandling, PodEntry, cgroup, host, netns::Netns,
    reset_sockets, socket::Listeners,
};

use crate::{
    enrol::{Enroller, NotYet, Pod, State},
    telemetry::{Ends, Party, Reporter},
};

/// How long after a change of policy connections are looked for that came before it: above the time in which a client
/// answers the kernel's SYN-ACK or is sent another.
const SETTLING: Duration = Duration::from_secs(3);
const TUNNEL: u16 = tacit_abi::tcp_port::TUNNEL;

impl Enroller {
    /// Makes sure that the kernel knows the pod, so that it sends nothing past the agent from here on. An entry of an
    /// earlier agent stays as it is: its connections are captured, and refused until this agent listens.
    pub(super) fn cover(
        &self,
        state: &mut State,
        cgroup: u64,
        workload: &Workload,
        modes: &Modes,
    ) -> Result<u32, NotYet> {
        if let Some(slot) = state.known.get(&cgroup) {
            return Ok(*slot);
        }
        let slot = state.free_slot();
        let entry = entry(workload, cgroup, slot, (0, 0), modes);
        self.kernel.maps.set_pod(&entry).map_err(|e| NotYet::Kernel(e.to_string()))?;
        state.known.insert(cgroup, slot);
        Ok(slot)
    }

    pub(super) fn tell_kernel(
        &self,
        entry: &PodEntry,
        netns: &Netns,
        listeners: &Listeners,
        (modes, authorization): (&Modes, &Authorization),
    ) -> Result<Vec<GuardedLink>, KernelError> {
        let maps = &self.kernel.maps;
        let default = (kernel_mode(modes.default), plaintext(authorization));
        maps.set_modes(entry.slot, &entry.addresses, default, &kernel_ports(modes))?;
        listeners.publish(maps, entry.slot)?;
        let mut programs = self.kernel.programs();
        programs.steer(entry.cgroup, netns)?;
        let tell = |interface| maps.set_link(interface, entry.cgroup);
        let links = programs.guard_links(entry.cgroup, netns, &self.host, tell)?;
        drop(programs);
        maps.set_pod(entry)?;
        Ok(links)
    }

    pub(super) fn apply_policies(&self, state: &mut State, kept: &HashMap<&Path, &Arc<Workload>>) {
        let policies = self.policies.current();
        state.applied = Some(Arc::clone(&policies));
        state.unsettled.retain(|_, since| since.elapsed() < SETTLING);
        for pod in state.current.values() {
            // Labels may have changed since the pod was enrolled.
            let entry = kept.get(pod.workload.cgroup.as_path()).map_or(&*pod.workload, |entry| entry);
            let (modes, authorization) = (policies.modes(entry), policies.authorization(entry));
            if (modes != **pod.modes.load() || authorization != *pod.authorization())
                && self.change_policies(pod, modes, authorization)
            {
                state.unsettled.insert(pod.cgroup, Instant::now());
            }
            if state.unsettled.contains_key(&pod.cgroup) {
                self.reset_denied(pod);
            }
        }
    }

    /// Returns whether they hold now.
    fn change_policies(&self, pod: &Pod, modes: Modes, authorization: Authorization) -> bool {
        if let Err(error) = self.set_policies(pod, &modes, &authorization) {
            tracing::error!(pod = %pod.workload.name, %error, "policy not applied; trying again");
            return false;
        }
        let selected_by: Vec<_> = authorization.names().collect();
        tracing::info!(pod = %pod.workload.name, mode = ?modes.default, ?selected_by, "policy changed");
        pod.modes.store(Arc::new(modes));
        // Flows under way look at both when this comes.
        pod.authorization.send_replace(Arc::new(authorization));
        true
    }

    fn set_policies(
        &self,
        pod: &Pod,
        modes: &Modes,
        authorization: &Authorization,
    ) -> Result<(), KernelError> {
        let maps = &self.kernel.maps;
        let default = (kernel_mode(modes.default), plaintext(authorization));
        maps.set_modes(pod.slot, &pod.workload.addresses, default, &kernel_ports(modes))?;
        let at = (pod.netns.cookie(), pod.capture_port);
        maps.set_pod(&entry(&pod.workload, pod.cgroup, pod.slot, at, modes))
    }

    /// Ends connections that the pod's applications accepted in clear, with no agent between, while that was allowed.
    /// Called for [`SETTLING`]: the handshake of one that the kernel let through may not have ended at the change.
    fn reset_denied(&self, pod: &Pod) {
        let nodes = host::addresses().unwrap_or_default();
        let (modes, authorization) = (pod.modes.load(), pod.authorization());
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
            let Verdict::Deny(denial) = decide(&modes, &authorization, &flow) else { return None };
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

    /// Removes what the kernel holds for pods that are no longer of this node: those of an earlier agent, and those that the
    /// directory forgot after they had ended. While it names one, a process could still appear behind what is held.
    pub(super) fn remove_leftovers(&self, state: &mut State, kept: &HashMap<&Path, &Arc<Workload>>) {
        let ids: HashSet<u64> =
            kept.keys().filter_map(|path| cgroup::id_at(&self.pods_cgroup.path().join(path))).collect();
        let is_first = !std::mem::replace(&mut state.swept, true);
        if !is_first && state.known.keys().all(|id| ids.contains(id)) {
            return;
        }
        let gone: Vec<u64> = state.known.keys().copied().filter(|id| !ids.contains(id)).collect();
        for cgroup in gone {
            if let Some(slot) = state.known.remove(&cgroup) {
                self.kernel.maps.remove_modes(slot);
            }
            self.kernel.maps.remove_pod(cgroup);
            self.kernel.maps.remove_links(cgroup);
        }
        // Not in the loops' heads: the lock would be held until their ends.
        let steered = self.kernel.programs().steered().unwrap_or_default();
        for cgroup in steered.into_iter().filter(|id| !ids.contains(id)) {
            self.kernel.programs().unsteer(cgroup);
        }
        let guarded = self.kernel.programs().guarded().unwrap_or_default();
        for cgroup in guarded.into_iter().filter(|id| !ids.contains(id)) {
            self.kernel.programs().unguard_links(cgroup, &[]);
        }
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
    modes: &Modes,
) -> PodEntry {
    PodEntry {
        cgroup,
        netns_cookie,
        addresses: workload.addresses.clone(),
        slot,
        mode: kernel_mode(modes.default),
        clear: in_clear(workload, modes),
        capture_port,
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

/// Policies can only be kept by whoever sees the connection: with any, plaintext goes to the agent.
fn plaintext(authorization: &Authorization) -> PlaintextHandling {
    if authorization.is_empty() { PlaintextHandling::Direct } else { PlaintextHandling::Authorized }
}

fn kernel_ports(modes: &Modes) -> BTreeMap<u16, tacit_abi::Mode> {
    modes.ports.iter().map(|(port, mode)| (*port, kernel_mode(*mode))).collect()
}
