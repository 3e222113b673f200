//! What the kernel side and the agent agree on: map keys and values, counters, ports, and the pure decisions.
//!
//! No dependencies and no I/O, so every decision is tested on the host. All types are `repr(C)`, of fixed size, with
//! explicit padding. Addresses are in network byte order; ports are in host byte order unless a name says `_be`.
#![no_std]

#[cfg(test)]
extern crate std;

mod address;
mod decide;
mod layout;
mod reason;

pub use address::Address;
pub use decide::{Connect, ConnectFacts, Inbound, InboundFacts, Steer, decide_connect, decide_inbound};
pub use layout::{
    ABI_VERSION, Destination, LISTENERS_PER_POD, Listener, MeshKey, Mode, Names, Pod, PortKey, Settings,
    Steered, Tuple, limits, listener_index, names_kind, tcp_port,
};
pub use reason::{REASONS, Reason, ReasonText};
