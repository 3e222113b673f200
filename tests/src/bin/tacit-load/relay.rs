//! A plain relay: copies bytes as an agent does, without TLS, identity, policy or guard. Two relays in a row show the cost
//! of passing through user space twice.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use crate::server::{EVENTS, PortSharing, listen};

/// Number of threads, that of an agent on two cores.
const THREADS: usize = 2;
/// Buffer of one read in bytes, the agent's size.
const BUFFER_BYTES: usize = 512 << 10;

/// A route: connections accepted at `listen` are relayed to `to`.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) listen: SocketAddr,
    pub(crate) to: SocketAddr,
}

/// Relays until the process is killed. Prints `ready` when it listens.
pub(crate) fn run(routes: &[Route]) -> Result<()> {
    let relays: Vec<_> = (0..THREADS).map(|_| Relay::new(routes)).collect::<Result<_>>()?;
    println!("ready");
    let (sender, results) = mpsc::channel();
    for mut relay in relays {
        let sender = sender.clone();
        // The receiver is gone if another thread failed before.
        thread::spawn(move || drop(sender.send(relay.run())));
    }
    results.recv().context("all threads of the relay have exited")?
}

/// One thread: its listeners, which share their ports with those of other threads, and the sockets of its connections.
struct Relay {
    epoll: Epoll,
    listeners: Vec<(TcpListener, SocketAddr)>,
    /// Sockets by descriptor. The kernel allocates small descriptors first.
    ends: Vec<Option<Endpoint>>,
    buffer: Vec<u8>,
}

/// One of the two sockets of a connection.
struct Endpoint {
    stream: TcpStream,
    /// Descriptor of the other socket.
    other: usize,
    /// Bytes read from the other socket that this socket has not accepted yet. Reading pauses while there are any.
    unsent: Vec<u8>,
    /// True after this socket's end of file was read.
    has_ended: bool,
    /// True after the other socket's end of file was forwarded.
    is_shut: bool,
    /// Events that epoll reports.
    watched: EpollFlags,
}

impl Relay {
    fn new(routes: &[Route]) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
        let listeners: Vec<_> = routes
            .iter()
            .map(|route| Ok((listen(route.listen, PortSharing::Shared)?, route.to)))
            .collect::<Result<_>>()?;
        for (listener, _) in &listeners {
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, descriptor(listener) as u64))?;
        }
        Ok(Self { epoll, listeners, ends: Vec::new(), buffer: vec![0; BUFFER_BYTES] })
    }

    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.context("wait for events")?,
            };
            for event in &events[..count] {
                let at = usize::try_from(event.data())?;
                match self.listeners.iter().position(|(listener, _)| descriptor(listener) == at) {
                    Some(index) => self.accept(index)?,
                    None if matches!(self.serve(at), Ok(true)) => {}
                    None => self.close(at),
                }
            }
        }
    }

    fn accept(&mut self, index: usize) -> Result<()> {
        let (listener, to) = &self.listeners[index];
        let accepted = match listener.accept() {
            Ok((accepted, _)) => accepted,
            // Another thread accepted the connection, or the client closed it.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
                return Ok(());
            }
            Err(error) => return Err(error).context("accept"),
        };
        accepted.set_nonblocking(true)?;
        let dialled = dial(*to)?;
        let (first, second) = (descriptor(&accepted), descriptor(&dialled));
        if self.ends.len() <= first.max(second) {
            self.ends.resize_with(first.max(second) + 1, || None);
        }
        for (stream, at, other) in [(accepted, first, second), (dialled, second, first)] {
            stream.set_nodelay(true)?;
            self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
            self.ends[at] = Some(Endpoint {
                stream,
                other,
                unsent: Vec::new(),
                has_ended: false,
                is_shut: false,
                watched: EpollFlags::EPOLLIN,
            });
        }
        Ok(())
    }

    /// Sends pending bytes, reads once from this socket and forwards the bytes. False once both directions have ended.
    fn serve(&mut self, at: usize) -> io::Result<bool> {
        // The connection was closed after the event.
        let Some(mut end) = self.ends[at].take() else { return Ok(true) };
        let Some(mut other) = self.ends[end.other].take() else { return Ok(false) };
        let outcome = end.send().and_then(|()| end.read(&mut other, &mut self.buffer));
        end.shut_down_after(&other)?;
        other.shut_down_after(&end)?;
        let is_open = !(end.is_shut && other.is_shut);
        if is_open {
            end.watch(&self.epoll, &other, at)?;
            other.watch(&self.epoll, &end, end.other)?;
        }
        let other_at = end.other;
        (self.ends[at], self.ends[other_at]) = (Some(end), Some(other));
        outcome.map(|()| is_open)
    }

    /// Closes both sockets. Closing a descriptor also removes it from the epoll.
    fn close(&mut self, at: usize) {
        if let Some(end) = self.ends[at].take() {
            self.ends[end.other] = None;
        }
    }
}

