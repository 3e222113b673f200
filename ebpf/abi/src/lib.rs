//! Contract between the kernel side and the agent: map keys and values, counters, ports, and the pure decisions.
//!
//! The crate has no dependencies and no I/O, so every decision is tested on the host. All types are `repr(C)`, of fixed
//! size, with explicit padding. Addresses are in network byte order. Ports are in host byte order unless a name ends
//! in `_be`.
#![no_std]

#[cfg(test)]
extern crate std;

/// Defines flags and lists them all, so that the tests enumerate each new one.
macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)+) => {
        $($(#[$doc])* pub const $name: u32 = $bit;)+
        /// All flags.
        pub const ALL: [u32; [$($bit),+].len()] = [$($bit),+];
    };
}

mod address;
mod answers;
mod arrival;
mod cells;
mod claim;
mod drops;
mod exception;
mod guard;
mod held;
mod inbound;
mod layout;
mod link;
mod node_flows;
pub mod node_port;
mod outbound;
mod pending;
mod probes;
mod reason;
mod recent;
mod silence;
mod syn_ack;
pub mod tcp_port;

pub use address::Address;
pub use answers::{ANSWER_WAYS, answer_cells, is_expected, remember};
pub use arrival::{Arrival, ArrivalFacts, decide_arrival, seconds};
pub use cells::{PodCells, pod_secret};
pub use claim::{Claim, may_claim, may_send_from};
pub use drops::{DROP_WAYS, DropCounter, PodDrops, drops_index};
pub use exception::{EXCEPTION_COUNTERS, EXCEPTIONS, Exception, ExceptionHook, ExceptionText};
pub use guard::{
    Accepted, GuardFacts, Hook, Marked, Packet, Segment, Verdict, decide_egress, decide_ingress, protocol,
};
pub use held::{
    HELD_PACKET_MAX, HELD_PACKET_MIN, HELD_RING_BYTES, HELD_RINGS, HELD_SHARE, HeldEnd, HeldShare, HeldSyn,
    Hold, HoldFacts, decide_hold, held_kind, held_ring,
};
pub use inbound::{Inbound, InboundFacts, Steer, decide_inbound};
pub use layout::{
    ABI_VERSION, ClearKey, Destination, LISTENERS_PER_POD, Listener, MeshKey, Mode, Names, Pod, PortKey,
    Settings, State, Steered, Tuple, limits, listener_index, names_kind, pod_flag, steer_flag,
};
pub use link::{Link, hardware_address};
pub use node_flows::{NODE_FLOW_WAYS, NodeFlow, NodeFlowCell, NodeFlowKey};
pub use outbound::{Connect, ConnectFacts, connect_error, decide_connect};
pub use pending::{Pending, is_in_share, is_share_used_up};
pub use probes::{PROBE_LATE_NS, ProbeShare, SegmentHead};
pub use reason::{REASONS, Reason, ReasonText};
pub use recent::{RECENT_CELLS, is_recent, noted_at, recent_cell};
pub use silence::{Limits, NOTICED_MS, TOLD_BYTES, TOLD_KIND, TOLD_MAGIC, Told};
pub use syn_ack::has_options_of_kernel;

/// Mark (`SO_MARK`) of a connection of the agent to an application whose client could not be stored. The guard drops its packets,
/// so no application accepts it under another name. The agent reads the mark and refuses the connection.
pub const LOST_CLIENT_MARK: u32 = 0x7ac1_70ff;

/// Bytes that a connection between the agent and an application keeps unsent, beside those that its reader has. Sending goes on
/// when half of them are left, so the reader never waits for the sender to wake up.
pub const LOOPBACK_UNSENT_BYTES: u32 = 64 << 10;
