//! Server: one thread with epoll. A connection has a buffer of its own only while its client does not read.

use crate::REQUEST_MAX;
use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
};

/// Accept backlog; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Events of one epoll call.
pub(crate) const EVENTS: usize = 256;

/// Behaviour on each connection.
#[derive(Clone, Copy)]
pub(crate) enum Behaviour {
    /// Echo until the client closes.
    Echo,
    /// Echo that many bytes, then close. The server closes first, as with HTTP's `Connection: close`.
    Answer(usize),
}

struct Connection {
    stream: TcpStream,
    /// Bytes to echo before the server closes; `None` if the client closes.
    left: Option<usize>,
    /// Bytes that the socket has not accepted yet. Reading pauses while there are any.
    unsent: Vec<u8>,
}

/// Next action on a connection.
#[derive(PartialEq, Eq)]
enum Next {
    Read,
    Write,
    Close,
}

/// Serves until the process is killed.
pub(crate) fn run(address: SocketAddr, behaviour: Behaviour) -> Result<()> {
    let listener = listen(address, PortSharing::Exclusive)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
    epoll
        .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, token(&listener)))
        .context("watch the listener")?;
    let mut server = Server { behaviour, epoll, connections: Vec::new(), buffer: vec![0; REQUEST_MAX] };
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let count = match server.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.context("wait for events")?,
        };
        for event in events.iter().take(count) {
            if event.data() == token(&listener) {
                server.accept(&listener)?;
            } else {
                server.serve(usize::try_from(event.data())?)?;
            }
        }
    }
}

/// Sharing of a port.
#[derive(PartialEq, Eq)]
pub(crate) enum PortSharing {
    Exclusive,
    /// Listeners of several threads share the port, and each gets a part of the connections.
    Shared,
}

pub(crate) fn listen(address: SocketAddr, sharing: PortSharing) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(sharing == PortSharing::Shared)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn token(socket: &impl AsRawFd) -> u64 {
    u64::try_from(socket.as_raw_fd()).unwrap_or(u64::MAX)
}

struct Server {
    behaviour: Behaviour,
    epoll: Epoll,
    /// Connections by descriptor. The kernel allocates small descriptors first.
    connections: Vec<Option<Connection>>,
    buffer: Vec<u8>,
}

impl Server {
    /// Accepts pending connections. A connection that its client aborted is skipped.
    fn accept(&mut self, listener: &TcpListener) -> Result<()> {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error).context("accept"),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let number = token(&stream);
            self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
            let left = match self.behaviour {
                Behaviour::Echo => None,
                Behaviour::Answer(bytes) => Some(bytes),
            };
            let at = usize::try_from(number)?;
            if self.connections.len() <= at {
                self.connections.resize_with(at + 1, || None);
            }
            self.connections[at] = Some(Connection { stream, left, unsent: Vec::new() });
        }
    }

    fn serve(&mut self, at: usize) -> Result<()> {
        let Some(connection) = self.connections.get_mut(at).and_then(Option::as_mut) else { return Ok(()) };
        let was_writing = !connection.unsent.is_empty();
        let next = connection.advance(&mut self.buffer).unwrap_or(Next::Close);
        let wanted = match next {
            Next::Close => {
                // Closing the descriptor also removes it from the epoll.
                self.connections[at] = None;
                return Ok(());
            }
            Next::Read => EpollFlags::EPOLLIN,
            Next::Write => EpollFlags::EPOLLOUT,
        };
        if was_writing != (next == Next::Write) {
            self.epoll.modify(&connection.stream, &mut EpollEvent::new(wanted, at as u64))?;
        }
        Ok(())
    }
}

impl Connection {
    fn advance(&mut self, buffer: &mut [u8]) -> io::Result<Next> {
        if self.unsent.is_empty() {
            let most = self.left.unwrap_or(buffer.len()).min(buffer.len());
            let read = match self.stream.read(&mut buffer[..most]) {
                Ok(0) => return Ok(Next::Close),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Next::Read),
                Err(error) => return Err(error),
            };
            if let Some(left) = &mut self.left {
                *left -= read;
            }
            let sent = self.send(&buffer[..read])?;
            self.unsent.extend_from_slice(&buffer[sent..read]);
        } else {
            let unsent = std::mem::take(&mut self.unsent);
            let sent = self.send(&unsent)?;
            self.unsent.extend_from_slice(&unsent[sent..]);
        }
        Ok(match (self.unsent.is_empty(), self.left) {
            (false, _) => Next::Write,
            (true, Some(0)) => Next::Close,
            (true, _) => Next::Read,
        })
    }

    /// Sends bytes and returns the number that the socket accepted.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stream.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }
}
