//! Rules of nf_tables that translate addresses in a network namespace. They are written as netlink messages, because `nft` is not
//! on every machine.
//!
//! A [`Batch`] collects commands that the kernel applies together. Expressions of a rule are bytes, made by the functions here.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::Result;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use crate::Netns;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// Subsystem of nf_tables, in the upper byte of its messages.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
/// Type of the message with which the kernel acknowledges, and the offset of its error.
const ERROR: u16 = 2;
const ERROR_OFFSET: usize = 16;
/// Flag of a table that the kernel removes when the socket of its owner is closed.
const OWNED: u32 = 2;

/// The address families of a table.
#[derive(Debug, Clone, Copy)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ipv4 = 2,
    /// IPv6.
    Ipv6 = 10,
}

/// A hook of the kernel at which packets are translated.
#[derive(Debug, Clone, Copy)]
pub enum Hook {
    /// Packets that arrive.
    Prerouting = 0,
    /// Packets that processes send.
    Output = 3,
    /// Packets that leave.
    Postrouting = 4,
}

impl Hook {
    /// Returns the priority of translations at this hook: of the source when packets leave, else of the destination.
    fn priority(self) -> i32 {
        match self {
            Self::Prerouting | Self::Output => -100,
            Self::Postrouting => 100,
        }
    }
}

/// A register of nf_tables.
#[derive(Debug, Clone, Copy)]
pub enum Register {
    /// The first one. Matches use it.
    One = 1,
    /// The second one.
    Two = 2,
}

/// Commands that the kernel applies together.
#[derive(Debug)]
pub struct Batch {
    family: Family,
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    /// Makes a batch without commands, for tables of this family.
    #[must_use]
    pub fn new(family: Family) -> Self {
        let mut batch = Self { family, bytes: Vec::new(), sequence: 0 };
        batch.message(BATCH_BEGIN, 0, SUBSYSTEM, &[]);
        batch
    }

    /// Adds a table.
    pub fn table(&mut self, name: &str) {
        self.command(NEW_TABLE, &text(1, name));
    }

    /// Adds a table that exists until the socket is closed that [`Self::apply`] returns.
    pub fn owned_table(&mut self, name: &str) {
        self.command(NEW_TABLE, &[text(1, name), attribute(2, &OWNED.to_be_bytes())].concat());
    }

    /// Removes a table.
    pub fn delete_table(&mut self, name: &str) {
        self.command(DELETE_TABLE, &text(1, name));
    }

    /// Adds a chain of translations at `hook`.
    pub fn chain(&mut self, table: &str, name: &str, hook: Hook) {
        let place = [number(1, hook as u32), attribute(2, &hook.priority().to_be_bytes())];
        let parts = [text(1, table), text(3, name), nested(4, &place), text(7, "nat")];
        self.command(NEW_CHAIN, &parts.concat());
    }

    /// Adds a rule to a chain.
    pub fn rule(&mut self, table: &str, chain: &str, expressions: &[Vec<u8>]) {
        let parts = [text(1, table), text(2, chain), nested(4, expressions)];
        self.command(NEW_RULE, &parts.concat());
    }

    /// Applies the commands in `netns`. Returns the socket that owns the tables of [`Self::owned_table`].
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered. The inner error is the kernel's. A kernel that has no nf_tables answers with
    /// `EOPNOTSUPP` or `EPROTONOSUPPORT`.
    pub fn apply(mut self, netns: &Netns) -> Result<io::Result<OwnedFd>> {
        self.message(BATCH_END, 0, SUBSYSTEM, &[]);
        netns.enter(|| self.send())
    }

    /// Sends the batch, and reads one acknowledgement for each command.
    fn send(&self) -> io::Result<OwnedFd> {
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        sendto(netlink.as_raw_fd(), &self.bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        // All messages but the two that enclose the commands.
        for _ in 0..self.sequence - 2 {
            let mut answer = [0_u8; 4096];
            recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let kind = u16::from_ne_bytes([answer[4], answer[5]]);
            let code = [0, 1, 2, 3].map(|byte| answer[ERROR_OFFSET + byte]);
            match (kind, i32::from_ne_bytes(code)) {
                (ERROR, 0) => {}
                (ERROR, code) => return Err(io::Error::from_raw_os_error(-code)),
                _ => return Err(io::Error::other(format!("netlink message of type {kind}"))),
            }
        }
        Ok(netlink)
    }

    fn command(&mut self, kind: u16, attributes: &[u8]) {
        self.message(kind, ACKNOWLEDGE | CREATE | APPEND, 0, attributes);
    }

    fn message(&mut self, kind: u16, flags: u16, resource: u16, attributes: &[u8]) {
        const HEADERS: usize = 20;
        self.sequence += 1;
        self.bytes.extend(((HEADERS + attributes.len()) as u32).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST | flags).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        // No port; family and version.
        self.bytes.extend([0, 0, 0, 0, self.family as u8, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes);
    }
}

/// Part of a packet that [`load_packet`] reads.
#[derive(Debug, Clone, Copy)]
pub enum Header {
    /// The header of IPv4 or IPv6.
    Network = 1,
    /// The header of TCP or UDP.
    Transport = 2,
}

/// Returns an expression that loads `length` bytes of a packet into the first register.
#[must_use]
pub fn load_packet(header: Header, offset: u32, length: u32) -> Vec<u8> {
    let parts = [register(1, Register::One), number(2, header as u32), number(3, offset), number(4, length)];
    expression("payload", &parts)
}

/// Returns an expression that loads the number of a packet's transport protocol into the first register.
#[must_use]
pub fn load_protocol() -> Vec<u8> {
    const L4_PROTOCOL: u32 = 16;
    expression("meta", &[number(2, L4_PROTOCOL), register(1, Register::One)])
}

/// Returns an expression that ends the rule unless the first register has the value `bytes`.
#[must_use]
pub fn equals(bytes: &[u8]) -> Vec<u8> {
    const EQUAL: u32 = 0;
    expression("cmp", &[register(1, Register::One), number(2, EQUAL), value(3, bytes)])
}

/// Returns an expression that loads `bytes` into a register.
#[must_use]
pub fn load(to: Register, bytes: &[u8]) -> Vec<u8> {
    expression("immediate", &[register(1, to), value(2, bytes)])
}

/// Returns an expression by its name, such as `counter`.
#[must_use]
pub fn expression(name: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[text(1, name), nested(2, attributes)])
}

/// Returns an attribute that is a number.
#[must_use]
pub fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// Returns an attribute that names a register.
#[must_use]
pub fn register(kind: u16, register: Register) -> Vec<u8> {
    number(kind, register as u32)
}

/// Returns an attribute, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Returns an attribute that is a text, which ends with a zero.
fn text(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(NESTED | kind, &parts.concat())
}

fn value(kind: u16, bytes: &[u8]) -> Vec<u8> {
    nested(kind, &[attribute(1, bytes)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(text(3, "to"), [7, 0, 3, 0, b't', b'o', 0, 0]);
        assert_eq!(number(1, 2), [8, 0, 1, 0, 0, 0, 0, 2]);
        assert_eq!(nested(1, &[number(1, 2)])[..4], [12, 0, 1, 0x80]);
    }
}
