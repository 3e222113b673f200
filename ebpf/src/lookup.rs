//! Facts of the whole node, looked up in maps.

use aya_ebpf::btf_maps::lpm_trie::Key;
use tacit_abi::{
    Address, ClearKey, Mode, PortKey,
    node_port::{self, NodePortFacts},
};

use crate::{
    context::now,
    maps::{
        AGENTS, CLEAR, CLUSTER_NODES, MESH, NODE, NODE_HARDWARE, NODE_SERVICE_PORTS, NODE_SERVICES,
        NODE_TABLES, PORT_MODES, STATE,
    },
};

/// Prefix length of a full address in the mesh's map.
const FULL_PREFIX: u32 = 128;

/// Returns true if the agent's heartbeat is stale or missing.
#[inline(always)]
pub fn is_stale() -> bool {
    STATE.get(0).is_none_or(|state| state.is_stale(now()))
}

/// Returns true if STRICT applies to pods without an entry. Without a state, nothing was ever enforced here.
#[inline(always)]
pub fn default_is_strict() -> bool {
    STATE.get(0).is_some_and(|state| state.default_mode == Mode::Strict as u32)
}

/// Returns the secret of hashes that pods must not foresee.
#[inline(always)]
pub fn seed() -> u64 {
    STATE.get(0).map_or(0, |state| state.seed)
}

/// Returns true for hardware addresses of the node's interfaces.
#[inline(always)]
pub fn is_node_hardware(address: u64) -> bool {
    // SAFETY: only presence is read.
    unsafe { NODE_HARDWARE.get(&address) }.is_some()
}

/// Returns true for cgroups of agents.
#[inline(always)]
pub fn is_agent_cgroup(id: u64) -> bool {
    // SAFETY: only presence is read.
    unsafe { AGENTS.get(&id) }.is_some()
}

/// Returns true for the node's own addresses.
#[inline(always)]
pub fn is_node(address: &Address) -> bool {
    // SAFETY: only presence is read.
    unsafe { NODE.get(address) }.is_some()
}

/// An address and a port that may be a service's at a node.
struct NodePort<'a> {
    address: &'a Address,
    port: u16,
    protocol: u32,
}

impl NodePort<'_> {
    #[inline(always)]
    fn is_in_table(&self, port: u16, protocol: u32) -> bool {
        let key = ClearKey { address: *self.address, port: u32::from(port), protocol };
        // SAFETY: only presence is read.
        unsafe { NODE_SERVICES.get(&key) }.is_some()
    }
}

impl NodePortFacts for NodePort<'_> {
    #[inline(always)]
    fn is_node(&self) -> bool {
        // SAFETY: only presence is read.
        unsafe { CLUSTER_NODES.get(self.address) }.is_some()
    }

    #[inline(always)]
    fn is_listed(&self) -> bool {
        self.is_in_table(self.port, self.protocol)
    }

    #[inline(always)]
    fn is_anywhere(&self) -> bool {
        let (word, bit) = node_port::port_bit(self.port, self.protocol);
        NODE_SERVICE_PORTS.get(word).is_some_and(|bits| bits & bit != 0)
    }

    #[inline(always)]
    fn is_balanced(&self) -> bool {
        self.is_in_table(0, 0)
    }
}

/// Returns true for a port of a service at an address of a node, and for what may be one while a table lacks entries.
#[inline(always)]
pub fn is_node_service(address: &Address, port: u16, protocol: u32) -> bool {
    let flags = NODE_TABLES.get(0).map_or(0, |flags| *flags);
    node_port::is_service(flags, address, port, &NodePort { address, port, protocol })
}

/// Returns the mode of a pod's port that has its own.
#[inline(always)]
pub fn port_mode(slot: u32, port: u16) -> Option<u32> {
    // SAFETY: copied at once; the agent replaces entries whole.
    unsafe { PORT_MODES.get(&PortKey { slot, port: u32::from(port) }) }.copied()
}

/// Returns true for destinations of `allowClear`.
#[inline(always)]
pub fn is_allowed_clear(address: &Address, port: u16, protocol: u32) -> bool {
    // SAFETY: only presence is read.
    unsafe { CLEAR.get(&ClearKey { address: *address, port: u32::from(port), protocol }) }.is_some()
}

/// Returns true for addresses in the mesh's ranges.
#[inline(always)]
pub fn in_mesh(address: &Address) -> bool {
    MESH.get(&Key::new(FULL_PREFIX, address.0)).is_some()
}
