//! Many connections: at once, all open and each echoed before the first one closes; or one after the other.

use crate::{
    Origin, PATIENCE, STACK, connect,
    event::{Teller, kind},
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

/// Opens `count` connections to echo servers in turn and tells `flows` {echoed, failures}: how many were right both when
/// they had opened and when all were open, and the errors of the others by how often they came.
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
            Err(error) => *failures.entry(kind(&error)).or_default() += 1,
        }
    }
    Teller::new(0).tell("flows", json!({ "echoed": echoed, "failures": failures }));
    Ok(())
}

/// What a client does when a connection failed, before it tries again.
#[derive(Clone, Copy)]
pub(crate) enum AfterFailure {
    /// Pauses shortly, as clients do.
    Pause,
    /// Nothing, as the worst clients do.
    Storm,
}

/// Pause of a client between a failure and its next connection.
const PAUSE: Duration = Duration::from_millis(10);

/// Opens one connection after the other to an echo server until a line comes on stdin. Tells `begun` after the first, and
/// `again` {echoed, failures} at the end.
pub(crate) fn again(to: SocketAddr, after_failure: AfterFailure) -> Result<()> {
    let ends = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&ends);
    thread::spawn(move || {
        // Its end says the same.
        let _ = io::stdin().read_line(&mut String::new());
        told.store(true, Relaxed);
    });
    let teller = Teller::new(0);
    let (mut echoed, mut failures) = (0_u64, BTreeMap::<String, u64>::new());
    while !ends.load(Relaxed) {
        let exchange = connect(to, Origin::Any).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            echo(&stream, "words of one after the other")
        });
        match exchange {
            Ok(()) => echoed += 1,
            Err(error) => {
                *failures.entry(kind(&error)).or_default() += 1;
                if let AfterFailure::Pause = after_failure {
                    thread::sleep(PAUSE);
                }
            }
        }
        if echoed == 1 {
            teller.tell("begun", json!({}));
        }
    }
    teller.tell("again", json!({ "echoed": echoed, "failures": failures }));
    Ok(())
}

fn one(to: SocketAddr, number: usize, all_open: &Barrier) -> io::Result<()> {
    let opened = connect(to, Origin::Any).and_then(|stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        echo(&stream, &format!("first words of flow {number}"))?;
        Ok(stream)
    });
    // Also one that failed comes here: the others wait for it.
    all_open.wait();
    let stream = opened?;
    echo(&stream, &format!("last words of flow {number}"))
}

fn echo(mut stream: &TcpStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    if answer == text.as_bytes() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "another answer"))
    }
}
