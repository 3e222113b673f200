//! The cases of the bench, by name.

use std::{fmt::Write as _, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{
    load::{self, Direction, Done, Keep},
    programs::Programs,
    servers,
    testbed::Testbed,
};

/// One case.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    /// For the reader, without the unit.
    pub(super) what: String,
    pub(super) kind: Kind,
    /// Rounds and seconds of this case, whatever is asked for.
    pub(super) fixed: Option<(usize, u64)>,
}

/// The load of a case.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Bytes from one pod to another.
    Throughput { streams: u16, direction: Direction, server: Server },
    /// Requests on open connections.
    Echo { connections: u16, bytes: u32 },
    /// Requests on one connection, with a pause before each.
    Sparse { pause_ms: u32 },
    /// Requests of a pod while another pod of its node sends bytes.
    Neighbour { streams: u16 },
    /// A connection for every request.
    Connect { clients: u16 },
    /// Connections to a closed port.
    Refused { clients: u16 },
    /// wrk against nginx.
    Http { keep: Keep },
    /// Connections for a minute, from the default range of ports.
    Churn { closer: Closer },
    /// A measurement of its own, with a topology of its own.
    Special(Special),
}

/// The side that closes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closer {
    Server,
    /// Not possible directly: the client's ports are all in TIME_WAIT after some seconds.
    Client,
}

/// Measurements of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Special {
    /// Thousands of open and silent flows.
    Idle,
    /// One and two worker threads.
    Workers,
    /// A node full of pods.
    Pods,
    /// Each BPF program.
    Kernel,
}

/// The pod that serves.
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

/// The better one of two figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Better {
    Higher,
    Lower,
}

const GBITS: Metric = Metric { name: "rate", unit: "Gbit/s", better: Better::Higher };
const REQUESTS: Metric = Metric { name: "rate", unit: "requests/s", better: Better::Higher };
const CONNECTIONS: Metric = Metric { name: "rate", unit: "connections/s", better: Better::Higher };
const REFUSALS: Metric = Metric { name: "rate", unit: "refusals/s", better: Better::Higher };
const FLAT: Metric = Metric { name: "flat", unit: "last 10 s / first 10 s", better: Better::Higher };
const FAILED: Metric = Metric { name: "failed", unit: "% of connections", better: Better::Lower };
const P50: Metric = Metric { name: "p50", unit: "us", better: Better::Lower };
const P99: Metric = Metric { name: "p99", unit: "us", better: Better::Lower };
const P999: Metric = Metric { name: "p999", unit: "us", better: Better::Lower };

/// Clients, rounds and seconds of churn.
const CHURN: (u16, usize, u64) = (16, 1, 60);
/// Pause before each sparse request.
const SPARSE_MS: u32 = 2;
/// Streams beside the requests of a neighbour.
const NEIGHBOURS: u16 = 8;
/// Connections of wrk.
const HTTP_CONNECTIONS: u16 = 32;

/// All cases, in the order of the table.
pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, what: String, kind| cases.push(Case { name, what, kind, fixed: None });
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
    add(
        "sparse".to_owned(),
        format!("echo 64 B every {SPARSE_MS} ms, 1 connection"),
        Kind::Sparse { pause_ms: SPARSE_MS },
    );
    let what = format!("echo 64 B, 1 connection, beside {NEIGHBOURS} streams of another pod");
    add("neighbour".to_owned(), what, Kind::Neighbour { streams: NEIGHBOURS });
    for clients in [1, 16, 64] {
        let what = format!("new connection + 64 B, {clients} client{}", if clients == 1 { "" } else { "s" });
        add(format!("connect-x{clients}"), what, Kind::Connect { clients });
    }
    for clients in [1, 16] {
        let what =
            format!("connect() to a closed port, {clients} client{}", if clients == 1 { "" } else { "s" });
        add(format!("refused-x{clients}"), what, Kind::Refused { clients });
    }
    add("http-keepalive".to_owned(), "HTTP keep-alive, wrk c32".to_owned(), Kind::Http { keep: Keep::Alive });
    add(
        "http-close".to_owned(),
        "HTTP Connection: close, wrk c32".to_owned(),
        Kind::Http { keep: Keep::Close },
    );
    for (name, closer, who) in
        [("churn", Closer::Server, "the server"), ("churn-client-closes", Closer::Client, "the client")]
    {
        let what = format!("new connections, {} clients for {} s, {who} closes", CHURN.0, CHURN.2);
        add(name.to_owned(), what, Kind::Churn { closer });
    }
    for (name, what, own) in SPECIAL {
        add(name.to_owned(), what.to_owned(), Kind::Special(own));
    }
    for case in &mut cases {
        if matches!(case.kind, Kind::Churn { .. }) {
            case.fixed = Some((CHURN.1, CHURN.2));
        }
    }
    cases
}

const SPECIAL: [(&str, &str, Special); 4] = [
    ("idle-flows", "3,500 open and silent flows: memory, CPU, memory afterwards", Special::Idle),
    ("workers", "one and two worker threads", Special::Workers),
    ("pods", "250 pods on one node: time and memory for each, CPU while idle", Special::Pods),
    ("kernel", "time of each BPF program", Special::Kernel),
];

