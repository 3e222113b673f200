//! Sockets of the agent inside a pod's network namespace: three listeners, raw sockets, and outgoing connections.
//!
//! They belong to the agent's cgroup, so the pods' cgroup hooks never see them: no mark, no uid, nothing that an
//! application could imitate.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{
        setsockopt,
        sockopt::{IpBindAddressNoPort, TcpCongestion},
    },
};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tacit_abi::{Address, LOOPBACK_UNSENT_BYTES, LOST_CLIENT_MARK, Listener, tcp_port};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
    time::timeout,
};

use super::{
    KernelError, Maps,
    inject::Injector,
    maps::ip,
    netlink,
    netns::{HostNetns, Netns},
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

/// The ports at which listeners may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// At the data path's own ports alone.
    Default,
    /// At a spare one where the own is taken: by the agent from which this one takes over.
    OrSpare,
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
    #[error(
        "listen on port {port} in the pod: {source}; ports 15001, 15002 and 15006 to 15009 are the agent's in an enrolled pod"
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
    /// Opens all three in `netns`, at `ports`. Where they are makes no difference to who is steered to them.
    ///
    /// # Errors
    /// [`ListenError`]; none stays open then.
    pub fn open(netns: &Netns, host: &HostNetns, ports: Ports) -> Result<Self, ListenError> {
        let opened = host.run_in(netns.file(), || {
            // Capture targets are spread over 127.0.0.0/8, and the kernel resets an IPv4 connection that is steered to
            // a socket bound to `::1`: so all listen on all addresses. The steering program refuses what comes from
            // outside to a port that is not to be dialled, and hands captured IPv6 connections, which are spread over
            // ports instead of addresses, to the one listener.
            let capture = of_applications(tcp_port::CAPTURE, ports)?;
            // As the kernel side does for the other ends on loopback; what is accepted inherits it.
            let _ = setsockopt(&capture, TcpCongestion, &LOOPBACK_CONGESTION.into());
            let _ = capture.set_recv_buffer_size(LOOPBACK_UNREAD_BYTES);
            let plaintext = of_applications(tcp_port::PLAINTEXT, ports)?;
            let tunnel = listener(tcp_port::TUNNEL, ports)?;
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
/// not read, or that the agent does not read; and they end with RST however they are closed, also those that nobody has
/// accepted yet when the agent dies.
fn of_applications(port: u16, ports: Ports) -> Result<Socket, ListenError> {
    let listener = listener(port, ports)?;
    let set = || {
        listener.set_tcp_nodelay(true)?;
        listener.set_tcp_notsent_lowat(LOOPBACK_UNSENT_BYTES)?;
        listener.set_linger(Some(Duration::ZERO))
    };
    set().map_err(|source| ListenError::Listen { port, source })?;
    Ok(listener)
}

/// A listener at `port`, or where `ports` lets it be instead.
fn listener(port: u16, ports: Ports) -> Result<Socket, ListenError> {
    match listener_at(port) {
        Err(ListenError::Listen { source, .. })
            if ports == Ports::OrSpare && source.kind() == io::ErrorKind::AddrInUse =>
        {
            listener_at(tcp_port::spare(port))
        }
        opened => opened,
    }
}

/// One socket for both families where the pod has IPv6, else for IPv4.
fn listener_at(port: u16) -> Result<Socket, ListenError> {
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

/// Opens a listener whose packets the kernel drops: none is answered, not even with a reset. The steering program redirects to it.
/// It has a network namespace of its own, so it takes no port of the node.
///
/// # Errors
/// The kernel's.
pub(super) fn discarding() -> io::Result<TcpListener> {
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
pub struct Acceptor(AsyncFd<TcpListener>);

impl Acceptor {
    /// Polled by the calling thread's runtime.
    ///
    /// # Errors
    /// Fails if memory of the poller is used up.
    pub fn new(listener: TcpListener) -> io::Result<Self> {
        // SAFETY: the listener owns its descriptor, is owned by the registration, and is never replaced.
        let registered = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// The next connection and its peer.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn accept(&self) -> io::Result<(std::net::TcpStream, SocketAddr)> {
        self.0
            .async_io(Interest::READABLE, |listener| {
                let (socket, peer) =
                    SockRef::from(listener).accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)?;
                let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
                Ok((socket.into(), peer))
            })
            .await
    }
}

/// A socket in `netns`, ready to connect to an address of `to`'s family.
///
/// # Errors
/// Fails if the namespace cannot be entered or descriptors are used up.
pub fn outgoing(netns: &Netns, host: &HostNetns, to: SocketAddr) -> io::Result<Socket> {
    let open = || Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP));
    let socket = host.run_in(netns.file(), open)??;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A socket in `netns`, ready to dial an application there for `client`.
///
/// It stands at a loopback address, for two reasons. The side that closes first keeps its port for a minute, unless it
/// is a loopback one: then the kernel gives the port away again after a second (`net.ipv4.tcp_tw_reuse`, whose default
/// is loopback alone). From the pod's own address, new connections fell to some 400 a second once 28,000 ports were
/// waiting. And there are many IPv4 loopback addresses, so the ports of one are no bound. The port is left for connect()
/// to choose, which knows the destination: a port chosen by bind() would be unique over all destinations.
///
/// # Errors
/// As [`outgoing`].
pub fn dialer(netns: &Netns, host: &HostNetns, to: SocketAddr, client: SocketAddr) -> io::Result<Socket> {
    let socket = outgoing(netns, host, to)?;
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    // Applications that set this option too may listen on the socket's port while it is in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(loopback_for(to.ip(), client), 0).into())?;
    Ok(socket)
}

/// The loopback address of `to`'s family that dials for `client`.
fn loopback_for(to: IpAddr, client: SocketAddr) -> IpAddr {
    let mut hasher = DefaultHasher::new();
    client.hash(&mut hasher);
    ip(&Address::dial_source(to.is_ipv4(), hasher.finish() as u32))
}

/// Bounds the bytes that `socket` keeps unsent, beside those in flight; `None` leaves that to the kernel.
///
/// # Errors
/// The kernel's.
pub fn limit_unsent_bytes<'s>(socket: impl Into<SockRef<'s>>, most: Option<u32>) -> io::Result<()> {
    // 0 stands for `net.ipv4.tcp_notsent_lowat`.
    socket.into().set_tcp_notsent_lowat(most.unwrap_or(0))
}

/// Bounds the bytes that `socket` keeps for its reader to about `most`, and returns true. A socket that has a bound keeps it.
///
/// # Errors
/// The kernel's.
pub fn bound_unread_bytes<'s>(socket: impl Into<SockRef<'s>>, most: u32) -> io::Result<bool> {
    let socket = socket.into();
    if option(&socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK)? & RECEIVE_BUFFER_LOCKED != 0 {
        return Ok(false);
    }
    socket.set_recv_buffer_size(most as usize)?;
    Ok(true)
}

/// Raises the bound of [`bound_unread_bytes`] to what the kernel grows a buffer to by default. Growth by the kernel would begin
/// at the small window, and take tens of round trips.
///
/// # Errors
/// The kernel's.
pub fn widen_unread_bytes<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<()> {
    let socket = socket.into();
    // The kernel clamps the window to the size that the buffer had before it was bound.
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, WINDOW_MAX_BYTES)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, WIDE_UNREAD_BYTES)
}

