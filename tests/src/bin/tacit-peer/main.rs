//! The program that the tests run inside pods, on one side or both of a connection.
//!
//! ```text
//! tacit-peer serve ADDRESS STEP...              every connection goes through the steps, until the process is killed
//! tacit-peer connect ADDRESS [--from IP | --mptcp] STEP...   one connection goes through the steps
//! tacit-peer flows COUNT ADDRESS...             COUNT connections at once, to the addresses in turn, each echoed, all
//!                                               open before any closes
//! tacit-peer again|storm ADDRESS                one connection after the other until a line comes on stdin; a storm does
//!                                               not pause after one that failed
//! ```
//!
//! What happens is told on stdout, one JSON object a line; the test that started the program draws the conclusions.
//! It uses plain blocking sockets, as an ordinary application does, and knows nothing of Tacit. `steps` lists the steps.

#![forbid(unsafe_code)]

mod bulk;
mod event;
mod flows;
mod steps;

use anyhow::{Context, Result, bail};
use event::{Teller, kind};
use flows::AfterFailure;
use serde_json::json;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};
use steps::Step;

/// Longest wait of one socket call: above what a loaded machine needs, below what hides a hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Threads here do little: small stacks let thousands of them run, in bytes.
const STACK: usize = 256 << 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", address, steps @ ..] => serve(address.parse().context("ADDRESS")?, &parse(steps)?),
        ["connect", address, "--from", from, steps @ ..] => {
            let origin = Origin::Address(from.parse().context("IP")?);
            client(address.parse().context("ADDRESS")?, origin, &parse(steps)?)
        }
        ["connect", address, "--mptcp", steps @ ..] => {
            client(address.parse().context("ADDRESS")?, Origin::Multipath, &parse(steps)?)
        }
        ["connect", address, steps @ ..] => {
            client(address.parse().context("ADDRESS")?, Origin::Any, &parse(steps)?)
        }
        ["flows", count, addresses @ ..] if !addresses.is_empty() => {
            let addresses = addresses.iter().map(|address| address.parse().context("ADDRESS"));
            flows::run(&addresses.collect::<Result<Vec<_>>>()?, count.parse().context("COUNT")?)
        }
        ["again", address] => flows::again(address.parse().context("ADDRESS")?, AfterFailure::Pause),
        ["storm", address] => flows::again(address.parse().context("ADDRESS")?, AfterFailure::Storm),
        _ => bail!("usage: tacit-peer serve|connect|flows|again|storm ADDRESS ..."),
    }
}

fn parse(steps: &[&str]) -> Result<Vec<Step>> {
    steps.iter().map(|step| Step::parse(step)).collect()
}

fn serve(address: SocketAddr, steps: &[Step]) -> Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    Teller::new(0).tell("listening", json!({ "address": listener.local_addr()? }));
    for connection in 1.. {
        let (stream, from) = listener.accept().context("accept")?;
        let steps = steps.to_vec();
        let teller = Teller::new(connection);
        // Before its thread runs, so that connections are told in the order in which they were accepted.
        let names =
            json!({ "accept": from, "peer": stream.peer_addr().ok(), "local": stream.local_addr().ok() });
        teller.tell("accepted", names);
        thread::Builder::new().stack_size(STACK).spawn(move || converse(stream, &steps, &teller))?;
    }
    Ok(())
}

fn client(to: SocketAddr, origin: Origin, steps: &[Step]) -> Result<()> {
    let teller = Teller::new(1);
    match connect(to, origin) {
        Ok(stream) => {
            teller.tell(
                "connected",
                json!({ "peer": stream.peer_addr().ok(), "local": stream.local_addr().ok() }),
            );
            converse(stream, steps, &teller);
        }
        Err(error) => teller.tell("failed", json!({ "step": "connect", "error": kind(&error) })),
    }
    Ok(())
}

/// What a client connects from.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// The address and port that the kernel chooses.
    Any,
    /// This address, bound first.
    Address(IpAddr),
    /// A multipath socket (RFC 8684), which looks to its application as TCP does.
    Multipath,
}

/// Connects as an application does: a blocking `connect`.
fn connect(to: SocketAddr, origin: Origin) -> io::Result<TcpStream> {
    let protocol = match origin {
        Origin::Multipath => Protocol::MPTCP,
        Origin::Any | Origin::Address(_) => Protocol::TCP,
    };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    if let Origin::Address(from) = origin {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect(&to.into())?;
    Ok(socket.into())
}

fn converse(stream: TcpStream, steps: &[Step], teller: &Teller) {
    let socket = SockRef::from(&stream);
    let patient =
        socket.set_read_timeout(Some(PATIENCE)).and_then(|()| socket.set_write_timeout(Some(PATIENCE)));
    let result = patient.map_err(|error| ("timeouts".to_owned(), error));
    let result = result.and_then(|()| {
        steps.iter().try_for_each(|step| step.run(&stream, teller).map_err(|error| (step.to_string(), error)))
    });
    if let Err((step, error)) = result {
        teller.tell("failed", json!({ "step": step, "error": kind(&error) }));
    }
    // The connection closes before this is told: who waits for it may count on that.
    drop(stream);
    teller.tell("closed", json!({}));
}
