//! The maps of the guard: the agent's heartbeat, the agents' cgroups, destinations that accept plaintext, the pods' links,
//! and counts of dropped packets.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aya::maps::{Array, HashMap, MapData};
use nix::time::{ClockId, clock_gettime};
use tacit_abi::{Address, ClearKey, DropCounter, Link, Mode, PodDrops, REASONS, State, hardware_address};

use super::{
    super::{
        KernelError,
        programs::{HostEnd, Programs},
    },
    PRESENT, address, failed, ip, lock, typed, unlocked,
};
use crate::host;

/// A destination to which strict pods may send plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlaintextDestination {
    /// Its address and port.
    pub address: SocketAddr,
    /// Number of its IP protocol.
    pub protocol: u8,
}

/// Packets that the guard dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropCount {
    /// Id of the pod's cgroup.
    pub cgroup: u64,
    /// The other end.
    pub remote: IpAddr,
    /// Stable label of the reason.
    pub reason: &'static str,
    /// Number of the IP protocol; 0 where the packet did not say.
    pub protocol: u8,
    /// Packets since the entry was made.
    pub packets: u64,
}

/// Typed handles of the guard's maps.
pub(super) struct GuardMaps {
    state: Mutex<AgentState>,
    agents: Mutex<HashMap<MapData, u64, u32>>,
    clear: Mutex<HashMap<MapData, ClearKey, u32>>,
    links: Mutex<HashMap<MapData, u32, Link>>,
    hardware: Mutex<HashMap<MapData, u64, u32>>,
    drops: Array<MapData, PodDrops>,
}

impl GuardMaps {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        Ok(Self {
            state: AgentState::take(programs)?,
            agents: typed(programs, "AGENTS")?,
            clear: typed(programs, "CLEAR")?,
            links: typed(programs, "LINKS")?,
            hardware: typed(programs, "NODE_HARDWARE")?,
            drops: unlocked(programs, "DROPS")?,
        })
    }
}

/// The map of the heartbeat and the default mode.
struct AgentState {
    map: Array<MapData, State>,
    /// Part of every heartbeat: the agent before writes the same entry while this one takes over.
    default_mode: Mode,
}

impl AgentState {
    fn take(programs: &mut Programs) -> Result<Mutex<Self>, KernelError> {
        let map = typed::<Array<MapData, State>>(programs, "STATE")?;
        let map = map.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Mutex::new(Self { map, default_mode: Mode::Strict }))
    }
}

