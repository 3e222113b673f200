//! The load generator of `cargo xtask bench`, on one side or the other of many connections.
//!
//! ```text
//! tacit-load serve ADDRESS                                    echoes on every connection until its end
//! tacit-load serve ADDRESS --answer BYTES                     echoes the first BYTES of every connection, then closes it
//! tacit-load echo ADDRESS CONNECTIONS BYTES SECONDS           requests on open connections, one at a time on each
//! tacit-load connect ADDRESS CLIENTS BYTES SECONDS            a new connection for every request, one at a time per client
//! tacit-load connect-close ADDRESS CLIENTS BYTES SECONDS      the same, and the client is the first to close
//! tacit-load idle ADDRESS COUNT                               opens COUNT connections, one request on each, then stays silent
//! tacit-load relay LISTEN TO [LISTEN TO ...]                  passes on to TO what is accepted at LISTEN, both ways
//! ```
//!
//! Clients are threads with plain blocking sockets, as ordinary applications are, one request in flight each: a closed
//! loop. The server is one thread with epoll. Each time is kept, so percentiles are exact. A client ends with one
//! JSON object on stdout; `idle` tells when all are open and closes them when its stdin ends. Nothing here knows of
//! Tacit.

#![forbid(unsafe_code)]

mod client;
mod idle;
mod relay;
mod server;
mod times;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{net::SocketAddr, str::FromStr, time::Duration};

/// Longest wait of one socket call: what takes longer counts as a failure.
const PATIENCE: Duration = Duration::from_secs(20);
/// Largest request, in bytes.
const REQUEST_MAX: usize = 64 << 10;

fn main() -> Result<()> {
    // Thousands of connections: all descriptors that the machine gives.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raise the limit of descriptors")?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", address] => server::run(parse(address, "ADDRESS")?, server::Duty::Echo),
        ["serve", address, "--answer", bytes] => {
            server::run(parse(address, "ADDRESS")?, server::Duty::Answer(request_size(bytes)?))
        }
        ["echo", address, rest @ ..] => client::echo(&load(address, rest)?),
        ["connect", address, rest @ ..] => client::connect(&load(address, rest)?, client::Closer::Server),
        ["connect-close", address, rest @ ..] => {
            client::connect(&load(address, rest)?, client::Closer::Client)
        }
        ["idle", address, count] => idle::run(parse(address, "ADDRESS")?, parse(count, "COUNT")?),
        ["relay", addresses @ ..] if !addresses.is_empty() => relay::run(&routes(addresses)?),
        _ => bail!("usage: tacit-load serve|echo|connect|connect-close|idle|relay ADDRESS ..."),
    }
}

/// What the clients do, and for how long.
struct Load {
    to: SocketAddr,
    clients: usize,
    request_bytes: usize,
    time: Duration,
}

fn load(address: &str, rest: &[&str]) -> Result<Load> {
    let [clients, bytes, seconds] = rest else { bail!("give ADDRESS CLIENTS BYTES SECONDS") };
    Ok(Load {
        to: parse(address, "ADDRESS")?,
        clients: parse(clients, "CLIENTS")?,
        request_bytes: request_size(bytes)?,
        time: Duration::from_secs_f64(parse(seconds, "SECONDS")?),
    })
}

fn routes(addresses: &[&str]) -> Result<Vec<relay::Route>> {
    let pairs = addresses.chunks(2).map(|pair| {
        let [listen, to] = pair else { bail!("relay: LISTEN {} has no TO", pair[0]) };
        Ok(relay::Route { listen: parse(listen, "LISTEN")?, to: parse(to, "TO")? })
    });
    pairs.collect()
}

fn request_size(text: &str) -> Result<usize> {
    match parse(text, "BYTES")? {
        bytes @ 1..=REQUEST_MAX => Ok(bytes),
        bytes => bail!("{bytes} bytes: a request has 1 to {REQUEST_MAX}"),
    }
}

fn parse<T: FromStr>(text: &str, what: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().with_context(|| format!("{what}: {text:?}"))
}
