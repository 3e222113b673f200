//! The order in which the tables are written. Pure.
//!
//! Each write is one system call, and an agent can be killed after any of them. Its successor finds what was written. So each
//! part of a list of writes, from its beginning, has to be sound:
//! - An address and port that are a service's before and after the change are one throughout.
//! - The flags claim that a table has all only when the writes before have made it so. A table that was never written has
//!   flags without claims, and the flag of known nodes comes with the one of unknown ports.

use std::collections::HashSet;

use tacit_abi::{Address, ClearKey, node_port::flag};

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// All flags.
    Flags(u32),
    /// An address of a node.
    AddNode(Address),
    /// An address that is no node's any more.
    RemoveNode(Address),
    /// A port of a load balancer.
    AddService(ClearKey),
    /// A port that is no load balancer's any more.
    RemoveService(ClearKey),
    /// A word of the ports that count at each address of a load balancer.
    Ports(u32, u64),
}

/// The ports of load balancers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Services {
    /// Addresses with ports, and addresses of load balancers with port 0.
    pub(super) entries: HashSet<ClearKey>,
    /// The words of the bitmap.
    pub(super) ports: Vec<u64>,
}

impl Services {
    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.ports.iter().all(|word| *word == 0)
    }
}

/// Returns the writes that make the nodes `wanted`. Without room for all of them, every address counts as one of a node.
pub(super) fn nodes(
    flags: u32,
    present: &HashSet<Address>,
    wanted: &HashSet<Address>,
    has_room: bool,
) -> Vec<Write> {
    let mut writes = Vec::new();
    if !has_room && flags & flag::NODES_KNOWN != 0 {
        writes.push(Write::Flags(flags & !flag::NODES_KNOWN));
    }
    // The table has room for no more than all, so what is gone goes first.
    writes.extend(present.difference(wanted).map(|gone| Write::RemoveNode(*gone)));
    writes.extend(wanted.difference(present).map(|new| Write::AddNode(*new)));
    if has_room && flags & flag::NODES_KNOWN == 0 {
        // In one write: without the nodes, unknown ports would be those of every address.
        writes.push(Write::Flags(flags | flag::NODES_KNOWN | flag::PORTS_UNKNOWN));
    }
    writes
}

/// Returns the writes that make the ports `wanted`. Without room for all of them, every port of a node counts as one of a service.
pub(super) fn services(flags: u32, present: &Services, wanted: &Services, has_room: bool) -> Vec<Write> {
    let mut writes = Vec::new();
    let listed = if wanted.is_empty() { flags } else { flags | flag::LISTED };
    let during = if has_room { listed } else { listed | flag::PORTS_UNKNOWN };
    if during != flags {
        writes.push(Write::Flags(during));
    }
    // The table has room for all twice. What is new comes before what is gone goes, in the table and in the bitmap together: a
    // port can move from one to the other.
    let words = || (0_u32..).zip(present.ports.iter().zip(&wanted.ports));
    let both = words().filter(|(_, (present, wanted))| **present | **wanted != **present);
    writes.extend(both.map(|(word, (present, wanted))| Write::Ports(word, present | wanted)));
    writes.extend(wanted.entries.difference(&present.entries).map(|new| Write::AddService(*new)));
    writes.extend(present.entries.difference(&wanted.entries).map(|gone| Write::RemoveService(*gone)));
    let fewer = words().filter(|(_, (present, wanted))| **present & !**wanted != 0);
    writes.extend(fewer.map(|(word, (_, wanted))| Write::Ports(word, *wanted)));
    let kept = if wanted.is_empty() { during & !flag::LISTED } else { during };
    let after = if has_room { kept & !flag::PORTS_UNKNOWN } else { kept };
    if after != during {
        writes.push(Write::Flags(after));
    }
    writes
}
