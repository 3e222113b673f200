//! The maps, behind methods that say what each is for. Keys and values are those of `tacit-abi`.
//!
//! Locks are held for one or two map system calls, never across an await.

use std::{
    collections::HashSet,
    hash::Hash,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, SockMap,
        lpm_trie::{Key, LpmTrie},
    },
};
use ipnet::IpNet;
use tacit_abi::{
    Address, Listener, MeshKey, Mode, Names, Pending, Pod, PodCells, ProbeShare, REASONS, Tuple, limits,
    listener_index, names_kind, pod_flag, steer_flag,
};

use super::{KernelError, programs::Programs};

mod exceptions;
mod guard;
mod modes;
mod node_services;
mod per_connection;
mod probes;

pub use exceptions::ExceptionCounter;
use guard::GuardMaps;
pub use guard::{DropCount, PlaintextDestination};
use modes::ModeMaps;
pub use node_services::NodeServicePorts;
use node_services::NodeTables;
use per_connection::{Captured, SocketNames};

/// Present in the mesh: the value carries no more.
const PRESENT: u32 = 1;
/// Prefix length of a single address in the mesh's map.
const ADDRESS_BITS: u32 = 128;

/// One counter of the kernel side.
#[derive(Debug, Clone, Copy)]
pub struct KernelCounter {
    /// Stable label.
    pub name: &'static str,
    /// Meaning.
    pub help: &'static str,
    /// Events since the maps were made.
    pub value: u64,
}

/// An enrolled pod as the kernel should know it.
#[derive(Debug, Clone)]
pub struct PodEntry {
    /// Id of its cgroup.
    pub cgroup: u64,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Its addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Index of its listeners.
    pub slot: u32,
    /// The mode of ports without a mode of their own.
    pub mode: Mode,
    /// The plaintext that the pod may send.
    pub clear: PlaintextEgress,
    /// The handling of plaintext that reaches it.
    pub plaintext: PlaintextHandling,
    /// When its `connect()` returns.
    pub connect: ConnectReturn,
    /// The port of the agent's listener for captured connections; 0 without a listener.
    pub capture_port: u16,
}

impl PodEntry {
    /// Returns the pod's cells in the kernel's tables of flows.
    #[must_use]
    pub const fn cells(&self) -> PodCells {
        PodCells::new(self.slot, self.cgroup)
    }
}

/// Decides on plaintext that the mode of its port takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaintextHandling {
    /// Nothing: plaintext goes straight to the application.
    Direct,
    /// The agent, by authorization policies; while it is dead, plaintext is refused.
    Authorized,
}

impl PlaintextHandling {
    fn flags(self) -> u32 {
        match self {
            Self::Direct => 0,
            Self::Authorized => steer_flag::JUDGED,
        }
    }

    fn pod_flags(self) -> u32 {
        match self {
            Self::Direct => 0,
            Self::Authorized => pod_flag::JUDGED,
        }
    }
}

/// When `connect()` of a pod returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectReturn {
    /// When the destination has answered.
    Truthful,
    /// At once: the agent accepts before the destination answers.
    Early,
}

impl ConnectReturn {
    fn flags(self) -> u32 {
        match self {
            Self::Truthful => 0,
            Self::Early => pod_flag::CONNECT_EARLY,
        }
    }
}

/// The plaintext that a pod may send into the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaintextEgress {
    /// Nothing.
    Nothing,
    /// UDP only.
    Udp,
    /// Everything but UDP.
    AllButUdp,
    /// Everything.
    All,
}

impl PlaintextEgress {
    fn flags(self) -> u32 {
        match self {
            Self::Nothing => pod_flag::EGRESS_STRICT,
            Self::Udp => pod_flag::EGRESS_STRICT | pod_flag::UDP_ALLOWED,
            Self::AllButUdp => 0,
            Self::All => pod_flag::UDP_ALLOWED,
        }
    }
}

