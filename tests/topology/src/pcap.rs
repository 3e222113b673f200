//! Content of a capture: bytes in the tunnel, plaintext bytes, and the number of times a marker is readable.
//!
//! TCP streams are reassembled by sequence number before the search. A marker that was split over two packets or
//! retransmitted is counted once. The parser reads files that `tcpdump` writes on an Ethernet link of this machine (pcap
//! in the machine's byte order), and no other variants.

use anyhow::{Context, Result, bail};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Port of the tunnel.
pub const TUNNEL_PORT: u16 = 15008;

/// Magic numbers of pcap with microseconds and with nanoseconds.
const MAGICS: [u32; 2] = [0xa1b2_c3d4, 0xa1b2_3c4d];
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;
const ETHERNET_HEADER: usize = 14;
/// IP protocol number of TCP.
const TCP: u8 = 6;
const SYN: u8 = 0x02;

/// Packets that crossed the wire.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Packets of any kind.
    pub packets: u64,
    /// Bytes of all packets, link headers included.
    pub bytes: u64,
    /// TCP payload bytes to and from the tunnel port, retransmissions included.
    pub tunnel_bytes: u64,
    /// TCP payload bytes of all other ports, retransmissions included.
    pub clear_bytes: u64,
    streams: Vec<Stream>,
    /// Packets that are not TCP, whole.
    others: Vec<Vec<u8>>,
}

/// One direction of one TCP connection.
#[derive(Debug)]
struct Stream {
    from: SocketAddr,
    to: SocketAddr,
    /// Sequence number of its first byte, or of its first captured byte if the SYN was not captured.
    start: u32,
    has_syn: bool,
    segments: Vec<(i32, Vec<u8>)>,
}

struct Segment<'a> {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    flags: u8,
    payload: &'a [u8],
}

impl Traffic {
    /// Reads a pcap file.
    ///
    /// # Errors
    /// Fails if the file is not a pcap file of this machine, or if a packet is truncated.
    pub fn parse(file: &[u8]) -> Result<Self> {
        let magic = native_u32(file, 0).context("pcap file without a header")?;
        if !MAGICS.contains(&magic) {
            bail!("invalid pcap magic {magic:#x}: expected one in this machine's byte order");
        }
        let mut traffic = Self::default();
        let mut open = HashMap::new();
        let mut at = FILE_HEADER;
        while let (Some(captured), Some(sent)) = (native_u32(file, at + 8), native_u32(file, at + 12)) {
            let begin = at + PACKET_HEADER;
            // The last packet may be cut when the file is read while it is written.
            let Some(packet) = file.get(begin..begin + captured as usize) else {
                break;
            };
            if captured != sent {
                bail!(
                    "packet of {sent} bytes is truncated to {captured} bytes: expected a capture of whole packets"
                );
            }
            traffic.packet(packet, &mut open);
            at = begin + packet.len();
        }
        Ok(traffic)
    }

    /// Counts occurrences of `marker` in TCP streams and in packets that are not TCP.
    #[must_use]
    pub fn occurrences(&self, marker: &[u8]) -> usize {
        let streams: usize = self.streams.iter().map(|stream| count(&stream.bytes(), marker)).sum();
        streams + self.others.iter().map(|packet| count(packet, marker)).sum::<usize>()
    }

    /// Counts connections to the tunnel port that begin with a TLS ClientHello.
    #[must_use]
    pub fn client_hellos(&self) -> usize {
        self.tunnel_streams()
            .filter(|stream| stream.to.port() == TUNNEL_PORT && is_client_hello(&stream.bytes()))
            .count()
    }

    /// Counts connections to the tunnel port that carry data.
    #[must_use]
    pub fn tunnel_connections(&self) -> usize {
        self.tunnel_streams()
            .filter(|stream| stream.to.port() == TUNNEL_PORT && !stream.segments.is_empty())
            .count()
    }

    /// Returns true if all data to and from the tunnel port is a sequence of TLS records. Connections whose SYN was not
    /// captured are skipped, because their first record is not known.
    #[must_use]
    pub fn tunnel_is_tls(&self) -> bool {
        self.tunnel_streams().filter(|stream| stream.has_syn).all(|stream| is_tls(&stream.bytes()))
    }

