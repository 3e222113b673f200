//! Clients in a closed loop: each has one request in flight, on one connection or on a new one each time.

use crate::{Load, PATIENCE, times::Times};
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

/// Requests of each connection before the clock starts.
const WARM_UP: usize = 20;
/// Threads here do little, in bytes.
const STACK: usize = 128 << 10;

/// What one client did.
#[derive(Default)]
struct Done {
    /// When each request ended, in nanoseconds since the start, and how long it took, in nanoseconds.
    requests: Vec<(u64, u32)>,
    /// Requests before the start, which cost CPU as well.
    warm_up: usize,
    /// Failed requests by the name of the error.
    failures: BTreeMap<String, u64>,
}

/// Requests on connections that stay open.
pub(crate) fn echo(load: &Load) -> Result<()> {
    report(load, |barrier| {
        let mut done = Done::default();
        let opened = open(load.to).and_then(|stream| {
            (0..WARM_UP).try_for_each(|_| exchange(&stream, &mut vec![b'x'; load.request_bytes]))?;
            done.warm_up = WARM_UP;
            Ok(stream)
        });
        // Also one that failed comes here: the others wait for it.
        barrier.wait();
        let result = opened.and_then(|stream| {
            let mut request = vec![b'x'; load.request_bytes];
            until_time(load.time, &mut done, || exchange(&stream, &mut request))
        });
        if let Err(error) = result {
            done.count(&error);
        }
        done
    })
}

/// Which side ends a connection first, and then keeps it in TIME_WAIT.
#[derive(Clone, Copy)]
pub(crate) enum Closer {
    /// As with HTTP's `Connection: close`.
    Server,
    Client,
}

/// A connection for each request.
pub(crate) fn connect(load: &Load, closer: Closer) -> Result<()> {
    report(load, |barrier| {
        let mut done = Done::default();
        let mut request = vec![b'x'; load.request_bytes];
        match one_shot(load.to, &mut request, closer) {
            Ok(()) => done.warm_up = 1,
            Err(error) => done.count(&error),
        }
        barrier.wait();
        let begin = Instant::now();
        // A failure is counted and the next connection tried, as a busy client would.
        while let Some(left) = load.time.checked_sub(begin.elapsed()) {
            let once = || one_shot(load.to, &mut request, closer);
            if let Err(error) = until_time_from(begin, left, &mut done, once) {
                done.count(&error);
            }
        }
        done
    })
}

impl Done {
    fn count(&mut self, error: &io::Error) {
        // A blocking socket whose time is over reports what a non-blocking one does.
        let name = match error.kind() {
            ErrorKind::WouldBlock => "TimedOut".to_owned(),
            kind => format!("{kind:?}"),
        };
        *self.failures.entry(name).or_default() += 1;
    }
}

fn until_time(time: Duration, done: &mut Done, request: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    until_time_from(Instant::now(), time, done, request)
}

/// Requests for `time` from now; the times at which they end count from `begin`.
fn until_time_from(
    begin: Instant,
    time: Duration,
    done: &mut Done,
    mut request: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut before = Instant::now();
    let end = before + time;
    loop {
        request()?;
        let after = Instant::now();
        let took = u32::try_from((after - before).as_nanos()).unwrap_or(u32::MAX);
        done.requests.push((u64::try_from((after - begin).as_nanos()).unwrap_or(u64::MAX), took));
        if after >= end {
            return Ok(());
        }
        before = after;
    }
}

pub(crate) fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub(crate) fn exchange(mut stream: &TcpStream, request: &mut [u8]) -> io::Result<()> {
    stream.write_all(request)?;
    stream.read_exact(request)
}

fn one_shot(to: SocketAddr, request: &mut [u8], closer: Closer) -> io::Result<()> {
    let stream = open(to)?;
    exchange(&stream, request)?;
    if let Closer::Client = closer {
        return Ok(());
    }
    match (&stream).read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::new(ErrorKind::InvalidData, "more than was asked for")),
    }
}

/// Runs the clients at once and prints what they did together.
fn report(load: &Load, client: impl Fn(&Barrier) -> Done + Sync) -> Result<()> {
    let barrier = Barrier::new(load.clients);
    let all = thread::scope(|scope| -> Result<Vec<Done>> {
        let start = |_| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || client(&barrier));
        let threads: Vec<_> = (0..load.clients).map(start).collect::<io::Result<_>>()?;
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))).collect()
    })?;
    println!("{}", summary(load, all));
    Ok(())
}

fn summary(load: &Load, all: Vec<Done>) -> Value {
    let seconds = load.time.as_secs_f64();
    // What ended after the time was begun before it: counting it would favour slow requests.
    let limit = u64::try_from(load.time.as_nanos()).unwrap_or(u64::MAX);
    let in_time = || all.iter().flat_map(|done| &done.requests).filter(|(ended, _)| *ended <= limit);
    let mut per_second = vec![0_u64; load.time.as_secs().try_into().unwrap_or(0)];
    for (ended, _) in in_time() {
        let second = usize::try_from(ended / 1_000_000_000).unwrap_or(usize::MAX);
        per_second.get_mut(second).into_iter().for_each(|count| *count += 1);
    }
    let mut failures = BTreeMap::<&str, u64>::new();
    for (name, count) in all.iter().flat_map(|done| &done.failures) {
        *failures.entry(name).or_default() += count;
    }
    let times = Times::new(in_time().map(|(_, took)| *took).collect());
    json!({
        "requests": all.iter().map(|done| done.requests.len() + done.warm_up).sum::<usize>(),
        "per_second": times.count() as f64 / seconds,
        "p50_us": times.percentile(500),
        "p99_us": times.percentile(990),
        "p999_us": times.percentile(999),
        "each_second": per_second,
        "failures": failures,
    })
}
