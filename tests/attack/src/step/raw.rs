//! Steps by raw sockets: headers of the attacker's own making.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Given, Told};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A UDP packet with its IP header. First argument: the source address it claims.
pub(super) fn raw(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("source address")?;
    send_udp(source, given.target, &given.marker)?;
    Ok(Told::Sent)
}

/// Sends a UDP packet with its IP header.
pub(super) fn send_udp(source: SocketAddr, target: SocketAddr, payload: &[u8]) -> Result<()> {
    // This protocol number means: the header is included.
    let socket =
        Socket::new(Domain::for_address(target), Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let packet = ip(source.ip(), target.ip(), UDP, &udp(source, target, payload))?;
    // The port of a raw address has no meaning, and of IPv6 must be 0.
    socket.send_to(&packet, &SocketAddr::new(target.ip(), 0).into())?;
    Ok(())
}

/// An ACK without data; the marker stands in its TCP options. First argument: the own address.
pub(super) fn ack_option(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let packet = ip(source.ip(), given.target.ip(), TCP, &ack_with_option(source, given))?;
    let domain = Domain::for_address(given.target);
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    socket.send_to(&packet, &SocketAddr::new(given.target.ip(), 0).into())?;
    Ok(Told::Sent)
}

/// A TCP header of the largest size there is: 20 bytes, and 40 of options.
pub(super) fn ack_with_option(source: SocketAddr, given: &Given) -> Vec<u8> {
    let mut segment = Vec::with_capacity(60);
    segment.extend_from_slice(&source.port().to_be_bytes());
    segment.extend_from_slice(&given.target.port().to_be_bytes());
    // Sequence and acknowledgement, 15 words of header, ACK, window, checksum, urgent pointer.
    segment.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0xf0, 0x10, 1, 0, 0, 0, 0, 0]);
    // An experimental option, then nothing.
    segment.extend_from_slice(&[253, 2 + given.marker.len() as u8]);
    segment.extend_from_slice(&given.marker);
    segment.resize(60, 1);
    segment
}

/// An echo request to oneself in the victim's name: the kernel answers the victim, with the marker. First argument: the
/// own address.
pub(super) fn reflected(given: &Given) -> Result<Told> {
    let own: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let (number, mut echo) = if own.is_ipv4() {
        (1, vec![8_u8, 0, 0, 0, 0, 7, 0, 1])
    } else {
        (58, vec![128, 0, 0, 0, 0, 7, 0, 1])
    };
    echo.extend_from_slice(&given.marker);
    let mut summed = echo.clone();
    if let (IpAddr::V6(from), IpAddr::V6(to)) = (given.target.ip(), own.ip()) {
        let mut pseudo = [from.octets(), to.octets()].concat();
        pseudo.extend_from_slice(&(echo.len() as u32).to_be_bytes());
        pseudo.extend_from_slice(&[0, 0, 0, 58]);
        pseudo.append(&mut summed);
        summed = pseudo;
    }
    let sum = checksum(&summed).to_be_bytes();
    echo[2..4].copy_from_slice(&sum);
    let packet = ip(given.target.ip(), own.ip(), number, &echo)?;
    let domain = Domain::for_address(own);
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    socket.send_to(&packet, &SocketAddr::new(own.ip(), 0).into())?;
    Ok(Told::Sent)
}

/// An echo request with the marker as payload.
pub(super) fn icmp(given: &Given) -> Result<Told> {
    let (protocol, request) =
        if given.target.is_ipv4() { (libc::IPPROTO_ICMP, 8) } else { (libc::IPPROTO_ICMPV6, 128) };
    let domain = Domain::for_address(given.target);
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))?;
    let mut packet = vec![request, 0, 0, 0, 0, 7, 0, 1];
    packet.extend_from_slice(&given.marker);
    if given.target.is_ipv4() {
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    socket.send_to(&packet, &SocketAddr::new(given.target.ip(), 0).into())?;
    Ok(Told::Sent)
}

