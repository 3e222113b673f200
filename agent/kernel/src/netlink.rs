//! Questions to the kernel over netlink, and one order: which interfaces a namespace has and in which namespace their
//! other ends are, which TCP connections it has, and that one of them shall end.
//!
//! The namespace is the calling thread's. Answers are parsed with every length checked.

mod interfaces;
mod sockets;

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

pub(crate) use interfaces::{Interface, interfaces, netns_id};
pub(crate) use sockets::{Connection, connections, destroy, is_listening, listener_at, listeners, reset_own};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
pub(super) const NLM_F_DUMP: u16 = 0x300;
const NLM_HEADER: usize = 16;
/// Attributes and messages begin at multiples of this.
const ALIGN: usize = 4;
/// The kernel fills dumps up to 32 KiB at a time.
const BUFFER: usize = 64 * 1024;

/// A netlink socket in the calling thread's namespace.
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    pub(super) fn open(protocol: SockProtocol) -> io::Result<Self> {
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?))
    }

    /// A socket for questions about sockets.
    pub(super) fn sock_diag() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkSockDiag)
    }

    /// Sends one request and hands every message of the answer to `each`.
    fn ask(&self, kind: u16, flags: u16, body: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let all = |kind: u16, body: &[u8]| {
            each(kind, body);
            ControlFlow::Continue(())
        };
        self.ask_until(kind, flags, body, all).map(drop)
    }

    /// As [`Self::ask`], until `each` breaks. The socket has the rest of the answer then, and is of no use any more.
    pub(super) fn ask_until(
        &self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]) -> ControlFlow<()>,
    ) -> io::Result<ControlFlow<()>> {
        let mut request = Vec::with_capacity(NLM_HEADER + body.len());
        request.extend_from_slice(&((NLM_HEADER + body.len()) as u32).to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        request.extend_from_slice(body);
        sendto(self.0.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let len = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            match read(buffer.get(..len).unwrap_or_default(), &mut each)? {
                Answer::Partial => {}
                Answer::Complete => return Ok(ControlFlow::Continue(())),
                Answer::Stopped => return Ok(ControlFlow::Break(())),
            }
        }
    }
}

/// The state of an answer after a datagram.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Partial,
    Complete,
    /// The rest is not wanted.
    Stopped,
}

/// Goes through the messages of one datagram.
fn read(mut datagram: &[u8], each: &mut impl FnMut(u16, &[u8]) -> ControlFlow<()>) -> io::Result<Answer> {
    while !datagram.is_empty() {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed netlink message");
        let len = u32_at(datagram, 0).ok_or_else(malformed)? as usize;
        let kind = u16_at(datagram, 4).ok_or_else(malformed)?;
        let body = datagram.get(NLM_HEADER..len).ok_or_else(malformed)?;
        match kind {
            NLMSG_DONE => return Ok(Answer::Complete),
            NLMSG_ERROR => {
                let code = u32_at(body, 0).ok_or_else(malformed)? as i32;
                return if code == 0 {
                    Ok(Answer::Complete)
                } else {
                    Err(io::Error::from_raw_os_error(-code))
                };
            }
            _ => {
                if each(kind, body).is_break() {
                    return Ok(Answer::Stopped);
                }
            }
        }
        datagram = datagram.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
    Ok(Answer::Partial)
}

/// The attributes of a message; the rest of a malformed one is left out.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_messages_are_errors_or_nothing() {
        let mut message = Vec::new();
        message.extend_from_slice(&20_u32.to_ne_bytes());
        message.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
        message.extend_from_slice(&[0; 14]);
        let mut go_on = |_: u16, _: &[u8]| ControlFlow::Continue(());
        assert_eq!(read(&message, &mut go_on).expect("well-formed"), Answer::Complete);
        for len in 1..message.len() {
            assert!(read(&message[..len], &mut go_on).is_err(), "{len}");
        }
        for bytes in [&[][..], &[4], &[3, 0, 1, 0], &[200, 0, 1, 0, 5]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
