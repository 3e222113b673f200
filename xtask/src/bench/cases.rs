//! What is measured, by name.

use std::fmt::Write as _;

use anyhow::Result;

use super::{
    ground::{self, Ground, Programs},
    load::{self, Direction, Done, Keep},
};

/// One case.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    /// For the reader, without the unit.
    pub(super) what: String,
    pub(super) kind: Kind,
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Bytes from one pod to another.
    Throughput { streams: u16, direction: Direction, server: Server },
    /// Requests on open connections.
    Echo { connections: u16, bytes: u32 },
    /// A connection for every request.
    Connect { clients: u16 },
    /// wrk against nginx.
    Http { keep: Keep },
}

/// Which pod serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// The one on the other node.
    Far,
    /// The one on the client's own node.
    Near,
}

/// A figure of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Metric {
    /// As [`Done::figures`] names it.
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    pub(super) better: Better,
}

/// Which of two figures is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Better {
    Higher,
    Lower,
}

const GBITS: Metric = Metric { name: "rate", unit: "Gbit/s", better: Better::Higher };
const REQUESTS: Metric = Metric { name: "rate", unit: "requests/s", better: Better::Higher };
const CONNECTIONS: Metric = Metric { name: "rate", unit: "connections/s", better: Better::Higher };
const P50: Metric = Metric { name: "p50", unit: "us", better: Better::Lower };
const P99: Metric = Metric { name: "p99", unit: "us", better: Better::Lower };
const P999: Metric = Metric { name: "p999", unit: "us", better: Better::Lower };

/// Connections of wrk.
const HTTP_CONNECTIONS: u16 = 32;

/// All cases, in the order of the table.
pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, what: String, kind| cases.push(Case { name, what, kind });
    for direction in [Direction::Forward, Direction::Reverse] {
        for streams in [1, 8] {
            let (end, how) = match direction {
                Direction::Forward => ("", ""),
                Direction::Reverse => ("-reverse", ", reverse"),
            };
            let what = format!("iperf3, {streams} stream{}{how}", if streams == 1 { "" } else { "s" });
            let kind = Kind::Throughput { streams, direction, server: Server::Far };
            add(format!("throughput-x{streams}{end}"), what, kind);
        }
    }
    let kind = Kind::Throughput { streams: 1, direction: Direction::Forward, server: Server::Near };
    add("same-node-x1".to_owned(), "iperf3, 1 stream, same node".to_owned(), kind);
    for connections in [1, 8, 64] {
        for bytes in [1, 64, 1024] {
            let what = format!(
                "echo {bytes} B, {connections} connection{}",
                if connections == 1 { "" } else { "s" }
            );
            add(format!("echo-{bytes}B-x{connections}"), what, Kind::Echo { connections, bytes });
        }
    }
    for clients in [1, 16, 64] {
        let what = format!("new connection + 64 B, {clients} client{}", if clients == 1 { "" } else { "s" });
        add(format!("connect-x{clients}"), what, Kind::Connect { clients });
    }
    add("http-keepalive".to_owned(), "HTTP keep-alive, wrk c32".to_owned(), Kind::Http { keep: Keep::Alive });
    add(
        "http-close".to_owned(),
        "HTTP Connection: close, wrk c32".to_owned(),
        Kind::Http { keep: Keep::Close },
    );
    cases
}

/// The cases as text.
pub(super) fn list() -> String {
    all().iter().fold(String::new(), |mut text, case| {
        let _ = writeln!(text, "{:<24} {}", case.name, case.what);
        text
    })
}

impl Case {
    /// What of it stands in the table, the most telling figure first.
    pub(super) fn metrics(&self) -> &'static [Metric] {
        match self.kind {
            Kind::Throughput { .. } => &[GBITS],
            Kind::Echo { connections: 1, .. } => &[P50, P99, P999],
            Kind::Echo { .. } => &[REQUESTS, P50, P99, P999],
            Kind::Connect { .. } => &[CONNECTIONS, P99],
            Kind::Http { .. } => &[REQUESTS, P99],
        }
    }

    /// Runs it once.
    pub(super) fn run(&self, ground: &Ground, programs: &Programs, seconds: u64) -> Result<Done> {
        let (client, far) = (&ground.client, &ground.far);
        let generator = programs.load.as_path();
        match self.kind {
            Kind::Throughput { streams, direction, server } => {
                let to = match server {
                    Server::Far => far,
                    Server::Near => &ground.near,
                };
                load::iperf(client, ground::iperf_of(to), streams, direction, seconds)
            }
            Kind::Echo { connections, bytes } => {
                load::requests(client, generator, "echo", ground::echo_of(far), (connections, bytes, seconds))
            }
            Kind::Connect { clients } => {
                let size = (clients, ground::REQUEST, seconds);
                load::requests(client, generator, "connect", ground::answer_of(far), size)
            }
            Kind::Http { keep } => load::wrk(client, ground::http_of(far), HTTP_CONNECTIONS, keep, seconds),
        }
    }
}