/// Typed handles of all maps.
pub struct Maps {
    pods: Mutex<HashMap<MapData, u64, Pod>>,
    modes: Mutex<ModeMaps>,
    mesh: Mutex<LpmTrie<MapData, MeshKey, u32>>,
    node: Mutex<HashMap<MapData, Address, u32>>,
    node_tables: Mutex<NodeTables>,
    listeners: Mutex<SockMap<MapData>>,
    capturers: Mutex<SockMap<MapData>>,
    discard: Mutex<SockMap<MapData>>,
    names: SocketNames,
    captured: Captured,
    pending: Array<MapData, Pending>,
    counters: PerCpuArray<MapData, u64>,
    exceptions: PerCpuArray<MapData, u64>,
    guard: GuardMaps,
    probe_shares: Mutex<Array<MapData, ProbeShare>>,
}

impl Maps {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        Ok(Self {
            pods: typed(programs, "PODS")?,
            modes: Mutex::new(ModeMaps::take(programs.ebpf())?),
            mesh: typed(programs, "MESH")?,
            node: typed(programs, "NODE")?,
            node_tables: Mutex::new(NodeTables::take(programs.ebpf())?),
            listeners: typed(programs, "LISTENERS")?,
            capturers: typed(programs, "CAPTURERS")?,
            discard: typed(programs, "DISCARD")?,
            names: SocketNames::take(programs)?,
            captured: Captured::take(programs)?,
            pending: unlocked(programs, "PENDING")?,
            counters: unlocked(programs, "COUNTERS")?,
            exceptions: unlocked(programs, "EXCEPTIONS")?,
            guard: GuardMaps::take(programs)?,
            probe_shares: typed(programs, "PROBE_SHARES")?,
        })
    }

    /// Makes the kernel treat a pod as enrolled: its connections into the mesh go to the agent from now on. Where that is
    /// in a namespace, it is steered already.
    ///
    /// # Errors
    /// [`KernelError::Map`], for instance when the map is full.
    pub fn set_pod(&self, entry: &PodEntry) -> Result<(), KernelError> {
        let of = |v4: bool| {
            entry.addresses.iter().find(|a| a.is_ipv4() == v4).map_or(Address::NONE, |a| address(*a))
        };
        let pod = Pod {
            netns_cookie: entry.netns_cookie,
            v4: of(true),
            v6: of(false),
            slot: entry.slot,
            mode: entry.mode as u32,
            flags: entry.clear.flags()
                | entry.plaintext.pod_flags()
                | entry.connect.flags()
                | pod_flag::SPREAD,
            capture_port: u32::from(entry.capture_port),
        };
        lock(&self.pods).insert(entry.cgroup, pod, 0).map_err(failed("PODS"))
    }

    /// Makes the kernel leave a pod alone that is known and not enrolled. On guarded links it is held to its addresses.
    ///
    /// # Errors
    /// [`KernelError::Map`], for instance when the map is full, and if the kernel has the cgroup as an enrolled pod's. That entry
    /// has to be removed first.
    pub fn set_exempt(&self, cgroup: u64, addresses: &[IpAddr]) -> Result<(), KernelError> {
        let of =
            |v4: bool| addresses.iter().find(|a| a.is_ipv4() == v4).map_or(Address::NONE, |a| address(*a));
        let pod = Pod { v4: of(true), v6: of(false), flags: pod_flag::EXEMPT, ..Pod::unknown() };
        let mut pods = lock(&self.pods);
        if pods.get(&cgroup, 0).is_ok_and(|known| !known.has(pod_flag::EXEMPT)) {
            let problem = format!("cgroup {cgroup} is an enrolled pod's and is not left alone");
            return Err(KernelError::Map { map: "PODS", problem });
        }
        pods.insert(cgroup, pod, 0).map_err(failed("PODS"))
    }

    /// Pods that the kernel leaves alone: cgroup id and the addresses that it has for them.
    #[must_use]
    pub fn exempt(&self) -> Vec<(u64, Vec<IpAddr>)> {
        let pods = lock(&self.pods);
        let exempt = pods.iter().filter_map(Result::ok).filter(|(_, pod)| pod.has(pod_flag::EXEMPT));
        let addresses = |pod: Pod| [pod.v4, pod.v6].iter().filter(|a| !a.is_none()).map(ip).collect();
        exempt.map(|(cgroup, pod)| (cgroup, addresses(pod))).collect()
    }

    /// Returns the namespace cookie and the capture port of a pod's entry.
    #[must_use]
    pub fn pod_place(&self, cgroup: u64) -> Option<(u64, u16)> {
        let pod = lock(&self.pods).get(&cgroup, 0).ok()?;
        Some((pod.netns_cookie, u16::try_from(pod.capture_port).unwrap_or(0)))
    }

    /// Ends the enrolment of a pod.
    pub fn remove_pod(&self, cgroup: u64) {
        // Missing is what was wanted.
        let _ = lock(&self.pods).remove(&cgroup);
    }

    /// Cookie of the network namespace in which a pod is enrolled; 0 while it is only covered.
    #[must_use]
    pub fn enrolled_in(&self, cgroup: u64) -> Option<u64> {
        lock(&self.pods).get(&cgroup, 0).ok().map(|pod| pod.netns_cookie)
    }

    /// Returns true if the kernel leaves a pod alone, and false if it treats it as one to enrol. `None` without an entry.
    #[must_use]
    pub fn is_exempt(&self, cgroup: u64) -> Option<bool> {
        lock(&self.pods).get(&cgroup, 0).ok().map(|pod| pod.has(pod_flag::EXEMPT))
    }

    /// Pods that the kernel treats as enrolled: cgroup id and slot.
    #[must_use]
    pub fn pods(&self) -> Vec<(u64, u32)> {
        let pods = lock(&self.pods);
        let enrolled = pods.iter().filter_map(Result::ok).filter(|(_, pod)| !pod.has(pod_flag::EXEMPT));
        enrolled.map(|(cgroup, pod)| (cgroup, pod.slot)).collect()
    }

    /// Gives the kernel a listener of a pod. It leaves the map by itself when the socket closes.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_listener(
        &self,
        slot: u32,
        listener: Listener,
        socket: &impl AsRawFd,
    ) -> Result<(), KernelError> {
        lock(&self.listeners).set(listener_index(slot, listener), socket, 0).map_err(failed("LISTENERS"))
    }

    /// Gives the kernel the listener for a pod's captured connections. It leaves the map as the others do.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_capture_listener(&self, slot: u32, socket: &impl AsRawFd) -> Result<(), KernelError> {
        lock(&self.capturers).set(slot, socket, 0).map_err(failed("CAPTURERS"))
    }

    /// Gives the kernel the listener whose packets are dropped.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub(super) fn set_discarding(&self, socket: &impl AsRawFd) -> Result<(), KernelError> {
        lock(&self.discard).set(0, socket, 0).map_err(failed("DISCARD"))
    }

    /// Makes the mesh's ranges exactly `ranges`.
    ///
    /// # Errors
    /// [`KernelError::Map`]. New ranges are added before old ones go.
    pub fn set_mesh(&self, ranges: &[IpNet]) -> Result<(), KernelError> {
        let mut mesh = lock(&self.mesh);
        let wanted: HashSet<(u32, MeshKey)> = ranges.iter().map(mesh_key).collect();
        for (bits, data) in &wanted {
            mesh.insert(&Key::new(*bits, *data), PRESENT, 0).map_err(failed("MESH"))?;
        }
        let stale: Vec<(u32, MeshKey)> = mesh
            .keys()
            .filter_map(Result::ok)
            .map(|k| (k.prefix_len(), k.data()))
            .filter(|k| !wanted.contains(k))
            .collect();
        for (bits, data) in stale {
            mesh.remove(&Key::new(bits, data)).map_err(failed("MESH"))?;
        }
        Ok(())
    }

    /// Returns the number of ranges of the mesh.
    #[must_use]
    pub fn count_mesh(&self) -> usize {
        lock(&self.mesh).keys().filter_map(Result::ok).count()
    }

    /// Returns true for an address in the mesh's ranges.
    #[must_use]
    pub fn is_in_mesh(&self, ip: IpAddr) -> bool {
        lock(&self.mesh).get(&Key::new(ADDRESS_BITS, address(ip).0), 0).is_ok()
    }

    /// Adds `new` to the mesh's ranges, and then takes out `replaced`, which lie in them.
    ///
    /// # Errors
    /// [`KernelError::Map`]; nothing was taken out when not all could be added.
    pub fn extend_mesh(&self, new: &[IpNet], replaced: &[IpNet]) -> Result<(), KernelError> {
        let mut mesh = lock(&self.mesh);
        for (bits, data) in new.iter().map(mesh_key) {
            mesh.insert(&Key::new(bits, data), PRESENT, 0).map_err(failed("MESH"))?;
        }
        for (bits, data) in replaced.iter().map(mesh_key) {
            // One that stays only repeats what the new ones say.
            let _ = mesh.remove(&Key::new(bits, data));
        }
        Ok(())
    }

    /// Returns true for an address that the kernel has as the node's own.
    #[must_use]
    pub fn is_node(&self, ip: IpAddr) -> bool {
        lock(&self.node).get(&address(ip), 0).is_ok()
    }

    /// Makes the node's own addresses exactly `addresses`; more than the map holds are left out with a warning.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_node(&self, addresses: &[IpAddr]) -> Result<(), KernelError> {
        let bound = limits::NODE_ADDRESSES as usize;
        if addresses.len() > bound {
            tracing::warn!(
                have = addresses.len(),
                bound,
                "probes from the node's further addresses are not recognised"
            );
        }
        let wanted = addresses.iter().take(bound).map(|a| address(*a)).collect();
        replace_all(&mut lock(&self.node), &wanted).map_err(failed("NODE"))
    }

    /// Returns the destination of a captured connection that the agent accepted as `socket`. The kernel stored it in the
    /// socket before `accept()` returned.
    #[must_use]
    pub fn destination(&self, socket: &impl AsRawFd) -> Option<SocketAddr> {
        let names = self.names.get(socket).filter(|names| names.kind == names_kind::REDIRECTED)?;
        Some(SocketAddr::new(ip(&names.peer), u16::try_from(names.peer_port).ok()?))
    }

    /// Returns a pod's entries in the maps of pending connections. `None` for a slot that no pod can have.
    #[must_use]
    pub fn pending(&self, slot: u32) -> Option<Pending> {
        self.pending.get(&slot, 0).ok()
    }

    /// Returns the pending connections that were refused since the maps were made: captured ones, and those of the agent. Both
    /// are sums over all slots, so they do not fall when a pod goes.
    #[must_use]
    pub fn pending_refused(&self) -> [i64; 2] {
        let slots = (0..limits::SLOTS).filter_map(|slot| self.pending(slot));
        slots.fold([0; 2], |[captured, dialled], pending| {
            [captured + pending.captured_refused, dialled + pending.dialled_refused]
        })
    }

    /// Returns true if a captured connection is not closed, and the agent's listener has not answered it.
    #[must_use]
    pub fn is_captured(&self, netns_cookie: u64, client: SocketAddr, target: SocketAddr) -> bool {
        let key = Tuple {
            netns_cookie,
            local: address(client.ip()),
            remote: address(target.ip()),
            local_port: u32::from(client.port()),
            remote_port: u32::from(target.port()),
        };
        self.captured.has(&key.of_captured())
    }

    /// Makes the application that accepts `socket`'s connection see `client` as its peer. To be called before
    /// `connect()`. The connection counts in the share of the pod with `slot` until the application's kernel takes it.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_peer_name(
        &self,
        socket: &impl AsRawFd,
        client: SocketAddr,
        slot: u32,
    ) -> Result<(), KernelError> {
        let names = Names {
            peer: address(client.ip()),
            own: Address::NONE,
            peer_port: u32::from(client.port()),
            kind: names_kind::DIALLED,
            slot,
            pad: 0,
        };
        self.names.set(socket, names)
    }

    /// Marks `socket` as a tunnel to `peer`. Of the agent's sockets only marked ones pass a pod's link into the mesh, and only
    /// to their peer. To be called before `connect()`.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_tunnel(&self, socket: &impl AsRawFd, peer: SocketAddr) -> Result<(), KernelError> {
        self.mark(socket, peer, names_kind::TUNNEL)
    }

    /// Marks `socket` as plaintext to `peer`, a port whose mode is DISABLE. As [`Self::set_tunnel`].
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_disabled(&self, socket: &impl AsRawFd, peer: SocketAddr) -> Result<(), KernelError> {
        self.mark(socket, peer, names_kind::DISABLED)
    }

    fn mark(&self, socket: &impl AsRawFd, peer: SocketAddr, kind: u32) -> Result<(), KernelError> {
        let names = Names {
            peer: address(peer.ip()),
            own: Address::NONE,
            peer_port: u32::from(peer.port()),
            kind,
            ..Names::default()
        };
        self.names.set(socket, names)
    }

    /// All counters, summed over CPUs.
    #[must_use]
    pub fn counters(&self) -> Vec<KernelCounter> {
        (0_u32..)
            .zip(REASONS)
            .map(|(index, text)| {
                let value = self.counters.get(&index, 0).map_or(0, |per_cpu| per_cpu.iter().sum());
                KernelCounter { name: text.name, help: text.help, value }
            })
            .collect()
    }
}

