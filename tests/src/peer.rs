//! `tacit-peer` in a pod, and its events.

use crate::program::peer_program;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream},
    process::{ChildStdin, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};
use tacit_topology::{HANG, Netns, Pod, Process};

/// Events that a peer has printed. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Events(Arc<(Mutex<EventLog>, Condvar)>);

#[derive(Debug, Default)]
struct EventLog {
    events: Vec<Value>,
    ended: bool,
}

impl Events {
    /// Returns all events so far.
    #[must_use]
    pub fn so_far(&self) -> Vec<Value> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).events.clone()
    }

    /// Waits for the first event with this name, of any connection.
    ///
    /// # Errors
    /// Fails if the event does not come; the message has all events.
    pub fn first(&self, event: &str) -> Result<Value> {
        self.nth(event, 0)
    }

    /// Waits for an event like [`Events::first`], after skipping `skip` events with this name.
    ///
    /// # Errors
    /// As [`Events::first`].
    pub fn nth(&self, event: &str, skip: usize) -> Result<Value> {
        self.matching(event, |found| found["event"] == event, skip)
    }

    /// Waits for an event for which `is` returns true, after skipping `skip` of them. `what` names it in the error.
    fn matching(&self, what: &str, is: impl Fn(&Value) -> bool, skip: usize) -> Result<Value> {
        let (log, changed) = &*self.0;
        let found = |log: &EventLog| log.events.iter().filter(|event| is(event)).nth(skip).cloned();
        let log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |log: &mut EventLog| found(log).is_none() && !log.ended;
        let waited = changed.wait_timeout_while(log, HANG, waiting).unwrap_or_else(PoisonError::into_inner);
        found(&waited.0)
            .with_context(|| format!("no event {what:?} from the peer, only {:?}", waited.0.events))
    }

    fn wait_end(&self) -> Result<Vec<Value>> {
        let (log, changed) = &*self.0;
        let log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(log, HANG, |log| !log.ended);
        let (log, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("the peer does not exit; events: {:?}", log.events);
        }
        Ok(log.events.clone())
    }

    fn push(&self, change: impl FnOnce(&mut EventLog)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }
}

/// A server in a pod, killed on drop.
#[derive(Debug)]
pub struct Server {
    peer: Peer,
    address: SocketAddr,
    netns: Netns,
    /// Source addresses of the connections that [`Server::accepted`] opens itself.
    probes: Mutex<Vec<String>>,
}

impl Server {
    /// Starts a server on `address` in `pod` that runs `steps` on every connection.
    ///
    /// # Errors
    /// Fails if the server cannot listen on `address`.
    pub fn start(pod: &Pod, address: SocketAddr, steps: &[&str]) -> Result<Self> {
        let text = address.to_string();
        let peer = Peer::start(pod, &[&["serve", &text], steps].concat())?;
        peer.events
            .first("listening")
            .with_context(|| format!("server on {address} in pod {}", pod.name()))?;
        Ok(Self { peer, address, netns: pod.netns().clone(), probes: Mutex::default() })
    }

    /// Returns the address that the server listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the server's events.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.peer.events
    }

    /// Returns the number of connections that the server has accepted. It connects to the server from inside the pod and
    /// waits for the event of this connection, so the events of all earlier connections are there too.
    ///
    /// # Errors
    /// Fails if the server does not accept this connection.
    pub fn accepted(&self) -> Result<usize> {
        let local = match self.address.ip() {
            IpAddr::V6(v6) if v6.is_unspecified() => {
                SocketAddr::from((Ipv6Addr::LOCALHOST, self.address.port()))
            }
            _ => self.address,
        };
        let probe = self
            .netns
            .enter(|| TcpStream::connect_timeout(&local, HANG))?
            .context("connect to the server")?;
        let from = probe.local_addr()?.to_string();
        let mut probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        probes.push(from.clone());
        self.events().matching(&format!("connection from {from}"), |event| event["peer"] == from, 0)?;
        let accepted = self.events().so_far().into_iter().filter(|event| event["event"] == "accepted");
        Ok(accepted.filter(|event| !probes.iter().any(|probe| event["peer"] == *probe)).count())
    }
}

/// A client in a pod, killed on drop.
#[derive(Debug)]
pub struct Client {
    peer: Peer,
}

impl Client {
    /// Starts a client in `pod` that connects to `address` and runs `steps`.
    ///
    /// # Errors
    /// Fails if the client cannot be started. A failed connection is an event.
    pub fn start(pod: &Pod, address: SocketAddr, steps: &[&str]) -> Result<Self> {
        let text = address.to_string();
        Self::with_args(pod, &[&["connect", &text], steps].concat())
    }

    /// Starts `tacit-peer` with these arguments in `pod`.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn with_args(pod: &Pod, args: &[&str]) -> Result<Self> {
        Ok(Self { peer: Peer::start(pod, args)? })
    }

    /// Calls [`Client::start`] and [`Client::finish`].
    ///
    /// # Errors
    /// As [`Client::start`] and [`Client::finish`].
    pub fn run(pod: &Pod, address: SocketAddr, steps: &[&str]) -> Result<Vec<Value>> {
        Self::start(pod, address, steps)?.finish()
    }

    /// Connects, sends a line, and checks that the server echoes the line and closes.
    ///
    /// # Errors
    /// Fails if the exchange differs; the message has the events.
    pub fn echo(pod: &Pod, address: SocketAddr, text: &str) -> Result<()> {
        let events = Self::run(pod, address, &[&format!("send:{text}"), "shut", "read-end"])?;
        let end = events.iter().find(|event| event["event"] == "end");
        let is_echo = end.is_some_and(|end| end["text"] == format!("{text}\n") && end["end"] == "eof");
        if is_echo { Ok(()) } else { bail!("no echo from {address}: {events:?}") }
    }

    /// Returns the client's events.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.peer.events
    }

    /// Continues a client that waits in the step `pause`.
    ///
    /// # Errors
    /// Fails if the client has exited.
    pub fn proceed(&mut self) -> Result<()> {
        self.peer.stdin.write_all(b"\n").context("the peer has exited")
    }

    /// Waits until the client exits and returns its events.
    ///
    /// # Errors
    /// Fails if the client does not exit.
    pub fn finish(self) -> Result<Vec<Value>> {
        self.peer.events.wait_end()
    }
}

#[derive(Debug)]
struct Peer {
    _process: Process,
    stdin: ChildStdin,
    events: Events,
}

impl Peer {
    fn start(pod: &Pod, args: &[&str]) -> Result<Self> {
        let mut command = pod.command(peer_program()?);
        let mut process = Process::spawn(command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let stdin = process.take_stdin().context("stdin of the peer")?;
        let stdout = process.take_stdout().context("stdout of the peer")?;
        let events = Events::default();
        let sink = events.clone();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                // A line that is not an event is kept as text, for error messages.
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                sink.push(|log| log.events.push(event));
            }
            sink.push(|log| log.ended = true);
        });
        Ok(Self { _process: process, stdin, events })
    }
}
