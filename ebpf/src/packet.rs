//! Parser from a packet's bytes to the guard's facts. Packets are untrusted: one that ends early is unreadable, and one
//! with too long a chain of extension headers has an unknown protocol.

use tacit_abi::{Address, Claim, Packet, Segment, hardware_address, protocol};

use crate::context::Skb;

/// EtherTypes.
pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_IPV6: u16 = 0x86dd;
pub const ETH_P_ARP: u16 = 0x0806;

/// Returns true for the EtherTypes of VLAN tags.
#[inline(always)]
pub const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8)
}

/// Number of IPv6 extension headers that are parsed. Real packets have one or two; a longer chain is evasion.
const EXTENSIONS_MAX: u32 = 6;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Masks of the fragment offset, without the flags.
const FRAGMENT_OFFSET_V4: u16 = 0x1fff;
const FRAGMENT_OFFSET_V6: u16 = 0xfff8;

/// ICMPv6 types of discovery.
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LISTENER_REPORT_V2: u8 = 143;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Fields of an IP header and its extension headers.
pub struct IpHeader {
    pub source: Address,
    pub destination: Address,
    protocol: u8,
    /// Offset of the first byte after the IP headers, from the network header.
    payload: u32,
    /// True for fragments other than the first, which have no ports.
    is_later_fragment: bool,
}

impl IpHeader {
    /// Returns the offset of the first byte after the IP headers, from the network header.
    #[inline(always)]
    pub const fn payload(&self) -> u32 {
        self.payload
    }
}

/// Direction of a packet, as the pod sees it.
#[derive(Clone, Copy)]
pub enum Direction {
    Egress,
    Ingress,
}

/// Parses the IP header and its extension headers; `None` if the packet is shorter than its headers.
#[inline(always)]
pub fn ip_header(skb: &Skb<'_>, ethertype: u16) -> Option<IpHeader> {
    if ethertype == ETH_P_IP { ipv4_header(skb) } else { ipv6_header(skb) }
}

#[inline(always)]
fn ipv4_header(skb: &Skb<'_>) -> Option<IpHeader> {
    let words: [u32; 5] = skb.read(0)?;
    let first = words[0].to_ne_bytes();
    let fragment = u16::from_be_bytes([words[1].to_ne_bytes()[2], words[1].to_ne_bytes()[3]]);
    Some(IpHeader {
        source: Address::from_v4_be(words[3]),
        destination: Address::from_v4_be(words[4]),
        protocol: words[2].to_ne_bytes()[1],
        payload: u32::from(first[0] & 0x0f) * 4,
        is_later_fragment: fragment & FRAGMENT_OFFSET_V4 != 0,
    })
}

#[inline(always)]
fn ipv6_header(skb: &Skb<'_>) -> Option<IpHeader> {
    let words: [u32; 10] = skb.read(0)?;
    let mut header = IpHeader {
        source: Address([words[2], words[3], words[4], words[5]]),
        destination: Address([words[6], words[7], words[8], words[9]]),
        protocol: words[1].to_ne_bytes()[2],
        payload: 40,
        is_later_fragment: false,
    };
    for _ in 0..EXTENSIONS_MAX {
        let number = header.protocol;
        if !matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION) {
            return Some(header);
        }
        // Next header and length; in a fragment header also the offset.
        let start: [u8; 4] = skb.read(header.payload)?;
        header.protocol = start[0];
        header.payload += match number {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(start[1]) + 2) * 4,
            _ => (u32::from(start[1]) + 1) * 8,
        };
        if number == FRAGMENT && u16::from_be_bytes([start[2], start[3]]) & FRAGMENT_OFFSET_V6 != 0 {
            header.is_later_fragment = true;
            return Some(header);
        }
    }
    header.protocol = protocol::UNKNOWN;
    Some(header)
}

