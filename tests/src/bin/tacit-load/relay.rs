//! A plain relay: what an agent does to the bytes of a connection, without TLS, identity, policy or guard. Two in a row show
//! what passing through user space twice costs, whoever does it.

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

use crate::server::{EVENTS, Port, listen};

/// As many as the agent has on two cores.
const THREADS: usize = 2;
/// Bytes moved at once, as many as the agent moves.
const BUFFER_BYTES: usize = 512 << 10;

/// What is accepted at `listen` goes on to `to`.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) listen: SocketAddr,
    pub(crate) to: SocketAddr,
}

/// Relays until the process is killed; says `ready` when it listens.
pub(crate) fn run(routes: &[Route]) -> Result<()> {
    let relays: Vec<_> = (0..THREADS).map(|_| Relay::new(routes)).collect::<Result<_>>()?;
    println!("ready");
    let (tell, told) = mpsc::channel();
    for mut relay in relays {
        let tell = tell.clone();
        // Nobody listens any more once another thread has failed.
        thread::spawn(move || drop(tell.send(relay.run())));
    }
    told.recv().context("no thread of the relay runs")?
}

/// One thread: its listeners, which share the ports with those of the others, and the ends of its connections.
struct Relay {
    epoll: Epoll,
    listeners: Vec<(TcpListener, SocketAddr)>,
    /// By descriptor, which the kernel keeps small.
    ends: Vec<Option<End>>,
    buffer: Vec<u8>,
}

/// One of the two sockets of a connection.
struct End {
    stream: TcpStream,
    /// Descriptor of the other.
    other: usize,
    /// Read from the other, and not taken by this socket yet. Nothing more is read there while there is some.
    unsent: Vec<u8>,
    /// Its end has been read.
    has_ended: bool,
    /// The end of the other has been passed on.
    is_shut: bool,
    /// What the poller watches for.
    watched: EpollFlags,
}

impl Relay {
    fn new(routes: &[Route]) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
        let listeners: Vec<_> = routes
            .iter()
            .map(|route| Ok((listen(route.listen, Port::Shared)?, route.to)))
            .collect::<Result<_>>()?;
        for (listener, _) in &listeners {
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, place(listener) as u64))?;
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
                match self.listeners.iter().position(|(listener, _)| place(listener) == at) {
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
            // Another thread was faster, or the client is gone.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
                return Ok(());
            }
            Err(error) => return Err(error).context("accept"),
        };
        accepted.set_nonblocking(true)?;
        let dialled = dial(*to)?;
        let (first, second) = (place(&accepted), place(&dialled));
        if self.ends.len() <= first.max(second) {
            self.ends.resize_with(first.max(second) + 1, || None);
        }
        for (stream, at, other) in [(accepted, first, second), (dialled, second, first)] {
            stream.set_nodelay(true)?;
            self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
            self.ends[at] = Some(End {
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

    /// Sends what waits for this socket, reads once from it, and passes that on. False once both directions have ended.
    fn serve(&mut self, at: usize) -> io::Result<bool> {
        // Closed since the event.
        let Some(mut end) = self.ends[at].take() else { return Ok(true) };
        let Some(mut other) = self.ends[end.other].take() else { return Ok(false) };
        let outcome = end.send().and_then(|()| end.read(&mut other, &mut self.buffer));
        end.pass_end_of(&other)?;
        other.pass_end_of(&end)?;
        let goes_on = !(end.is_shut && other.is_shut);
        if goes_on {
            end.watch(&self.epoll, &other, at)?;
            other.watch(&self.epoll, &end, end.other)?;
        }
        let other_at = end.other;
        (self.ends[at], self.ends[other_at]) = (Some(end), Some(other));
        outcome.map(|()| goes_on)
    }

    /// Both ends. Closing a descriptor also removes it from the epoll.
    fn close(&mut self, at: usize) {
        if let Some(end) = self.ends[at].take() {
            self.ends[end.other] = None;
        }
    }
}

impl End {
    /// Sends what waits.
    fn send(&mut self) -> io::Result<()> {
        let unsent = std::mem::take(&mut self.unsent);
        self.take(&unsent)
    }

    /// Sends `bytes`; what does not fit waits.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
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

    /// Reads once and passes it on to `other`, if nothing waits there.
    fn read(&mut self, other: &mut Self, buffer: &mut [u8]) -> io::Result<()> {
        if self.has_ended || !other.unsent.is_empty() {
            return Ok(());
        }
        match self.stream.read(buffer) {
            Ok(0) => self.has_ended = true,
            Ok(read) => return other.take(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Ends this direction once the other socket has ended and all of it is sent.
    fn pass_end_of(&mut self, other: &Self) -> io::Result<()> {
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

/// Begins to connect. Until that is done, writes do not fit.
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

fn place(socket: &impl AsRawFd) -> usize {
    usize::try_from(socket.as_raw_fd()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use tacit_topology::until;

    use super::*;
    use crate::PATIENCE;

    /// More than all sockets and buffers on the way hold.
    const BYTES: usize = 32 << 20;

    /// A listener, and its address.
    fn listener() -> Result<(TcpListener, SocketAddr)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    }

    #[test]
    fn all_bytes_and_both_ends_pass_two_relays() -> Result<()> {
        let (server, at) = listener()?;
        // Ports that are free now: the relay takes them again.
        let [first, second] = [listener()?.1, listener()?.1];
        thread::spawn(move || run(&[Route { listen: first, to: second }, Route { listen: second, to: at }]));
        let serving = thread::spawn(move || -> Result<usize> {
            let (mut stream, _) = server.accept()?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            // The client has ended its direction, and still reads.
            stream.write_all(&all)?;
            Ok(all.len())
        });
        let mut client = until("the relay listening", || Ok(TcpStream::connect(first).ok()))?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.set_write_timeout(Some(PATIENCE))?;
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
