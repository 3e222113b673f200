//! Load generator of `cargo xtask bench`, for either side of many connections.
//!
//! ```text
//! tacit-load serve ADDRESS                                    echoes on every connection until the client closes it
//! tacit-load serve ADDRESS --answer BYTES                     echoes the first BYTES of every connection, then closes it
//! tacit-load echo ADDRESS CONNECTIONS BYTES SECONDS           requests on open connections, one at a time on each
//! tacit-load sparse ADDRESS MILLISECONDS BYTES SECONDS        as echo, on one connection, with a pause before each request
//! tacit-load connect ADDRESS CLIENTS BYTES SECONDS            a new connection for every request, one at a time per client
//! tacit-load connect-close ADDRESS CLIENTS BYTES SECONDS      the same, and the client is the first to close
//! tacit-load refused ADDRESS CLIENTS SECONDS                  connections to a closed port, one at a time per client
//! tacit-load idle ADDRESS COUNT                               opens COUNT connections, sends one request on each, then idles
//! tacit-load relay LISTEN TO [LISTEN TO ...]                  relays connections accepted at LISTEN to TO, both ways
//! ```
//!
//! Clients are threads with plain blocking sockets, as ordinary applications are, one request in flight each: a closed
//! loop. The server is one thread with epoll. Every duration is kept, so percentiles are exact. A client prints one JSON
//! object when it is done. `idle` prints one when all connections are open, and closes them when its stdin ends. Nothing
//! in this program depends on Tacit.

#![forbid(unsafe_code)]

mod client;
mod idle;
mod relay;
mod server;
mod times;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{net::SocketAddr, str::FromStr, time::Duration};

/// Timeout of one socket call; a longer call counts as a failure.
const IO_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest request, in bytes.
const REQUEST_MAX: usize = 64 << 10;

fn main() -> Result<()> {
    // Thousands of connections need the highest possible limit of descriptors.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raise the limit of descriptors")?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", address] => server::run(parse(address, "ADDRESS")?, server::Behaviour::Echo),
        ["serve", address, "--answer", bytes] => {
            server::run(parse(address, "ADDRESS")?, server::Behaviour::Answer(request_size(bytes)?))
        }
        ["echo", address, rest @ ..] => client::echo(&load(address, rest)?, Duration::ZERO),
        ["sparse", address, pause, rest @ ..] => {
            let [bytes, seconds] = rest else { bail!("expected ADDRESS MILLISECONDS BYTES SECONDS") };
            let pause = Duration::from_millis(parse(pause, "MILLISECONDS")?);
            client::echo(&load(address, &["1", bytes, seconds])?, pause)
        }
        ["connect", address, rest @ ..] => client::connect(&load(address, rest)?, client::Closer::Server),
        ["connect-close", address, rest @ ..] => {
            client::connect(&load(address, rest)?, client::Closer::Client)
        }
        ["refused", address, clients, seconds] => client::refused(&load(address, &[clients, "1", seconds])?),
        ["idle", address, count] => idle::run(parse(address, "ADDRESS")?, parse(count, "COUNT")?),
        ["relay", addresses @ ..] if !addresses.is_empty() => relay::run(&routes(addresses)?),
        _ => {
            bail!("usage: tacit-load serve|echo|sparse|connect|connect-close|refused|idle|relay ADDRESS ...")
        }
    }
}

/// Parameters of the clients.
struct Load {
    to: SocketAddr,
    clients: usize,
    request_bytes: usize,
    time: Duration,
}

fn load(address: &str, rest: &[&str]) -> Result<Load> {
    let [clients, bytes, seconds] = rest else { bail!("expected ADDRESS CLIENTS BYTES SECONDS") };
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
        bytes => bail!("invalid BYTES {bytes}: expected 1 to {REQUEST_MAX}"),
    }
}

fn parse<T: FromStr>(text: &str, what: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().with_context(|| format!("{what}: {text:?}"))
}
