//! Many connections: concurrent, all open and echoed before the first one closes, or sequential.

use crate::{
    IO_TIMEOUT, Origin, STACK, connect,
    event::{Reporter, error_name},
};
use anyhow::{Result, anyhow};
use serde_json::json;
use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

/// Opens `count` connections, distributed over the echo servers, and prints `flows` {echoed, failures}. A connection
/// counts as echoed if it echoed after it opened and again when all were open. Failures are counted by error.
pub(crate) fn run(to: &[SocketAddr], count: usize) -> Result<()> {
    let all_open = Arc::new(Barrier::new(count));
    let start = |(number, to): (usize, SocketAddr)| {
        let all_open = Arc::clone(&all_open);
        thread::Builder::new().stack_size(STACK).spawn(move || one(to, number, &all_open))
    };
    let threads: Vec<_> = (0..count).zip(to.iter().copied().cycle()).map(start).collect::<io::Result<_>>()?;
    let (mut echoed, mut failures) = (0, BTreeMap::<String, u64>::new());
    for thread in threads {
        match thread.join().map_err(|_| anyhow!("a thread panicked"))? {
            Ok(()) => echoed += 1,
            Err(error) => *failures.entry(error_name(&error)).or_default() += 1,
        }
    }
    Reporter::new(0).emit("flows", json!({ "echoed": echoed, "failures": failures }));
    Ok(())
}

/// Opens `count` connections to the echo servers, one after the other, and keeps those that echo. Prints `held` {echoed,
/// failures}, and ends when a line comes on stdin.
pub(crate) fn hold(to: &[SocketAddr], count: usize) -> Result<()> {
    let (mut open, mut failures) = (Vec::new(), BTreeMap::<String, u64>::new());
    for (number, to) in (0..count).zip(to.iter().copied().cycle()) {
        let opened = connect(to, Origin::Any).and_then(|stream| {
            stream.set_read_timeout(Some(IO_TIMEOUT))?;
            echo(&stream, &format!("text of connection {number}"))?;
            Ok(stream)
        });
        match opened {
            Ok(stream) => open.push(stream),
            Err(error) => *failures.entry(error_name(&error)).or_default() += 1,
        }
    }
    Reporter::new(0).emit("held", json!({ "echoed": open.len(), "failures": failures }));
    io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// Behaviour of a client between a failed connection and the next one.
#[derive(Clone, Copy)]
pub(crate) enum AfterFailure {
    /// Pauses for [`PAUSE`], as usual clients do.
    Pause,
    /// Connects again at once, as the worst clients do.
    Storm,
}

/// Pause of a client between a failure and its next connection.
const PAUSE: Duration = Duration::from_millis(10);

/// Opens sequential connections to an echo server until a line comes on stdin. Prints `started` after the first one, and
/// `repeat` {echoed, failures} at the end.
pub(crate) fn repeat(to: SocketAddr, after_failure: AfterFailure) -> Result<()> {
    let is_done = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&is_done);
    thread::spawn(move || {
        // End of file has the same meaning as a line.
        let _ = io::stdin().read_line(&mut String::new());
        stop.store(true, Relaxed);
    });
    let reporter = Reporter::new(0);
    let (mut echoed, mut failures) = (0_u64, BTreeMap::<String, u64>::new());
    while !is_done.load(Relaxed) {
        let exchange = connect(to, Origin::Any).and_then(|stream| {
            stream.set_read_timeout(Some(IO_TIMEOUT))?;
            echo(&stream, "text of a sequential connection")
        });
        match exchange {
            Ok(()) => echoed += 1,
            Err(error) => {
                *failures.entry(error_name(&error)).or_default() += 1;
                if let AfterFailure::Pause = after_failure {
                    thread::sleep(PAUSE);
                }
            }
        }
        if echoed == 1 {
            reporter.emit("started", json!({}));
        }
    }
    reporter.emit("repeat", json!({ "echoed": echoed, "failures": failures }));
    Ok(())
}

fn one(to: SocketAddr, number: usize, all_open: &Barrier) -> io::Result<()> {
    let opened = connect(to, Origin::Any).and_then(|stream| {
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        echo(&stream, &format!("first text of flow {number}"))?;
        Ok(stream)
    });
    // A connection that failed waits here too, because the others wait for it.
    all_open.wait();
    let stream = opened?;
    echo(&stream, &format!("last text of flow {number}"))
}

pub(crate) fn echo(mut stream: &TcpStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    if answer == text.as_bytes() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "echo differs from the text"))
    }
}
