//! Sockets of the agent inside a pod's network namespace: three listeners, and outgoing connections.
//!
//! They belong to the agent's cgroup, so the pods' cgroup hooks never see them: no mark, no uid, nothing that an
//! application could imitate.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tacit_abi::{Listener, tcp_port};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use super::{
    KernelError, Maps,
    netns::{HostNetns, Netns},
};

/// Accept backlog of each listener, in connections; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// The agent's listeners in one pod.
#[derive(Debug)]
pub struct Listeners {
    /// Captured outbound connections.
    pub capture: TcpListener,
    /// Steered inbound plaintext.
    pub plaintext: TcpListener,
    /// The tunnel.
    pub tunnel: TcpListener,
}

/// A listener that could not be opened in a pod.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The namespace could not be entered.
    #[error("enter the pod's network namespace: {0}")]
    Enter(#[source] io::Error),
    /// The port could not be had.
    #[error(
        "listen on port {port} in the pod: {source}; ports 15001, 15006 and 15008 are the agent's in an enrolled pod"
    )]
    Listen {
        /// The port.
        port: u16,
        /// The error.
        #[source]
        source: io::Error,
    },
}

impl Listeners {
    /// Opens all three in `netns`.
    ///
    /// # Errors
    /// [`ListenError`]; none stays open then.
    pub fn open(netns: &Netns, host: &HostNetns) -> Result<Self, ListenError> {
        let opened = host.within(netns.file(), || {
            // Capture targets are spread over 127.0.0.0/8, and the kernel resets an IPv4 connection that is steered to
            // a socket bound to `::1`: so all listen on all addresses. The steering program refuses what comes from
            // outside to a port that is not to be dialled.
            let capture = listener(tcp_port::CAPTURE)?;
            let plaintext = listener(tcp_port::PLAINTEXT)?;
            let tunnel = listener(tcp_port::TUNNEL)?;
            Ok((capture, plaintext, tunnel))
        });
        let (capture, plaintext, tunnel) = opened.map_err(ListenError::Enter)??;
        Ok(Self {
            capture: adopt(capture, tcp_port::CAPTURE)?,
            plaintext: adopt(plaintext, tcp_port::PLAINTEXT)?,
            tunnel: adopt(tunnel, tcp_port::TUNNEL)?,
        })
    }

    /// Gives the kernel those that it steers connections to.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn publish(&self, maps: &Maps, slot: u32) -> Result<(), KernelError> {
        maps.set_listener(slot, Listener::Tunnel, &self.tunnel)?;
        maps.set_listener(slot, Listener::Plaintext, &self.plaintext)
    }
}

/// One socket for both families where the pod has IPv6, else for IPv4.
fn listener(port: u16) -> Result<Socket, ListenError> {
    let open = |domain: Domain, ip: IpAddr| -> io::Result<Socket> {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        // A restarted agent must not wait for connections of its predecessor to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.bind(&SocketAddr::new(ip, port).into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    open(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into())
        .or_else(|e| match e.raw_os_error() {
            Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => {
                open(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into())
            }
            _ => Err(e),
        })
        .map_err(|source| ListenError::Listen { port, source })
}

fn adopt(socket: Socket, port: u16) -> Result<TcpListener, ListenError> {
    TcpListener::from_std(socket.into()).map_err(|source| ListenError::Listen { port, source })
}

/// A socket in `netns`, ready to connect to an address of `to`'s family.
///
/// # Errors
/// When the namespace cannot be entered or descriptors are used up.
pub fn outgoing(netns: &Netns, host: &HostNetns, to: SocketAddr) -> io::Result<TcpSocket> {
    let socket =
        host.within(netns.file(), || if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })??;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Connects from inside `netns`.
///
/// # Errors
/// The kernel's, or [`io::ErrorKind::TimedOut`] after `limit`.
pub async fn connect(
    netns: &Netns,
    host: &HostNetns,
    to: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let socket = outgoing(netns, host, to)?;
    timeout(limit, socket.connect(to)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
