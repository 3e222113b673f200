//! The maps, behind methods that say what each is for. Keys and values are those of `tacit-abi`.
//!
//! Locks are held for one or two map system calls, never across an await.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::maps::{
    HashMap, Map, MapData, MapError, PerCpuArray, SkStorage, SockMap,
    lpm_trie::{Key, LpmTrie},
};
use ipnet::IpNet;
use tacit_abi::{
    Address, Destination, Listener, MeshKey, Mode, Names, Pod, PortKey, REASONS, Steered, Tuple, limits,
    listener_index, names_kind, pod_flag, steer_flag,
};

use super::{KernelError, link, programs::Programs};

mod guard;

use guard::GuardMaps;
pub use guard::{DropCount, PlaintextDestination};

/// Present in the mesh: the value carries no more.
const PRESENT: u32 = 1;

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
    /// What plaintext meets at ports without a mode of their own.
    pub mode: Mode,
    /// What it may do in clear.
    pub clear: PlaintextEgress,
    /// The handling of plaintext that reaches it.
    pub plaintext: PlaintextHandling,
    /// When its `connect()` returns.
    pub connect: ConnectReturn,
    /// Where the agent listens for its captured connections; 0 while it does not.
    pub capture_port: u16,
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

/// What a pod may send in clear into the mesh.
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
    steered: Mutex<HashMap<MapData, Address, Steered>>,
    port_modes: Mutex<HashMap<MapData, PortKey, u32>>,
    mesh: Mutex<LpmTrie<MapData, MeshKey, u32>>,
    node: Mutex<HashMap<MapData, Address, u32>>,
    listeners: Mutex<SockMap<MapData>>,
    capturers: Mutex<SockMap<MapData>>,
    names: Mutex<SkStorage<MapData, Names>>,
    captured: Captured,
    counters: PerCpuArray<MapData, u64>,
    guard: GuardMaps,
}

