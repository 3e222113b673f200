//! `tacit-peer` inside a pod, and what it told.

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

/// Events a peer told so far, and whether it can tell more. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Events(Arc<(Mutex<Told>, Condvar)>);

#[derive(Debug, Default)]
struct Told {
    events: Vec<Value>,
    ended: bool,
}

impl Events {
    /// All so far.
    #[must_use]
    pub fn so_far(&self) -> Vec<Value> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).events.clone()
    }

    /// The first one of that name, of whichever connection; waits for it.
    ///
    /// # Errors
    /// When it never comes; the message has what came instead.
    pub fn first(&self, event: &str) -> Result<Value> {
        self.nth(event, 0)
    }

    /// As [`Events::first`], passing over the first `skip` of that name.
    ///
    /// # Errors
    /// As [`Events::first`].
    pub fn nth(&self, event: &str, skip: usize) -> Result<Value> {
        self.matching(event, |told| told["event"] == event, skip)
    }

    /// Waits for the event of which `is` says that it is the one, passing over the first `skip`; `what` names it.
    fn matching(&self, what: &str, is: impl Fn(&Value) -> bool, skip: usize) -> Result<Value> {
        let (told, news) = &*self.0;
        let found = |told: &Told| told.events.iter().filter(|event| is(event)).nth(skip).cloned();
        let told = told.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |told: &mut Told| found(told).is_none() && !told.ended;
        let waited = news.wait_timeout_while(told, HANG, waiting).unwrap_or_else(PoisonError::into_inner);
        found(&waited.0).with_context(|| format!("the peer told no {what:?} but {:?}", waited.0.events))
    }

    fn wait_end(&self) -> Result<Vec<Value>> {
        let (told, news) = &*self.0;
        let told = told.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = news.wait_timeout_while(told, HANG, |told| !told.ended);
        let (told, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("the peer does not end; it told {:?}", told.events);
        }
        Ok(told.events.clone())
    }

    fn push(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }
}

/// A server in a pod; it is killed on drop.
#[derive(Debug)]
pub struct Server {
    peer: Peer,
    address: SocketAddr,
    netns: Netns,
    /// Where our own visits came from.
    visits: Mutex<Vec<String>>,
}

impl Server {
    /// Listens on `address` in `pod`; every connection goes through `steps`.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn start(pod: &Pod, address: SocketAddr, steps: &[&str]) -> Result<Self> {
        let text = address.to_string();
        let peer = Peer::start(pod, &[&["serve", &text], steps].concat())?;
        peer.events
            .first("listening")
            .with_context(|| format!("server on {address} in pod {}", pod.name()))?;
        Ok(Self { peer, address, netns: pod.netns().clone(), visits: Mutex::default() })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it told.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.peer.events
    }

    /// How many connections it accepted until now. It visits the server itself, from inside the pod, and waits until
    /// that visit is told: what was accepted before it has been told then too.
    ///
    /// # Errors
    /// When the server does not answer its visit.
    pub fn accepted(&self) -> Result<usize> {
        let local = match self.address.ip() {
            IpAddr::V6(v6) if v6.is_unspecified() => {
                SocketAddr::from((Ipv6Addr::LOCALHOST, self.address.port()))
            }
            _ => self.address,
        };
        let visit =
            self.netns.enter(|| TcpStream::connect_timeout(&local, HANG))?.context("visit the server")?;
        let from = visit.local_addr()?.to_string();
        let mut visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
        visits.push(from.clone());
        self.events().matching(&format!("visit from {from}"), |event| event["peer"] == from, 0)?;
        let accepted = self.events().so_far().into_iter().filter(|event| event["event"] == "accepted");
        Ok(accepted.filter(|event| !visits.iter().any(|visit| event["peer"] == *visit)).count())
    }
}

/// A client in a pod; it is killed on drop.
#[derive(Debug)]
pub struct Client {
    peer: Peer,
}

impl Client {
    /// Connects from `pod` to `address` and goes through `steps`.
    ///
    /// # Errors
    /// When it cannot be started. That a connection fails is an event.
    pub fn start(pod: &Pod, address: SocketAddr, steps: &[&str]) -> Result<Self> {
        let text = address.to_string();
        Self::with_args(pod, &[&["connect", &text], steps].concat())
    }

    /// Runs `tacit-peer` with these arguments in `pod`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn with_args(pod: &Pod, args: &[&str]) -> Result<Self> {
        Ok(Self { peer: Peer::start(pod, args)? })
    }

    /// [`Client::start`] and [`Client::finish`].
    ///
    /// # Errors
    /// As these.
    pub fn run(pod: &Pod, address: SocketAddr, steps: &[&str]) -> Result<Vec<Value>> {
        Self::start(pod, address, steps)?.finish()
    }

    /// Says a line to [`Client::run`], go on, and answers whether the exchange was right: connects, sends, gets the echo
    /// and the end.
    ///
    /// # Errors
    /// When it was not; the message has what happened instead.
    pub fn echo(pod: &Pod, address: SocketAddr, text: &str) -> Result<()> {
        let events = Self::run(pod, address, &[&format!("send:{text}"), "shut", "read-end"])?;
        let end = events.iter().find(|event| event["event"] == "end");
        let right = end.is_some_and(|end| end["text"] == format!("{text}\n") && end["end"] == "eof");
        if right { Ok(()) } else { bail!("no echo from {address}: {events:?}") }
    }

    /// What it told.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.peer.events
    }

    /// Lets it go on after a `pause`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn proceed(&mut self) -> Result<()> {
        self.peer.stdin.write_all(b"\n").context("the peer is gone")
    }

    /// Waits for its end and returns all it told.
    ///
    /// # Errors
    /// When it does not end.
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
        let told = events.clone();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                // What is no event is kept as the text it was: it shows up in the message of a failure.
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                told.push(|told| told.events.push(event));
            }
            told.push(|told| told.ended = true);
        });
        Ok(Self { _process: process, stdin, events })
    }
}