/// The case of that name.
pub(super) fn named(name: &str) -> Option<Case> {
    all().into_iter().find(|case| case.name == name)
}

/// The cases as text.
pub(super) fn list() -> String {
    all().iter().fold(String::new(), |mut text, case| {
        let _ = writeln!(text, "{:<24} {}", case.name, case.what);
        text
    })
}

/// Measures the requests of one pod while another pod of its node sends bytes to the same server pod.
fn neighbour(testbed: &Testbed, generator: &Path, streams: u16, seconds: u64) -> Result<Done> {
    let far = &testbed.far;
    thread::scope(|scope| {
        let beside = scope.spawn(|| {
            let to = servers::iperf_of(far);
            // It begins earlier and ends later than the requests.
            load::iperf(&testbed.client, to, streams, Direction::Forward, seconds + 2)
        });
        thread::sleep(Duration::from_secs(1));
        let size = (1, servers::REQUEST, seconds);
        let done = load::requests(&testbed.near, generator, "echo", servers::echo_of(far, 1), size);
        let sent = beside.join().map_err(|_| anyhow!("the sender panicked"))?;
        sent.context("streams beside the requests")?;
        done
    })
}

impl Case {
    /// Returns true if the load can run without a mesh.
    pub(super) fn works_directly(&self) -> bool {
        !matches!(self.kind, Kind::Churn { closer: Closer::Client })
    }

    /// Returns true if another proxy can run the load. One that accepts before it has asked the destination refuses nothing.
    pub(super) fn works_with_rival(&self) -> bool {
        !matches!(self.kind, Kind::Refused { .. })
    }

    /// Returns the metrics of the case in the table, the most telling one first.
    pub(super) fn metrics(&self) -> &'static [Metric] {
        match self.kind {
            Kind::Throughput { .. } => &[GBITS],
            Kind::Echo { connections: 1, .. } | Kind::Sparse { .. } | Kind::Neighbour { .. } => {
                &[P50, P99, P999]
            }
            Kind::Echo { .. } => &[REQUESTS, P50, P99, P999],
            Kind::Connect { .. } => &[CONNECTIONS, P99],
            Kind::Refused { clients: 1 } => &[P50, P99],
            Kind::Refused { .. } => &[REFUSALS, P99],
            Kind::Http { .. } => &[REQUESTS, P99],
            Kind::Churn { .. } => &[CONNECTIONS, FLAT, FAILED],
            Kind::Special(_) => &[],
        }
    }

    /// The name and the description of the line that shows a metric.
    pub(super) fn labels(&self, metric: &Metric) -> (String, String) {
        match metric.name {
            "rate" => (self.name.clone(), self.what.clone()),
            other => {
                let metric = other.replace("p999", "p99.9");
                (format!("{}-{other}", self.name), format!("{}, {metric}", self.what))
            }
        }
    }

    /// Runs it once.
    pub(super) fn run(&self, testbed: &Testbed, programs: &Programs, seconds: u64) -> Result<Done> {
        let (client, far) = (&testbed.client, &testbed.far);
        let generator = programs.load.as_path();
        let done = match self.kind {
            Kind::Throughput { streams, direction, server } => {
                let to = match server {
                    Server::Far => far,
                    Server::Near => &testbed.near,
                };
                load::iperf(client, servers::iperf_of(to), streams, direction, seconds)
            }
            Kind::Echo { connections, bytes } => load::requests(
                client,
                generator,
                "echo",
                servers::echo_of(far, connections),
                (connections, bytes, seconds),
            ),
            Kind::Sparse { pause_ms } => {
                let size = (pause_ms, servers::REQUEST, seconds);
                load::sparse(client, generator, servers::echo_of(far, 1), size)
            }
            Kind::Neighbour { streams } => neighbour(testbed, generator, streams, seconds),
            Kind::Connect { clients } => {
                let size = (clients, servers::REQUEST, seconds);
                load::requests(client, generator, "connect", servers::answer_of(far, clients), size)
            }
            Kind::Refused { clients } => {
                load::refusals(client, generator, servers::closed_of(far), (clients, seconds))
            }
            Kind::Http { keep } => load::wrk(client, servers::http_of(far), HTTP_CONNECTIONS, keep, seconds),
            Kind::Churn { closer } => {
                let size = (CHURN.0, servers::REQUEST, seconds);
                let (kind, to) = match closer {
                    Closer::Server => ("connect", servers::answer_of(far, CHURN.0)),
                    Closer::Client => ("connect-close", servers::echo_of(far, CHURN.0)),
                };
                load::requests(client, generator, kind, to, size)
            }
            Kind::Special(own) => bail!("{own:?} has a runner of its own"),
        }?;
        // Churn is there to find out how many fail.
        match self.kind {
            Kind::Churn { .. } => Ok(done),
            _ => done.without_failures(),
        }
    }
}
