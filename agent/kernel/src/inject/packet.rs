//! The packets that answer a held SYN. Pure.
//!
//! ```text
//! complete     the SYN itself, without data, its checksum filled in (on loopback the kernel leaves that to the hardware)
//! reset        RST and ACK of the SYN, from the target (RFC 9293, 3.5.2)
//! unreachable  ICMP or ICMPv6 error with the SYN's headers in it (RFC 792, RFC 4443)
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tacit_abi::HELD_PACKET_MAX;

use super::Unreachable;
use crate::held::HeldEnds;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
pub(super) const TCP_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;

pub(super) const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
pub(super) const ACK: u8 = 0x10;

/// Hops that a packet on loopback may take.
const HOPS: u8 = 64;

/// A SYN as an application's kernel sent it: its headers without data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Syn {
    bytes: [u8; HELD_PACKET_MAX],
    /// Bytes of the IP header.
    ip: usize,
    /// Bytes of both headers.
    length: usize,
}

impl Syn {
    /// Returns the SYN in `packet`, which may end behind its headers; `None` if it is none.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        Self::parse_flags(packet, SYN)
    }

    /// Returns the headers of a TCP segment of whose flags SYN, RST and ACK are exactly `wanted`.
    fn parse_flags(packet: &[u8], wanted: u8) -> Option<Self> {
        let ip = match packet.first()? >> 4 {
            4 => usize::from(packet[0] & 0x0f) * 4,
            6 => IPV6_HEADER,
            _ => return None,
        };
        let protocol = *packet.get(if packet[0] >> 4 == 4 { 9 } else { 6 })?;
        let least = if packet[0] >> 4 == 4 { IPV4_HEADER } else { IPV6_HEADER };
        let tcp = packet.get(ip..)?;
        let length = ip + usize::from(tcp.get(12)? >> 4) * 4;
        let is_wanted = tcp.get(13)? & (SYN | RST | ACK) == wanted;
        let fits = ip >= least && length >= ip + TCP_HEADER && length <= packet.len();
        if protocol != TCP || !is_wanted || !fits {
            return None;
        }
        let mut bytes = [0; HELD_PACKET_MAX];
        bytes.get_mut(..length)?.copy_from_slice(&packet[..length]);
        Some(Self { bytes, ip, length })
    }

    /// Returns the ends of its connection.
    #[must_use]
    pub fn ends(&self) -> HeldEnds {
        let (source, destination) = self.addresses();
        let port = |at: usize| u16::from_be_bytes([self.bytes[self.ip + at], self.bytes[self.ip + at + 1]]);
        HeldEnds { client: SocketAddr::new(source, port(0)), target: SocketAddr::new(destination, port(2)) }
    }

    /// Returns its sequence number.
    #[must_use]
    pub fn sequence(&self) -> u32 {
        let at = self.ip + 4;
        u32::from_be_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    fn is_v4(&self) -> bool {
        self.bytes[0] >> 4 == 4
    }

    fn addresses(&self) -> (IpAddr, IpAddr) {
        let address = |at: usize| {
            let bytes = &self.bytes[at..];
            if self.is_v4() {
                IpAddr::V4(Ipv4Addr::from(*bytes.first_chunk().expect("the header is complete")))
            } else {
                IpAddr::V6(Ipv6Addr::from(*bytes.first_chunk::<16>().expect("the header is complete")))
            }
        };
        if self.is_v4() { (address(12), address(16)) } else { (address(8), address(24)) }
    }

    /// Returns the SYN with its checksum.
    pub(super) fn complete(&self) -> Vec<u8> {
        let mut packet = self.bytes[..self.length].to_vec();
        let (source, destination) = self.addresses();
        // The kernel fills in length and checksum of an IPv4 header.
        if !self.is_v4() {
            put_u16(&mut packet, 4, self.length - IPV6_HEADER);
        }
        checksum_at(&mut packet, self.ip, 16, Some(pseudo_header(source, destination, TCP)));
        packet
    }

    /// Returns the refusal of the SYN.
    pub(super) fn reset(&self) -> Vec<u8> {
        let ends = self.ends();
        let (mut packet, at) = header(ends.target.ip(), ends.client.ip(), TCP, TCP_HEADER);
        packet.extend(ends.target.port().to_be_bytes());
        packet.extend(ends.client.port().to_be_bytes());
        packet.extend(0_u32.to_be_bytes());
        packet.extend(self.sequence().wrapping_add(1).to_be_bytes());
        packet.extend([(TCP_HEADER as u8 / 4) << 4, RST | ACK, 0, 0, 0, 0, 0, 0]);
        checksum_at(&mut packet, at, 16, Some(pseudo_header(ends.target.ip(), ends.client.ip(), TCP)));
        packet
    }

    /// Returns the report that the SYN's destination cannot be reached.
    pub(super) fn unreachable(&self, why: Unreachable) -> Vec<u8> {
        let ends = self.ends();
        let (from, to) = (ends.target.ip(), ends.client.ip());
        let (protocol, kind, code) = match (self.is_v4(), why) {
            (true, Unreachable::Network) => (ICMP, 3, 0),
            (true, Unreachable::Host) => (ICMP, 3, 1),
            (false, Unreachable::Network) => (ICMP_V6, 1, 0),
            (false, Unreachable::Host) => (ICMP_V6, 1, 3),
        };
        let (mut packet, at) = header(from, to, protocol, ICMP_HEADER + self.length);
        packet.extend([kind, code, 0, 0, 0, 0, 0, 0]);
        packet.extend(self.complete());
        let pseudo = (!self.is_v4()).then(|| pseudo_header(from, to, ICMP_V6));
        checksum_at(&mut packet, at, 2, pseudo);
        packet
    }
}

