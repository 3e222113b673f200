//! Maps of the programs. The agent pins them under their names, so they outlive it.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, SkStorage, SockMap},
    macros::btf_map,
};
use tacit_abi::{
    Address, ClearKey, Destination, EXCEPTION_COUNTERS, HELD_RING_BYTES, HeldShare, HeldSyn,
    LISTENERS_PER_POD, Limits, Link, MeshKey, Names, NodeFlowCell, Pending, Pod, PodDrops, PortKey,
    ProbeShare, REASONS, RECENT_CELLS, Settings, State, Steered, Tuple, limits, node_port,
};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// Settings that the agent writes before it loads the programs. The verifier sees constants.
#[unsafe(no_mangle)]
pub static SETTINGS: Global<Settings> = Global::new(Settings {
    pods_level: u32::MAX,
    abi_version: 0,
    pods_cgroup: 0,
    has_set_retval: 0,
    has_tcp6_sock: 0,
    node_netns_cookie: 0,
});

/// The agent's heartbeat and the mesh's default mode. Zero: no agent ever ran, and nothing is enforced.
#[btf_map]
pub static STATE: Array<State, 1> = Array::new();

/// Cgroups of agents by id, with the process id. Missing: treated as a pod.
#[btf_map]
pub static AGENTS: HashMap<u64, u32, { limits::AGENTS as usize }> = HashMap::new();

/// Destinations of `allowClear`. Missing: STRICT pods cannot reach it as plaintext.
#[btf_map]
pub static CLEAR: HashMap<ClearKey, u32, { limits::CLEAR as usize }, ON_DEMAND> = HashMap::new();

/// Pods' links by the index of their host end. Missing: the link is not guarded.
#[btf_map]
pub static LINKS: HashMap<u32, Link, { limits::PODS as usize }> = HashMap::new();

/// Hardware addresses of the node's interfaces. Missing: a frame to this address goes to a neighbour.
#[btf_map]
pub static NODE_HARDWARE: HashMap<u64, u32, { limits::NODE_HARDWARE as usize }, ON_DEMAND> = HashMap::new();

/// Flows that the node itself has with pods, see `tacit_abi::NodeFlow`. Missing or old: the other end is not the node,
/// whatever its address.
#[btf_map]
pub static NODE_FLOWS: Array<NodeFlowCell, { (limits::SLOTS * limits::NODE_FLOWS_PER_POD) as usize }> =
    Array::new();

/// Datagrams of STRICT pods whose answers are expected, see `tacit_abi::answer_cells`. Missing: no answer, dropped.
#[btf_map]
pub static ANSWERS: Array<u64, { (limits::SLOTS * limits::ANSWERS_PER_POD) as usize }> = Array::new();

/// Numbers of dropped packets by pod, destination and reason, see `tacit_abi::DropCounter`. Verdicts do not depend on this
/// map, and `COUNTERS` stays complete.
#[btf_map]
pub static DROPS: Array<PodDrops, { (limits::SLOTS + limits::DROPS_WITHOUT_SLOT) as usize }> = Array::new();

/// Known pods by cgroup id, enrolled or exempt. Missing: left alone, or treated as STRICT if that is the mesh's default.
#[btf_map]
pub static PODS: HashMap<u64, Pod, { limits::PODS as usize }> = HashMap::new();

/// Enrolled pods by address. Missing: reset inside the mesh, passed outside.
#[btf_map]
pub static STEERED: HashMap<Address, Steered, { limits::ADDRESSES as usize }> = HashMap::new();

/// Modes of single ports. Missing: the pod's mode. Never full: the agent keeps each pod inside its share.
#[btf_map]
pub static PORT_MODES: HashMap<PortKey, u32, { limits::PORT_MODES as usize }, ON_DEMAND> = HashMap::new();

/// Ranges of the mesh.
#[btf_map]
pub static MESH: LpmTrie<MeshKey, u32, { limits::MESH_RANGES as usize }> = LpmTrie::new();

/// The node's own addresses, except those of services.
#[btf_map]
pub static NODE: HashMap<Address, u32, { limits::NODE_ADDRESSES as usize }> = HashMap::new();

/// Flags of the tables of nodes, see `tacit_abi::node_port::flag`. Zero: no address of a node is known.
#[btf_map]
pub static NODE_TABLES: Array<u32, 1> = Array::new();

/// Addresses of all nodes of the cluster. Missing: no node ports at the address.
#[btf_map]
pub static CLUSTER_NODES: HashMap<Address, u32, { limits::CLUSTER_NODES as usize }, ON_DEMAND> =
    HashMap::new();

/// Ports of load balancers that have addresses of nodes, and with port and protocol 0 such addresses. Missing: a port of the node
/// itself.
#[btf_map]
pub static NODE_SERVICES: HashMap<ClearKey, u32, { limits::NODE_SERVICE_ENTRIES as usize }, ON_DEMAND> =
    HashMap::new();

