//! One attack step inside a pod: a process of its own, started as `tacit-attack step NAME TARGET MARKER ..`.
//!
//! A step prints one line: `sent`, `refused: ..` (what the system told it), or `absent: ..` (this kernel lacks it). It
//! ends with an error only when it was started wrongly.

mod fill;
mod flood;
mod packets;
mod raw;
mod serve;
mod sockets;
mod translate;

use std::{
    io::{self, BufRead as _, Write as _},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// The result of a step.
pub(crate) enum Told {
    /// The system took the marker.
    Sent,
    /// The system did not; its words.
    Refused(String),
    /// This kernel lacks what the step needs.
    Absent(String),
}

/// The arguments of a step.
pub(crate) struct Given {
    target: SocketAddr,
    marker: Vec<u8>,
    extra: Vec<String>,
}

impl Given {
    fn extra(&self, index: usize) -> Result<&str> {
        self.extra.get(index).map(String::as_str).with_context(|| format!("argument {index} is missing"))
    }
}

/// Runs the step that `arguments` name.
///
/// # Errors
/// Fails if there is no such step, or its arguments are wrong.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [name, target, marker, extra @ ..] = arguments else { bail!("NAME TARGET MARKER [..]") };
    if name == "serve" {
        return serve::run(target);
    }
    let target = target.parse().with_context(|| format!("{target:?} is no address with a port"))?;
    let given = Given { target, marker: marker.clone().into_bytes(), extra: extra.to_vec() };
    let told = match perform(name, &given) {
        Ok(told) => told,
        Err(error) => match error.downcast::<io::Error>() {
            Ok(error) if is_absent(&error) => Told::Absent(error.to_string()),
            Ok(error) => Told::Refused(error.to_string()),
            Err(error) => return Err(error),
        },
    };
    match told {
        Told::Sent => println!("sent"),
        Told::Refused(why) => println!("refused: {why}"),
        Told::Absent(why) => println!("absent: {why}"),
    }
    Ok(())
}

fn perform(name: &str, given: &Given) -> Result<Told> {
    match name {
        "tcp" => sockets::tcp(given),
        "udp" => sockets::udp(given),
        "query" => sockets::query(given),
        "udplite" => sockets::udplite(given),
        "fastopen-sendto" => sockets::fastopen_sendto(given),
        "fastopen-sendmsg" => sockets::fastopen_sendmsg(given),
        "fastopen-connect" => sockets::fastopen_connect(given),
        "mptcp" => sockets::mptcp(given),
        "io-uring" => sockets::io_uring(given),
        "sctp" => sockets::sctp(given),
        "dccp" => sockets::dccp(given),
        "unspec" => sockets::unspec(given),
        "bind" => sockets::bound(given),
        "bindtodevice" => sockets::bound_to_device(given),
        "transparent" => sockets::transparent(given),
        "marks-udp" => sockets::marks_udp(given),
        "marks-tcp" => sockets::marks_tcp(given),
        "fragments" => sockets::fragments(given),
        "extension-headers" => sockets::extension_headers(given),
        "simultaneous" => sockets::simultaneous(given),
        "hold" => sockets::hold(given),
        "after-go" => {
            wait_for_go()?;
            perform(given.extra(0)?, given)
        }
        "passed-fd" => sockets::passed_fd(given),
        "raw" => raw::raw(given),
        "raw-ack" => raw::ack_option(given),
        "reflected" => raw::reflected(given),
        "icmp" => raw::icmp(given),
        "syn-in-fragments" => raw::syn_in_fragments(given),
        "encapsulated" => raw::encapsulated(given),
        "packet-udp" => packets::udp(given),
        "packet-tcp" => packets::tunnel_segment(given),
        "packet-ack" => packets::ack_option(given),
        "packet-fragment" => packets::later_fragment(given),
        "packet-hardware" => packets::foreign_hardware(given),
        "packet-tagged" => packets::tagged(given),
        "claim" => packets::claim(given),
        "translate" => translate::run(given),
        "flood" => flood::syns(given),
        "at-once" => flood::at_once(given),
        "replayed-cookies" => flood::replayed_cookies(given),
        "fill-connects" => fill::connects(given),
        "fill-connections" => fill::connections(given),
        "fill-handshakes" => fill::handshakes(given),
        "fill-answers" => fill::answers(given),
        "late-answers" => fill::late_answers(given),
        "late-answer" => fill::late_answer(given),
        "listen" => fill::listen(given),
        other => bail!("no step {other:?}"),
    }
}

/// The environment variable with [`patience`] in milliseconds.
pub(crate) const PATIENCE: &str = "TACIT_ATTACK_PATIENCE_MS";

/// Returns the time that a step waits for a connection or an answer. The driver measures it on this machine without
/// Tacit.
fn patience() -> Result<Duration> {
    let text = std::env::var(PATIENCE).with_context(|| format!("{PATIENCE} is not set"))?;
    let milliseconds = text.parse().with_context(|| format!("{PATIENCE}={text:?}: expected milliseconds"))?;
    Ok(Duration::from_millis(milliseconds))
}

/// Reports to the driver that the step is ready, and waits for its word.
fn wait_for_go() -> Result<()> {
    println!("waiting");
    io::stdout().flush()?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).context("the driver's word")?;
    Ok(())
}

/// Does the error say that the kernel does not have this at all?
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EPROTONOSUPPORT
                | libc::ESOCKTNOSUPPORT
                | libc::EAFNOSUPPORT
                | libc::ENOPROTOOPT
                | libc::ENOSYS
        )
    )
}
