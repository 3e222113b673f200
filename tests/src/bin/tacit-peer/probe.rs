//! System calls of one connection and what they return, as a program sees them that looks closely.
//!
//! | way | system calls |
//! |---|---|
//! | `blocking` | connect() |
//! | `epoll` | connect() that does not block, epoll_wait(), SO_ERROR |
//! | `send-timeout:MS` | SO_SNDTIMEO, connect() |
//! | `user-timeout:MS` | TCP_USER_TIMEOUT, connect() |
//! | `fast-open` | sendto() with MSG_FASTOPEN instead of connect(), recv() |
//! | `speak` | connect(), send() at once, recv() |
//! | `listen` | connect(), recv() |
//! | `cancel` | connect() that does not block, close() |
//! | `pending` | connect() that does not block, and at once: connect() again, send(), recv(), getpeername(), getsockname() |
//! | `twice` | connect(), and again on the same socket after it has ended |
//! | `early-shutdown` | connect() that does not block, shutdown() of the sending direction, epoll_wait(), SO_ERROR |
//! | `linger-close` | connect() that does not block, SO_LINGER of 0, close() |
//!
//! The event `probe` has the outcome of each call under its name, and `ms`, the time until the connection was decided.

use crate::event::Reporter;
use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde_json::{Map, Value, json};
use socket2::{Domain, Socket, Type};
use std::{
    io::{self, Read, Write},
    mem::MaybeUninit,
    net::{Shutdown, SocketAddr},
    time::{Duration, Instant},
};

/// Limit for one wait, for hangs only: longer than the kernel tries to connect by default.
const WAIT: Duration = Duration::from_secs(140);
/// Flag of sendto(), from linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;
/// Text that the client sends first.
const HELLO: &[u8] = b"hello\n";

/// Makes one connection to `to` in this `way` and prints what its calls returned.
pub(crate) fn run(to: SocketAddr, way: &str) -> Result<()> {
    let mut probe = Probe { to, seen: Map::new(), started: Instant::now() };
    let (name, number) = way.split_once(':').unwrap_or((way, "0"));
    let number = number.parse().context("MS")?;
    let limit = Duration::from_millis(number);
    match name {
        "blocking" => drop(probe.blocking(|_| Ok(()))?),
        "send-timeout" => drop(probe.blocking(|socket| socket.set_write_timeout(Some(limit)))?),
        "user-timeout" => drop(probe.blocking(|socket| socket.set_tcp_user_timeout(Some(limit)))?),
        "epoll" => drop(probe.waiting(|_, _| Ok(()))?),
        "early-shutdown" => drop(probe.waiting(|probe, socket| {
            probe.saw("shutdown", socket.shutdown(Shutdown::Write));
            Ok(())
        })?),
        "pending" => drop(probe.waiting(Probe::look_while_pending)?),
        "fast-open" => probe.fast_open()?,
        "speak" => probe.exchange(HELLO)?,
        "listen" => probe.exchange(b"")?,
        "cancel" => drop(probe.not_blocking()?),
        "linger-close" => probe.not_blocking()?.set_linger(Some(Duration::ZERO))?,
        "twice" => probe.twice()?,
        _ => bail!("invalid way {way}"),
    }
    Reporter::new(0).emit("probe", Value::Object(probe.seen));
    Ok(())
}

struct Probe {
    to: SocketAddr,
    seen: Map<String, Value>,
    started: Instant,
}

impl Probe {
    fn saw<T: Outcome>(&mut self, call: &str, outcome: io::Result<T>) -> bool {
        let ok = outcome.is_ok();
        self.seen.insert(call.to_owned(), outcome.map_or_else(|error| errno(&error), Outcome::shown));
        ok
    }

    fn decided(&mut self) {
        self.seen.insert("ms".to_owned(), json!(self.started.elapsed().as_millis() as u64));
    }

    fn socket(&mut self) -> Result<Socket> {
        let socket = Socket::new(Domain::for_address(self.to), Type::STREAM, None)?;
        socket.set_read_timeout(Some(WAIT))?;
        self.started = Instant::now();
        Ok(socket)
    }

    /// A blocking connect() on a socket that `set` has prepared.
    fn blocking(&mut self, set: impl FnOnce(&Socket) -> io::Result<()>) -> Result<Socket> {
        let socket = self.socket()?;
        set(&socket)?;
        let connected = socket.connect(&self.to.into());
        self.decided();
        self.saw("connect", connected);
        self.names(&socket);
        Ok(socket)
    }

