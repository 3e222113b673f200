//! From a packet's bytes to what the guard decides on. Nothing is trusted: a packet that ends early is unreadable, a
//! chain of extension headers that does not end soon is an unknown protocol.

use tacit_abi::{Address, Packet, protocol};

use crate::context::Skb;

/// EtherTypes.
pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_IPV6: u16 = 0x86dd;
pub const ETH_P_ARP: u16 = 0x0806;

/// Most extension headers of IPv6 that are walked. Real packets have one or two; a longer chain hides something.
const EXTENSIONS_MAX: u32 = 6;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Offset of a fragment, without its flags.
const FRAGMENT_OFFSET_V4: u16 = 0x1fff;
const FRAGMENT_OFFSET_V6: u16 = 0xfff8;

/// First and last type of discovery.
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// What the IP header tells.
pub struct Head {
    pub source: Address,
    pub destination: Address,
    protocol: u8,
    /// First byte behind the headers of IP, counted from the network header.
    payload: u32,
    /// Not the first part of a packet: its ports are elsewhere.
    is_later_fragment: bool,
}

/// Which way a packet goes, as seen from the pod.
#[derive(Clone, Copy)]
pub enum Way {
    Out,
    In,
}

/// Reads the IP header, and those behind it that are still IP's. `None`: the packet is too short for what it says.
#[inline(always)]
pub fn head(skb: &Skb<'_>, ethertype: u16) -> Option<Head> {
    if ethertype == ETH_P_IP { head_v4(skb) } else { head_v6(skb) }
}

#[inline(always)]
fn head_v4(skb: &Skb<'_>) -> Option<Head> {
    let words: [u32; 5] = skb.read(0)?;
    let first = words[0].to_ne_bytes();
    let fragment = u16::from_be_bytes([words[1].to_ne_bytes()[2], words[1].to_ne_bytes()[3]]);
    Some(Head {
        source: Address::from_v4_be(words[3]),
        destination: Address::from_v4_be(words[4]),
        protocol: words[2].to_ne_bytes()[1],
        payload: u32::from(first[0] & 0x0f) * 4,
        is_later_fragment: fragment & FRAGMENT_OFFSET_V4 != 0,
    })
}

#[inline(always)]
fn head_v6(skb: &Skb<'_>) -> Option<Head> {
    let words: [u32; 10] = skb.read(0)?;
    let mut head = Head {
        source: Address([words[2], words[3], words[4], words[5]]),
        destination: Address([words[6], words[7], words[8], words[9]]),
        protocol: words[1].to_ne_bytes()[2],
        payload: 40,
        is_later_fragment: false,
    };
    for _ in 0..EXTENSIONS_MAX {
        let number = head.protocol;
        if !matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION) {
            return Some(head);
        }
        // Next header, length; of a fragment header also the offset.
        let start: [u8; 4] = skb.read(head.payload)?;
        head.protocol = start[0];
        head.payload += match number {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(start[1]) + 2) * 4,
            _ => (u32::from(start[1]) + 1) * 8,
        };
        if number == FRAGMENT && u16::from_be_bytes([start[2], start[3]]) & FRAGMENT_OFFSET_V6 != 0 {
            head.is_later_fragment = true;
            return Some(head);
        }
    }
    head.protocol = protocol::UNKNOWN;
    Some(head)
}

/// Reads on as far as ports. `skipped`: bytes of the program's view before the network header.
#[inline(always)]
pub fn packet(skb: &Skb<'_>, head: &Head, way: Way, skipped: u32) -> Option<Packet> {
    let (local, remote) = match way {
        Way::Out => (head.source, head.destination),
        Way::In => (head.destination, head.source),
    };
    let mut packet = Packet {
        local,
        remote,
        protocol: head.protocol,
        local_port: 0,
        remote_port: 0,
        matters: true,
        is_discovery: false,
    };
    if head.is_later_fragment {
        // The head's protocol still tells UDP from the rest; a fragment of TCP is nobody's ACK.
        return Some(packet);
    }
    if head.protocol == protocol::ICMP_V6 {
        let kind: [u8; 1] = skb.read(head.payload)?;
        packet.is_discovery = ROUTER_SOLICITATION <= kind[0] && kind[0] <= NEIGHBOUR_ADVERTISEMENT;
        return Some(packet);
    }
    if head.protocol != protocol::TCP && head.protocol != protocol::UDP {
        return Some(packet);
    }
    let ports: [u8; 4] = skb.read(head.payload)?;
    let (source, destination) =
        (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
    (packet.local_port, packet.remote_port) = match way {
        Way::Out => (source, destination),
        Way::In => (destination, source),
    };
    if head.protocol == protocol::TCP {
        // Length of the header in words, then the flags.
        let tail: [u8; 2] = skb.read(head.payload + 12)?;
        let end = skipped + head.payload + u32::from(tail[0] >> 4) * 4;
        packet.matters = skb.len() > end || tail[1] & (SYN | ACK) == SYN;
    }
    Some(packet)
}