    /// Returns the pairs of addresses that exchanged plaintext bytes, for error messages.
    #[must_use]
    pub fn clear_streams(&self) -> Vec<(SocketAddr, SocketAddr)> {
        let clear = self.streams.iter().filter(|stream| !stream.is_tunnel() && !stream.segments.is_empty());
        clear.map(|stream| (stream.from, stream.to)).collect()
    }

    fn tunnel_streams(&self) -> impl Iterator<Item = &Stream> {
        self.streams.iter().filter(|stream| stream.is_tunnel())
    }

    fn packet(&mut self, packet: &[u8], open: &mut HashMap<(SocketAddr, SocketAddr), usize>) {
        self.packets += 1;
        self.bytes += packet.len() as u64;
        let Some(segment) = tcp(packet) else {
            self.others.push(packet.to_owned());
            return;
        };
        let tunnel = [segment.from.port(), segment.to.port()].contains(&TUNNEL_PORT);
        *if tunnel { &mut self.tunnel_bytes } else { &mut self.clear_bytes } += segment.payload.len() as u64;
        self.segment(&segment, open);
    }

    fn segment(&mut self, segment: &Segment<'_>, open: &mut HashMap<(SocketAddr, SocketAddr), usize>) {
        let syn = segment.flags & SYN != 0;
        let start = if syn { segment.sequence.wrapping_add(1) } else { segment.sequence };
        let key = (segment.from, segment.to);
        let known = open.get(&key).copied().filter(|index| {
            // A SYN with another sequence number opens a new connection between the same ports.
            !syn || self.streams.get(*index).is_some_and(|stream| stream.start == start)
        });
        let index = known.unwrap_or_else(|| {
            let (from, to) = key;
            self.streams.push(Stream { from, to, start, has_syn: syn, segments: Vec::new() });
            open.insert(key, self.streams.len() - 1);
            self.streams.len() - 1
        });
        if let Some(stream) = self.streams.get_mut(index).filter(|_| !segment.payload.is_empty()) {
            // Sequence numbers wrap. Streams of the tests stay far below 2 GiB, so the difference fits.
            let offset = start.wrapping_sub(stream.start).cast_signed();
            stream.segments.push((offset, segment.payload.to_owned()));
        }
    }
}

impl Stream {
    fn is_tunnel(&self) -> bool {
        [self.from.port(), self.to.port()].contains(&TUNNEL_PORT)
    }

    /// Returns the stream's bytes in order, without retransmissions.
    fn bytes(&self) -> Vec<u8> {
        let mut sorted: Vec<_> = self.segments.iter().collect();
        sorted.sort_by_key(|(offset, _)| *offset);
        let mut out = Vec::new();
        let mut next = i64::MIN;
        for (offset, payload) in sorted {
            let offset = i64::from(*offset);
            let known = usize::try_from(next.saturating_sub(offset)).unwrap_or(0);
            out.extend_from_slice(payload.get(known..).unwrap_or_default());
            next = next.max(offset + payload.len() as i64);
        }
        out
    }
}

/// Returns the TCP segment of an Ethernet packet; `None` for other packets and for fragments.
fn tcp(packet: &[u8]) -> Option<Segment<'_>> {
    let ip = packet.get(ETHERNET_HEADER..)?;
    let (from, to, tcp) = match packet.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(ip.first()? & 0x0f) * 4;
            let fragment = u16::from_be_bytes([*ip.get(6)?, *ip.get(7)?]) & 0x3fff;
            let whole = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
            if *ip.get(9)? != TCP || fragment != 0 {
                return None;
            }
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
            (IpAddr::V4(address(12)?), IpAddr::V4(address(16)?), ip.get(header..whole)?)
        }
        [0x86, 0xdd] => {
            let length = usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
            if *ip.get(6)? != TCP {
                return None;
            }
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
            (IpAddr::V6(address(8)?), IpAddr::V6(address(24)?), ip.get(40..40 + length)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Segment {
        from: SocketAddr::new(from, port(0)?),
        to: SocketAddr::new(to, port(2)?),
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        flags: *tcp.get(13)?,
        payload: tcp.get(header..)?,
    })
}

/// Returns true for record type handshake (RFC 8446 section 5.1) and message type ClientHello (section 4). Any 3.x
/// record version is accepted.
fn is_client_hello(bytes: &[u8]) -> bool {
    matches!(bytes, [22, 3, _, _, _, 1, ..])
}

