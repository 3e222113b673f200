//! Decision of the guard on a frame towards a pod, on the host end of its link: which packets are the node's own.

use crate::{Address, Packet, Pod, Reason, Segment, protocol};

/// Facts about a frame towards a pod, on the host end of its link.
pub trait ArrivalFacts {
    /// Returns true for the node's own addresses.
    fn is_node(&self, address: &Address) -> bool;
    /// Returns true if the packet's socket belongs to the kernel or the node, and not to a pod.
    fn is_node_socket(&self) -> bool;
    /// Returns true if the node itself sent a packet of this flow a short time ago.
    fn is_node_flow(&self, packet: &Packet) -> bool;
}

/// Returns the time in seconds, which wraps around after 136 years.
#[inline(always)]
#[must_use]
pub const fn seconds(now_ns: u64) -> u32 {
    (now_ns / 1_000_000_000) as u32
}

/// Verdict on a frame towards a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Passes; nothing is proven.
    Pass,
    /// Passes, and its flow is the node's own.
    OfNode,
    /// Dropped and counted.
    Drop(Reason),
}

/// Decides on a packet towards `pod`, on the host end of its link. This is the only place that can tell the node's own
/// packets, such as probes of the kubelet, from forwarded, masqueraded and forged ones: they have a socket of the node.
#[inline(always)]
pub fn decide_arrival(facts: &impl ArrivalFacts, pod: &Pod, packet: &Packet) -> Arrival {
    // A pod's packets to itself do not leave its namespace. Such a source would pass for the pod inside.
    if pod.owns(&packet.remote) {
        return Arrival::Drop(Reason::GuardSpoofed);
    }
    if !pod.owns(&packet.local) || !facts.is_node(&packet.remote) {
        return Arrival::Pass;
    }
    if facts.is_node_socket() {
        // Anyone can make the node's kernel send a reset to the pod. It begins no flow of the node.
        let is_answer = matches!(packet.segment, Segment::Bare) && !facts.is_node_flow(packet);
        return if is_answer { Arrival::Pass } else { Arrival::OfNode };
    }
    // Somebody else takes part in a connection of the node. Masquerading never chooses a port that is in use.
    if !packet.segment.is_bare() && !is_icmp(packet.protocol) && facts.is_node_flow(packet) {
        return Arrival::Drop(Reason::GuardSpoofed);
    }
    Arrival::Pass
}

#[inline(always)]
fn is_icmp(number: u8) -> bool {
    matches!(number, protocol::ICMP | protocol::ICMP_V6)
}