/// As [`typed`], for a map that is only read.
fn unlocked<M: TryFrom<Map, Error = MapError>>(
    programs: &mut Programs,
    name: &'static str,
) -> Result<M, KernelError> {
    map_of(programs.ebpf(), name)
}

fn typed<M: TryFrom<Map, Error = MapError>>(
    programs: &mut Programs,
    name: &'static str,
) -> Result<Mutex<M>, KernelError> {
    map_of(programs.ebpf(), name).map(Mutex::new)
}

/// Takes a map of the loaded object.
fn map_of<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, KernelError> {
    let missing = || KernelError::Map { map: name, problem: "not in the object".to_owned() };
    M::try_from(ebpf.take_map(name).ok_or_else(missing)?).map_err(failed(name))
}

/// Makes the keys of `map` exactly `wanted`.
fn replace_all<K: aya::Pod + Eq + Hash>(
    map: &mut HashMap<MapData, K, u32>,
    wanted: &HashSet<K>,
) -> Result<(), MapError> {
    let present: HashSet<K> = map.keys().filter_map(Result::ok).collect();
    for gone in present.difference(wanted) {
        let _ = map.remove(gone);
    }
    wanted.difference(&present).try_for_each(|new| map.insert(new, PRESENT, 0))
}

/// A panic while a map is locked leaves the handle as it was: it holds a descriptor only.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(map: &'static str) -> impl Fn(MapError) -> KernelError {
    move |error| {
        let cause = std::error::Error::source(&error).map_or(String::new(), |s| format!(": {s}"));
        KernelError::Map { map, problem: format!("{error}{cause}") }
    }
}

fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => Address::from_octets(v4.to_ipv6_mapped().octets()),
        IpAddr::V6(v6) => Address::from_octets(v6.octets()),
    }
}

pub(super) fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(address.octets()).to_canonical()
}

fn mesh_key(range: &IpNet) -> (u32, MeshKey) {
    // In the mapped form the 96 bits before an IPv4 address are part of its prefix.
    let extra = if range.addr().is_ipv4() { 96 } else { 0 };
    (u32::from(range.prefix_len()) + extra, address(range.network()).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_trip_through_the_kernels_form() {
        for text in ["10.77.1.2", "fd77:1::2"] {
            let parsed: IpAddr = text.parse().expect("literal");
            assert_eq!(ip(&address(parsed)), parsed);
        }
        let mapped: IpAddr = "::ffff:10.77.1.2".parse().expect("literal");
        assert_eq!(ip(&address(mapped)), "10.77.1.2".parse::<IpAddr>().expect("literal"));
    }

    #[test]
    fn ipv4_ranges_are_lengthened_to_their_mapped_form() {
        let (bits, data) = mesh_key(&"10.77.0.0/16".parse().expect("literal"));
        assert_eq!(bits, 112);
        assert_eq!(data, address("10.77.0.0".parse().expect("literal")).0);
        assert_eq!(mesh_key(&"fd77::/32".parse().expect("literal")).0, 32);
    }
}
