//! Connections one after another from one source port: the rows are variants of what a program does with the port.

use std::{net::SocketAddr, ops::Range};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tacit_tests::{Client, Mesh, Server, fresh_port};

use super::{ALL, Family, NOISE_MS, address, with_tacit, without_tacit};

/// Ports below those that the kernel chooses, one for each try of a row.
const PORTS: Range<u16> = 20_000..30_000;
/// Tries of a row, until both runs return the same.
const TRIES: usize = 3;
/// Steps of a server that closes first, and of one that waits for the client's end.
const CLOSES: &[&str] = &["line", "send:bye"];
const WAITS: &[&str] = &["line", "send:bye", "read-end"];

/// Destinations of a row's connections, by pod and number of the port.
const SAME: &[(&str, u16)] = &[("far", 0); 12];
const PORTS_OF_ONE: &[(&str, u16)] = &[("far", 0), ("far", 1), ("far", 2), ("far", 3)];
const PODS: &[(&str, u16)] = &[("far", 0), ("near", 0)];
const IN_TURN: &[(&str, u16)] = &[("far", 0), ("near", 0), ("far", 0), ("near", 0)];

#[test]
#[ignore = "needs root"]
fn a_source_port_is_used_again_at_once() -> Result<()> {
    let mut ports = PORTS;
    let mut differences = Vec::new();
    for family in ALL {
        // A program with such a socket has no v4-mapped destinations.
        let only = if family == Family::V6 { &[("reuse,only", "server", SAME)][..] } else { &[] };
        for (options, end, to) in [
            ("", "server", SAME),
            ("reuse", "server", SAME),
            ("reuse,own", "server", SAME),
            ("reuse", "server", IN_TURN),
            ("reuse", "client", PODS),
            ("reuse", "client", PORTS_OF_ONE),
            ("reuse,own", "client", PORTS_OF_ONE),
            ("", "client", PODS),
            ("", "reset", SAME),
            ("reuse,own", "reset", IN_TURN),
            ("reuse", "open", PODS),
            ("reuse", "open", PORTS_OF_ONE),
            ("reuse,own", "open", PORTS_OF_ONE),
            ("share", "open", PORTS_OF_ONE),
            ("reuse", "open", SAME),
            ("own,late", "open", PORTS_OF_ONE),
        ]
        .iter()
        .chain(only)
        {
            let mut try_row = || same(family, (ports.next().context("a port")?, options, end), to);
            // On a loaded machine the kernel may not have got to the last segment of a connection when the next one begins.
            let mut outcome = try_row();
            for _ in 1..TRIES {
                if outcome.is_err() {
                    outcome = try_row();
                }
            }
            differences.extend(outcome.err().map(|difference| format!("{difference:#}")));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// Compares what every call returned without Tacit and with it.
fn same(family: Family, row: (u16, &str, &str), to: &[(&str, u16)]) -> Result<()> {
    let run = |mesh| rounds(mesh, family, row, to);
    let without = run(without_tacit()?).context("without Tacit")?;
    let with = run(with_tacit()?).context("with Tacit")?;
    let [(without, without_ms), (with, with_ms)] = [without, with].map(split_times);
    let name = format!("{family:?} {row:?} {to:?}");
    ensure!(with == without, "{name}\nwithout Tacit: {without:?}\n   with Tacit: {with:?}");
    ensure!(with_ms <= without_ms + NOISE_MS, "{name}: {with_ms} ms instead of {without_ms}");
    Ok(())
}

/// Returns what the calls returned, and how long all connections took.
fn split_times(mut rounds: Vec<Value>) -> (Vec<Value>, u64) {
    let times = rounds.iter_mut().filter_map(|round| round["ms"].take().as_u64());
    let all = times.sum();
    (rounds, all)
}

fn rounds(
    mesh: &Mesh,
    family: Family,
    (port, options, end): (u16, &str, &str),
    to: &[(&str, u16)],
) -> Result<Vec<Value>> {
    let steps = if end == "server" { CLOSES } else { WAITS };
    let (mut servers, mut at) = (Vec::<((&str, u16), Server, SocketAddr)>::new(), Vec::new());
    for destination @ (pod, _) in to {
        let known = servers.iter().find(|(known, ..)| known == destination).map(|(.., at)| *at);
        let at_once = match known {
            Some(known) => known,
            None => {
                let to = SocketAddr::new(address(mesh.pod(pod)?, family), fresh_port());
                let listening = SocketAddr::new(to.ip().to_canonical(), to.port());
                servers.push((*destination, Server::start(mesh.pod(pod)?, listening, steps)?, to));
                to
            }
        };
        at.push(at_once.to_string());
    }
    let client = mesh.pod("client")?;
    let own = format!("from:{}", address(client, family));
    let (port, options) = (port.to_string(), options.replace("own", &own));
    let at: Vec<&str> = at.iter().map(String::as_str).collect();
    let args = [&["rebind", &port, &options, end], &at[..]].concat();
    let events = Client::with_args(client, &args)?.finish()?;
    let rebind = events.iter().find(|event| event["event"] == "rebind").context("rebind")?;
    Ok(rebind["rounds"].as_array().context("rounds")?.clone())
}
