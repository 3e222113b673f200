//! Address translation in a network namespace, by nf_tables: what a pod with NET_ADMIN does to its own packets, and what
//! kube-proxy does to those that it forwards. Written as netlink messages, because `nft` is not on every machine.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::Result;
use tacit_topology::Netns;

/// Name of the table. The kernel removes it when its owner's socket is closed.
const TABLE: &[u8] = b"tacit-attack\0";

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// Subsystem of nf_tables, in the upper byte of its messages.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
/// Type of the message with which the kernel acknowledges, and where its error is.
const ERROR: u16 = 2;
const ERROR_OFFSET: usize = 16;
/// The table goes with its owner's socket.
const OWNED: u32 = 2;
const DESTINATION_PRIORITY: i32 = -100;
const SOURCE_PRIORITY: i32 = 100;
const NETWORK_HEADER: u32 = 1;
const REGISTER: u32 = 1;
const PORT_REGISTER: u32 = 2;

/// A hook of the kernel at which packets are translated.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Chain {
    /// Those that arrive.
    Prerouting = 0,
    /// Those that processes send.
    Output = 3,
}

/// Rules in a namespace, removed when dropped.
pub(crate) struct Nat {
    _owner: OwnedFd,
}

impl Nat {
    /// Sends packets `from` an address (their destination) to another one, with or without the address of this node as
    /// their source.
    ///
    /// # Errors
    /// The kernel's. One that has no nf_tables answers with `EOPNOTSUPP` or `EPROTONOSUPPORT`.
    pub(crate) fn redirect(
        netns: &Netns,
        chain: Chain,
        rules: &[(IpAddr, SocketAddr)],
        is_masqueraded: bool,
    ) -> Result<io::Result<Self>> {
        let is_v4 = rules.iter().all(|(_, to)| to.is_ipv4());
        let mut batch = Batch { family: if is_v4 { 2 } else { 10 }, bytes: Vec::new(), sequence: 0 };
        batch.message(BATCH_BEGIN, 0, SUBSYSTEM, &[]);
        let named = |kind| attribute(kind, TABLE);
        batch.command(NEW_TABLE, &[named(1), attribute(2, &OWNED.to_be_bytes())].concat());
        batch.chain(b"to\0", chain as u32, DESTINATION_PRIORITY);
        for (from, to) in rules {
            batch.rule(b"to\0", &destination_rule(*from, *to));
        }
        if is_masqueraded {
            const POSTROUTING: u32 = 4;
            batch.chain(b"from\0", POSTROUTING, SOURCE_PRIORITY);
            batch.rule(b"from\0", &[expression(b"masq\0", &[])]);
        }
        batch.message(BATCH_END, 0, SUBSYSTEM, &[]);
        netns.enter(|| batch.send().map(|owner| Self { _owner: owner }))
    }
}

/// Matches the destination address, and replaces it and the port.
fn destination_rule(from: IpAddr, to: SocketAddr) -> [Vec<u8>; 5] {
    let (offset, length): (u32, u32) = if from.is_ipv4() { (16, 4) } else { (24, 16) };
    let family: u32 = if from.is_ipv4() { 2 } else { 10 };
    let payload = [number(1, REGISTER), number(2, NETWORK_HEADER), number(3, offset), number(4, length)];
    let compare = [number(1, REGISTER), number(2, 0), nested(3, &[attribute(1, &octets(from))])];
    let load = |register, value: &[u8]| [number(1, register), nested(2, &[attribute(1, value)])].concat();
    const DESTINATION: u32 = 1;
    let translate =
        [number(1, DESTINATION), number(2, family), number(3, REGISTER), number(5, PORT_REGISTER)];
    [
        expression(b"payload\0", &payload.concat()),
        expression(b"cmp\0", &compare.concat()),
        expression(b"immediate\0", &load(REGISTER, &octets(to.ip()))),
        expression(b"immediate\0", &load(PORT_REGISTER, &to.port().to_be_bytes())),
        expression(b"nat\0", &translate.concat()),
    ]
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Messages that the kernel applies together.
struct Batch {
    family: u8,
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn command(&mut self, kind: u16, attributes: &[u8]) {
        self.message(kind, ACKNOWLEDGE | CREATE | APPEND, 0, attributes);
    }

    fn chain(&mut self, name: &[u8], hook: u32, priority: i32) {
        let hook = nested(4, &[number(1, hook), attribute(2, &priority.to_be_bytes())]);
        let parts = [attribute(1, TABLE), attribute(3, name), hook, attribute(7, b"nat\0")];
        self.command(NEW_CHAIN, &parts.concat());
    }

    fn rule(&mut self, chain: &[u8], expressions: &[Vec<u8>]) {
        let parts = [attribute(1, TABLE), attribute(2, chain), nested(4, expressions)];
        self.command(NEW_RULE, &parts.concat());
    }

    fn message(&mut self, kind: u16, flags: u16, resource: u16, attributes: &[u8]) {
        const HEADERS: usize = 20;
        self.sequence += 1;
        self.bytes.extend_from_slice(&((HEADERS + attributes.len()) as u32).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(REQUEST | flags).to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        // No port; family and version.
        self.bytes.extend_from_slice(&[0, 0, 0, 0, self.family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        self.bytes.extend_from_slice(attributes);
    }

    /// Sends the batch, and reads one acknowledgement for each command. Returns the socket that owns the table.
    fn send(&self) -> io::Result<OwnedFd> {
        // SAFETY: takes no pointer.
        let fd = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just returned this descriptor to us.
        let socket = socket2::Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.send(&self.bytes)?;
        // All messages but the two that enclose the commands.
        for _ in 0..self.sequence - 2 {
            let mut answer = [0_u8; 4096];
            // SAFETY: the buffer is of the size given and lives through the call.
            let length =
                unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
            if length < 0 {
                return Err(io::Error::last_os_error());
            }
            let kind = u16::from_ne_bytes([answer[4], answer[5]]);
            let code = [0, 1, 2, 3].map(|byte| answer[ERROR_OFFSET + byte]);
            match (kind, i32::from_ne_bytes(code)) {
                (ERROR, 0) => {}
                (ERROR, code) => return Err(io::Error::from_raw_os_error(-code)),
                _ => return Err(io::Error::other(format!("netlink message of type {kind}"))),
            }
        }
        Ok(socket.into())
    }
}

/// An attribute, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(NESTED | kind, &parts.concat())
}

/// An expression of a rule, as an element of a list.
fn expression(name: &[u8], attributes: &[u8]) -> Vec<u8> {
    nested(1, &[attribute(1, name), attribute(NESTED | 2, attributes)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(attribute(3, b"to\0"), [7, 0, 3, 0, b't', b'o', 0, 0]);
        assert_eq!(number(1, 2), [8, 0, 1, 0, 0, 0, 0, 2]);
        assert_eq!(nested(1, &[number(1, 2)])[..4], [12, 0, 1, 0x80]);
    }
}
