//! Flows that the node itself has with pods, proven on the host end of the pods' links.
//!
//! Each pod has [`limits::NODE_FLOWS_PER_POD`] cells of its own in one array, so no pod can take another's. A flow may be in
//! [`NODE_FLOW_WAYS`] cells, chosen by a keyed hash. A cell holds 103 bits of two keyed hashes of the whole flow, and the
//! second of the node's last packet. They stand for the flow: two flows share the bits by chance only, as long as the seed is
//! secret. The hashes are fast, not cryptographic, and differ in their key and in the order of their input. A cell that two
//! CPUs write at once matches neither flow. A pod with more flows than cells loses its own oldest ones. Each packet of the node
//! makes its cell again.

use crate::{Address, PodCells, cells::mix, limits, seconds};

/// Neighbouring cells in which a flow may be.
pub const NODE_FLOW_WAYS: u32 = 4;
/// Seconds after the node's last packet in which a flow counts as the node's own. Linux keeps the port of a closed
/// connection for as long (`TCP_TIMEWAIT_LEN`). Later, others on the node may use the port.
const PROVEN_SECONDS: u64 = 60;
/// Bits of a cell's second word that hold the time in seconds, which wrap around after half a year.
const TIME_MASK: u64 = (1 << 24) - 1;

/// A flow between the node itself and a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NodeFlow {
    /// Address of the node.
    pub node: Address,
    /// Address of the pod.
    pub pod: Address,
    /// Port of the node.
    pub node_port: u32,
    /// Port of the pod.
    pub pod_port: u32,
    /// IP protocol number.
    pub protocol: u32,
}

/// A cell of the array; zero if it is empty.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeFlowCell {
    /// The first hash; never 0 in use.
    pub first: u64,
    /// The upper bits of the second hash, and the time.
    pub second: u64,
}

const _: () = assert!(size_of::<NodeFlowCell>() == 16);

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for NodeFlowCell {}

/// The place of a flow in the array, and what its cell holds but for the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFlowKey {
    /// Index of the first of its cells.
    pub index: u32,
    first: u64,
    second: u64,
}

impl NodeFlow {
    /// Returns the flow between these addresses and ports.
    #[inline(always)]
    #[must_use]
    pub const fn new(
        (node, node_port): (Address, u32),
        (pod, pod_port): (Address, u32),
        protocol: u8,
    ) -> Self {
        Self { node, pod, node_port, pod_port, protocol: protocol as u32 }
    }

    /// Returns the flow's key in the cells of a pod. `None` for a pod without a slot.
    #[inline(always)]
    #[must_use]
    pub const fn key(&self, seed: u64, cells: PodCells) -> Option<NodeFlowKey> {
        if cells.slot >= limits::SLOTS {
            return None;
        }
        let (node, pod) = (&self.node.0, &self.pod.0);
        let (mut first, mut second) = (mix(seed), mix(!seed));
        let ports = (self.node_port as u64) << 32 | self.pod_port as u64;
        let words = [
            pair(node[0], node[1]),
            pair(node[2], node[3]),
            pair(pod[0], pod[1]),
            pair(pod[2], pod[3]),
            ports,
        ];
        let mut at = 0;
        while at < words.len() {
            first = mix(first ^ words[at]);
            second = mix(second ^ words[at].rotate_left(32));
            at += 1;
        }
        let last = pair(cells.mark, self.protocol);
        first = mix(first ^ last);
        second = mix(second ^ last);
        let set = mix(first ^ second) as u32 & (limits::NODE_FLOWS_PER_POD - NODE_FLOW_WAYS);
        let index = cells.slot * limits::NODE_FLOWS_PER_POD + set;
        Some(NodeFlowKey { index, first: first | 1, second: second & !TIME_MASK })
    }
}

