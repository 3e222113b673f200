//! Questions to the kernel over netlink, and one order: which interfaces a namespace has and in which namespace their
//! other ends are, which TCP connections it has, and that one of them shall end.
//!
//! The namespace is the calling thread's. Answers are parsed with every length checked.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    ops::ControlFlow,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

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

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const IFINFO: usize = 16;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
/// `struct rtgenmsg`, padded.
const RTGENMSG: usize = 4;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINK_NETNSID: u16 = 37;
const ARPHRD_ETHER: u16 = 1;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `struct inet_diag_req_v2`; its last 48 bytes are the socket's id, as in the answer.
const DIAG_REQUEST: usize = 56;
const DIAG_ID: usize = 48;
/// `struct inet_diag_msg`.
const DIAG_ANSWER: usize = 72;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// All states of TCP but LISTEN, TIME_WAIT and CLOSE.
const OPEN_STATES: u32 = 0xfff & !(LISTEN_STATE | 1 << 6 | 1 << 7 | 1);
const LISTEN_STATE: u32 = 1 << 10;

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    /// Index of what it is linked to: of a veth or netkit, its other end, in that end's namespace.
    pub(super) linked: Option<u32>,
    /// Number that this namespace has for the one of the other end; `None` where the other end is in this one.
    pub(super) linked_netns: Option<i32>,
    /// Index of the bridge or other device that it is a port of.
    pub(super) master: Option<u32>,
    /// Hardware address of an Ethernet interface.
    pub(super) hardware: Option<[u8; 6]>,
    /// The kernel's name of its kind, such as `veth`; empty for hardware.
    pub(super) kind: String,
    pub(super) is_ethernet: bool,
}

/// The interfaces of the calling thread's namespace.
///
/// # Errors
/// The kernel's.
pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    let mut found = Vec::new();
    netlink.ask(RTM_GETLINK, NLM_F_DUMP, &[0; IFINFO], |kind, body| {
        if kind == RTM_NEWLINK {
            found.extend(interface(body));
        }
    })?;
    Ok(found)
}

fn interface(body: &[u8]) -> Option<Interface> {
    let index = u32_at(body, 4)?;
    let is_ethernet = u16_at(body, 2)? == ARPHRD_ETHER;
    let mut interface = Interface { index, is_ethernet, ..Interface::default() };
    for (kind, value) in attributes(body.get(IFINFO..)?) {
        match kind {
            IFLA_IFNAME => {
                let text = value.strip_suffix(&[0]).unwrap_or(value);
                interface.name = String::from_utf8_lossy(text).into_owned();
            }
            IFLA_LINK => interface.linked = u32_at(value, 0),
            IFLA_LINK_NETNSID => interface.linked_netns = u32_at(value, 0).map(|id| id as i32),
            IFLA_MASTER => interface.master = u32_at(value, 0),
            IFLA_ADDRESS if is_ethernet => interface.hardware = value.try_into().ok(),
            IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                let text = kind.map_or(&[][..], |(_, text)| text.strip_suffix(&[0]).unwrap_or(text));
                interface.kind = String::from_utf8_lossy(text).into_owned();
            }
            _ => {}
        }
    }
    Some(interface)
}

/// The number that the calling thread's namespace has for `netns`; `None` while it has none, which is while none of its
/// interfaces has the other end there.
///
/// # Errors
/// The kernel's.
pub(super) fn netns_id(netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    let mut body = [0; RTGENMSG + 8];
    body[RTGENMSG..RTGENMSG + 2].copy_from_slice(&8_u16.to_ne_bytes());
    body[RTGENMSG + 2..RTGENMSG + 4].copy_from_slice(&NETNSA_FD.to_ne_bytes());
    body[RTGENMSG + 4..].copy_from_slice(&netns.as_raw_fd().to_ne_bytes());
    let mut found = None;
    // With an acknowledgement, so that the answer ends.
    netlink.ask(RTM_GETNSID, NLM_F_ACK, &body, |kind, body| {
        if kind == RTM_NEWNSID
            && let Some(rest) = body.get(RTGENMSG..)
        {
            let id = attributes(rest).find(|(kind, _)| *kind == NETNSA_NSID);
            found = id.and_then(|(_, value)| u32_at(value, 0)).map(|id| id as i32).filter(|id| *id >= 0);
        }
    })?;
    Ok(found)
}

