//! Rules of a pod that translate addresses: those that send what arrives at one port to another, as `nft add rule inet own arrivals tcp dport A redirect to :B`
//! makes them, and those that have containers inside the pod leave with its address. Written as netlink messages, because `nft` is not on every machine.

use std::{io, net::Ipv4Addr, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use tacit_topology::Pod;

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
/// Type of the message with which the kernel acknowledges.
const ERROR: u16 = 2;
/// IPv4 and IPv6.
const INET: u8 = 1;
const TABLE: &[u8] = b"own\0";
const CHAIN: &[u8] = b"arrivals\0";
const PREROUTING: u32 = 0;
const PRIORITY: i32 = -100;
const REGISTER: u32 = 1;

/// Sends what arrives at port `from` of `pod` to its port `to`, until [`remove`] or the end of the pod.
///
/// # Errors
/// The kernel's, for example without nf_tables.
pub fn add(pod: &Pod, from: u16, to: u16) -> Result<()> {
    let expressions = [
        // Of TCP.
        expression(b"meta\0", &[number(2, 16), number(1, REGISTER)]),
        equals(&[6]),
        // To the port: two bytes of the transport header.
        expression(b"payload\0", &[number(1, REGISTER), number(2, 2), number(3, 2), number(4, 2)]),
        equals(&from.to_be_bytes()),
        expression(b"immediate\0", &[number(1, REGISTER), value(2, &to.to_be_bytes())]),
        expression(b"redir\0", &[number(1, REGISTER)]),
    ];
    let rule = [attribute(1, TABLE), attribute(2, CHAIN), nested(4, &expressions)];
    apply(pod, &[(NEW_TABLE, attribute(1, TABLE)), (NEW_CHAIN, arrivals()), (NEW_RULE, rule.concat())])
}

/// Adds `count` rules that only count what arrives, to the chain that [`add`] makes.
///
/// # Errors
/// As [`add`].
pub fn add_without_effect(pod: &Pod, count: usize) -> Result<()> {
    /// Few enough for the buffer of a socket.
    const AT_ONCE: usize = 200;
    apply(pod, &[(NEW_TABLE, attribute(1, TABLE)), (NEW_CHAIN, arrivals())])?;
    let rule =
        [attribute(1, TABLE), attribute(2, CHAIN), nested(4, &[expression(b"counter\0", &[])])].concat();
    let mut left = count;
    while left > 0 {
        let commands = vec![(NEW_RULE, rule.clone()); left.min(AT_ONCE)];
        apply(pod, &commands)?;
        left -= commands.len();
    }
    Ok(())
}

/// The chain of the rules for what arrives.
fn arrivals() -> Vec<u8> {
    let hook = nested(4, &[number(1, PREROUTING), attribute(2, &PRIORITY.to_be_bytes())]);
    [attribute(1, TABLE), attribute(3, CHAIN), hook, attribute(7, b"nat\0")].concat()
}

/// Has what leaves `pod` from the /24 network of `inner` leave with the pod's own address, as for containers inside the pod.
///
/// # Errors
/// As [`add`].
pub fn masquerade(pod: &Pod, inner: Ipv4Addr) -> Result<()> {
    const POSTROUTING: u32 = 4;
    const AFTER: i32 = 100;
    let name = attribute(1, b"inner\0");
    let hook = nested(4, &[number(1, POSTROUTING), attribute(2, &AFTER.to_be_bytes())]);
    let chain = [name.clone(), attribute(3, b"leaving\0"), hook, attribute(7, b"nat\0")];
    let expressions = [
        // The source's first three bytes in the header of IPv4.
        expression(b"payload\0", &[number(1, REGISTER), number(2, 1), number(3, 12), number(4, 3)]),
        equals(&inner.octets()[..3]),
        expression(b"masq\0", &[]),
    ];
    let rule = [name.clone(), attribute(2, b"leaving\0"), nested(4, &expressions)];
    apply(pod, &[(NEW_TABLE, name), (NEW_CHAIN, chain.concat()), (NEW_RULE, rule.concat())])
}

/// Removes the rules that [`add`] has made.
///
/// # Errors
/// The kernel's.
pub fn remove(pod: &Pod) -> Result<()> {
    apply(pod, &[(DELETE_TABLE, attribute(1, TABLE))])
}

fn apply(pod: &Pod, commands: &[(u16, Vec<u8>)]) -> Result<()> {
    let mut batch = message(BATCH_BEGIN, 0, SUBSYSTEM, &[]);
    for (kind, attributes) in commands {
        batch.extend(message(*kind, ACKNOWLEDGE | CREATE | APPEND, 0, attributes));
    }
    batch.extend(message(BATCH_END, 0, SUBSYSTEM, &[]));
    pod.netns().enter(|| send(&batch, commands.len()))?.context("rules of nf_tables")
}

fn send(batch: &[u8], commands: usize) -> io::Result<()> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    sendto(netlink.as_raw_fd(), batch, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    for _ in 0..commands {
        let mut answer = [0_u8; 4096];
        recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let kind = u16::from_ne_bytes([answer[4], answer[5]]);
        match (kind, i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]])) {
            (ERROR, 0) => {}
            (ERROR, code) => return Err(io::Error::from_raw_os_error(-code)),
            _ => return Err(io::Error::other(format!("netlink message of type {kind}"))),
        }
    }
    Ok(())
}

fn message(kind: u16, flags: u16, resource: u16, attributes: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 20;
    let mut bytes = ((HEADERS + attributes.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((REQUEST | flags).to_ne_bytes());
    // No sequence number and no port; family and version.
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, INET, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// An attribute, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(NESTED | kind, &parts.concat())
}

fn value(kind: u16, bytes: &[u8]) -> Vec<u8> {
    nested(kind, &[attribute(1, bytes)])
}

/// Compares the register with `bytes`.
fn equals(bytes: &[u8]) -> Vec<u8> {
    expression(b"cmp\0", &[number(1, REGISTER), number(2, 0), value(3, bytes)])
}

/// An expression of a rule, as an element of a list.
fn expression(name: &[u8], attributes: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[attribute(1, name), nested(2, attributes)])
}
