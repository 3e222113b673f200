//! Steps by packet sockets: whole frames that pass neither the stack nor any hook of a socket.

use std::{
    fs, io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::until;

use super::{Given, Told, raw};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP_V6: u8 = 58;

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

/// A UDP packet in a frame whose source is another pod's hardware address. Arguments: the own address, the hardware
/// addresses of destination and source.
pub(super) fn foreign_hardware(given: &Given) -> Result<Told> {
    let own: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let (to, from) = (parse_hardware(given.extra(1)?)?, parse_hardware(given.extra(2)?)?);
    let payload = raw::udp(own, given.target, &given.marker);
    let packet = raw::ip(own.ip(), given.target.ip(), UDP, &payload)?;
    send_tagged(0, (to, from), ethertype(given.target), &packet)
}

/// A UDP packet to the node's end of the link, in a frame with priority tags. Arguments: the source address it claims, the
/// IPv4 gateway, the own hardware address, the number of tags.
pub(super) fn tagged(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("source address")?;
    let (to, from) = (hardware_address(given.extra(1)?)?, parse_hardware(given.extra(2)?)?);
    let tags = given.extra(3)?.parse().context("number of tags")?;
    let payload = raw::udp(source, given.target, &given.marker);
    let packet = raw::ip(source.ip(), given.target.ip(), UDP, &payload)?;
    send_tagged(tags, (to, from), ethertype(given.target), &packet)
}

/// An unsolicited ARP reply or neighbour advertisement to everyone: the target's address is here. Arguments: the own
/// address and hardware address, the number of priority tags of the frame.
pub(super) fn claim(given: &Given) -> Result<Told> {
    let own: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let hardware = parse_hardware(given.extra(1)?)?;
    let tags = given.extra(2)?.parse().context("number of tags")?;
    match (own.ip(), given.target.ip()) {
        (IpAddr::V4(_), IpAddr::V4(claimed)) => {
            // Ethernet, IPv4, their lengths, a reply; then sender and receiver, each with both addresses.
            let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
            for _ in 0..2 {
                arp.extend_from_slice(&hardware);
                arp.extend_from_slice(&claimed.octets());
            }
            send_tagged(tags, ([0xff; 6], hardware), libc::ETH_P_ARP, &arp)
        }
        (IpAddr::V6(own), IpAddr::V6(claimed)) => {
            let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            // Type, code, checksum, and the flag that replaces what is known; the address; an option with the hardware's.
            let mut advertisement = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
            advertisement.extend_from_slice(&claimed.octets());
            advertisement.extend_from_slice(&[2, 1]);
            advertisement.extend_from_slice(&hardware);
            let mut pseudo = [own.octets(), all.octets()].concat();
            pseudo.extend_from_slice(&(advertisement.len() as u32).to_be_bytes());
            pseudo.extend_from_slice(&[0, 0, 0, ICMP_V6]);
            pseudo.extend_from_slice(&advertisement);
            advertisement[2..4].copy_from_slice(&raw::checksum(&pseudo).to_be_bytes());
            let mut packet = raw::ip(own.into(), all.into(), ICMP_V6, &advertisement)?;
            // Neighbour discovery accepts nothing that was forwarded.
            packet[7] = 255;
            send_tagged(tags, ([0x33, 0x33, 0, 0, 0, 1], hardware), libc::ETH_P_IPV6, &packet)
        }
        (own, claimed) => bail!("{own} and {claimed} are of different families"),
    }
}

/// Sends an IP packet in a frame to the node's end of the link.
fn send(given: &Given, packet: &[u8]) -> Result<Told> {
    send_frame(libc::SOCK_DGRAM, ethertype(given.target), hardware_address(given.extra(1)?)?, packet)
}

fn ethertype(target: SocketAddr) -> i32 {
    if target.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 }
}

/// Sends a packet in a frame from one hardware address to another, with `tags` 802.1Q tags of priority 0 and VLAN 0. The
/// receiver's kernel removes such tags.
fn send_tagged(tags: usize, (to, from): ([u8; 6], [u8; 6]), ethertype: i32, packet: &[u8]) -> Result<Told> {
    const TAG: [u8; 4] = [0x81, 0, 0, 0];
    let mut frame = [to, from].concat();
    frame.extend(TAG.repeat(tags));
    frame.extend_from_slice(&(ethertype as u16).to_be_bytes());
    frame.extend_from_slice(packet);
    let outer = if tags > 0 { libc::ETH_P_8021Q } else { ethertype };
    send_frame(libc::SOCK_RAW, outer, to, &frame)
}

/// Sends a whole frame.
pub(super) fn send_whole(frame: &[u8]) -> Result<Told> {
    let (to, ethertype) = frame.split_at_checked(6).context("an Ethernet header")?;
    let ethertype = i32::from(u16::from_be_bytes([ethertype[6], ethertype[7]]));
    send_frame(libc::SOCK_RAW, ethertype, to.try_into().context("six bytes")?, frame)
}

/// Sends a frame through a packet socket of type `kind`. Of `SOCK_DGRAM`, the kernel writes the Ethernet header.
fn send_frame(kind: i32, protocol: i32, hardware: [u8; 6], frame: &[u8]) -> Result<Told> {
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind | libc::SOCK_CLOEXEC, 0) };
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
    to.sll_addr[..6].copy_from_slice(&hardware);
    let size = size_of_val(&to) as libc::socklen_t;
    // SAFETY: frame and address are of the sizes given and live through the call.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), size)
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
        Ok(parse_hardware(text).ok().filter(|address| *address != [0; 6]))
    })
}

fn parse_hardware(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().ok().with_context(|| format!("{text:?} is no hardware address"))
}