/// A TCP connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connection {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// Id of its socket's cgroup; `None` on kernels that do not tell.
    pub(super) cgroup: Option<u64>,
    family: u8,
    id: [u8; DIAG_ID],
}

/// The open TCP connections of the calling thread's namespace.
///
/// # Errors
/// The kernel's.
pub(super) fn connections() -> io::Result<Vec<Connection>> {
    sockets(OPEN_STATES)
}

/// The listening TCP sockets of the calling thread's namespace.
///
/// # Errors
/// The kernel's.
pub(super) fn listeners() -> io::Result<Vec<Connection>> {
    sockets(LISTEN_STATE)
}

/// Returns true if a socket of the calling thread's namespace listens at `at`. The kernel looks for this one alone, however many
/// sockets listen. Without its `inet_diag` module it finds none.
///
/// # Errors
/// The kernel's.
pub(super) fn is_listening(at: SocketAddr) -> io::Result<bool> {
    listener_at(&Netlink::sock_diag()?, at).map(|found| found.is_some())
}

/// Returns the socket of the calling thread's namespace that listens at `at`. As [`is_listening`].
///
/// # Errors
/// The kernel's.
pub(super) fn listener_at(netlink: &Netlink, at: SocketAddr) -> io::Result<Option<Connection>> {
    let mut id = [0; DIAG_ID];
    id[..2].copy_from_slice(&at.port().to_be_bytes());
    // The other end is a loopback address without a port, which no connection has.
    let family = match at.ip() {
        IpAddr::V4(ip) => {
            id[4..8].copy_from_slice(&ip.octets());
            id[20..24].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
            libc::AF_INET
        }
        IpAddr::V6(ip) => {
            id[4..20].copy_from_slice(&ip.octets());
            id[20..36].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
            libc::AF_INET6
        }
    };
    // Its cookie is not asked about.
    id[40..].fill(0xff);
    let request = diag_request(family as u8, u32::MAX, &id);
    let mut found = None;
    let asked = netlink.ask(SOCK_DIAG_BY_FAMILY, NLM_F_ACK, &request, |kind, body| {
        if kind == SOCK_DIAG_BY_FAMILY {
            found = connection(body);
        }
    });
    match asked {
        Ok(()) => Ok(found),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn sockets(states: u32) -> io::Result<Vec<Connection>> {
    let netlink = Netlink::open(SockProtocol::NetlinkSockDiag)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let request = diag_request(family as u8, states, &[0; DIAG_ID]);
        netlink.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request, |kind, body| {
            if kind == SOCK_DIAG_BY_FAMILY {
                found.extend(connection(body));
            }
        })?;
    }
    Ok(found)
}

/// Resets a connection: its application gets ECONNABORTED, its peer a reset.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` without CONFIG_INET_DIAG_DESTROY. A connection that has ended meanwhile is none.
pub(super) fn destroy(connection: &Connection) -> io::Result<()> {
    match order_end(connection.family, &connection.id) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

/// Resets a connection made for this over loopback: whether the kernel can.
///
/// # Errors
/// As [`destroy`]; `ENOENT` when the kernel does not even find it.
pub(super) fn reset_own() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (local, remote) = (client.local_addr()?, client.peer_addr()?);
    let mut id = [0; DIAG_ID];
    id[..2].copy_from_slice(&local.port().to_be_bytes());
    id[2..4].copy_from_slice(&remote.port().to_be_bytes());
    id[4..8].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
    id[20..24].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
    // Its cookie is not asked about.
    id[40..].fill(0xff);
    order_end(libc::AF_INET as u8, &id)
}

