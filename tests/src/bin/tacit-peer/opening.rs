//! Connections that a client opens and does not wait for, and connections one after another. Failures are counted by
//! the number of their error.

use crate::{IO_TIMEOUT, event::Reporter, flows::echo};
use anyhow::Result;
use serde_json::json;
use socket2::{Domain, Socket, Type};
use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpStream},
};

/// Opens `count` connections without waiting for any, and prints `pending` {opened, failures}. All stay open until a line
/// comes on stdin; then prints `closed`.
pub(crate) fn pending(to: SocketAddr, count: usize) -> Result<()> {
    let (mut opened, mut failures) = (Vec::new(), BTreeMap::<String, u64>::new());
    for _ in 0..count {
        let begin = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => Err(error),
                _ => Ok(socket),
            }
        };
        match begin() {
            Ok(socket) => opened.push(socket),
            Err(error) => *failures.entry(number(&error)).or_default() += 1,
        }
    }
    let reporter = Reporter::new(0);
    reporter.emit("pending", json!({ "opened": opened.len(), "failures": failures }));
    // End of file has the same meaning as a line.
    let _ = io::stdin().read_line(&mut String::new());
    drop(opened);
    reporter.emit("closed", json!({}));
    Ok(())
}

/// Opens `count` connections one after another, by sockets that are bound to `device`. Prints `sequence` {echoed, failures}.
pub(crate) fn sequence(to: SocketAddr, count: usize, device: Option<&str>) -> Result<()> {
    let (mut echoed, mut failures) = (0_u64, BTreeMap::<String, u64>::new());
    for _ in 0..count {
        let exchange = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind_device(device.map(str::as_bytes))?;
            socket.set_write_timeout(Some(IO_TIMEOUT))?;
            socket.set_read_timeout(Some(IO_TIMEOUT))?;
            socket.connect(&to.into())?;
            echo(&TcpStream::from(socket), "text of one connection of many")
        };
        match exchange() {
            Ok(()) => echoed += 1,
            Err(error) => *failures.entry(number(&error)).or_default() += 1,
        }
    }
    Reporter::new(0).emit("sequence", json!({ "echoed": echoed, "failures": failures }));
    Ok(())
}

fn number(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.kind().to_string(), |number| number.to_string())
}
