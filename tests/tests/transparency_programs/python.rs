//! Lines of Python: asyncio, plain sockets, and Go's way to race two addresses, in pod `client`. See `clients.py`.

use std::{fs, thread};

use anyhow::{Result, anyhow};
use nix::sys::signal::Signal;
use tacit_topology::{Process, until};

use crate::{stage::Scene, table::Line};

const SCRIPT: &str = include_str!("clients.py");
/// Port of the server in all pods. It listens at addresses of both families.
const PORT: u16 = 7001;
/// Port of the server that listens at the IPv4 address only.
const PORT_V4: u16 = 7002;

/// Its answers to a loopback address leave by that device.
const AT_DEVICE: &str =
    "the agent connects from a loopback address, which a listener that is bound to a device cannot answer";

/// Starts the servers of all lines.
pub(crate) fn servers(scene: &Scene<'_>) -> Result<Vec<Process>> {
    let serve = |pod, host, port: u16| {
        scene.server(pod, &["python3", "-c", SCRIPT, "serve", host, &port.to_string()], port)
    };
    Ok(vec![
        serve("far", "::", PORT)?,
        serve("far", "{far4}", PORT)?,
        serve("near", "{near4}", PORT)?,
        serve("far", "{far4}", PORT_V4)?,
    ])
}

pub(crate) fn lines() -> Vec<Line> {
    let mut lines = connected();
    lines.extend(raced());
    lines.extend(failed());
    lines.extend(streams());
    lines
}

fn line(event: &'static str, shows: &'static str, case: &'static [&'static str]) -> Line {
    Line::python(event, shows, SCRIPT, case)
}

fn connected() -> Vec<Line> {
    vec![
        line(
            "asyncio: a pod of another node",
            "peer 10.77.2.2:7001 own 10.77.1.2, server sees 10.77.1.2",
            &["names", "{far4}:7001"],
        ),
        line(
            "asyncio: IPv6",
            "peer fd77:2::2:7001 own fd77:1::2, server sees fd77:1::2",
            &["names", "{far6}:7001"],
        ),
        line(
            "asyncio: a pod of the same node",
            "peer 10.77.1.3:7001 own 10.77.1.2, server sees 10.77.1.2",
            &["names", "{near4}:7001"],
        ),
        line(
            "asyncio: local_addr with a port",
            "10.77.1.2 2",
            &["from_port", "{far4}:7001", "{client4}:{p1}"],
        ),
        line(
            "asyncio: local_addr with a port, IPv6",
            "fd77:1::2 2",
            &["from_port", "{far6}:7001", "{client6}:{p1}"],
        ),
        line("a v4-mapped address", "peer ::ffff:10.77.2.2 own ::ffff:10.77.1.2", &["mapped", "{far4}:7001"]),
        line(
            "connect(), poll(), SO_ERROR, connect(): an open port",
            "EINPROGRESS, events 4, error 0, again 0",
            &["waited", "{far4}:7001"],
        ),
    ]
}

fn raced() -> Vec<Line> {
    vec![
        line(
            "asyncio, happy eyeballs: IPv6 refuses",
            "10.77.2.2",
            &["eyeballs", "{far6}:7002", "{far4}:7002"],
        ),
        line(
            "asyncio, happy eyeballs: IPv6 does not answer",
            "10.77.2.2",
            &["eyeballs", "{silent6}:7001", "{far4}:7001"],
        ),
        line(
            "asyncio, happy eyeballs: IPv6 is rejected by a router",
            "10.77.2.2",
            &["eyeballs", "{unreachable6}:7001", "{far4}:7001"],
        ),
        line(
            "asyncio, happy eyeballs: both refuse",
            "Multiple exceptions: [Errno 111]",
            &["eyeballs", "{far6}:7003", "{far4}:7003"],
        ),
        line(
            "asyncio, happy eyeballs: refused, silent, open",
            "10.77.2.2",
            &["eyeballs", "{far6}:7003", "{silent4}:7001", "{far4}:7001"],
        ),
        line("asyncio, in turn: the first refuses", "10.77.2.2", &["in_turn", "{near4}:7002", "{far4}:7002"]),
        line(
            "asyncio, in turn: all refuse",
            "Multiple exceptions: [Errno 111]",
            &["in_turn", "{near4}:7003", "{far4}:7003"],
        ),
        line(
            "Go's dialer: both accept",
            "fd77:2::2 after []",
            &["go_patiently", "{far6}:7001", "{far4}:7001"],
        ),
        line(
            "Go's dialer: IPv6 refuses",
            "10.77.2.2 after ['ECONNREFUSED']",
            &["go", "{far6}:7002", "{far4}:7002"],
        ),
        line(
            "Go's dialer: IPv6 does not answer",
            "10.77.2.2 after []",
            &["go", "{silent6}:7001", "{far4}:7001"],
        ),
        line(
            "Go's dialer: both refuse",
            "failed: ['ECONNREFUSED', 'ECONNREFUSED']",
            &["go", "{far6}:7003", "{far4}:7003"],
        ),
        line(
            "Go's dialer: IPv6 does not answer, IPv4 refuses",
            "failed: ['ECONNREFUSED', 'ETIMEDOUT']",
            &["go", "{silent6}:7001", "{far4}:7003"],
        ),
    ]
}