/// Ends the bound of [`bound_unread_bytes`]: the kernel grows the buffer with the rate of reading.
///
/// # Errors
/// The kernel's.
pub fn unbound_unread_bytes<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<()> {
    set_option(&socket.into(), libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0)
}

/// Half of the largest receive buffer by the kernel's defaults (`net.ipv4.tcp_rmem`), in bytes; the kernel doubles it.
const WIDE_UNREAD_BYTES: libc::c_int = 3 << 20;
/// More than any receive buffer, in bytes.
const WINDOW_MAX_BYTES: libc::c_int = 1 << 30;
/// `SOCK_RCVBUF_LOCK`: the bit in `SO_BUF_LOCK` of a receive buffer whose size was set.
const RECEIVE_BUFFER_LOCKED: libc::c_int = 2;

fn option(socket: &Socket, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let (mut value, mut size) = (0, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the descriptor is open, and `value` and `size` live through the call; `size` is that of `value`.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut size) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

fn set_option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and `value` lives through the call and has the size that is passed.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The kernel side had no room for the client of a dialled connection.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error(
    "the pod has its share of connections that its applications have not accepted, or the kernel has no memory"
)]
pub struct ClientNotStored;

/// Connects a socket of [`dialer`] within `limit`. It is in `netns`, where the agent listens at `own_port` for captured connections.
///
/// # Errors
/// As [`connected`]; [`ClientNotStored`] inside [`io::ErrorKind::Other`].
pub async fn dialled(
    socket: Socket,
    (netns, own_port): (&Netns, u16),
    host: &HostNetns,
    to: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let is_connected = begin(&socket, to)?;
    if socket.mark()? == LOST_CLIENT_MARK {
        return Err(io::Error::other(ClientNotStored));
    }
    if is_connected {
        return TcpStream::from_std(socket.into());
    }
    // The kernel answers a SYN from `::1` to a closed port of another address with nothing, while IPv4 has a reset. A
    // listener that does not answer either has a full backlog.
    if to.is_ipv6() && matches!(has_listener((netns, own_port), host, to), Ok(false)) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    answered(socket, limit).await
}

