//! Steps that use up a share, without a privilege. Each fills the share, waits for the driver, begins one more use, waits
//! again, and reports the result of that use.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, setgid, setuid},
};
use socket2::{Domain, Socket, Type};
use tacit_topology::HANG;

use super::{Given, Told, raw, sockets::QUERY, wait_for_go};

/// Descriptors of a step: above every share.
const DESCRIPTORS: u64 = 16_384;
/// The user of the processes that fill shares. It has no privilege.
const USER: u32 = 1000;
/// First bytes of a handshake record whose announced length is never sent.
const HELLO: [u8; 5] = [0x16, 3, 1, 2, 0];
/// Time between two looks for connections that the agent has closed.
const PAUSE: Duration = Duration::from_millis(10);
/// Ports of the datagram flows whose answers come late.
const EARLY: std::ops::Range<u16> = 21_000..21_064;
/// Ports of the datagram flows after them: six for each flow that the kernel remembers of a pod.
const LATER: std::ops::Range<u16> = 22_000..28_144;

/// Opens connections to the target and waits for none. Arguments: their number, and the destination of the next one.
pub(super) fn connects(given: &Given) -> Result<Told> {
    unprivileged()?;
    let (count, next) = (number(given)?, given.extra(1)?.parse().context("next destination")?);
    let mut open = Vec::new();
    begin_many(given.target, count, &mut open);
    wait_for_go()?;
    begin_many(given.target, count, &mut open);
    let last = begin(next);
    wait_for_go()?;
    let Ok(last) = last else {
        // It has failed at once, and does so still.
        begin_many(given.target, count, &mut open);
        return begin(next).map_or_else(|error| refused(open.len(), &error), |_| Ok(Told::Sent));
    };
    match last.take_error()? {
        Some(error) => refused(open.len(), &error),
        None if last.peer_addr().is_ok() => Ok(Told::Sent),
        None => refused(open.len(), &"the next one is not answered"),
    }
}

/// Opens connections to the target, one after the other, until one fails. Argument: their number.
pub(super) fn connections(given: &Given) -> Result<Told> {
    unprivileged()?;
    let mut open = Vec::new();
    while open.len() < number(given)? {
        match opened(given.target) {
            Ok(socket) => open.push(socket),
            Err(_) => break,
        }
    }
    wait_for_go()?;
    let next = opened(given.target);
    wait_for_go()?;
    // Before the victim's flow, and after it.
    match (next, opened(given.target)) {
        (Err(_), Err(error)) => refused(open.len(), &error),
        _ => Ok(Told::Sent),
    }
}

/// Begins handshakes at the target and never goes on; those that the agent closes are replaced. Argument: their number. The
/// next use is a record that every server answers: with the rest of it, or with an alert.
pub(super) fn handshakes(given: &Given) -> Result<Told> {
    unprivileged()?;
    let mut open: Vec<Socket> =
        (0..number(given)?).map(|_| half_open(given.target)).collect::<Result<_>>()?;
    let count = open.len();
    let (stop, stopped) = mpsc::channel::<()>();
    let target = given.target;
    let thread = std::thread::spawn(move || {
        while stopped.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
            open.retain_mut(is_silent);
            while open.len() < count {
                // One that finds no room is tried again.
                let Ok(socket) = half_open(target) else { break };
                open.push(socket);
            }
        }
    });
    wait_for_go()?;
    let mut last = opened(given.target)?;
    last.write_all(&[QUERY, b"no handshake"].concat())?;
    last.set_nonblocking(true)?;
    wait_for_go()?;
    let answer = last.read(&mut [0; 256]);
    drop(stop);
    thread.join().map_err(|_| anyhow::anyhow!("the thread that holds handshakes panicked"))?;
    match answer {
        Ok(1..) => Ok(Told::Sent),
        Ok(0) => refused(count, &"the next one is closed without an answer"),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            refused(count, &"the next one is not answered")
        }
        Err(error) => refused(count, &error),
    }
}