#[inline(always)]
const fn pair(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

impl NodeFlowKey {
    /// Returns the cell after a packet of the node.
    #[inline(always)]
    #[must_use]
    pub const fn proven(&self, now_ns: u64) -> NodeFlowCell {
        NodeFlowCell { first: self.first, second: self.second | seconds(now_ns) as u64 & TIME_MASK }
    }

    /// Returns true if `cell` is the flow's.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(&self, cell: &NodeFlowCell) -> bool {
        cell.first == self.first && cell.second & !TIME_MASK == self.second
    }

    /// Returns true if `cell` says that the node sent a packet of this flow a short time ago.
    #[inline(always)]
    #[must_use]
    pub const fn is_proven(&self, cell: &NodeFlowCell, now_ns: u64) -> bool {
        self.is_of(cell) && cell.age(now_ns) <= PROVEN_SECONDS
    }
}

impl NodeFlowCell {
    /// Returns the seconds since the node's last packet; for an empty cell more than for any other.
    #[inline(always)]
    #[must_use]
    pub const fn age(&self, now_ns: u64) -> u64 {
        if self.first == 0 {
            u64::MAX
        } else {
            (seconds(now_ns) as u64).wrapping_sub(self.second) & TIME_MASK
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const SECOND: u64 = 1_000_000_000;
    const POD: PodCells = PodCells::new(3, 70);
    const AT: u64 = 40_000_000 * SECOND;

    fn flow(node_port: u32) -> NodeFlow {
        let (node, pod) = (Address::from_v4_be(7), Address::from_v4_be(9));
        NodeFlow::new((node, node_port), (pod, 8080), crate::protocol::TCP)
    }

    #[test]
    fn only_the_flow_of_the_nodes_packet_is_proven_and_for_a_bounded_time() {
        let key = flow(4000).key(1, POD).expect("a slot");
        let cell = key.proven(AT);
        for (age, proven) in [(0, true), (PROVEN_SECONDS, true), (PROVEN_SECONDS + 1, false)] {
            assert_eq!(key.is_proven(&cell, AT + age * SECOND), proven, "{age}");
        }
        assert!(!key.is_proven(&NodeFlowCell::default(), AT));
        let like = flow(4000);
        let others = [
            flow(4001),
            NodeFlow { pod_port: 8081, ..like },
            NodeFlow { protocol: 17, ..like },
            NodeFlow { node: Address::from_v4_be(8), ..like },
            NodeFlow { pod: Address::LOOPBACK_V6, ..like },
            NodeFlow { node: like.pod, pod: like.node, ..like },
        ];
        for other in others {
            let other = other.key(1, POD).expect("a slot");
            assert!(!other.is_of(&cell));
            // A cell that two flows wrote at once is neither's.
            let torn = NodeFlowCell { first: cell.first, second: other.proven(AT).second };
            assert!(!key.is_of(&torn) && !other.is_of(&torn));
        }
        assert!(!flow(4000).key(2, POD).expect("a slot").is_of(&cell), "another seed");
    }

    #[test]
    fn a_cell_proves_nothing_for_the_next_pod_of_its_slot() {
        let cell = flow(4000).key(1, POD).expect("a slot").proven(AT);
        for cgroup in (0..10_000).filter(|cgroup| *cgroup != 70) {
            assert!(!flow(4000).key(1, PodCells::new(3, cgroup)).expect("a slot").is_of(&cell), "{cgroup}");
        }
    }

    #[test]
    fn a_pods_flows_are_in_its_own_cells_and_use_all_of_them() {
        let sets: HashSet<u32> = (0..20_000)
            .filter_map(|port| flow(port).key(5, PodCells::new(1, 70)))
            .map(|key| key.index)
            .collect();
        let own = limits::NODE_FLOWS_PER_POD..2 * limits::NODE_FLOWS_PER_POD - NODE_FLOW_WAYS + 1;
        assert!(sets.iter().all(|index| own.contains(index)));
        assert_eq!(sets.len() as u32, limits::NODE_FLOWS_PER_POD / NODE_FLOW_WAYS);
        assert_eq!(flow(1).key(5, PodCells::new(limits::SLOTS, 70)), None);
        assert_eq!(flow(1).key(5, PodCells::new(u32::MAX, 70)), None);
    }

    #[test]
    fn an_empty_cell_is_older_than_any_other() {
        let old = flow(1).key(1, POD).expect("a slot").proven(AT);
        assert!(NodeFlowCell::default().age(AT) > old.age(AT + 3600 * SECOND));
    }
}