fn failed() -> Vec<Line> {
    vec![
        line("asyncio: a closed port", "ConnectionRefusedError ECONNREFUSED", &["refused", "{far4}:7003"]),
        line(
            "asyncio: an address that a router rejects",
            "OSError EHOSTUNREACH",
            &["refused", "{unreachable4}:7001"],
        ),
        line(
            "asyncio: wait_for 1 s, an address that does not answer",
            "TimeoutError",
            &["limited", "{silent4}:7001"],
        ),
        line("timeout=2: an address that does not answer", "TimeoutError", &["blocking", "{silent4}:7001"]),
        line("timeout=2: a closed port", "ConnectionRefusedError ECONNREFUSED", &["blocking", "{far4}:7003"]),
        line(
            "connect(), poll(), SO_ERROR, connect(): a closed port",
            "EINPROGRESS, events ",
            &["waited", "{far4}:7003"],
        ),
        line(
            "connect(), poll(), SO_ERROR, connect(): a closed port, IPv6",
            "EINPROGRESS, events ",
            &["waited", "{far6}:7003"],
        ),
        line(
            "its own address after a closed port",
            "ECONNREFUSED, own 0.0.0.0",
            &["own_after", "{far4}:7003"],
        ),
        line(
            "its own address after a closed port, IPv6",
            "ECONNREFUSED, own ::",
            &["own_after", "{far6}:7003"],
        )
        .but(
            "ECONNREFUSED, own fd77:1::2",
            "the connect hook binds an IPv6 socket to the address that the kernel would choose",
        ),
        line("bound to a device: a closed port of a pod without policies", "none accepted", &["at_a_device", "{near4}:7003"]),
        line("bound to a device: a closed port of a pod with policies", "none accepted", &["at_a_device", "{far4}:7003"])
            .but("some accepted", "the agent accepts plaintext to a pod that a policy selects, and then connects to the application"),
        Line::scene("python3 many", "asyncio: 300 connections at a time to a closed port", "300 x ConnectionRefusedError ECONNREFUSED", |scene| {
            many(scene, "{far4}:7003")
        }),
    ]
}

