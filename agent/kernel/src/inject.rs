//! Puts packets on a pod's loopback: the SYN of a held connection, or the answer to it.
//!
//! The raw sockets belong to the pod's network namespace and to the agent's cgroup, as all sockets of the agent in a pod. They
//! send to addresses of the namespace alone, so no packet leaves the pod.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

use tacit_abi::Told;

use super::{
    held::HeldEnds,
    netns::{HostNetns, Netns},
};

mod packet;
mod told;

#[cfg(test)]
pub(super) use packet::testing;
pub use packet::{Probe, Syn};
pub use told::Numbers;

/// Receive buffer in bytes, which the kernel raises to its least. Nothing is read from these sockets, and a pod can send to
/// them.
const RECEIVE_BYTES: usize = 0;

/// Raw sockets in one pod.
#[derive(Debug)]
pub struct Injector {
    v4: Socket,
    /// `None` where the pod has no IPv6.
    v6: Option<Socket>,
}

/// Why a destination cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// There is no route to its network.
    Network,
    /// The host does not answer on its link, or a router says so.
    Host,
}

impl Injector {
    /// Opens the sockets in the calling thread's namespace.
    pub(super) fn open_here() -> io::Result<Self> {
        let v4 = raw(Domain::IPV4)?;
        let v6 = match raw(Domain::IPV6) {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4, v6 })
    }

    /// Opens the sockets in `netns`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(netns: &Netns, host: &HostNetns) -> io::Result<Self> {
        host.run_in(netns.file(), Self::open_here)?
    }

    /// Delivers the SYN. The agent's listener answers it, and the application's `connect()` succeeds.
    ///
    /// # Errors
    /// The kernel's.
    pub fn deliver(&self, syn: &Syn) -> io::Result<()> {
        self.send(&syn.complete(), syn.ends().target)
    }

    /// Delivers a probe. The kernel of the agent's end answers it, and the application's kernel notes that its peer is alive.
    ///
    /// # Errors
    /// The kernel's.
    pub fn deliver_probe(&self, probe: &Probe) -> io::Result<()> {
        self.send(&probe.complete(), probe.ends().target)
    }

    /// Reports the peer of the connection with these ends and numbers to the application's kernel.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tell(&self, ends: &HeldEnds, numbers: Numbers, told: Told) -> io::Result<()> {
        self.send(&told::segment(ends.target, ends.client, numbers, told), ends.client)
    }

    /// Refuses the connection: the application's `connect()` fails with ECONNREFUSED.
    ///
    /// # Errors
    /// The kernel's.
    pub fn refuse(&self, syn: &Syn) -> io::Result<()> {
        self.send(&syn.reset(), syn.ends().client)
    }

    /// Reports that the destination cannot be reached: the application's `connect()` fails with ENETUNREACH or EHOSTUNREACH.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unreachable(&self, syn: &Syn, why: Unreachable) -> io::Result<()> {
        self.send(&syn.unreachable(why), syn.ends().client)
    }

    fn send(&self, packet: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket = match to.ip() {
            IpAddr::V4(_) => Some(&self.v4),
            IpAddr::V6(_) => self.v6.as_ref(),
        };
        let socket = socket.ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
        // Raw sockets have no ports: IPv6 takes one for a protocol number.
        socket.send_to(packet, &SocketAddr::new(to.ip(), 0).into()).map(drop)
    }
}

/// A socket that sends packets with their IP header.
fn raw(domain: Domain) -> io::Result<Socket> {
    // Of this protocol, both families take the header from the caller, and nothing is received.
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::from(libc::IPPROTO_RAW)))?;
    socket.set_recv_buffer_size(RECEIVE_BYTES)?;
    Ok(socket)
}
