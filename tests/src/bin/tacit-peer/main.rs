//! Program that the tests run in pods, for one side or both sides of a connection.
//!
//! ```text
//! tacit-peer serve [--after-line] ADDRESS STEP...   runs the steps on every connection, until the process is killed; with
//!                                               the option it accepts none before a line comes on stdin
//! tacit-peer connect ADDRESS [--from IP | --mptcp | --unsent BYTES | --set OPTION] STEP...   runs the steps on one
//!                                               connection; `--unsent` sets TCP_NOTSENT_LOWAT, `--set` an option of `option`
//! tacit-peer flows COUNT ADDRESS...             opens COUNT concurrent connections, distributed over the addresses; each
//!                                               is echoed, and all are open before any closes
//! tacit-peer probe ADDRESS WAY                  makes one connection and prints what each system call returned, see `probe`
//! tacit-peer rebind PORT OPTIONS END ADDRESS... connects to the addresses one after another from one port, see `rebind`
//! tacit-peer deaf ADDRESS STEP...               listens with the smallest backlog and accepts nothing until a line comes on
//!                                               stdin; then as `serve`
//! tacit-peer hold COUNT ADDRESS...              opens COUNT connections one after the other, each echoed once, and keeps them
//!                                               until a line comes on stdin
//! tacit-peer repeat|storm ADDRESS               opens sequential connections until a line comes on stdin; a storm does
//!                                               not pause after a failure
//! tacit-peer pending COUNT ADDRESS              opens COUNT connections without waiting for any, and keeps all until a line
//!                                               comes on stdin
//! tacit-peer sequence COUNT ADDRESS [--device NAME]   opens COUNT connections one after another; each is echoed
//! ```
//!
//! Events are printed on stdout, one JSON object a line, and the test that started the program evaluates them. The program
//! uses plain blocking sockets, as an ordinary application does, and does not depend on Tacit. `steps` lists the steps.

#![forbid(unsafe_code)]

mod bulk;
mod event;
mod flows;
mod opening;
mod option;
mod probe;
mod rebind;
mod steps;
mod urgent;

use anyhow::{Context, Result, bail};
use event::{Reporter, error_name};
use flows::AfterFailure;
use option::SocketOption;
use serde_json::json;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};
use steps::Step;

/// Timeout of one socket call: longer than a loaded machine needs, shorter than a hang of a test.
const IO_TIMEOUT: Duration = Duration::from_secs(60);
/// Accept backlog; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Stack of a thread, in bytes. Threads need little of it, and thousands of them run.
const STACK: usize = 256 << 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", "--after-line", address, steps @ ..] => {
            serve(address.parse().context("ADDRESS")?, &parse(steps)?, Accepting::AfterLine)
        }
        ["serve", address, steps @ ..] => {
            serve(address.parse().context("ADDRESS")?, &parse(steps)?, Accepting::Now)
        }
        ["connect", address, "--from", from, steps @ ..] => {
            let origin = Origin::Address(from.parse().context("IP")?);
            client(address.parse().context("ADDRESS")?, origin, &parse(steps)?)
        }
        ["connect", address, "--mptcp", steps @ ..] => {
            client(address.parse().context("ADDRESS")?, Origin::Multipath, &parse(steps)?)
        }
        ["connect", address, "--unsent", bytes, steps @ ..] => {
            let origin = Origin::Unsent(bytes.parse().context("BYTES")?);
            client(address.parse().context("ADDRESS")?, origin, &parse(steps)?)
        }
        ["connect", address, "--set", option, steps @ ..] => {
            let origin = Origin::Set(SocketOption::parse(option)?);
            client(address.parse().context("ADDRESS")?, origin, &parse(steps)?)
        }
        ["connect", address, steps @ ..] => {
            client(address.parse().context("ADDRESS")?, Origin::Any, &parse(steps)?)
        }
        ["flows", count, addresses @ ..] if !addresses.is_empty() => {
            let addresses = addresses.iter().map(|address| address.parse().context("ADDRESS"));
            flows::run(&addresses.collect::<Result<Vec<_>>>()?, count.parse().context("COUNT")?)
        }
        ["probe", address, way] => probe::run(address.parse().context("ADDRESS")?, way),
        ["rebind", port, options, end, to @ ..] => {
            let to = to.iter().map(|address| address.parse().context("ADDRESS"));
            rebind::run(port.parse().context("PORT")?, options, end, &to.collect::<Result<Vec<_>>>()?)
        }
        ["deaf", address, steps @ ..] => deaf(address.parse().context("ADDRESS")?, &parse(steps)?),
        ["hold", count, addresses @ ..] if !addresses.is_empty() => {
            let addresses = addresses.iter().map(|address| address.parse().context("ADDRESS"));
            flows::hold(&addresses.collect::<Result<Vec<_>>>()?, count.parse().context("COUNT")?)
        }
        ["repeat", address] => flows::repeat(address.parse().context("ADDRESS")?, AfterFailure::Pause),
        ["storm", address] => flows::repeat(address.parse().context("ADDRESS")?, AfterFailure::Storm),
        ["pending", count, address] => {
            opening::pending(address.parse().context("ADDRESS")?, count.parse().context("COUNT")?)
        }
        ["sequence", count, address, device @ ..] => {
            let device = match device {
                [] => None,
                ["--device", name] => Some(*name),
                _ => bail!("sequence COUNT ADDRESS [--device NAME]"),
            };
            opening::sequence(address.parse().context("ADDRESS")?, count.parse().context("COUNT")?, device)
        }
        _ => bail!(
            "usage: tacit-peer serve|connect|flows|probe|rebind|deaf|hold|repeat|storm|pending|sequence ..."
        ),
    }
}