/// Ports of load balancers that count at each address of one, a bit each, see `tacit_abi::node_port::port_bit`.
#[btf_map]
pub static NODE_SERVICE_PORTS: Array<u64, { node_port::PORT_WORDS as usize }> = Array::new();

/// The agent's listeners, see `tacit_abi::listener_index`. The kernel removes an entry with its socket. Missing: no agent.
#[btf_map]
pub static LISTENERS: SockMap<{ (limits::SLOTS * LISTENERS_PER_POD) as usize }> = SockMap::new();

/// The agent's listeners for captured connections, by slot. Connections that are spread over ports without a listener are
/// redirected to them. The kernel removes an entry with its socket. Missing: no agent.
#[btf_map]
pub static CAPTURERS: SockMap<{ limits::SLOTS as usize }> = SockMap::new();

/// A listener of the agent that answers nothing: what is redirected to it is dropped. The kernel removes it with its socket.
#[btf_map]
pub static DISCARD: SockMap<1> = SockMap::new();

/// Captured connections whose handshake has a socket since a moment ago, see `tacit_abi::recent_cell`.
#[btf_map]
pub static RECENT: Array<u64, { RECENT_CELLS as usize }> = Array::new();

/// Names that a socket's application sees. The kernel frees an entry with its socket.
#[btf_map]
pub static NAMES: SkStorage<Names> = SkStorage::new();

/// Options of applications' sockets whose peers are silent, see `tacit_abi`'s `silence`. The kernel frees an entry with its socket.
#[btf_map]
pub static SILENCES: SkStorage<Limits> = SkStorage::new();

/// Destinations of captured connections until the handshake with the agent's listener ends, see `pending`. Never full:
/// each pod has its share. A connection without an entry is reset.
#[btf_map]
pub static CAPTURED: HashMap<Tuple, Destination, { limits::CAPTURED as usize }, ON_DEMAND> = HashMap::new();

/// Clients of the agent's connections until the handshake with the application ends, see `pending`. Never full: each pod
/// has its share. A connection without an entry is dropped by the guard, and refused by the agent.
#[btf_map]
pub static DIALLED: HashMap<Tuple, Destination, { limits::DIALLED as usize }, ON_DEMAND> = HashMap::new();

/// Numbers of each pod's entries in both maps of pending connections, by slot.
#[btf_map]
pub static PENDING: Array<Pending, { limits::SLOTS as usize }> = Array::new();

/// A ring of records about held connections, see `tacit_abi::held_ring`. Full: the record is lost, and the next
/// retransmission of the SYN makes another.
pub type HeldRing = RingBuf<HeldSyn, { HELD_RING_BYTES as usize }>;

/// Not pinned: each agent that loads the programs has rings of its own, so two agents never read the same one.
#[btf_map]
pub static HELD_0: HeldRing = HeldRing::new();
#[btf_map]
pub static HELD_1: HeldRing = HeldRing::new();
#[btf_map]
pub static HELD_2: HeldRing = HeldRing::new();
#[btf_map]
pub static HELD_3: HeldRing = HeldRing::new();

/// Pods' shares of the rings, by slot. Not pinned, like the rings.
#[btf_map]
pub static HELD_SHARES: Array<HeldShare, { limits::SLOTS as usize }> = Array::new();

/// The agents that read the probes of pods, by slot. Not pinned, like the rings.
#[btf_map]
pub static PROBE_SHARES: Array<ProbeShare, { limits::SLOTS as usize }> = Array::new();

/// One counter for each `tacit_abi::Reason`, by its number.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { REASONS.len() }> = PerCpuArray::new();

/// One counter for each `tacit_abi::Exception` at each hook, see `Exception::counter`.
#[btf_map]
pub static EXCEPTIONS: PerCpuArray<u64, { EXCEPTION_COUNTERS }> = PerCpuArray::new();

/// Levels below the pods' cgroup at which pods' cgroups can be: directly, or below a QoS class of Kubernetes.
const POD_DEPTHS: u32 = 2;

/// Returns the enrolled pod and its cgroup's id. `ancestor` returns the id of the ancestor cgroup at a level.
#[inline(always)]
pub fn pod_of(ancestor: impl Fn(u32) -> u64) -> Option<(u64, Pod)> {
    let level = SETTINGS.load().pods_level;
    for depth in 1..=POD_DEPTHS {
        let id = ancestor(level.wrapping_add(depth));
        // SAFETY: the entry is copied at once; the agent replaces entries, it never changes one in place.
        if let Some(pod) = unsafe { PODS.get(&id) } {
            return Some((id, *pod));
        }
    }
    None
}
