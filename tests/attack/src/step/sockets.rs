//! Steps by sockets: every way to connect and send that the system has.

use std::{
    io::{self, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use socket2::{Domain, MsgHdr, Protocol, SockAddr, Socket, Type};
use tacit_topology::within;

use super::{Given, Told, patience, wait_for_go};

/// Start of a datagram that the server answers with the rest of it.
pub(super) const QUERY: &[u8] = b"?";

pub(super) fn stream(given: &Given, protocol: i32) -> io::Result<Socket> {
    Socket::new(Domain::for_address(given.target), Type::STREAM, Some(Protocol::from(protocol)))
}

fn datagram(given: &Given, protocol: i32) -> io::Result<Socket> {
    Socket::new(Domain::for_address(given.target), Type::DGRAM, Some(Protocol::from(protocol)))
}

/// Writes the marker, ends the sending side, and waits for the other end to do so.
fn finish(mut socket: Socket, marker: &[u8]) -> Result<Told> {
    socket.set_nonblocking(false)?;
    socket.write_all(marker)?;
    close(socket)
}

pub(super) fn close(mut socket: Socket) -> Result<Told> {
    socket.shutdown(std::net::Shutdown::Write)?;
    socket.set_read_timeout(Some(patience()?))?;
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest)?;
    Ok(Told::Sent)
}

pub(super) fn connect(socket: &Socket, target: SocketAddr) -> Result<()> {
    Ok(socket.connect_timeout(&target.into(), patience()?)?)
}

pub(super) fn tcp(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    connect(&socket, given.target)?;
    finish(socket, &given.marker)
}

pub(super) fn mptcp(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_MPTCP)?;
    connect(&socket, given.target)?;
    finish(socket, &given.marker)
}

pub(super) fn sctp(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_SCTP)?;
    connect(&socket, given.target)?;
    (&socket).write_all(&given.marker)?;
    Ok(Told::Sent)
}

pub(super) fn dccp(given: &Given) -> Result<Told> {
    let socket = dccp_socket(Domain::for_address(given.target))?;
    connect(&socket, given.target)?;
    (&socket).write_all(&given.marker)?;
    Ok(Told::Sent)
}

/// A DCCP socket; both ends have to name the same service.
pub(super) fn dccp_socket(domain: Domain) -> io::Result<Socket> {
    const SOCK_DCCP: i32 = 6;
    const SOL_DCCP: i32 = 269;
    const DCCP_SOCKOPT_SERVICE: i32 = 2;
    const SERVICE: u32 = 42_u32.to_be();
    let socket = Socket::new(domain, Type::from(SOCK_DCCP), Some(Protocol::from(libc::IPPROTO_DCCP)))?;
    set(&socket, SOL_DCCP, DCCP_SOCKOPT_SERVICE, &SERVICE)?;
    Ok(socket)
}

pub(super) fn udp(given: &Given) -> Result<Told> {
    let socket = datagram(given, libc::IPPROTO_UDP)?;
    socket.set_broadcast(true)?;
    socket.send_to(&given.marker, &given.target.into())?;
    Ok(Told::Sent)
}

/// A datagram that the other end answers, and its answer.
pub(super) fn query(given: &Given) -> Result<Told> {
    let mut socket = datagram(given, libc::IPPROTO_UDP)?;
    socket.set_read_timeout(Some(patience()?))?;
    let query = [QUERY, given.marker.as_slice()].concat();
    socket.send_to(&query, &given.target.into())?;
    let mut answer = [0; 256];
    let length = socket.read(&mut answer)?;
    let is_ours = answer.get(..length) == Some(given.marker.as_slice());
    Ok(if is_ours { Told::Sent } else { Told::Refused("another answer came".to_owned()) })
}

pub(super) fn udplite(given: &Given) -> Result<Told> {
    datagram(given, libc::IPPROTO_UDPLITE)?.send_to(&given.marker, &given.target.into())?;
    Ok(Told::Sent)
}

/// The payload goes with the SYN.
pub(super) fn fastopen_sendto(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    socket.send_to_with_flags(&given.marker, &given.target.into(), libc::MSG_FASTOPEN)?;
    close(socket)
}

pub(super) fn fastopen_sendmsg(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    let address: SockAddr = given.target.into();
    let buffers = [io::IoSlice::new(&given.marker)];
    socket.sendmsg(&MsgHdr::new().with_addr(&address).with_buffers(&buffers), libc::MSG_FASTOPEN)?;
    close(socket)
}

/// connect() returns at once; the SYN goes with the first write.
pub(super) fn fastopen_connect(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    set(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, &1_i32)?;
    socket.connect(&given.target.into())?;
    finish(socket, &given.marker)
}

pub(super) fn io_uring(given: &Given) -> Result<Told> {
    use io_uring::{IoUring, opcode, types::Fd};
    let socket = stream(given, libc::IPPROTO_TCP)?;
    let (fd, address) = (Fd(socket.as_raw_fd()), SockAddr::from(given.target));
    let mut ring = IoUring::new(2)?;
    let submit = |ring: &mut IoUring, entry: io_uring::squeue::Entry| -> io::Result<i32> {
        // SAFETY: what the entry points to outlives the wait below.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let result = ring.completion().next().map_or(0, |completion| completion.result());
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
    };
    submit(&mut ring, opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build())?;
    let length = given.marker.len() as u32;
    submit(&mut ring, opcode::Send::new(fd, given.marker.as_ptr(), length).build())?;
    close(socket)
}

