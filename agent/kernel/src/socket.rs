//! Sockets of the agent inside a pod's network namespace: listeners, raw sockets, and outgoing connections.
//!
//! They belong to the agent's cgroup, so the pods' cgroup hooks never see them: no mark, no uid, nothing that an
//! application could imitate.

use std::{
    future::poll_fn,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tacit_abi::{Address, LOST_CLIENT_MARK};
use tokio::time::timeout;

use super::{
    maps::ip,
    netns::{HostNetns, Netns},
};

mod app_stream;
mod foreign;
mod listeners;
pub mod peer;

pub use app_stream::{AppStream, Polled, send_urgent};
pub use foreign::foreign_listener;
pub(super) use listeners::discarding;
pub use listeners::{
    Acceptor, LOOPBACK_UNREAD_BYTES, ListenError, Listeners, accept, answering_listener, has_listener,
};

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
    app_stream::keep_urgent_inline(&socket)?;
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
) -> io::Result<AppStream> {
    let is_connected = begin(&socket, to)?;
    if socket.mark()? == LOST_CLIENT_MARK {
        return Err(io::Error::other(ClientNotStored));
    }
    if is_connected {
        return AppStream::of(socket);
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
pub async fn connected<S: Polled>(socket: Socket, to: SocketAddr, limit: Duration) -> io::Result<S> {
    if begin(&socket, to)? {
        return S::of(socket);
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
async fn answered<S: Polled>(socket: Socket, limit: Duration) -> io::Result<S> {
    let stream = S::of(socket)?;
    timeout(limit, poll_fn(|cx| stream.poll_write_ready(cx)))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    match SockRef::from(&stream).take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
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

/// A socket in `netns`, ready to connect to an application at `to` as plaintext.
///
/// # Errors
/// As [`outgoing`].
pub fn plaintext(netns: &Netns, host: &HostNetns, to: SocketAddr) -> io::Result<Socket> {
    let socket = outgoing(netns, host, to)?;
    app_stream::keep_urgent_inline(&socket)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        net::{Ipv4Addr, Ipv6Addr},
    };

    use super::*;

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