/// Connects `socket` within `limit`.
///
/// # Errors
/// The kernel's, or [`io::ErrorKind::TimedOut`].
pub async fn connected(socket: Socket, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    if begin(&socket, to)? {
        return TcpStream::from_std(socket.into());
    }
    answered(socket, limit).await
}

/// Sends the SYN. Returns true if the handshake is over, as on loopback whatever connect() returns.
fn begin(socket: &Socket, to: SocketAddr) -> io::Result<bool> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.peer_addr().is_ok()),
    }
}

/// Waits for the answer to the SYN.
async fn answered(socket: Socket, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(socket.into())?;
    timeout(limit, stream.writable()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
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

/// Writes as much of `slices` as fits. With `more` the last segment waits for what follows at once: more bytes or the end.
///
/// # Errors
/// The kernel's.
#[inline]
pub fn send(socket: &Socket, slices: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
    let flags = if more { libc::MSG_MORE | libc::MSG_NOSIGNAL } else { libc::MSG_NOSIGNAL };
    // The call for one slice copies no list of slices: 0.13 us less.
    let mut full = slices.iter().filter(|slice| !slice.is_empty());
    match (full.next(), full.next()) {
        (Some(slice), None) => socket.send_with_flags(slice, flags),
        _ => socket.send_vectored_with_flags(slices, flags),
    }
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
    connected(outgoing(netns, host, to)?, to, limit).await
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn accepted_connections_inherit_what_applications_need() {
        let listener: TcpListener = of_applications(0, Ports::Default).expect("a port").into();
        let port = listener.local_addr().expect("bound").port();
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("loopback");
        let (accepted, _) = listener.accept().expect("connected");
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().expect("an option"));
        assert_eq!(accepted.linger().expect("an option"), Some(Duration::ZERO));
    }

    #[test]
    fn clients_are_dialled_for_from_many_loopback_addresses() {
        let to = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 2));
        let from: HashSet<_> =
            (1..=1000).map(|port| loopback_for(to, SocketAddr::from(([10, 77, 2, 2], port)))).collect();
        assert!(from.len() > 900, "{}", from.len());
        for address in from {
            let IpAddr::V4(address) = address else { panic!("{address}") };
            assert!(address.octets()[0] == 127 && (64..80).contains(&address.octets()[1]), "{address}");
        }
        let client = SocketAddr::from(([10, 77, 2, 2], 1));
        assert_eq!(loopback_for(Ipv6Addr::LOCALHOST.into(), client), IpAddr::V6(Ipv6Addr::LOCALHOST));
    }
}