/// A SYN with data, which TCP Fast Open delivers at once, in two fragments. The first has the ports, but not the flags. IPv4
/// only. First argument: the source address it claims.
pub(super) fn syn_in_fragments(given: &Given) -> Result<Told> {
    /// Bytes of the first fragment; fragments begin at multiples of 8.
    const FIRST: usize = 8;
    const MORE: u16 = 0x2000;
    let source: SocketAddr = given.extra(0)?.parse().context("source address")?;
    let (IpAddr::V4(from), IpAddr::V4(to)) = (source.ip(), given.target.ip()) else { bail!("IPv4 only") };
    let mut segment = [source.port().to_be_bytes(), given.target.port().to_be_bytes()].concat();
    // Sequence and acknowledgement, 5 words of header, SYN, window, checksum, urgent pointer.
    segment.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(&given.marker);
    let mut pseudo = [from.octets(), to.octets()].concat();
    pseudo.extend_from_slice(&[0, TCP]);
    pseudo.extend_from_slice(&(segment.len() as u16).to_be_bytes());
    pseudo.extend_from_slice(&segment);
    segment[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let (first, second) = segment.split_at(FIRST);
    for (part, offset) in [(first, MORE), (second, (FIRST / 8) as u16)] {
        let mut packet = ip(source.ip(), given.target.ip(), TCP, part)?;
        packet[6..8].copy_from_slice(&offset.to_be_bytes());
        packet[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum(&packet[..20]).to_be_bytes();
        packet[10..12].copy_from_slice(&sum);
        socket.send_to(&packet, &SocketAddr::new(given.target.ip(), 0).into())?;
    }
    Ok(Told::Sent)
}

/// A packet of the pod to the victim inside another to the target, which unpacks it. Arguments: the own address, the
/// victim's, and the kind of encapsulation: a UDP port, or an IP protocol.
pub(super) fn encapsulated(given: &Given) -> Result<Told> {
    const GRE: i32 = 47;
    let own: SocketAddr = given.extra(0)?.parse().context("own address")?;
    let victim: SocketAddr = given.extra(1)?.parse().context("the victim's address")?;
    let inner = ip(own.ip(), victim.ip(), UDP, &udp(own, victim, &given.marker))?;
    let ethertype: [u8; 2] = if own.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] };
    let domain = Domain::for_address(given.target);
    let raw = |protocol: i32| Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)));
    let (socket, port, header) = match (given.extra(2)?, own.is_ipv4()) {
        ("ip", true) => (raw(libc::IPPROTO_IPIP)?, 0, Vec::new()),
        ("ip", false) => (raw(libc::IPPROTO_IPV6)?, 0, Vec::new()),
        ("gre", _) => (raw(GRE)?, 0, [[0, 0], ethertype].concat()),
        (port, _) => {
            // VXLAN with a network identifier of 1, then an Ethernet header. Geneve's header is of the same size.
            let mut header = vec![8, 0, 0, 0, 0, 0, 1, 0];
            header.extend_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
            header.extend_from_slice(&ethertype);
            (Socket::new(domain, Type::DGRAM, None)?, port.parse().context("port")?, header)
        }
    };
    socket.send_to(&[header, inner].concat(), &SocketAddr::new(given.target.ip(), port).into())?;
    Ok(Told::Sent)
}

/// A UDP header and payload; without a checksum over IPv4, with one over IPv6, which wants it.
pub(super) fn udp(source: SocketAddr, target: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let mut packet = Vec::with_capacity(usize::from(length));
    for word in [source.port(), target.port(), length, 0] {
        packet.extend_from_slice(&word.to_be_bytes());
    }
    packet.extend_from_slice(payload);
    if let (IpAddr::V6(from), IpAddr::V6(to)) = (source.ip(), target.ip()) {
        let mut pseudo = [from.octets(), to.octets()].concat();
        pseudo.extend_from_slice(&u32::from(length).to_be_bytes());
        pseudo.extend_from_slice(&[0, 0, 0, UDP]);
        pseudo.extend_from_slice(&packet);
        packet[6..8].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    }
    packet
}

/// An IP header before `payload`.
pub(super) fn ip(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let length = ((20 + payload.len()) as u16).to_be_bytes();
            let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
            header.extend_from_slice(&from.octets());
            header.extend_from_slice(&to.octets());
            let sum = checksum(&header).to_be_bytes();
            header[10..12].copy_from_slice(&sum);
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = (payload.len() as u16).to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
            header.extend_from_slice(&from.octets());
            header.extend_from_slice(&to.octets());
            header
        }
        _ => bail!("{from} and {to} are of different families"),
    };
    packet.extend_from_slice(payload);
    Ok(packet)
}

pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_sum_up_to_zero_with_their_checksum() {
        let (from, to) = ("10.77.1.2".parse().expect("literal"), "10.77.2.2".parse().expect("literal"));
        let packet = ip(from, to, UDP, b"payload").expect("one family");
        assert_eq!(checksum(&packet[..20]), 0);
        assert!(ip(from, "fd77::1".parse().expect("literal"), UDP, b"").is_err());
    }
}
