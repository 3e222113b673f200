//! Urgent data (MSG_OOB), as programs send and receive it.

use crate::event::Reporter;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send};
use serde_json::json;
use socket2::SockRef;
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::AsRawFd as _,
    time::Duration,
};

/// Limit for one wait, for hangs only.
const WAIT: Duration = Duration::from_secs(60);
/// The urgent byte of a bulk transfer.
const MARK: u8 = b'!';

/// The way in which a program receives.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Receive {
    /// Without SO_OOBINLINE, when everything has come.
    Beside,
    /// With SO_OOBINLINE, when everything has come.
    Inline,
    /// As [`Self::Beside`], with urgent data that is read only behind the stream.
    Never,
}

impl Receive {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "beside" => Self::Beside,
            "inline" => Self::Inline,
            "never" => Self::Never,
            _ => return None,
        })
    }
}

/// Sends `text`, whose last byte is urgent.
pub(crate) fn send_text(stream: &TcpStream, text: &str) -> io::Result<()> {
    send(stream.as_raw_fd(), text.as_bytes(), MsgFlags::MSG_OOB)?;
    Ok(())
}

/// Waits until the other side has ended its direction, and prints `received` {epoll, beside, chunks}: the reported events, what
/// recv() with MSG_OOB returned, and what each other call returned.
pub(crate) fn receive(mut stream: &TcpStream, how: Receive, reporter: &Reporter) -> io::Result<()> {
    SockRef::from(stream).set_out_of_band_inline(matches!(how, Receive::Inline))?;
    let events = wait_for_end(stream)?;
    let beside = |is_now: bool| {
        let mut byte = [0; 4];
        let received = is_now.then(|| recv(stream.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB));
        received.map(|received| match received {
            Ok(count) => String::from_utf8_lossy(&byte[..count]).into_owned(),
            Err(error) => format!("{error:?}"),
        })
    };
    let before = beside(!matches!(how, Receive::Never));
    let (mut chunks, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        chunks.push(String::from_utf8_lossy(&buffer[..read]).into_owned());
    }
    let after = beside(true);
    let seen = json!({ "epoll": format!("{events:?}"), "before": before, "chunks": chunks, "after": after });
    reporter.emit("received", seen);
    Ok(())
}

/// Waits for the end of the other side's direction. Returns all events that are reported then.
fn wait_for_end(stream: &TcpStream) -> io::Result<EpollFlags> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let interest = |events| EpollEvent::new(events, 0);
    epoll.add(stream, interest(EpollFlags::EPOLLRDHUP))?;
    let mut events = [EpollEvent::empty()];
    let wait = EpollTimeout::try_from(WAIT).map_err(io::Error::other)?;
    epoll.wait(&mut events, wait)?;
    let all = EpollFlags::EPOLLIN | EpollFlags::EPOLLPRI | EpollFlags::EPOLLRDHUP;
    epoll.modify(stream, &mut interest(all))?;
    epoll.wait(&mut events, wait)?;
    Ok(events[0].events())
}

/// Sends `bytes`, one urgent byte, and `bytes` again.
pub(crate) fn send_bulk(mut stream: &TcpStream, bytes: usize) -> io::Result<()> {
    stream.write_all(&pattern(bytes))?;
    send(stream.as_raw_fd(), &[MARK], MsgFlags::MSG_OOB)?;
    stream.write_all(&pattern(bytes))
}

/// Reads what [`send_bulk`] sends, with SO_OOBINLINE. Prints `bulk-received` {bytes, intact, marked}: the last is true if a read
/// ended at the mark.
pub(crate) fn receive_bulk(mut stream: &TcpStream, bytes: usize, reporter: &Reporter) -> io::Result<()> {
    SockRef::from(stream).set_out_of_band_inline(true)?;
    let (mut all, mut is_marked, mut buffer) = (Vec::<u8>::new(), false, vec![0; 7000]);
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        all.extend(&buffer[..read]);
        is_marked |= all.len() == bytes;
    }
    let is_intact = all == [pattern(bytes), vec![MARK], pattern(bytes)].concat();
    reporter.emit("bulk-received", json!({ "bytes": all.len(), "intact": is_intact, "marked": is_marked }));
    Ok(())
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 251) as u8).collect()
}
