//! The maps. All but the log's are pinned by the agent under their name, so they outlive it.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage, SockMap},
    macros::btf_map,
};
use tacit_abi::{
    Address, ClearKey, Destination, DropKey, LISTENERS_PER_POD, MeshKey, Names, Pod, PortKey, REASONS,
    Settings, State, Steered, Tuple, limits,
};

use crate::event::Budget;

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// Written by the agent before the programs are loaded; constant to the verifier.
#[unsafe(no_mangle)]
pub static SETTINGS: Global<Settings> =
    Global::new(Settings { pods_level: u32::MAX, abi_version: 0, pods_cgroup: 0, has_set_retval: 0, pad: 0 });

/// The agent's heartbeat and the mesh's default. Zero: no agent ever ran, nobody is held to anything.
#[btf_map]
pub static STATE: Array<State, 1> = Array::new();

/// Cgroups of agents by id, with the process. Missing: treated as any pod.
#[btf_map]
pub static AGENTS: HashMap<u64, u32, { limits::AGENTS as usize }> = HashMap::new();

/// Destinations that strict pods may reach in clear. Missing: they may not.
#[btf_map]
pub static CLEAR: HashMap<ClearKey, u32, { limits::CLEAR as usize }, ON_DEMAND> = HashMap::new();

/// The pod behind a link, its cgroup's id by the index of the link's host end. Missing: not guarded there.
#[btf_map]
pub static LINKS: HashMap<u32, u64, { limits::PODS as usize }> = HashMap::new();

/// How many packets the guard dropped, by pod, destination and reason. Full: the least recently seen makes room;
/// the verdict does not depend on it, and `COUNTERS` loses nothing.
#[btf_map]
pub static DROPS: LruHashMap<DropKey, u64, { limits::DROPS as usize }> = LruHashMap::new();

/// Enrolled pods by cgroup id. Missing: left alone, or held to STRICT when that is the mesh's default.
#[btf_map]
pub static PODS: HashMap<u64, Pod, { limits::PODS as usize }> = HashMap::new();

/// Enrolled pods by address. Missing: refused inside the mesh, left alone outside.
#[btf_map]
pub static STEERED: HashMap<Address, Steered, { limits::ADDRESSES as usize }> = HashMap::new();

/// Modes of ports that have their own. Missing: the pod's mode.
#[btf_map]
pub static PORT_MODES: HashMap<PortKey, u32, { limits::PORT_MODES as usize }, ON_DEMAND> = HashMap::new();

/// The mesh's ranges.
#[btf_map]
pub static MESH: LpmTrie<MeshKey, u32, { limits::MESH_RANGES as usize }> = LpmTrie::new();

/// The node's own addresses: probes come from them.
#[btf_map]
pub static NODE: HashMap<Address, u32, { limits::NODE_ADDRESSES as usize }> = HashMap::new();

/// The agent's listeners, see `tacit_abi::listener_index`. An entry goes with its socket: missing means no agent.
#[btf_map]
pub static LISTENERS: SockMap<{ (limits::PODS * LISTENERS_PER_POD) as usize }> = SockMap::new();

/// The agent's listeners for captured connections, by slot: those that are spread over ports on which nobody listens are
/// steered to it. An entry goes with its socket: missing means no agent.
#[btf_map]
pub static CAPTURERS: SockMap<{ limits::PODS as usize }> = SockMap::new();

/// What a socket's application should be told; lives and dies with the socket.
#[btf_map]
pub static NAMES: SkStorage<Names> = SkStorage::new();

/// Captured connections on their way to the agent: where they wanted to go. Full: the agent finds nothing and resets.
#[btf_map]
pub static CAPTURED: HashMap<Tuple, Destination, { limits::PENDING as usize }, ON_DEMAND> = HashMap::new();

/// The agent's connections on their way to an application: whom they stand for. Full: the application sees the
/// agent's address; nothing is let through that was not decided already.
#[btf_map]
pub static DIALLED: HashMap<Tuple, Destination, { limits::PENDING as usize }, ON_DEMAND> = HashMap::new();

/// One counter for each `tacit_abi::Reason`.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { REASONS.len() }> = PerCpuArray::new();

/// How many log lines each CPU has written in its current second. Not pinned: it means nothing to a successor.
#[btf_map]
pub static LOG_BUDGET: PerCpuArray<Budget, 1> = PerCpuArray::new();

/// How deep below the pods' cgroup a pod's own cgroup can be: directly, or below a QoS class as Kubernetes has it.
const POD_DEPTHS: u32 = 2;

/// The enrolled pod, with its cgroup's id, of whatever has the ancestor cgroups that `ancestor` tells by level.
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
