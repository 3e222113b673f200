//! A plain relay: what an agent does to the bytes of a connection, without TLS, identity, policy or guard. Two in a row show
//! what passing through user space twice costs, whoever does it.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread,
};

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use crate::server::{BACKLOG, EVENTS};

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
    let running: Vec<_> = relays.into_iter().map(|mut relay| thread::spawn(move || relay.run())).collect();
    match running.into_iter().map(thread::JoinHandle::join).next() {
        Some(Ok(Err(error))) => Err(error),
        _ => bail!("a thread of the relay has ended"),
    }
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
    /// The other has ended: this one is to be shut down behind what is unsent.
    other_ended: bool,
}

impl Relay {
    fn new(routes: &[Route]) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
        let listeners: Vec<_> =
            routes.iter().map(|route| Ok((listen(route.listen)?, route.to))).collect::<Result<_>>()?;
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
                    // Its other may have closed it since.
                    None if self.end(at).is_none() => {}
                    None => {
                        if self.serve(at, event.events()).is_err() {
                            self.close(at);
                        }
                    }
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
            self.ends[at] = Some(End { stream, other, unsent: Vec::new(), other_ended: false });
        }
        Ok(())
    }

    fn end(&mut self, at: usize) -> Option<&mut End> {
        self.ends.get_mut(at)?.as_mut()
    }

    /// Sends what waits to be sent, or reads once and passes it on.
    fn serve(&mut self, at: usize, ready: EpollFlags) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let outcome = if ready.contains(EpollFlags::EPOLLOUT) {
            let unsent = self.end(at).map(|end| std::mem::take(&mut end.unsent)).unwrap_or_default();
            self.pass(at, &unsent, true)
        } else {
            self.read(at, &mut buffer)
        };
        self.buffer = buffer;
        outcome
    }

    fn read(&mut self, at: usize, buffer: &mut [u8]) -> io::Result<()> {
        let Some(end) = self.end(at) else { return Ok(()) };
        let other = end.other;
        match end.stream.read(buffer) {
            Ok(0) => {
                self.watch(at, EpollFlags::empty())?;
                if let Some(other) = self.end(other) {
                    other.other_ended = true;
                }
                self.pass(other, &[], false)
            }
            Ok(read) => self.pass(other, &buffer[..read], false),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Sends `bytes` to the end at `at`, and its end once all is sent. What does not fit waits, and so does its other;
    /// `waited` says that they did.
    fn pass(&mut self, at: usize, bytes: &[u8], waited: bool) -> io::Result<()> {
        let Some(end) = self.end(at) else { return Ok(()) };
        let sent = match end.stream.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            outcome => outcome?,
        };
        end.unsent.extend_from_slice(&bytes[sent..]);
        let (other, waits, ended) = (end.other, !end.unsent.is_empty(), end.other_ended);
        if ended && !waits {
            end.stream.shutdown(Shutdown::Write)?;
            if self.end(other).is_some_and(|other| other.other_ended && other.unsent.is_empty()) {
                self.close(at);
                return Ok(());
            }
        }
        if waits != waited {
            let own = if waits { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            self.watch(at, own)?;
            self.watch(other, if waits || ended { EpollFlags::empty() } else { EpollFlags::EPOLLIN })?;
        }
        Ok(())
    }

    fn watch(&mut self, at: usize, what: EpollFlags) -> io::Result<()> {
        let Some(Some(end)) = self.ends.get(at) else { return Ok(()) };
        Ok(self.epoll.modify(&end.stream, &mut EpollEvent::new(what, at as u64))?)
    }

    /// Both ends. Closing a descriptor also removes it from the epoll.
    fn close(&mut self, at: usize) {
        if let Some(end) = self.ends[at].take() {
            self.ends[end.other] = None;
        }
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
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