/// A keep-alive or window probe as an application's kernel sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe(Syn);

impl Probe {
    /// Returns the probe in `packet`; `None` if it cannot be one.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        Syn::parse_flags(packet, ACK).map(Self)
    }

    /// Returns the ends of its connection.
    #[must_use]
    pub fn ends(&self) -> HeldEnds {
        self.0.ends()
    }

    /// Returns the probe with its checksum.
    pub(super) fn complete(&self) -> Vec<u8> {
        self.0.complete()
    }
}

/// Returns an IP header before `length` bytes, and its own length. The kernel fills in length and checksum for IPv4.
pub(super) fn header(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> (Vec<u8>, usize) {
    let mut packet = Vec::with_capacity(IPV6_HEADER + length);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0, 0, 0, 0, 0, 0x40, 0, HOPS, protocol, 0, 0]);
            put_u16(&mut packet, 2, IPV4_HEADER + length);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        (from, to) => {
            packet.extend([0x60, 0, 0, 0, 0, 0, protocol, HOPS]);
            put_u16(&mut packet, 4, length);
            packet.extend(mapped(from).octets());
            packet.extend(mapped(to).octets());
        }
    }
    let length = packet.len();
    (packet, length)
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn put_u16(packet: &mut [u8], at: usize, value: usize) {
    let value = u16::try_from(value).unwrap_or(u16::MAX);
    packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Returns the sum of the pseudo header's words, without the length.
pub(super) fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8) -> u32 {
    let words = |address: IpAddr| match address {
        IpAddr::V4(v4) => sum(&v4.octets()),
        IpAddr::V6(v6) => sum(&v6.octets()),
    };
    words(from) + words(to) + u32::from(protocol)
}

