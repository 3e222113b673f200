//! The agent's listeners: in pods, and the one that discards.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{setsockopt, sockopt::TcpCongestion},
};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tacit_abi::{LOOPBACK_UNSENT_BYTES, Listener, tcp_port};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    KernelError, Maps,
    inject::Injector,
    netlink,
    netns::{HostNetns, Netns},
    socket::app_stream::keep_urgent_inline,
};

/// Accept backlog of each listener, in connections; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Congestion control of connections that end on loopback: nothing is lost there, and pacing only costs.
const LOOPBACK_CONGESTION: &str = "reno";

/// Receive buffer of a connection from an application; the kernel doubles it. The window is a batch of the agent's largest reads.
pub const LOOPBACK_UNREAD_BYTES: usize = 256 << 10;

/// The agent's listeners in one pod; not blocking, and not yet with any runtime.
#[derive(Debug)]
pub struct Listeners {
    /// Captured outbound connections.
    pub capture: TcpListener,
    /// Steered inbound plaintext.
    pub plaintext: TcpListener,
    /// The tunnel.
    pub tunnel: TcpListener,
    /// Answers connections that are held.
    pub injector: Injector,
}

/// A listener that could not be opened in a pod.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The namespace could not be entered.
    #[error("enter the pod's network namespace: {0}")]
    Enter(#[source] io::Error),
    /// The raw sockets could not be opened.
    #[error("open raw sockets in the pod: {0}; the agent needs CAP_NET_RAW")]
    Raw(#[source] io::Error),
    /// The port could not be had.
    #[error("listen on port {port} in the pod: {source}")]
    Listen {
        /// The port.
        port: u16,
        /// The error.
        #[source]
        source: io::Error,
    },
}

impl ListenError {
    /// Returns the port that another socket of the pod has.
    #[must_use]
    pub fn taken_port(&self) -> Option<u16> {
        match self {
            Self::Listen { port, source } if source.kind() == io::ErrorKind::AddrInUse => Some(*port),
            _ => None,
        }
    }
}

impl Listeners {
    /// Opens all three in `netns`, each at its port, or at its spare where another socket has that: one of the agent that this
    /// one takes over from, or of the pod. Where they are makes no difference to who is steered to them.
    ///
    /// # Errors
    /// [`ListenError`]; none stays open then.
    pub fn open(netns: &Netns, host: &HostNetns) -> Result<Self, ListenError> {
        let opened = host.run_in(netns.file(), || {
            // Capture targets are spread over 127.0.0.0/8, and the kernel resets an IPv4 connection that is steered to
            // a socket bound to `::1`: so all listen on all addresses. The steering program refuses what comes from
            // outside to a port that is not to be dialled, and hands captured IPv6 connections, which are spread over
            // ports instead of addresses, to the one listener.
            let capture = of_applications(tcp_port::CAPTURE)?;
            // As the kernel side does for the other ends on loopback; what is accepted inherits it.
            let _ = setsockopt(&capture, TcpCongestion, &LOOPBACK_CONGESTION.into());
            let _ = capture.set_recv_buffer_size(LOOPBACK_UNREAD_BYTES);
            let plaintext = of_applications(tcp_port::PLAINTEXT)?;
            let tunnel = listener(tcp_port::TUNNEL_LISTENER)?;
            let injector = Injector::open_here().map_err(ListenError::Raw)?;
            Ok((capture, plaintext, tunnel, injector))
        });
        let (capture, plaintext, tunnel, injector) = opened.map_err(ListenError::Enter)??;
        Ok(Self { capture: capture.into(), plaintext: plaintext.into(), tunnel: tunnel.into(), injector })
    }

    /// Returns the port to which captured connections are redirected.
    ///
    /// # Errors
    /// The kernel's.
    pub fn capture_port(&self) -> io::Result<u16> {
        self.capture.local_addr().map(|at| at.port())
    }

    /// Gives the kernel those that it steers connections to.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn publish(&self, maps: &Maps, slot: u32) -> Result<(), KernelError> {
        maps.set_listener(slot, Listener::Tunnel, &self.tunnel)?;
        maps.set_listener(slot, Listener::Plaintext, &self.plaintext)?;
        maps.set_capture_listener(slot, &self.capture)
    }
}

/// A listener whose connections are applications'. They inherit what each of them needs, which saves two system calls for
/// each: bytes are passed on as they come, since waiting for more belongs to the applications; little is kept for one that does
/// not read, or that the agent does not read; urgent data stays in the stream; and they end with RST however they are closed, also those that nobody has
/// accepted yet when the agent dies.
fn of_applications(port: u16) -> Result<Socket, ListenError> {
    let listener = listener(port)?;
    let set = || {
        listener.set_tcp_nodelay(true)?;
        listener.set_tcp_notsent_lowat(LOOPBACK_UNSENT_BYTES)?;
        keep_urgent_inline(&listener)?;
        listener.set_linger(Some(Duration::ZERO))
    };
    set().map_err(|source| ListenError::Listen { port, source })?;
    Ok(listener)
}

