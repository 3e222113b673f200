//! Steps by packet sockets: whole frames that pass neither the stack nor any hook of a socket.

use std::{
    fs, io,
    mem::MaybeUninit,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use tacit_topology::until;

use super::{Given, Told, raw};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A UDP packet to the victim. Arguments: the own address, the IPv4 gateway.
pub(super) fn udp(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let payload = raw::udp(source, given.target, &given.marker);
    send(given, &raw::ip(source.ip(), given.target.ip(), UDP, &payload)?)
}

/// A segment that looks as if it belonged to a tunnel: the victim's tunnel port.
pub(super) fn tunnel_segment(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let mut segment = Vec::new();
    segment.extend_from_slice(&source.port().to_be_bytes());
    segment.extend_from_slice(&15008_u16.to_be_bytes());
    // Sequence and acknowledgement, 5 words of header, ACK and PSH, window, checksum, urgent pointer.
    segment.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    segment.extend_from_slice(&given.marker);
    send(given, &raw::ip(source.ip(), given.target.ip(), TCP, &segment)?)
}

/// An ACK without data; the marker stands in its TCP options.
pub(super) fn ack_option(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("own address")?;
    send(given, &raw::ip(source.ip(), given.target.ip(), TCP, &raw::ack_with_option(source, given))?)
}

/// A part of a packet whose beginning was never sent: it has no ports. IPv4 only.
pub(super) fn later_fragment(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let mut payload = vec![0; 8];
    payload.extend_from_slice(&given.marker);
    let mut packet = raw::ip(source.ip(), given.target.ip(), TCP, &payload)?;
    // Offset 64 bytes, no more to come.
    packet[6..8].copy_from_slice(&8_u16.to_be_bytes());
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = raw::checksum(&packet[..20]).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    send(given, &packet)
}

/// Sends an IP packet in a frame to the node's end of the link.
fn send(given: &Given, packet: &[u8]) -> Result<Told> {
    let protocol = if given.target.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
    let node = hardware_address(given.extra(1)?)?;
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the kernel just returned this descriptor to us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { MaybeUninit::zeroed().assume_init() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = (protocol as u16).to_be();
    to.sll_ifindex = nix::net::if_::if_nametoindex("eth0")? as i32;
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&node);
    let size = size_of_val(&to) as libc::socklen_t;
    // SAFETY: packet and address are of the sizes given and live through the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            size,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error().into()) } else { Ok(Told::Sent) }
}

/// Hardware address of the gateway, which is asked for by talking to it.
fn hardware_address(gateway: &str) -> Result<[u8; 6]> {
    let ask = UdpSocket::bind("0.0.0.0:0")?;
    ask.send_to(b"who are you", (gateway, 9))?;
    until("the gateway's hardware address", || {
        let table = fs::read_to_string("/proc/thread-self/net/arp")?;
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(gateway));
        let text = line.and_then(|line| line.split_whitespace().nth(3)).unwrap_or_default();
        let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        let address: Option<[u8; 6]> = bytes.try_into().ok();
        Ok(address.filter(|address| *address != [0; 6]))
    })
}