/// Sends datagrams of many flows to the target. The answers to the first flows come after all others were sent, and that to
/// the last flow after them.
pub(super) fn answers(given: &Given) -> Result<Told> {
    unprivileged()?;
    let early = EARLY.map(|port| sent_from(port, given)).collect::<Result<Vec<_>>>()?;
    LATER.clone().try_for_each(|port| sent_from(port, given).map(drop))?;
    wait_for_go()?;
    let last = sent_from(EARLY.end, given)?;
    wait_for_go()?;
    last.set_read_timeout(Some(HANG))?;
    last.recv(&mut [0; 64]).context("the answer to the last flow")?;
    let is_answered = |socket: &&UdpSocket| -> bool {
        socket.set_nonblocking(true).is_ok_and(|()| socket.recv(&mut [0; 64]).is_ok())
    };
    let (answered, count) = (early.iter().filter(is_answered).count(), early.len());
    if answered == count {
        return Ok(Told::Sent);
    }
    Ok(Told::Refused(format!("{answered} of {count} early flows got their answers")))
}

/// Sends the answers for [`answers`] to the target's address, in the name of the argument.
pub(super) fn late_answers(given: &Given) -> Result<Told> {
    let source: SocketAddr = given.extra(0)?.parse().context("source address")?;
    (EARLY.start..=EARLY.end).try_for_each(|port| {
        let to = SocketAddr::new(given.target.ip(), port);
        raw::send_udp(source, to, &given.marker)
    })?;
    Ok(Told::Sent)
}

/// A datagram whose answer comes when the driver says so. Argument: the own port.
pub(super) fn late_answer(given: &Given) -> Result<Told> {
    let socket = sent_from(given.extra(0)?.parse().context("own port")?, given)?;
    wait_for_go()?;
    socket.set_read_timeout(Some(super::patience()?))?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer)?;
    let is_ours = answer.get(..length) == Some(given.marker.as_slice());
    Ok(if is_ours { Told::Sent } else { Told::Refused("another answer came".to_owned()) })
}

/// Listens and accepts nothing, until the driver says so. Arguments: the length of the queue of each port, as `PORT:LENGTH`.
pub(super) fn listen(given: &Given) -> Result<Told> {
    let mut listeners = Vec::new();
    for text in &given.extra {
        let (port, length) = text.split_once(':').context("PORT:LENGTH")?;
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port.parse()?).into())?;
        socket.listen(length.parse()?)?;
        listeners.push(socket);
    }
    wait_for_go()?;
    Ok(Told::Sent)
}

/// Raises the limit of descriptors, and gives up all privileges.
fn unprivileged() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS)?;
    setgid(Gid::from_raw(USER))?;
    setuid(Uid::from_raw(USER))
}

fn number(given: &Given) -> Result<usize> {
    given.extra(0)?.parse().context("number of connections")
}

fn refused(held: usize, why: &dyn std::fmt::Display) -> Result<Told> {
    Ok(Told::Refused(format!("{held} held, {why}")))
}

/// Begins connections until `open` has `count` or one fails at once. Those that have failed are replaced.
fn begin_many(target: SocketAddr, count: usize, open: &mut Vec<Socket>) {
    open.retain(|socket| socket.take_error().is_ok_and(|error| error.is_none()));
    while open.len() < count
        && let Ok(socket) = begin(target)
    {
        open.push(socket);
    }
}

/// Begins a connection without waiting for its end.
fn begin(target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

fn opened(target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.connect_timeout(&target.into(), HANG)?;
    socket.set_nonblocking(false)?;
    Ok(socket)
}

fn half_open(target: SocketAddr) -> Result<Socket> {
    let mut socket = opened(target)?;
    socket.write_all(&HELLO)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Returns true if the other end neither answers nor ends the connection.
fn is_silent(socket: &mut Socket) -> bool {
    matches!(socket.read(&mut [0; 1]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

/// A socket at `port`, from which the marker was sent to the target.
fn sent_from(port: u16, given: &Given) -> Result<UdpSocket> {
    let own: IpAddr = match given.target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((own, port)).with_context(|| format!("bind to port {port}"))?;
    socket.send_to(&given.marker, given.target)?;
    Ok(socket)
}