fn parse(steps: &[&str]) -> Result<Vec<Step>> {
    steps.iter().map(|step| Step::parse(step)).collect()
}

/// Begin of a server's accepts.
enum Accepting {
    Now,
    AfterLine,
}

fn serve(address: SocketAddr, steps: &[Step], accepting: Accepting) -> Result<()> {
    accept(&listen(address, BACKLOG)?, steps, accepting)
}

fn deaf(address: SocketAddr, steps: &[Step]) -> Result<()> {
    accept(&listen(address, 0)?, steps, Accepting::AfterLine)
}

fn listen(address: SocketAddr, backlog: i32) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(backlog)?;
    let listener = TcpListener::from(socket);
    Reporter::new(0).emit("listening", json!({ "address": listener.local_addr()? }));
    Ok(listener)
}

fn accept(listener: &TcpListener, steps: &[Step], accepting: Accepting) -> Result<()> {
    if matches!(accepting, Accepting::AfterLine) {
        io::stdin().read_line(&mut String::new())?;
    }
    for connection in 1.. {
        let (stream, from) = listener.accept().context("accept")?;
        let steps = steps.to_vec();
        let reporter = Reporter::new(connection);
        // Printed before the thread runs, so that events are in the order of accepts.
        let names =
            json!({ "accept": from, "peer": stream.peer_addr().ok(), "local": stream.local_addr().ok() });
        reporter.emit("accepted", names);
        thread::Builder::new().stack_size(STACK).spawn(move || run_steps(stream, &steps, &reporter))?;
    }
    Ok(())
}

fn client(to: SocketAddr, origin: Origin, steps: &[Step]) -> Result<()> {
    let reporter = Reporter::new(1);
    match connect(to, origin) {
        Ok(stream) => {
            reporter.emit(
                "connected",
                json!({
                    "peer": stream.peer_addr().ok(),
                    "local": stream.local_addr().ok(),
                    "unsent_bytes": SockRef::from(&stream).tcp_notsent_lowat().ok(),
                }),
            );
            run_steps(stream, steps, &reporter);
        }
        Err(error) => reporter.emit("failed", json!({ "step": "connect", "error": error_name(&error) })),
    }
    Ok(())
}

/// Local end of a client's socket.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// Address and port are chosen by the kernel.
    Any,
    /// The socket is bound to this address.
    Address(IpAddr),
    /// As [`Self::Any`], with this bound of unsent bytes.
    Unsent(u32),
    /// As [`Self::Any`], with this option.
    Set(SocketOption),
    /// A multipath socket (RFC 8684), which applications use like TCP.
    Multipath,
}

/// Connects as an application does: a blocking `connect`.
fn connect(to: SocketAddr, origin: Origin) -> io::Result<TcpStream> {
    let protocol = match origin {
        Origin::Multipath => Protocol::MPTCP,
        Origin::Any | Origin::Address(_) | Origin::Unsent(_) | Origin::Set(_) => Protocol::TCP,
    };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    socket.set_write_timeout(Some(IO_TIMEOUT))?;
    if let Origin::Address(from) = origin {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    if let Origin::Unsent(bytes) = origin {
        socket.set_tcp_notsent_lowat(bytes)?;
    }
    if let Origin::Set(option) = origin {
        option.set(SockRef::from(&socket))?;
    }
    socket.connect(&to.into())?;
    Ok(socket.into())
}

fn run_steps(stream: TcpStream, steps: &[Step], reporter: &Reporter) {
    let socket = SockRef::from(&stream);
    let timeouts =
        socket.set_read_timeout(Some(IO_TIMEOUT)).and_then(|()| socket.set_write_timeout(Some(IO_TIMEOUT)));
    let result = timeouts.map_err(|error| ("timeouts".to_owned(), error));
    let result = result.and_then(|()| {
        steps
            .iter()
            .try_for_each(|step| step.run(&stream, reporter).map_err(|error| (step.to_string(), error)))
    });
    if let Err((step, error)) = result {
        reporter.emit("failed", json!({ "step": step, "error": error_name(&error) }));
    }
    // The connection is closed before this event, so tests can rely on the order.
    drop(stream);
    reporter.emit("closed", json!({}));
}
