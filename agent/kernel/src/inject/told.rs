//! The segment by which the agent tells an application's kernel of the peer, see `tacit_abi`'s `silence`. Pure.

use std::net::SocketAddr;

use tacit_abi::{TOLD_BYTES, Told};

use super::packet::{ACK, TCP, TCP_HEADER, checksum_at, header, pseudo_header};

/// The numbers of a connection, as the agent's end has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// The next byte that it sends.
    pub next: u32,
    /// The next byte that it expects.
    pub expected: u32,
}

/// A window for any number of bytes: the agent's end drops what it does not want.
const WINDOW: u16 = u16::MAX;

/// Returns the segment from `agent` to `application`.
pub(super) fn segment(agent: SocketAddr, application: SocketAddr, numbers: Numbers, told: Told) -> Vec<u8> {
    let length = TCP_HEADER + TOLD_BYTES;
    let (mut packet, at) = header(agent.ip(), application.ip(), TCP, length);
    packet.extend(agent.port().to_be_bytes());
    packet.extend(application.port().to_be_bytes());
    packet.extend(numbers.next.to_be_bytes());
    packet.extend(numbers.expected.to_be_bytes());
    packet.extend([(length as u8 / 4) << 4, ACK]);
    packet.extend(WINDOW.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend(told.encode());
    checksum_at(&mut packet, at, 16, Some(pseudo_header(agent.ip(), application.ip(), TCP)));
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segment_is_an_acknowledgement_with_the_option() {
        for (agent, application) in
            [("127.96.1.2:15056", "127.0.0.1:40000"), ("[::1]:15040", "[fd77::2]:40000")]
        {
            let (agent, application) =
                (agent.parse().expect("literal"), application.parse().expect("literal"));
            let numbers = Numbers { next: 7, expected: 9 };
            let packet = segment(agent, application, numbers, Told::Alive);
            let tcp = &packet[if agent.is_ipv4() { 20 } else { 40 }..];
            assert_eq!(tcp.len(), 32);
            assert_eq!(tcp[..4], [agent.port().to_be_bytes(), application.port().to_be_bytes()].concat());
            assert_eq!(tcp[4..16], [0, 0, 0, 7, 0, 0, 0, 9, 0x80, 0x10, 0xff, 0xff]);
            assert_eq!(tcp[20..], Told::Alive.encode());
        }
    }
}