fn streams() -> Vec<Line> {
    vec![
        Line::scene("python3 many", "asyncio: 300 connections at a time", "300 x ok", |scene| {
            many(scene, "{far4}:7001")
        }),
        line(
            "asyncio: 50 connections that are cancelled",
            "50 cancelled, then True",
            &["cancelled", "{silent4}:7001", "{far4}:7001"],
        ),
        line("asyncio: the server resets", "ConnectionResetError ECONNRESET", &["reset", "{far4}:7001"]),
        line("asyncio: the client resets", "ConnectionResetError ECONNRESET", &["aborted", "{far4}:7001"]),
        line("asyncio: write_eof() after 4 MiB", "4194304", &["half_closed", "{far4}:7001"]),
        line("asyncio: a reader that is slow", "8388608", &["read_slowly", "{far4}:7001"]),
        line("asyncio: sendfile()", "2097152", &["file_sent", "{far4}:7001"]),
        line(
            "asyncio: 6 s idle, with keep-alive and TCP_USER_TIMEOUT",
            "before after",
            &["idle", "{far4}:7001"],
        ),
        line(
            "poll() when the server ends",
            "text True, end b'', peer 10.77.2.2",
            &["hangs_up", "{far4}:7001"],
        ),
        Line::scene("python3 ended", "a server that is killed", "end b''", |scene| {
            killed(scene, &["{far4}:0"])
        }),
        line("a write after the server's end", "events 24, ", &["written_after_end", "{far4}:7001"]),
        line(
            "IP_RECVERR: an address that a router rejects",
            "OSError EHOSTUNREACH",
            &["with_errors", "{unreachable4}:7001"],
        ),
        line(
            "IP_RECVERR: a closed port",
            "ConnectionRefusedError ECONNREFUSED",
            &["with_errors", "{far4}:7003"],
        ),
        line("TCP_SYNCNT: an address that does not answer", "ETIMEDOUT", &["counted", "{silent4}:7001"]),
        line("bound to a loopback address", "OSError EINVAL", &["from_loopback", "{far4}:7001"]).but(
            "connected",
            "the agent's listener is at a loopback address, and the agent connects from the pod's own",
        ),
        Line::scene("python3 greeted", "a server that is bound to a device", "hello", |scene| {
            let _server = scene.server(
                "far",
                &["python3", "-c", SCRIPT, "at_device", "{far4}:{p1}"],
                scene.port("p1")?,
            )?;
            scene.shown("client", &["python3", "-c", SCRIPT, "greeted", "{far4}:{p1}"])
        })
        .but("ETIMEDOUT", AT_DEVICE),
        Line::scene("python3 greeted", "a server that is bound to a device, IPv6", "hello", |scene| {
            let _server = scene.server(
                "far",
                &["python3", "-c", SCRIPT, "at_device", "{far6}:{p1}"],
                scene.port("p1")?,
            )?;
            scene.shown("client", &["python3", "-c", SCRIPT, "greeted", "{far6}:{p1}"])
        })
        .but("ECONNREFUSED", AT_DEVICE),
        Line::scene(
            "python3 greeted",
            "a server of the same node that is bound to a device",
            "hello 10.77.1.2",
            |scene| {
                let _server = scene.server(
                    "near",
                    &["python3", "-c", SCRIPT, "at_device", "{near4}:{p1}"],
                    scene.port("p1")?,
                )?;
                scene.shown("client", &["python3", "-c", SCRIPT, "greeted", "{near4}:{p1}"])
            },
        )
        .but("ETIMEDOUT", AT_DEVICE),
        Line::scene("python3 greeted", "a server that listens on loopback only", "ECONNREFUSED", |scene| {
            let _server =
                scene.server("far", &["nc.openbsd", "-lkn", "127.0.0.1", "{p1}"], scene.port("p1")?)?;
            scene.shown("client", &["python3", "-c", SCRIPT, "greeted", "{far4}:{p1}"])
        }),
        Line::scene(
            "python3 greeted",
            "a server that listens on IPv6 loopback only",
            "ECONNREFUSED",
            |scene| {
                let _server =
                    scene.server("far", &["nc.openbsd", "-lkn6", "::1", "{p1}"], scene.port("p1")?)?;
                scene.shown("client", &["python3", "-c", SCRIPT, "greeted", "{far6}:{p1}"])
            },
        ),
        Line::scene(
            "python3 ended",
            "a server that is killed before it has read",
            "ConnectionResetError ECONNRESET",
            |scene| killed(scene, &[]),
        ),
    ]
}

/// Makes many connections from pod `near`, whose kernel repeats a SYN for two minutes: the agents make a session for each, which takes
/// a slow machine some seconds.
fn many(scene: &Scene<'_>, to: &str) -> Result<String> {
    scene.shown("near", &["python3", "-c", SCRIPT, "many", to])
}

/// Kills a server that has data of a client. Returns the client's end. With `read` the server has read the data.
fn killed(scene: &Scene<'_>, read: &[&str]) -> Result<String> {
    let port = scene.port("p1")?;
    let server = [&["python3", "-c", SCRIPT, "mute", "{far4}:{p1}"], read].concat();
    let server = scene.server("far", &server, port)?;
    thread::scope(|scope| {
        let client =
            scope.spawn(|| scene.shown("client", &["python3", "-c", SCRIPT, "ended", "{far4}:{p1}"]));
        until("the server has data", || {
            Ok(fs::read_to_string(scene.log("far", port))?.contains("has data").then_some(()))
        })?;
        server.signal(Signal::SIGKILL)?;
        client.join().map_err(|_| anyhow!("the client has panicked"))?
    })
}
