//! TCP segments without any connection, sent and received on the loopback of a namespace.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Limit for a reset, for hangs only.
const WAIT: Duration = Duration::from_secs(10);
const HEADER: usize = 20;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
/// The protocol's number.
const TCP: u32 = 6;

/// Raw sockets of one network namespace.
#[derive(Debug)]
pub struct Segments {
    from: Ipv4Addr,
    sender: Socket,
    receiver: Socket,
}

impl Segments {
    /// Opens the sockets in the calling thread's namespace. Segments are sent from the address `from`.
    ///
    /// # Errors
    /// The kernel's; the caller needs `CAP_NET_RAW`.
    pub fn open(from: Ipv4Addr) -> io::Result<Self> {
        let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP));
        let (sender, receiver) = (raw()?, raw()?);
        sender.bind(&SocketAddrV4::new(from, 0).into())?;
        receiver.set_read_timeout(Some(WAIT))?;
        Ok(Self { from, sender, receiver })
    }

    /// Sends a SYN. The kernel resets the answer, since no socket waits for it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send_syn(&self, port: u16, to: SocketAddrV4) -> io::Result<()> {
        self.send(port, to, SYN)
    }

    /// Sends a segment with the ACK flag and no data.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send_ack(&self, port: u16, to: SocketAddrV4) -> io::Result<()> {
        self.send(port, to, ACK)
    }

    fn send(&self, port: u16, to: SocketAddrV4, flag: u8) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&port.to_be_bytes());
        header[2..4].copy_from_slice(&to.port().to_be_bytes());
        header[12] = (HEADER as u8 / 4) << 4;
        header[13] = flag;
        let sum = checksum(self.from, *to.ip(), &header);
        header[16..18].copy_from_slice(&sum.to_be_bytes());
        let to = SockAddr::from(SocketAddrV4::new(*to.ip(), 0));
        self.sender.send_to(&header, &to).map(drop)
    }

    /// Returns the ports that resets from the port `from` went to, in their order, up to the first one to `last`.
    ///
    /// # Errors
    /// Fails if none comes.
    pub fn resets_until(&self, from: u16, last: u16) -> Result<Vec<u16>> {
        let mut ports = Vec::new();
        while ports.last() != Some(&last) {
            let mut packet = [0; 128];
            let length = (&self.receiver).read(&mut packet).context("wait for a reset")?;
            let header = usize::from(packet[0] & 0xf) * 4;
            let segment = packet[..length].get(header..header + HEADER).context("a segment")?;
            let [source, port] = [0, 2].map(|at| u16::from_be_bytes([segment[at], segment[at + 1]]));
            if segment[13] & RST != 0 && source == from {
                ports.push(port);
            }
        }
        Ok(ports)
    }
}

/// Returns the checksum of a TCP header without data.
fn checksum(from: Ipv4Addr, to: Ipv4Addr, header: &[u8; HEADER]) -> u16 {
    let addresses = [from.octets(), to.octets()].concat();
    let words = addresses.chunks_exact(2).chain(header.chunks_exact(2));
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = sum + TCP + HEADER as u32;
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