/// A socket that was connected elsewhere, disconnected, and connected again.
pub(super) fn unspec(given: &Given) -> Result<Told> {
    let own: IpAddr =
        if given.target.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let listener = TcpListener::bind(SocketAddr::new(own, 0))?;
    let socket = stream(given, libc::IPPROTO_TCP)?;
    connect(&socket, listener.local_addr()?)?;
    // SAFETY: all-zero is a valid `sockaddr`, of the family AF_UNSPEC.
    let nowhere: libc::sockaddr = unsafe { MaybeUninit::zeroed().assume_init() };
    let size = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: the address is of the size given and lives through the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size) };
    if result != 0 {
        return Err(io::Error::last_os_error().into());
    }
    connect(&socket, given.target)?;
    finish(socket, &given.marker)
}

/// First argument: the pod's own address to bind to.
pub(super) fn bound(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    let own: SocketAddr = given.extra(0)?.parse().context("own address")?;
    // The port of an earlier run may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&own.into())?;
    connect(&socket, given.target)?;
    finish(socket, &given.marker)
}

pub(super) fn bound_to_device(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    socket.bind_device(Some(b"eth0"))?;
    connect(&socket, given.target)?;
    finish(socket, &given.marker)
}

/// First argument: an address that is not the pod's.
pub(super) fn transparent(given: &Given) -> Result<Told> {
    let socket = datagram(given, libc::IPPROTO_UDP)?;
    let foreign: SocketAddr = given.extra(0)?.parse().context("foreign address")?;
    if given.target.is_ipv4() {
        set(&socket, libc::SOL_IP, libc::IP_TRANSPARENT, &1_i32)?;
    } else {
        set(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, &1_i32)?;
    }
    socket.bind(&foreign.into())?;
    socket.send_to(&given.marker, &given.target.into())?;
    Ok(Told::Sent)
}

/// Every mark of 12 bits: what a mesh might let pass by its own mark.
pub(super) fn marks_udp(given: &Given) -> Result<Told> {
    let socket = datagram(given, libc::IPPROTO_UDP)?;
    let mut last = Told::Refused("no packet was taken".to_owned());
    for mark in 0..0x1000 {
        socket.set_mark(mark)?;
        if socket.send_to(&given.marker, &given.target.into()).is_ok() {
            last = Told::Sent;
        }
    }
    Ok(last)
}

/// Each bit of the mark alone, and all of them.
pub(super) fn marks_tcp(given: &Given) -> Result<Told> {
    let mut last = Told::Sent;
    for mark in (0..12).map(|bit| 1 << bit).chain([0xfff]) {
        let socket = stream(given, libc::IPPROTO_TCP)?;
        socket.set_mark(mark)?;
        connect(&socket, given.target)?;
        last = finish(socket, &given.marker)?;
    }
    Ok(last)
}

/// A datagram of three packets; the marker is in the last.
pub(super) fn fragments(given: &Given) -> Result<Told> {
    let mut large = vec![b'.'; 4000];
    large.extend_from_slice(&given.marker);
    datagram(given, libc::IPPROTO_UDP)?.send_to(&large, &given.target.into())?;
    Ok(Told::Sent)
}

/// Options before UDP, so that its header is not where it usually is.
pub(super) fn extension_headers(given: &Given) -> Result<Told> {
    /// Next header (the kernel's business), length, and six bytes of padding.
    const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    let socket = datagram(given, libc::IPPROTO_UDP)?;
    for option in [libc::IPV6_HOPOPTS, libc::IPV6_DSTOPTS] {
        set(&socket, libc::SOL_IPV6, option, &PADDING)?;
    }
    socket.send_to(&given.marker, &given.target.into())?;
    Ok(Told::Sent)
}

/// Both ends connect to each other. First argument: the own end. Waits for the driver between SYN and answer.
pub(super) fn simultaneous(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    let own: SocketAddr = given.extra(0)?.parse().context("own address")?;
    socket.set_reuse_address(true)?;
    socket.bind(&own.into())?;
    socket.set_nonblocking(true)?;
    match socket.connect(&given.target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error.into()),
        _ => {}
    }
    wait_for_go()?;
    // The first SYN is lost; it is repeated after a second.
    let met = within(patience()?, || {
        socket.take_error()?.map_or(Ok(()), Err)?;
        Ok(socket.peer_addr().is_ok().then_some(()))
    });
    match met {
        Ok(Some(())) => finish(socket, &given.marker),
        Ok(None) => Ok(Told::Refused("the other end never came".to_owned())),
        Err(error) => Ok(Told::Refused(error.to_string())),
    }
}

/// Connects, and sends when the driver says so.
pub(super) fn hold(given: &Given) -> Result<Told> {
    let socket = stream(given, libc::IPPROTO_TCP)?;
    connect(&socket, given.target)?;
    wait_for_go()?;
    finish(socket, &given.marker)
}

/// Sends through a socket that another process made and passes over stdin. A datagram socket is not connected.
pub(super) fn passed_fd(given: &Given) -> Result<Told> {
    println!("waiting");
    io::stdout().flush()?;
    let socket = receive_fd()?;
    if socket.r#type()? == Type::DGRAM {
        socket.send_to(&given.marker, &given.target.into())?;
        return Ok(Told::Sent);
    }
    // One that never came to be connected would be waited for.
    socket.set_write_timeout(Some(patience()?))?;
    (&socket).write_all(&given.marker)?;
    Ok(Told::Sent)
}

fn receive_fd() -> Result<Socket> {
    let mut byte = [0; 1];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(0, &mut buffers, Some(&mut space), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(fd) = descriptors.first()
        {
            // SAFETY: the kernel just gave us this descriptor.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) }.into());
        }
    }
    anyhow::bail!("no descriptor came with the message")
}

pub(super) fn set<T>(socket: &Socket, level: i32, name: i32, value: &T) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is of the size given and lives through the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