fn order_end(family: u8, id: &[u8; DIAG_ID]) -> io::Result<()> {
    let netlink = Netlink::open(SockProtocol::NetlinkSockDiag)?;
    netlink.ask(SOCK_DESTROY, NLM_F_ACK, &diag_request(family, u32::MAX, id), |_, _| {})
}

fn diag_request(family: u8, states: u32, id: &[u8; DIAG_ID]) -> [u8; DIAG_REQUEST] {
    let mut request = [0; DIAG_REQUEST];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    request[4..8].copy_from_slice(&states.to_ne_bytes());
    request[8..].copy_from_slice(id);
    request
}

fn connection(body: &[u8]) -> Option<Connection> {
    let family = *body.first()?;
    let id: [u8; DIAG_ID] = body.get(4..4 + DIAG_ID)?.try_into().ok()?;
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let cgroup = attributes(body.get(DIAG_ANSWER..)?)
        .find(|(kind, _)| *kind == INET_DIAG_CGROUP_ID)
        .and_then(|(_, value)| Some(u64::from_ne_bytes(value.get(..8)?.try_into().ok()?)));
    Some(Connection {
        local: SocketAddr::new(ip(family, id.get(4..20)?)?, port(0)),
        remote: SocketAddr::new(ip(family, id.get(20..36)?)?, port(2)),
        cgroup,
        family,
        id,
    })
}

fn ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    if i32::from(family) == libc::AF_INET {
        let four: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
        return Some(Ipv4Addr::from(four).into());
    }
    let sixteen: [u8; 16] = bytes.try_into().ok()?;
    Some(Ipv6Addr::from(sixteen).to_canonical())
}

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
    fn loopback_is_among_the_interfaces() {
        let all = interfaces().expect("netlink");
        assert!(all.iter().any(|i| i.name == "lo" && i.index == 1 && !i.is_ethernet), "{all:?}");
    }

    #[test]
    fn an_open_connection_is_listed_with_both_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
        let (local, remote) = (client.local_addr().expect("local"), client.peer_addr().expect("peer"));
        let all = connections().expect("netlink");
        let found = all.iter().find(|c| c.local == local && c.remote == remote);
        assert!(found.is_some_and(|c| c.cgroup.is_some_and(|id| id > 0)), "{all:?}");
        let listening = listeners().expect("netlink");
        assert!(listening.iter().any(|c| c.local == remote), "{listening:?}");
        assert!(!listening.iter().any(|c| c.local == local), "{listening:?}");
    }

    #[test]
    fn a_listener_is_found_by_its_address_and_by_any() {
        let port_of = |listener: &TcpListener| listener.local_addr().expect("bound").port();
        let at = |ip: &str, port| SocketAddr::new(ip.parse().expect("literal"), port);
        let one = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let all = TcpListener::bind("[::]:0").expect("any");
        let client = TcpStream::connect(one.local_addr().expect("bound")).expect("connect");
        for (at, expected) in [
            (at("127.0.0.1", port_of(&one)), true),
            (at("127.0.0.2", port_of(&one)), false),
            (at("::1", port_of(&one)), false),
            (at("127.0.0.2", port_of(&all)), true),
            (at("::1", port_of(&all)), true),
            (client.local_addr().expect("bound"), false),
        ] {
            assert_eq!(is_listening(at).expect("netlink"), expected, "{at}");
            let asked = Netlink::sock_diag().expect("netlink");
            let found = listener_at(&asked, at).expect("netlink");
            assert_eq!(found.is_some_and(|found| found.cgroup.is_some_and(|id| id > 0)), expected, "{at}");
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn a_connection_can_be_reset() {
        reset_own().expect("SOCK_DESTROY");
    }

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
        assert_eq!(connection(&[2; 20]), None);
        assert_eq!(interface(&[0; 6]), None);
    }
}
