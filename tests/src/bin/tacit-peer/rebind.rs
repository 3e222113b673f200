//! Connections one after another from one source port, as programs open them whose firewall or protocol fixes it.
//!
//! | option | effect |
//! |---|---|
//! | `from:IP` | binds the port of this address, instead of the unspecified one |
//! | `reuse` | SO_REUSEADDR |
//! | `share` | SO_REUSEPORT |
//! | `only` | IPV6_V6ONLY |
//! | `late` | binds the address without a port, with IP_BIND_ADDRESS_NO_PORT |
//!
//! | end | who closes first |
//! |---|---|
//! | `server` | the server, and the client when it has read that |
//! | `client` | the client |
//! | `reset` | the client, with RST |
//! | `open` | nobody: all connections are open at the same time |

use crate::{
    IO_TIMEOUT,
    event::Reporter,
    probe::{Outcome as _, errno},
};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use serde_json::{Map, Value, json};
use socket2::{Domain, Socket, Type};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

/// Text of the client, which the server answers with a line.
const HELLO: &[u8] = b"hello\n";

#[derive(Debug, Default)]
struct Options {
    from: Option<IpAddr>,
    reuse: bool,
    share: bool,
    only: bool,
    late: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Server,
    Client,
    Reset,
    Open,
}

/// Connects from `port` to each of `to` in turn. Prints `rebind` {rounds}: what bind(), connect() and the exchange returned, and the
/// time until the connection was decided.
pub(crate) fn run(port: u16, options: &str, end: &str, to: &[SocketAddr]) -> Result<()> {
    let options = parse(options)?;
    let end = match end {
        "server" => End::Server,
        "client" => End::Client,
        "reset" => End::Reset,
        "open" => End::Open,
        _ => bail!("invalid end {end}"),
    };
    ensure!(!to.is_empty(), "no destination");
    let mut open = Vec::new();
    let mut rounds = Vec::new();
    for to in to {
        let mut round = Map::new();
        let socket = connect(port, &options, *to, &mut round)?;
        if let Some(socket) = socket {
            let exchanged = exchange(&socket, end);
            round.insert("text".to_owned(), exchanged.map_or_else(|error| errno(&error), |text| json!(text)));
            match end {
                End::Open => open.push(socket),
                End::Reset => socket.set_linger(Some(Duration::ZERO))?,
                End::Server | End::Client => {}
            }
        }
        rounds.push(Value::Object(round));
    }
    Reporter::new(0).emit("rebind", json!({ "rounds": rounds }));
    Ok(())
}

fn parse(text: &str) -> Result<Options> {
    let mut options = Options::default();
    for option in text.split(',').filter(|option| !option.is_empty()) {
        match option.split_once(':').unwrap_or((option, "")) {
            ("from", address) => options.from = Some(address.parse().context("IP")?),
            ("reuse", _) => options.reuse = true,
            ("share", _) => options.share = true,
            ("only", _) => options.only = true,
            ("late", _) => options.late = true,
            _ => bail!("invalid option {option}"),
        }
    }
    Ok(options)
}

/// Returns a connected socket, and notes what its calls returned.
fn connect(
    port: u16,
    options: &Options,
    to: SocketAddr,
    round: &mut Map<String, Value>,
) -> Result<Option<Socket>> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_read_timeout(Some(IO_TIMEOUT))?;
    if options.reuse {
        socket.set_reuse_address(true)?;
    }
    if options.share {
        socket.set_reuse_port(true)?;
    }
    if options.only {
        socket.set_only_v6(true)?;
    }
    if options.late {
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
    }
    let unspecified =
        if to.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let port = if options.late { 0 } else { port };
    let mut saw = |call: &str, outcome: io::Result<()>| {
        let is_ok = outcome.is_ok();
        round.insert(call.to_owned(), outcome.map_or_else(|error| errno(&error), |()| ().shown()));
        is_ok
    };
    if !saw("bind", socket.bind(&SocketAddr::new(options.from.unwrap_or(unspecified), port).into())) {
        return Ok(None);
    }
    let started = Instant::now();
    let is_connected = saw("connect", socket.connect(&to.into()));
    round.insert("ms".to_owned(), json!(started.elapsed().as_millis() as u64));
    let own = socket.local_addr().ok().and_then(|own| own.as_socket());
    // A port that the kernel has chosen differs from run to run.
    let own = own.map(|own| if options.late { own.ip().to_string() } else { own.to_string() });
    round.insert("own".to_owned(), json!(own));
    Ok(is_connected.then_some(socket))
}

/// Sends a line, and reads the answer, and the end if the server closes first.
fn exchange(mut socket: &Socket, end: End) -> io::Result<String> {
    socket.write_all(HELLO)?;
    let mut text = Vec::new();
    if end == End::Server {
        socket.read_to_end(&mut text)?;
    } else {
        let mut byte = [0];
        while byte != *b"\n" {
            socket.read_exact(&mut byte)?;
            text.extend(byte);
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
