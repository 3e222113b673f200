//! Contract between the kernel side and the agent: map keys and values, counters, ports, and the pure decisions.
//!
//! The crate has no dependencies and no I/O, so every decision is tested on the host. All types are `repr(C)`, of fixed
//! size, with explicit padding. Addresses are in network byte order. Ports are in host byte order unless a name ends
//! in `_be`.
#![no_std]

#[cfg(test)]
extern crate std;

mod address;
mod answers;
mod arrival;
mod claim;
mod guard;
mod held;
mod inbound;
mod layout;
mod link;
mod outbound;
mod reason;
pub mod tcp_port;

pub use address::Address;
pub use answers::{ANSWER_WAYS, answer_cells, is_expected, remember};
pub use arrival::{Arrival, ArrivalFacts, decide_arrival, is_recent, seconds};
pub use claim::{Claim, may_claim, may_send_from};
pub use guard::{
    Accepted, GuardFacts, Hook, Packet, Segment, Verdict, decide_egress, decide_ingress, protocol,
};
pub use held::{
    HELD_PACKET_MAX, HELD_PACKET_MIN, HELD_RING_BYTES, HELD_RINGS, HELD_SHARE, HeldEnd, HeldShare, HeldSyn,
    Hold, HoldFacts, decide_hold, held_kind, held_ring,
};
pub use inbound::{Inbound, InboundFacts, Steer, decide_inbound};
pub use layout::{
    ABI_VERSION, ClearKey, Destination, DropKey, LISTENERS_PER_POD, Listener, MeshKey, Mode, Names, NodeFlow,
    Pod, PortKey, Settings, State, Steered, Tuple, limits, listener_index, names_kind, pod_flag, steer_flag,
};
pub use link::{Link, hardware_address};
pub use outbound::{Connect, ConnectFacts, decide_connect};
pub use reason::{REASONS, Reason, ReasonText};