impl Maps {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        Ok(Self {
            pods: typed(programs, "PODS")?,
            steered: typed(programs, "STEERED")?,
            port_modes: typed(programs, "PORT_MODES")?,
            mesh: typed(programs, "MESH")?,
            node: typed(programs, "NODE")?,
            listeners: typed(programs, "LISTENERS")?,
            capturers: typed(programs, "CAPTURERS")?,
            names: typed(programs, "NAMES")?,
            captured: Captured::take(programs)?,
            counters: typed::<PerCpuArray<MapData, u64>>(programs, "COUNTERS")?
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
            guard: GuardMaps::take(programs)?,
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
    /// [`KernelError::Map`], for instance when the map is full.
    pub fn set_exempt(&self, cgroup: u64, addresses: &[IpAddr]) -> Result<(), KernelError> {
        let of =
            |v4: bool| addresses.iter().find(|a| a.is_ipv4() == v4).map_or(Address::NONE, |a| address(*a));
        let pod = Pod { v4: of(true), v6: of(false), flags: pod_flag::EXEMPT, ..Pod::unknown() };
        lock(&self.pods).insert(cgroup, pod, 0).map_err(failed("PODS"))
    }

    /// Pods that the kernel leaves alone: cgroup id and the addresses that it has for them.
    #[must_use]
    pub fn exempt(&self) -> Vec<(u64, Vec<IpAddr>)> {
        let pods = lock(&self.pods);
        let exempt = pods.iter().filter_map(Result::ok).filter(|(_, pod)| pod.has(pod_flag::EXEMPT));
        let addresses = |pod: Pod| [pod.v4, pod.v6].iter().filter(|a| !a.is_none()).map(ip).collect();
        exempt.map(|(cgroup, pod)| (cgroup, addresses(pod))).collect()
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

    /// Pods that the kernel treats as enrolled: cgroup id and slot.
    #[must_use]
    pub fn pods(&self) -> Vec<(u64, u32)> {
        let pods = lock(&self.pods);
        let enrolled = pods.iter().filter_map(Result::ok).filter(|(_, pod)| !pod.has(pod_flag::EXEMPT));
        enrolled.map(|(cgroup, pod)| (cgroup, pod.slot)).collect()
    }

    /// Sets what plaintext meets at a pod's addresses.
    ///
    /// # Errors
    /// [`KernelError::Map`]. Ports are written before the pod's default, so that no port is open meanwhile that
    /// should not be.
    pub fn set_modes(
        &self,
        slot: u32,
        addresses: &[IpAddr],
        (default, plaintext): (Mode, PlaintextHandling),
        ports: &BTreeMap<u16, Mode>,
    ) -> Result<(), KernelError> {
        let mut port_modes = lock(&self.port_modes);
        for (port, mode) in ports {
            let key = PortKey { slot, port: u32::from(*port) };
            port_modes.insert(key, *mode as u32, 0).map_err(failed("PORT_MODES"))?;
        }
        let mut steered = lock(&self.steered);
        let entry = Steered { slot, mode: default as u32, flags: plaintext.flags(), pad: 0 };
        for ip in addresses {
            steered.insert(address(*ip), entry, 0).map_err(failed("STEERED"))?;
        }
        let former: Vec<Address> = steered
            .iter()
            .filter_map(Result::ok)
            .filter(|(key, s)| s.slot == slot && !addresses.iter().any(|ip| address(*ip) == *key))
            .map(|(key, _)| key)
            .collect();
        for key in former {
            let _ = steered.remove(&key);
        }
        let stale: Vec<PortKey> = port_modes
            .keys()
            .filter_map(Result::ok)
            .filter(|k| k.slot == slot && !ports.keys().any(|p| u32::from(*p) == k.port))
            .collect();
        for key in stale {
            let _ = port_modes.remove(&key);
        }
        Ok(())
    }

    /// Forgets the modes of a slot and of those addresses that are still its own.
    pub fn remove_modes(&self, slot: u32) {
        let mut steered = lock(&self.steered);
        let own: Vec<Address> =
            steered.iter().filter_map(Result::ok).filter(|(_, s)| s.slot == slot).map(|(a, _)| a).collect();
        for key in own {
            let _ = steered.remove(&key);
        }
        let mut port_modes = lock(&self.port_modes);
        let ports: Vec<PortKey> =
            port_modes.keys().filter_map(Result::ok).filter(|k| k.slot == slot).collect();
        for key in ports {
            let _ = port_modes.remove(&key);
        }
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
        let wanted: HashSet<Address> = addresses.iter().take(bound).map(|a| address(*a)).collect();
        let mut node = lock(&self.node);
        let present: HashSet<Address> = node.keys().filter_map(Result::ok).collect();
        for gone in present.difference(&wanted) {
            let _ = node.remove(gone);
        }
        for new in wanted.difference(&present) {
            node.insert(new, PRESENT, 0).map_err(failed("NODE"))?;
        }
        Ok(())
    }

    /// Where a captured connection wanted to go, by what `accept()` tells about it. The entry is taken out.
    #[must_use]
    pub fn destination(
        &self,
        netns_cookie: u64,
        client: SocketAddr,
        accepted_at: SocketAddr,
    ) -> Option<SocketAddr> {
        let found = self.captured.take_out(&captured_key(netns_cookie, client, accepted_at))?;
        Some(SocketAddr::new(ip(&found.address), u16::try_from(found.port).ok()?))
    }

    /// Returns true if a captured connection is not closed and its destination was not taken out.
    #[must_use]
    pub fn is_captured(&self, netns_cookie: u64, client: SocketAddr, target: SocketAddr) -> bool {
        self.captured.has(&captured_key(netns_cookie, client, target))
    }

    /// Makes the application that accepts `socket`'s connection see `client` as its peer. To be called before
    /// `connect()`.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_peer_name(&self, socket: &impl AsRawFd, client: SocketAddr) -> Result<(), KernelError> {
        let names = Names {
            peer: address(client.ip()),
            own: Address::NONE,
            peer_port: u32::from(client.port()),
            kind: names_kind::DIALLED,
        };
        lock(&self.names).insert(socket, names, 0).map_err(failed("NAMES"))
    }

    /// Marks `socket` as a tunnel: only such sockets of the agent pass a pod's link into the mesh. To be called before
    /// `connect()`.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn set_tunnel(&self, socket: &impl AsRawFd) -> Result<(), KernelError> {
        let names = Names { kind: names_kind::TUNNEL, ..Names::default() };
        lock(&self.names).insert(socket, names, 0).map_err(failed("NAMES"))
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

/// The map of captured connections, from which entries are taken in one system call and without a lock: each captured
/// connection costs one.
struct Captured(MapData);

impl Captured {
    fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        const NAME: &str = "CAPTURED";
        let problem = |problem: &str| KernelError::Map { map: NAME, problem: problem.to_owned() };
        let map = programs.ebpf().take_map(NAME).ok_or_else(|| problem("not in the object"))?;
        // Whether its keys and values are what is taken for them.
        HashMap::<_, Tuple, Destination>::try_from(&map).map_err(failed(NAME))?;
        match map {
            Map::HashMap(data) => Ok(Self(data)),
            _ => Err(problem("not a hash map")),
        }
    }

    fn take_out(&self, key: &Tuple) -> Option<Destination> {
        link::take(self.0.fd().as_fd(), key)
    }

    fn has(&self, key: &Tuple) -> bool {
        link::has::<Tuple, Destination>(self.0.fd().as_fd(), key)
    }
}

/// The key of a captured connection by its ends in the pod.
fn captured_key(netns_cookie: u64, client: SocketAddr, target: SocketAddr) -> Tuple {
    let key = Tuple {
        netns_cookie,
        local: address(client.ip()),
        remote: address(target.ip()),
        local_port: u32::from(client.port()),
        remote_port: u32::from(target.port()),
    };
    key.of_captured()
}

fn typed<M: TryFrom<Map, Error = MapError>>(
    programs: &mut Programs,
    name: &'static str,
) -> Result<Mutex<M>, KernelError> {
    let missing = || KernelError::Map { map: name, problem: "not in the object".to_owned() };
    let map = programs.ebpf().take_map(name).ok_or_else(missing)?;
    M::try_from(map).map(Mutex::new).map_err(failed(name))
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
