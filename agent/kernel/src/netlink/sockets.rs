//! The TCP sockets of a namespace: listed, looked for, and reset.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
};

use nix::sys::socket::SockProtocol;

use super::{NLM_F_ACK, NLM_F_DUMP, Netlink, attributes};

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

/// A TCP connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Connection {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// Id of its socket's cgroup; `None` on kernels that do not tell.
    pub(crate) cgroup: Option<u64>,
    family: u8,
    id: [u8; DIAG_ID],
}

/// The open TCP connections of the calling thread's namespace.
///
/// # Errors
/// The kernel's.
pub(crate) fn connections() -> io::Result<Vec<Connection>> {
    sockets(OPEN_STATES)
}

/// The listening TCP sockets of the calling thread's namespace.
///
/// # Errors
/// The kernel's.
pub(crate) fn listeners() -> io::Result<Vec<Connection>> {
    sockets(LISTEN_STATE)
}

/// Returns true if a socket of the calling thread's namespace listens at `at`. The kernel looks for this one alone, however many
/// sockets listen. Without its `inet_diag` module it finds none.
///
/// # Errors
/// The kernel's.
pub(crate) fn is_listening(at: SocketAddr) -> io::Result<bool> {
    listener_at(&Netlink::sock_diag()?, at).map(|found| found.is_some())
}

/// Returns the socket of the calling thread's namespace that listens at `at`. As [`is_listening`].
///
/// # Errors
/// The kernel's.
pub(crate) fn listener_at(netlink: &Netlink, at: SocketAddr) -> io::Result<Option<Connection>> {
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
pub(crate) fn destroy(connection: &Connection) -> io::Result<()> {
    match order_end(connection.family, &connection.id) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

/// Resets a connection made for this over loopback: whether the kernel can.
///
/// # Errors
/// As [`destroy`]; `ENOENT` when the kernel does not even find it.
pub(crate) fn reset_own() -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_cut_message_is_no_connection() {
        assert_eq!(connection(&[2; 20]), None);
    }
}
