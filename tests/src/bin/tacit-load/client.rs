//! Clients in a closed loop: each has one request in flight, on a persistent connection or on a new one for each request.

use crate::{IO_TIMEOUT, Load, times::Times};
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

/// Requests of each connection before the measurement starts.
const WARM_UP: usize = 20;
/// Stack of a client's thread, in bytes. A thread needs little of it.
const STACK: usize = 128 << 10;

/// Measurements of one client.
#[derive(Default)]
struct Measurements {
    /// End of each request in nanoseconds since the start, and its duration in nanoseconds.
    requests: Vec<(u64, u32)>,
    /// Number of requests before the start. They count in `requests`, because they cost CPU too.
    warm_up: usize,
    /// Numbers of failed requests by the error's name.
    failures: BTreeMap<String, u64>,
}

/// Sends requests on persistent connections, each after `pause`.
pub(crate) fn echo(load: &Load, pause: Duration) -> Result<()> {
    report(load, |barrier| {
        let mut measurements = Measurements::default();
        let opened = open(load.to).and_then(|stream| {
            (0..WARM_UP).try_for_each(|_| exchange(&stream, &mut vec![b'x'; load.request_bytes]))?;
            measurements.warm_up = WARM_UP;
            Ok(stream)
        });
        // A client that failed waits here too, because the others wait for it.
        barrier.wait();
        let result = opened.and_then(|stream| {
            let mut request = vec![b'x'; load.request_bytes];
            let time = (load.time, pause);
            run_for_from(Instant::now(), time, &mut measurements, || exchange(&stream, &mut request))
        });
        if let Err(error) = result {
            measurements.count(&error);
        }
        measurements
    })
}

/// Side that closes a connection first and then keeps it in TIME_WAIT.
#[derive(Clone, Copy)]
pub(crate) enum Closer {
    /// The server, as with HTTP's `Connection: close`.
    Server,
    Client,
}

/// Opens a connection for each request.
pub(crate) fn connect(load: &Load, closer: Closer) -> Result<()> {
    repeat(load, |request| one_shot(load.to, request, closer))
}

/// Opens connections to a port on which nobody listens. The request is the refusal, and a connection is a failure.
pub(crate) fn refused(load: &Load) -> Result<()> {
    repeat(load, |_| match TcpStream::connect(load.to) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(ErrorKind::AlreadyExists, "connected")),
    })
}

/// Calls `once` with the bytes of a request until the time is over.
fn repeat(load: &Load, once: impl Fn(&mut [u8]) -> io::Result<()> + Sync) -> Result<()> {
    report(load, |barrier| {
        let mut measurements = Measurements::default();
        let mut request = vec![b'x'; load.request_bytes];
        match once(&mut request) {
            Ok(()) => measurements.warm_up = 1,
            Err(error) => measurements.count(&error),
        }
        barrier.wait();
        let begin = Instant::now();
        // After a failure the client opens the next connection, as a busy client would.
        while let Some(left) = load.time.checked_sub(begin.elapsed()) {
            let once = || once(&mut request);
            if let Err(error) = run_for_from(begin, (left, Duration::ZERO), &mut measurements, once) {
                measurements.count(&error);
            }
        }
        measurements
    })
}

impl Measurements {
    fn count(&mut self, error: &io::Error) {
        // A blocking socket reports a timeout with the error of a non-blocking one.
        let name = match error.kind() {
            ErrorKind::WouldBlock => "TimedOut".to_owned(),
            kind => format!("{kind:?}"),
        };
        *self.failures.entry(name).or_default() += 1;
    }
}

/// Sends requests for `time`, each after `pause`. The ends of requests count from `begin`.
fn run_for_from(
    begin: Instant,
    (time, pause): (Duration, Duration),
    measurements: &mut Measurements,
    mut request: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let end = Instant::now() + time;
    let mut before = Instant::now();
    loop {
        if !pause.is_zero() {
            thread::sleep(pause);
            before = Instant::now();
        }
        request()?;
        let after = Instant::now();
        let took = u32::try_from((after - before).as_nanos()).unwrap_or(u32::MAX);
        measurements.requests.push((u64::try_from((after - begin).as_nanos()).unwrap_or(u64::MAX), took));
        if after >= end {
            return Ok(());
        }
        before = after;
    }
}

pub(crate) fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
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
        _ => Err(io::Error::new(ErrorKind::InvalidData, "more bytes than requested")),
    }
}

/// Runs the clients concurrently and prints their combined measurements.
fn report(load: &Load, client: impl Fn(&Barrier) -> Measurements + Sync) -> Result<()> {
    let barrier = Barrier::new(load.clients);
    let all = thread::scope(|scope| -> Result<Vec<Measurements>> {
        let start = |_| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || client(&barrier));
        let threads: Vec<_> = (0..load.clients).map(start).collect::<io::Result<_>>()?;
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))).collect()
    })?;
    println!("{}", summary(load, all));
    Ok(())
}

fn summary(load: &Load, all: Vec<Measurements>) -> Value {
    let seconds = load.time.as_secs_f64();
    // A request that ended late began in time. Counting it would favour slow requests.
    let limit = u64::try_from(load.time.as_nanos()).unwrap_or(u64::MAX);
    let in_time =
        || all.iter().flat_map(|measurements| &measurements.requests).filter(|(ended, _)| *ended <= limit);
    let mut per_second = vec![0_u64; load.time.as_secs().try_into().unwrap_or(0)];
    for (ended, _) in in_time() {
        let second = usize::try_from(ended / 1_000_000_000).unwrap_or(usize::MAX);
        per_second.get_mut(second).into_iter().for_each(|count| *count += 1);
    }
    let mut failures = BTreeMap::<&str, u64>::new();
    for (name, count) in all.iter().flat_map(|measurements| &measurements.failures) {
        *failures.entry(name).or_default() += count;
    }
    let times = Times::new(in_time().map(|(_, took)| *took).collect());
    json!({
        "requests": all.iter().map(|measurements| measurements.requests.len() + measurements.warm_up).sum::<usize>(),
        "per_second": times.count() as f64 / seconds,
        "p50_us": times.percentile(500),
        "p99_us": times.percentile(990),
        "p999_us": times.percentile(999),
        "each_second": per_second,
        "failures": failures,
    })
}
