//! Steps around SYN cookies: a flood of SYNs, connections during it, and cookies sent again.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};
use tacit_topology::HANG;

use super::{
    Given, Told, packets, patience, raw,
    sockets::{QUERY, close, connect, stream},
    wait_for_go,
};
use crate::wire;

const TCP: u8 = 6;
const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;
/// SYNs between two pauses, which makes 6,000 a second.
const BURST: u32 = 60;
const PAUSE: Duration = Duration::from_millis(10);
/// Cookies that are sent again. Some of what the kernel sends belongs to connections that it still had room for.
const REPLAYED: usize = 50;
const ETHERNET: usize = 14;

/// Sends SYNs from addresses that nobody has, until the driver says so.
pub(super) fn syns(given: &Given) -> Result<Told> {
    let domain = Domain::for_address(given.target);
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let target = given.target;
    let (stop, stopped) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || -> Result<()> {
        let to = SocketAddr::new(target.ip(), 0).into();
        for number in 0_u32.. {
            // One that finds no room is missing, which the driver's count of cookies shows.
            let _ = socket.send_to(&syn(target, number)?, &to);
            if number % BURST == 0 && stopped.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        Ok(())
    });
    wait_for_go()?;
    drop(stop);
    thread.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
    Ok(Told::Sent)
}

/// A SYN of its own source for each number.
fn syn(target: SocketAddr, number: u32) -> Result<Vec<u8>> {
    let low = number.to_be_bytes();
    let source: IpAddr = if target.is_ipv4() {
        Ipv4Addr::new(10, 77, 192 | low[2] & 63, low[3]).into()
    } else {
        Ipv6Addr::new(0xfd77, 0xf100, 0, 0, 0, 0, (number >> 16) as u16, number as u16).into()
    };
    let mut segment = [(1024 + (number % 60_000) as u16).to_be_bytes(), target.port().to_be_bytes()].concat();
    segment.extend_from_slice(&number.wrapping_mul(2_654_435_761).to_be_bytes());
    // Acknowledgement, 6 words of header, window, checksum, urgent pointer, and the option with the segment size.
    segment.extend_from_slice(&[0, 0, 0, 0, 0x60, SYN, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4]);
    let length = segment.len() as u16;
    let mut pseudo = match (source, target.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets().as_slice(), &to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets().as_slice(), &to.octets()].concat(),
        _ => anyhow::bail!("one family"),
    };
    pseudo.extend_from_slice(&[0, TCP]);
    pseudo.extend_from_slice(&length.to_be_bytes());
    pseudo.extend_from_slice(&segment);
    segment[16..18].copy_from_slice(&raw::checksum(&pseudo).to_be_bytes());
    raw::ip(source, target.ip(), TCP, &segment)
}

/// Opens connections, and has each answered while all are open. Arguments: their number, and the number that must be answered.
pub(super) fn at_once(given: &Given) -> Result<Told> {
    let count: usize = given.extra(0)?.parse().context("number of connections")?;
    let required: usize = given.extra(1)?.parse().context("number of answers")?;
    let query = [QUERY, given.marker.as_slice()].concat();
    let mut open = Vec::new();
    for _ in 0..count {
        let mut socket = stream(given, libc::IPPROTO_TCP)?;
        connect(&socket, given.target)?;
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(HANG))?;
        socket.write_all(&query)?;
        open.push(socket);
    }
    let (mut answered, mut last_error) = (Vec::new(), None);
    for mut socket in open {
        let mut answer = vec![0; given.marker.len()];
        match socket.read_exact(&mut answer) {
            Ok(()) => answered.push(socket),
            Err(error) => last_error = Some(error),
        }
    }
    let number = answered.len();
    if let Some(error) = last_error.filter(|_| number < required) {
        return Ok(Told::Refused(format!("{number} of {count} answered, then {error}")));
    }
    for socket in answered {
        close(socket)?;
    }
    Ok(Told::Sent)
}

/// Sends SYN-ACKs of the kernel again, from the target's port, with the marker in their TCP options.
pub(super) fn replayed_cookies(given: &Given) -> Result<Told> {
    let all = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)))?;
    socket.set_read_timeout(Some(patience()?))?;
    let (mut frame, mut sent) = ([0; 2048], 0);
    while sent < REPLAYED {
        let (length, from) = wire::receive(&socket, &mut frame)?.context("no frame came")?;
        if from.sll_pkttype != libc::PACKET_OUTGOING {
            continue;
        }
        let frame = frame.get(..length).unwrap_or_default();
        if let Some(again) = with_marker(frame, given.target.port(), &given.marker) {
            packets::send_whole(&again)?;
            sent += 1;
        }
    }
    Ok(Told::Sent)
}

/// Returns a SYN-ACK from `port` with the marker as an option; `None` for another frame, or one that has the marker.
fn with_marker(frame: &[u8], port: u16, marker: &[u8]) -> Option<Vec<u8>> {
    const OPTIONS: usize = 40;
    let is_v4 = frame.get(12..ETHERNET)? == [0x08, 0x00];
    let tcp = ETHERNET + if is_v4 { 20 } else { 40 };
    let header = frame.get(tcp..tcp + 20)?;
    if header[..2] != port.to_be_bytes() || header[13] & SYN_ACK != SYN_ACK || header[12] >> 4 == 15 {
        return None;
    }
    let mut again = frame[..tcp + 20].to_vec();
    again[tcp + 12] = 0xf0;
    // An experimental option, then nothing.
    again.extend_from_slice(&[253, 2 + marker.len() as u8]);
    again.extend_from_slice(marker);
    again.resize(tcp + 20 + OPTIONS, 1);
    if is_v4 {
        again[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&((20 + 20 + OPTIONS) as u16).to_be_bytes());
        again[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&[0, 0]);
        let sum = raw::checksum(&again[ETHERNET..ETHERNET + 20]).to_be_bytes();
        again[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum);
    } else {
        again[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&((20 + OPTIONS) as u16).to_be_bytes());
    }
    Some(again)
}