/// A listener at `port`, or at its spare if that is taken.
fn listener(port: u16) -> Result<Socket, ListenError> {
    match listener_at(port) {
        Err(ListenError::Listen { source, .. }) if source.kind() == io::ErrorKind::AddrInUse => {
            listener_at(tcp_port::spare(port))
        }
        opened => opened,
    }
}

/// Opens the listener of a pod that is left alone, on which the agent answers peers that ask for the tunnel. The agent that takes
/// over opens its own beside this one. A process of the pod with the agent's user id can do so too, and proves no identity.
///
/// # Errors
/// [`ListenError`].
pub fn answering_listener(netns: &Netns, host: &HostNetns) -> Result<TcpListener, ListenError> {
    let opened = host.run_in(netns.file(), || bound(tcp_port::ANSWER, Sharing::WithSuccessor));
    opened.map_err(ListenError::Enter)?.map(Into::into)
}

/// Other sockets that may listen on a port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Nobody,
    WithSuccessor,
}

fn listener_at(port: u16) -> Result<Socket, ListenError> {
    bound(port, Sharing::Nobody)
}

/// One socket for both families where the pod has IPv6, else for IPv4.
fn bound(port: u16, sharing: Sharing) -> Result<Socket, ListenError> {
    let open = |domain: Domain, ip: IpAddr| -> io::Result<Socket> {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        // A restarted agent must not wait for connections of its predecessor to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(sharing == Sharing::WithSuccessor)?;
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

/// Opens a listener whose packets the kernel drops: none is answered, not even with a reset. The steering program redirects to it.
/// It has a network namespace of its own, so it takes no port of the node.
///
/// # Errors
/// The kernel's.
pub(crate) fn discarding() -> io::Result<TcpListener> {
    let open = |domain: Domain, ip: IpAddr| -> io::Result<Socket> {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.attach_filter(&[SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)])?;
        socket.bind(&SocketAddr::new(ip, 0).into())?;
        socket.listen(1)?;
        Ok(socket)
    };
    let in_new_namespace = move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        open(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into())
            .or_else(|_| open(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()))
    };
    // The thread ends in that namespace, which the socket keeps.
    let opened = thread::Builder::new().spawn(in_new_namespace)?.join();
    opened.map_err(|_| io::Error::other("the thread that opens it has panicked"))?.map(Into::into)
}

/// Accepts connections without registering them with a runtime: the thread that will serve one may be another.
#[derive(Debug)]
pub struct Acceptor(AsyncFd<Arc<TcpListener>>);

impl Acceptor {
    /// Polled by the calling thread's runtime.
    ///
    /// # Errors
    /// Fails if memory of the poller is used up.
    pub fn new(listener: Arc<TcpListener>) -> io::Result<Self> {
        // SAFETY: the listener owns its descriptor, is owned by the registration, and is never replaced.
        let registered = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// The next connection and its peer.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn accept(&self) -> io::Result<(std::net::TcpStream, SocketAddr)> {
        self.0.async_io(Interest::READABLE, |listener| accept(listener)).await
    }
}

/// The next connection of a listener that does not block, and its peer.
///
/// # Errors
/// The kernel's; `WouldBlock` if there is none.
pub fn accept(listener: &TcpListener) -> io::Result<(std::net::TcpStream, SocketAddr)> {
    let (socket, peer) = SockRef::from(listener).accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)?;
    let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((socket.into(), peer))
}

/// Returns true if a socket of `netns` listens at `at`. An agent must listen there at `own_port`, for captured connections.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel does not find the agent's listener either.
pub fn has_listener((netns, own_port): (&Netns, u16), host: &HostNetns, at: SocketAddr) -> io::Result<bool> {
    let own = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), own_port);
    host.run_in(netns.file(), || {
        if netlink::is_listening(at)? {
            Ok(true)
        } else if netlink::is_listening(own)? {
            Ok(false)
        } else {
            Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel shows no listener (inet_diag)"))
        }
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_connections_inherit_what_applications_need() {
        let listener: TcpListener = of_applications(0).expect("a port").into();
        let port = listener.local_addr().expect("bound").port();
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("loopback");
        let (accepted, _) = listener.accept().expect("connected");
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().expect("an option"));
        assert!(accepted.out_of_band_inline().expect("an option"));
        assert_eq!(accepted.linger().expect("an option"), Some(Duration::ZERO));
    }
}