    fn not_blocking(&mut self) -> Result<Socket> {
        let socket = self.socket()?;
        socket.set_nonblocking(true)?;
        let connected = socket.connect(&self.to.into());
        self.saw("connect", connected);
        Ok(socket)
    }

    /// A connect() that does not block, then `meanwhile`, then a wait until it is decided.
    fn waiting(&mut self, meanwhile: impl FnOnce(&mut Self, &Socket) -> Result<()>) -> Result<Socket> {
        let socket = self.not_blocking()?;
        meanwhile(self, &socket)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP;
        epoll.add(&socket, EpollEvent::new(interest, 0))?;
        let mut events = [EpollEvent::empty()];
        let wait = EpollTimeout::try_from(WAIT).context("limit")?;
        let count = epoll.wait(&mut events, wait).context("epoll_wait")?;
        self.decided();
        self.seen.insert("woken".to_owned(), json!(count));
        let error = socket.take_error()?;
        self.seen.insert("error".to_owned(), error.map_or(json!("none"), |error| errno(&error)));
        self.names(&socket);
        // The kernel sets the error before the state: only now, both are certain.
        epoll.wait(&mut events, wait).context("epoll_wait")?;
        // What the far end says may have come, or not.
        let flags = events[0].events() - EpollFlags::EPOLLIN;
        self.seen.insert("epoll".to_owned(), json!(format!("{flags:?}")));
        Ok(socket)
    }

    fn look_while_pending(&mut self, mut socket: &Socket) -> Result<()> {
        let again = socket.connect(&self.to.into());
        // A fast destination may have answered by now.
        let is_pending = matches!(&again, Err(error) if error.raw_os_error() == Some(nix::libc::EALREADY));
        self.seen.insert("pending".to_owned(), json!(is_pending));
        if is_pending {
            self.saw("pending-send", socket.write(b"x").map(drop));
            self.saw("pending-recv", socket.read(&mut [0]).map(drop));
            self.saw("pending-peer", socket.peer_addr().map(drop));
            let own = socket.local_addr().map(|own| own.as_socket().map(|own| own.ip().to_string()));
            self.seen.insert("pending-own".to_owned(), json!(own.ok().flatten()));
        }
        Ok(())
    }

    fn fast_open(&mut self) -> Result<()> {
        let socket = self.socket()?;
        let sent = socket.send_to_with_flags(HELLO, &self.to.into(), MSG_FASTOPEN);
        self.decided();
        if self.saw("sendto", sent) {
            self.read(&socket);
        }
        Ok(())
    }

    fn exchange(&mut self, hello: &[u8]) -> Result<()> {
        let socket = self.blocking(|_| Ok(()))?;
        if !hello.is_empty() {
            let sent = (&socket).write(hello);
            self.saw("send", sent);
        }
        self.read(&socket);
        Ok(())
    }

    fn twice(&mut self) -> Result<()> {
        let socket = self.blocking(|_| Ok(()))?;
        let again = socket.connect(&self.to.into());
        self.saw("again", again);
        Ok(())
    }

    fn read(&mut self, socket: &Socket) {
        let mut buffer = [MaybeUninit::uninit(); 64];
        let read = socket.recv(&mut buffer);
        self.saw("recv", read);
    }

    fn names(&mut self, socket: &Socket) {
        let peer = socket.peer_addr().map(|peer| peer.as_socket().map(|peer| peer.to_string()));
        self.seen.insert("peer".to_owned(), peer.map_or_else(|error| errno(&error), |peer| json!(peer)));
        let own = socket.local_addr().map(|own| own.as_socket().map(|own| own.ip().to_string()));
        self.seen.insert("own".to_owned(), own.map_or_else(|error| errno(&error), |own| json!(own)));
    }
}

pub(crate) trait Outcome {
    fn shown(self) -> Value;
}

impl Outcome for () {
    fn shown(self) -> Value {
        json!("ok")
    }
}

impl Outcome for usize {
    fn shown(self) -> Value {
        json!(self)
    }
}

pub(crate) fn errno(error: &io::Error) -> Value {
    match error.raw_os_error() {
        Some(number) => json!(format!("{:?}", nix::errno::Errno::from_raw(number))),
        None => json!(format!("{:?}", error.kind())),
    }
}