/// Parses up to the ports. `skipped` is the number of bytes in the program's view before the network header.
#[inline(always)]
pub fn parse(skb: &Skb<'_>, header: &IpHeader, direction: Direction, skipped: u32) -> Option<Packet> {
    let (local, remote) = match direction {
        Direction::Egress => (header.source, header.destination),
        Direction::Ingress => (header.destination, header.source),
    };
    let mut packet = Packet {
        local,
        remote,
        protocol: header.protocol,
        local_port: 0,
        remote_port: 0,
        segment: Segment::Data,
        is_discovery: false,
    };
    if header.is_later_fragment {
        // The header still has the protocol. A later fragment of TCP is never a bare ACK, so it counts as data.
        return Some(packet);
    }
    if header.protocol == protocol::ICMP_V6 {
        let kind: [u8; 1] = skb.read(header.payload)?;
        packet.is_discovery = (ROUTER_SOLICITATION <= kind[0] && kind[0] <= NEIGHBOUR_ADVERTISEMENT)
            || matches!(kind[0], LISTENER_REPORT | LISTENER_DONE | LISTENER_REPORT_V2);
        return Some(packet);
    }
    if header.protocol != protocol::TCP && header.protocol != protocol::UDP {
        return Some(packet);
    }
    let ports: [u8; 4] = skb.read(header.payload)?;
    let (source, destination) =
        (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
    (packet.local_port, packet.remote_port) = match direction {
        Direction::Egress => (source, destination),
        Direction::Ingress => (destination, source),
    };
    if header.protocol == protocol::TCP {
        // The upper four bits are the header's length in words; the second byte has the flags.
        let tail: [u8; 2] = skb.read(header.payload + 12)?;
        let end = skipped + header.payload + u32::from(tail[0] >> 4) * 4;
        packet.segment = match tail[1] & (SYN | ACK) {
            SYN => Segment::Syn,
            _ if skb.len() > end => Segment::Data,
            flags if flags == SYN | ACK => Segment::SynAck,
            _ => Segment::Bare,
        };
    }
    Some(packet)
}

/// Returns true if the rest of the packet may be in other fragments. Fragments of IPv6 have an extension header.
#[inline(always)]
pub fn may_continue(skb: &Skb<'_>, header: &IpHeader) -> bool {
    const MORE_FRAGMENTS: u8 = 0x20;
    if header.source.is_v4() {
        skb.read::<[u8; 1]>(6).is_none_or(|flags| flags[0] & MORE_FRAGMENTS != 0)
    } else {
        header.payload > 40
    }
}

/// Offsets in an ARP packet of Ethernet and IPv4.
const ARP_SENDER: u32 = 8;

/// Parses what an ARP packet says of its sender; `None` if it is too short.
#[inline(always)]
pub fn arp_claim(skb: &Skb<'_>) -> Option<Claim> {
    let sender: [u16; 5] = skb.read(ARP_SENDER)?;
    let [a, b, c, high, low] = sender.map(u16::to_ne_bytes);
    let hardware = hardware_address([a[0], a[1], b[0], b[1], c[0], c[1]]);
    let address = Address::from_v4_be(u32::from_ne_bytes([high[0], high[1], low[0], low[1]]));
    Some(Claim::Arp { hardware, address })
}

/// Parses what a message of neighbour discovery says of its sender; `None` for every other packet.
#[inline(always)]
pub fn discovery_claim(skb: &Skb<'_>, header: &IpHeader) -> Option<Claim> {
    if header.protocol != protocol::ICMP_V6 || header.is_later_fragment {
        return None;
    }
    let kind: [u8; 1] = skb.read(header.payload)?;
    match kind[0] {
        ROUTER_ADVERTISEMENT | REDIRECT => Some(Claim::Routing),
        NEIGHBOUR_ADVERTISEMENT => Some(Claim::Advertisement(Address(skb.read(header.payload + 8)?))),
        _ => None,
    }
}

/// Returns destination and port of a TCP segment as the agent's sockets send them, without extension headers.
#[inline(always)]
pub fn tcp_destination(skb: &Skb<'_>) -> Option<(Address, u16)> {
    const DESTINATION_PORT: u32 = 2;
    let (address, number, payload) = match skb.ethertype() {
        ETH_P_IP => {
            let words: [u32; 5] = skb.read(0)?;
            let length = u32::from(words[0].to_ne_bytes()[0] & 0x0f) * 4;
            (Address::from_v4_be(words[4]), words[2].to_ne_bytes()[1], length)
        }
        ETH_P_IPV6 => {
            let words: [u32; 10] = skb.read(0)?;
            (Address([words[6], words[7], words[8], words[9]]), words[1].to_ne_bytes()[2], 40)
        }
        _ => return None,
    };
    if number != protocol::TCP {
        return None;
    }
    let port: [u8; 2] = skb.read(payload + DESTINATION_PORT)?;
    Some((address, u16::from_be_bytes(port)))
}

/// Returns true if a SYN-ACK has only options that the kernel writes into one, see `tacit_abi::has_options_of_kernel`.
#[inline(always)]
pub fn has_options_of_kernel(skb: &Skb<'_>, payload: u32) -> bool {
    let Some(length) = skb.read::<[u8; 1]>(payload + 12) else { return false };
    tacit_abi::has_options_of_kernel(u32::from(length[0] >> 4), |word| skb.read(payload + word * 4))
}

/// Returns the segment as the client's acknowledgement of it would be, for the kernel's check of SYN cookies: the first 20
/// bytes of its TCP header.
#[inline(always)]
pub fn acknowledgement(skb: &Skb<'_>, payload: u32) -> Option<[u32; 5]> {
    let words: [u32; 5] = skb.read(payload)?;
    let ports = words[0].to_ne_bytes();
    let swapped = u32::from_ne_bytes([ports[2], ports[3], ports[0], ports[1]]);
    let answered = u32::from_be(words[1]).wrapping_add(1).to_be();
    let flags = u32::from_ne_bytes([5 << 4, ACK, 0, 0]);
    Some([swapped, words[2], answered, flags, 0])
}