/// Returns true for a sequence of TLS records. The last one may be truncated, because a connection can be reset.
fn is_tls(mut bytes: &[u8]) -> bool {
    while let [kind, major, _, high, low, rest @ ..] = bytes {
        if !(20..=23).contains(kind) || *major != 3 {
            return false;
        }
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        bytes = rest.get(length..).unwrap_or_default();
    }
    true
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    if needle.is_empty() {
        0
    } else {
        haystack.windows(needle.len()).filter(|window| *window == needle).count()
    }
}

fn native_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_cut_over_packets_and_sent_twice_is_found_once() {
        let traffic = recording(&[
            packet(7000, 99, SYN, b""),
            packet(7000, 100, 0, b"hello mar"),
            packet(7000, 109, 0, b"ker bye"),
            packet(7000, 109, 0, b"ker bye"),
        ]);
        assert_eq!(traffic.occurrences(b"marker"), 1);
        assert_eq!((traffic.clear_bytes, traffic.tunnel_bytes), (23, 0));
    }

    #[test]
    fn segments_out_of_order_and_over_the_wrap_are_put_in_order() {
        let traffic = recording(&[
            packet(7000, u32::MAX - 3, SYN, b""),
            packet(7000, 1, 0, b"ker"),
            packet(7000, u32::MAX - 2, 0, b"mar-"),
        ]);
        assert_eq!(traffic.occurrences(b"mar-ker"), 1);
    }

    #[test]
    fn the_next_connection_of_the_same_ports_is_another_stream() {
        let traffic = recording(&[
            packet(7000, 99, SYN, b""),
            packet(7000, 100, 0, b"mar"),
            packet(7000, 5000, SYN, b""),
            packet(7000, 5001, 0, b"ker"),
        ]);
        assert_eq!(traffic.occurrences(b"marker"), 0);
        assert_eq!(traffic.clear_streams().len(), 2);
    }

    #[test]
    fn what_is_not_tls_on_the_tunnel_port_is_noticed() {
        let hello = [22, 3, 1, 0, 2, 1, 0, 23, 3, 3, 0, 1, 9];
        let tls = recording(&[packet(TUNNEL_PORT, 99, SYN, b""), packet(TUNNEL_PORT, 100, 0, &hello)]);
        assert!(tls.tunnel_is_tls());
        assert_eq!((tls.client_hellos(), tls.tunnel_connections()), (1, 1));
        let clear = recording(&[
            packet(TUNNEL_PORT, 99, SYN, b""),
            packet(TUNNEL_PORT, 100, 0, b"GET / HTTP/1.1\r\n"),
        ]);
        assert!(!clear.tunnel_is_tls());
        assert_eq!(clear.client_hellos(), 0);
    }

    #[test]
    fn a_packet_recorded_in_part_is_refused() {
        let mut file = pcap(&[packet(7000, 99, SYN, b"")]);
        file[FILE_HEADER + 12] += 1;
        assert!(Traffic::parse(&file).is_err());
        assert!(Traffic::parse(b"no").is_err());
        assert!(Traffic::parse(&[0; 24]).is_err());
    }

    fn recording(packets: &[Vec<u8>]) -> Traffic {
        Traffic::parse(&pcap(packets)).expect("a pcap file")
    }

    fn pcap(packets: &[Vec<u8>]) -> Vec<u8> {
        let mut file = MAGICS[0].to_ne_bytes().to_vec();
        file.resize(FILE_HEADER, 0);
        for packet in packets {
            let length = u32::try_from(packet.len()).expect("short").to_ne_bytes();
            file.extend([[0; 4], [0; 4], length, length].concat());
            file.extend(packet);
        }
        file
    }

    fn packet(port: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 12];
        out.extend([0x08, 0x00, 0x45, 0]);
        out.extend(u16::try_from(40 + payload.len()).expect("short").to_be_bytes());
        out.extend([0, 0, 0x40, 0, 64, TCP, 0, 0, 10, 77, 1, 2, 10, 77, 2, 2]);
        out.extend(
            [&40000_u16.to_be_bytes()[..], &port.to_be_bytes(), &sequence.to_be_bytes(), &[0; 4]].concat(),
        );
        out.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
        out.extend(payload);
        out
    }
}