/// Writes the checksum of what follows the first `start` bytes, at `field` behind them.
pub(super) fn checksum_at(packet: &mut [u8], start: usize, field: usize, pseudo: Option<u32>) {
    packet[start + field..start + field + 2].fill(0);
    let rest = &packet[start..];
    let length = if pseudo.is_some() { u32::try_from(rest.len()).unwrap_or(0) } else { 0 };
    let mut total = sum(rest) + length + pseudo.unwrap_or(0);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    let checksum = !(total as u16);
    packet[start + field..start + field + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// Returns the sum of the big-endian words; a packet of some hundred bytes cannot overflow it.
fn sum(bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum::<u32>() + last
}

#[cfg(test)]
pub(crate) mod testing {
    use std::net::IpAddr;

    /// A SYN from 127.0.0.1:40000 to 127.100.1.2:15056, sequence number 0x01020304, with a partial checksum and options.
    pub(crate) const SYN_V4: [u8; 60] = [
        0x45, 0, 0, 60, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 127, 0, 0, 1, 127, 100, 1, 2, // IP
        0x9c, 0x40, 0x3a, 0xd0, 1, 2, 3, 4, 0, 0, 0, 0, 0xa0, 2, 0xff, 0xff, 0xfe, 0x30, 0, 0, // TCP
        2, 4, 0xff, 0xd7, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, // options
    ];

    pub(crate) fn address(text: &str) -> IpAddr {
        text.parse().expect("literal")
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::SYN_V4, *};

    /// The same over IPv6, from the pod's address to `::1`, port 15040.
    fn syn_v6() -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 40, TCP, 64];
        packet.extend(Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 2).octets());
        packet.extend(Ipv6Addr::LOCALHOST.octets());
        packet.extend(&SYN_V4[IPV4_HEADER..]);
        packet[42..44].copy_from_slice(&15040_u16.to_be_bytes());
        packet
    }

    /// Sums what is left after the checksum covers everything: zero.
    fn residue(packet: &[u8], start: usize, pseudo: Option<u32>) -> u16 {
        let length = if pseudo.is_some() { (packet.len() - start) as u32 } else { 0 };
        let mut total = sum(&packet[start..]) + length + pseudo.unwrap_or(0);
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        !(total as u16)
    }

    #[test]
    fn a_syn_is_parsed_and_completed_in_both_families() {
        for (packet, ip, client, target) in [
            (SYN_V4.to_vec(), IPV4_HEADER, "127.0.0.1:40000", "127.100.1.2:15056"),
            (syn_v6(), IPV6_HEADER, "[fd77:1::2]:40000", "[::1]:15040"),
        ] {
            let syn = Syn::parse(&packet).expect("a SYN");
            let ends = syn.ends();
            assert_eq!((ends.client, ends.target), (client.parse().expect("v"), target.parse().expect("v")));
            assert_eq!(syn.sequence(), 0x0102_0304);
            let complete = syn.complete();
            assert_eq!(complete.len(), packet.len());
            assert_eq!(
                (&complete[..ip + 16], &complete[ip + 18..]),
                (&packet[..ip + 16], &packet[ip + 18..])
            );
            let pseudo = pseudo_header(ends.client.ip(), ends.target.ip(), TCP);
            assert_eq!(residue(&complete, ip, Some(pseudo)), 0);
        }
    }

    #[test]
    fn data_of_a_syn_is_left_to_a_retransmission() {
        for mut packet in [SYN_V4.to_vec(), syn_v6()] {
            let length = packet.len();
            packet.extend([7; 20]);
            let complete = Syn::parse(&packet).expect("a SYN").complete();
            assert_eq!(complete.len(), length);
            if packet[0] >> 4 == 6 {
                assert_eq!(complete[4..6], [0, 40]);
            }
        }
    }

    #[test]
    fn a_reset_acknowledges_the_syn() {
        for packet in [SYN_V4.to_vec(), syn_v6()] {
            let syn = Syn::parse(&packet).expect("a SYN");
            let (reset, ends) = (syn.reset(), syn.ends());
            let at = reset.len() - TCP_HEADER;
            assert_eq!(at, if syn.is_v4() { IPV4_HEADER } else { IPV6_HEADER });
            assert_eq!(reset[at..at + 2], ends.target.port().to_be_bytes());
            assert_eq!(reset[at + 2..at + 4], ends.client.port().to_be_bytes());
            assert_eq!(reset[at + 8..at + 12], 0x0102_0305_u32.to_be_bytes());
            assert_eq!(reset[at + 13], RST | ACK);
            assert_eq!(residue(&reset, at, Some(pseudo_header(ends.target.ip(), ends.client.ip(), TCP))), 0);
        }
    }

    #[test]
    fn an_icmp_error_has_the_syn_in_it() {
        for packet in [SYN_V4.to_vec(), syn_v6()] {
            let syn = Syn::parse(&packet).expect("a SYN");
            let ends = syn.ends();
            for (why, v4, v6) in [(Unreachable::Network, [3, 0], [1, 0]), (Unreachable::Host, [3, 1], [1, 3])]
            {
                let error = syn.unreachable(why);
                let (at, expected) = if syn.is_v4() { (IPV4_HEADER, v4) } else { (IPV6_HEADER, v6) };
                assert_eq!(error[at..at + 2], expected);
                assert_eq!(error[at + ICMP_HEADER..], syn.complete());
                let pseudo =
                    (!syn.is_v4()).then(|| pseudo_header(ends.target.ip(), ends.client.ip(), ICMP_V6));
                assert_eq!(residue(&error, at, pseudo), 0);
                if !syn.is_v4() {
                    assert_eq!(
                        usize::from(u16::from_be_bytes([error[4], error[5]])),
                        error.len() - IPV6_HEADER
                    );
                }
            }
        }
    }

    #[test]
    fn other_packets_are_no_syn() {
        for packet in [SYN_V4.to_vec(), syn_v6()] {
            for length in 0..packet.len() {
                assert_eq!(Syn::parse(&packet[..length]), None, "{length} bytes");
            }
            let ip = packet.len() - 40;
            for (at, value) in
                [(ip + 13, SYN | ACK), (ip + 13, ACK), (ip + 13, SYN | RST), (ip + 12, 0x40), (0, 0x15)]
            {
                let mut other = packet.clone();
                other[at] = value;
                assert_eq!(Syn::parse(&other), None, "{value:#x} at {at}");
            }
        }
        let mut udp = SYN_V4;
        udp[9] = 17;
        assert_eq!(Syn::parse(&udp), None);
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..100_000 {
            let mut bytes = [0_u8; HELD_PACKET_MAX];
            for byte in &mut bytes {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (state >> 56) as u8;
            }
            bytes[0] = if state & 1 == 0 { 0x40 | (bytes[0] & 0x0f) } else { 0x60 };
            bytes[if state & 1 == 0 { 9 } else { 6 }] = TCP;
            let length = usize::from(bytes[119]) % (HELD_PACKET_MAX + 1);
            if let Some(syn) = Syn::parse(&bytes[..length]) {
                let _ = (syn.ends(), syn.complete(), syn.reset(), syn.unreachable(Unreachable::Host));
            }
        }
    }
}