impl super::Maps {
    /// Records that the agent is alive. The kernel decides without the agent once no heartbeat came for `stale_after`.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn beat(&self, stale_after: Duration) -> Result<(), KernelError> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(io::Error::from);
        let now = now.map_err(|e| KernelError::Map { map: "STATE", problem: e.to_string() })?;
        let mut state = lock(&self.guard.state);
        let kept = state.map.get(&0, 0).map_err(failed("STATE"))?.seed;
        let beat = State {
            heartbeat: nanoseconds(Duration::from(now)),
            stale_after: nanoseconds(stale_after),
            default_mode: state.default_mode as u32,
            pad: 0,
            seed: if kept == 0 { random() } else { kept },
        };
        state.map.set(0, beat, 0).map_err(failed("STATE"))
    }

    /// Returns the mode of pods that have no entry yet. `None` if no agent has written one since the maps were made.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn default_mode(&self) -> Result<Option<Mode>, KernelError> {
        let raw = lock(&self.guard.state).map.get(&0, 0).map_err(failed("STATE"))?.default_mode;
        Ok((raw != 0).then(|| Mode::from_raw(raw)))
    }

    /// Sets the mode of pods that have no entry yet.
    ///
    /// # Errors
    /// [`KernelError::Map`]. The next heartbeat writes the mode again.
    pub fn set_default_mode(&self, mode: Mode) -> Result<(), KernelError> {
        let mut state = lock(&self.guard.state);
        state.default_mode = mode;
        let last = state.map.get(&0, 0).map_err(failed("STATE"))?;
        state.map.set(0, State { default_mode: mode as u32, ..last }, 0).map_err(failed("STATE"))
    }

    /// Says that the agent goes: from now on the kernel decides by mode alone.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn clear_heartbeat(&self) -> Result<(), KernelError> {
        let mut state = lock(&self.guard.state);
        let last = state.map.get(&0, 0).map_err(failed("STATE"))?;
        state.map.set(0, State { heartbeat: 0, ..last }, 0).map_err(failed("STATE"))
    }

    /// Makes `cgroup` one whose sockets are this agent's, and the only one of an agent but for `others_stay`: those whose
    /// process lives.
    ///
    /// # Errors
    /// [`KernelError::Map`]. The new one is added before old ones go.
    pub fn set_agent(&self, cgroup: u64, others_stay: bool) -> Result<(), KernelError> {
        let mut agents = lock(&self.guard.agents);
        agents.insert(cgroup, std::process::id(), 0).map_err(failed("AGENTS"))?;
        let others = agents.iter().filter_map(Result::ok).filter(|(id, _)| *id != cgroup);
        let former: Vec<u64> = others
            .filter(|(_, process)| !others_stay || !host::is_process(*process))
            .map(|(id, _)| id)
            .collect();
        for id in former {
            agents.remove(&id).map_err(failed("AGENTS"))?;
        }
        Ok(())
    }

    /// Returns true for a cgroup whose sockets are an agent's.
    #[must_use]
    pub fn is_agent(&self, cgroup: u64) -> bool {
        lock(&self.guard.agents).get(&cgroup, 0).is_ok()
    }

    /// Sockets of `cgroup` are no agent's any more, unless a later agent is in the same cgroup.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn remove_agent(&self, cgroup: u64) -> Result<(), KernelError> {
        let mut agents = lock(&self.guard.agents);
        match agents.get(&cgroup, 0) {
            Ok(process) if process == std::process::id() => agents.remove(&cgroup).map_err(failed("AGENTS")),
            _ => Ok(()),
        }
    }

    /// Replaces the destinations that accept plaintext of strict pods by `wanted`.
    ///
    /// # Errors
    /// [`KernelError::Map`]. Old ones go before new ones come.
    pub fn set_plaintext_destinations(&self, wanted: &[PlaintextDestination]) -> Result<(), KernelError> {
        let wanted: HashSet<ClearKey> = wanted.iter().map(clear_key).collect();
        let mut clear = lock(&self.guard.clear);
        let present: HashSet<ClearKey> = clear.keys().filter_map(Result::ok).collect();
        for gone in present.difference(&wanted) {
            clear.remove(gone).map_err(failed("CLEAR"))?;
        }
        for new in wanted.difference(&present) {
            clear.insert(new, PRESENT, 0).map_err(failed("CLEAR"))?;
        }
        Ok(())
    }

    /// Says which pod is behind a link. A pod can write the hardware and the link-local address of its end, so on links with
    /// neighbours the first ones count for as long as the link exists, and none can be those of another pod or of the node.
    ///
    /// # Errors
    /// [`KernelError::Map`], [`KernelError::LinkAddress`].
    pub fn set_link(&self, cgroup: u64, end: &HostEnd) -> Result<(), KernelError> {
        let mut links = lock(&self.guard.links);
        let seen = Link {
            cgroup,
            hardware: if end.has_neighbours { end.hardware.map_or(0, hardware_address) } else { 0 },
            has_neighbours: u64::from(end.has_neighbours),
            link_local: end.link_local.map_or(Address::NONE, |ip| address(ip.into())),
        };
        let link = seen.after(links.get(&end.index, 0).ok());
        let others = links.iter().filter_map(Result::ok).filter(|(index, _)| *index != end.index);
        let mut others = others.map(|(_, other)| other);
        let is_nodes = link.hardware != 0 && lock(&self.guard.hardware).get(&link.hardware, 0).is_ok();
        if is_nodes || others.any(|other| link.claims_address_of(&other)) {
            return Err(KernelError::LinkAddress { interface: end.interface.clone() });
        }
        links.insert(end.index, link, 0).map_err(failed("LINKS"))
    }

    /// Makes the hardware addresses of the node's interfaces exactly `addresses`. Frames of pods to others go to neighbours.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_node_hardware(&self, addresses: &[[u8; 6]]) -> Result<(), KernelError> {
        let wanted: HashSet<u64> = addresses.iter().copied().map(hardware_address).collect();
        let mut map = lock(&self.guard.hardware);
        let present: HashSet<u64> = map.keys().filter_map(Result::ok).collect();
        for new in wanted.difference(&present) {
            map.insert(new, PRESENT, 0).map_err(failed("NODE_HARDWARE"))?;
        }
        for gone in present.difference(&wanted) {
            let _ = map.remove(gone);
        }
        Ok(())
    }

    /// Forgets the links of a pod.
    pub fn remove_links(&self, cgroup: u64) {
        let mut links = lock(&self.guard.links);
        let own: Vec<u32> = links
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, link)| link.cgroup == cgroup)
            .map(|(i, _)| i)
            .collect();
        for interface in own {
            let _ = links.remove(&interface);
        }
    }

    /// Returns the packets that the guard dropped, most packets first. Of each pod the least recently seen kinds are left out
    /// once there are too many.
    #[must_use]
    pub fn drops(&self) -> Vec<DropCount> {
        let pods = self.guard.drops.iter().filter_map(Result::ok);
        let used = pods.flat_map(|PodDrops(counters)| counters).filter(|counter| counter.packets > 0);
        let mut all: Vec<DropCount> = used.map(|counter| drops_of(&counter)).collect();
        all.sort_by(|a, b| b.packets.cmp(&a.packets).then(a.remote.cmp(&b.remote)));
        all
    }
}

pub(super) fn clear_key(destination: &PlaintextDestination) -> ClearKey {
    ClearKey {
        address: address(destination.address.ip()),
        port: u32::from(destination.address.port()),
        protocol: u32::from(destination.protocol),
    }
}

fn drops_of(counter: &DropCounter) -> DropCount {
    DropCount {
        cgroup: counter.cgroup,
        remote: ip(&counter.remote),
        reason: REASONS.get(counter.reason as usize).map_or("?", |text| text.name),
        protocol: u8::try_from(counter.protocol).unwrap_or(u8::MAX),
        packets: counter.packets,
    }
}

/// A number that nobody can foresee.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