impl Endpoint {
    /// Sends pending bytes.
    fn send(&mut self) -> io::Result<()> {
        let unsent = std::mem::take(&mut self.unsent);
        self.write(&unsent)
    }

    /// Sends `bytes` and keeps those that the socket does not accept.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let sent = match self.stream.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            outcome => outcome?,
        };
        self.unsent.extend_from_slice(&bytes[sent..]);
        Ok(())
    }

    /// Reads once and forwards the bytes to `other`, if no bytes are pending there.
    fn read(&mut self, other: &mut Self, buffer: &mut [u8]) -> io::Result<()> {
        if self.has_ended || !other.unsent.is_empty() {
            return Ok(());
        }
        match self.stream.read(buffer) {
            Ok(0) => self.has_ended = true,
            Ok(read) => return other.write(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Shuts down this direction once the other socket has ended and no bytes are pending.
    fn shut_down_after(&mut self, other: &Self) -> io::Result<()> {
        if other.has_ended && self.unsent.is_empty() && !self.is_shut {
            self.stream.shutdown(Shutdown::Write)?;
            self.is_shut = true;
        }
        Ok(())
    }

    fn watch(&mut self, epoll: &Epoll, other: &Self, at: usize) -> io::Result<()> {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, !self.has_ended && other.unsent.is_empty());
        wanted.set(EpollFlags::EPOLLOUT, !self.unsent.is_empty());
        if wanted != self.watched {
            epoll.modify(&self.stream, &mut EpollEvent::new(wanted, at as u64))?;
            self.watched = wanted;
        }
        Ok(())
    }
}

/// Starts a non-blocking connect. Writes return WouldBlock until it is done.
fn dial(to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(nix::errno::Errno::EINPROGRESS as i32) => {
            Err(error).with_context(|| format!("connect to {to}"))
        }
        _ => Ok(socket.into()),
    }
}

fn descriptor(socket: &impl AsRawFd) -> usize {
    usize::try_from(socket.as_raw_fd()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use tacit_topology::until;

    use super::*;
    use crate::IO_TIMEOUT;

    /// More bytes than all sockets and buffers on the path hold.
    const BYTES: usize = 32 << 20;

    /// Returns a listener and its address.
    fn listener() -> Result<(TcpListener, SocketAddr)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    }

    #[test]
    fn all_bytes_and_both_ends_pass_two_relays() -> Result<()> {
        let (server, at) = listener()?;
        // The ports are free now, and the relay binds them again.
        let [first, second] = [listener()?.1, listener()?.1];
        thread::spawn(move || run(&[Route { listen: first, to: second }, Route { listen: second, to: at }]));
        let serving = thread::spawn(move || -> Result<usize> {
            let (mut stream, _) = server.accept()?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            // The client has shut down its direction and still reads.
            stream.write_all(&all)?;
            Ok(all.len())
        });
        let mut client = until("the relay listening", || Ok(TcpStream::connect(first).ok()))?;
        client.set_read_timeout(Some(IO_TIMEOUT))?;
        client.set_write_timeout(Some(IO_TIMEOUT))?;
        let bytes: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
        client.write_all(&bytes)?;
        client.shutdown(Shutdown::Write)?;
        let mut back = Vec::new();
        client.read_to_end(&mut back)?;
        assert_eq!(serving.join().expect("it does not panic")?, BYTES);
        assert!(back == bytes);
        Ok(())
    }
}
