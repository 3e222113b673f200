//! Lines of HAProxy, in pod `client`: health checks, retries, and what its clients get.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use anyhow::{Context as _, Result};
use tacit_topology::{Process, until};

use crate::{stage::Scene, table::Line};

/// Requests that are made through a proxy.
const REQUESTS: &str = "80";

pub(crate) fn lines() -> Vec<Line> {
    let mut lines = checks();
    lines.extend(changes());
    lines.extend(requests());
    lines
}

fn checks() -> Vec<Line> {
    vec![
        Line::scene("haproxy, tcp, check", "one closed port", "second: DOWN L4CON; 80 x 200", |scene| {
            checked(scene, "mode tcp", ["{far4}:{web} check", "{far4}:{closed} check"])
        }),
        Line::scene("haproxy, http, check", "one closed port", "second: DOWN L4CON; 80 x 200", |scene| {
            checked(scene, "mode http", ["{far4}:{web} check", "{far4}:{closed} check"])
        }),
        Line::scene(
            "haproxy, http, option httpchk",
            "one closed port",
            "second: DOWN L4CON; 80 x 200",
            |scene| {
                checked(
                    scene,
                    "mode http\n option httpchk GET /",
                    ["{far4}:{web} check", "{far4}:{closed} check"],
                )
            },
        ),
        Line::scene(
            "haproxy, http, check",
            "one closed port, IPv6",
            "second: DOWN L4CON; 80 x 200",
            |scene| checked(scene, "mode http", ["{far6}:{web} check", "{far6}:{closed} check"]),
        ),
        Line::scene(
            "haproxy, tcp, check",
            "a closed port of a pod of the same node",
            "second: DOWN L4CON; 80 x 200",
            |scene| checked(scene, "mode tcp", ["{near4}:{web} check", "{near4}:{closed} check"]),
        ),
        Line::scene(
            "haproxy, tcp, check",
            "an address that does not answer",
            "second: DOWN L4TOUT; 80 x 200",
            |scene| {
                let mode = "mode tcp\n timeout check 1s";
                checked(scene, mode, ["{far4}:{web} check", "{silent4}:{web} check"])
            },
        ),
        Line::scene("haproxy, http, check", "all ports closed", "second: DOWN L4CON; 80 x 503", |scene| {
            checked(scene, "mode http", ["{far4}:{closed} check", "{near4}:{closed} check"])
        }),
        Line::scene(
            "haproxy, tcp-check connect, expect",
            "no answer to what is sent",
            "second: DOWN L7TOUT; 80 x 200",
            |scene| {
                let mode = "mode tcp\n timeout check 1s\n option tcp-check\n tcp-check connect\n \
                        tcp-check send-lf \"GET / HTTP/1.0%[str(\\r\\n)]%[str(\\r\\n)]\"\n tcp-check expect string page";
                let _mute =
                    scene.server("far", &["python3", "-c", MUTE, "{far4}", "{p3}"], scene.port("p3")?)?;
                checked(scene, mode, ["{far4}:{web} check", "{far4}:{p3} check"])
            },
        ),
    ]
}

/// Listens, and neither reads nor sends.
const MUTE: &str = "import socket, sys, time\n\
                    server = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=64)\n\
                    held = []\nwhile True: held.append(server.accept())";

fn changes() -> Vec<Line> {
    vec![
        Line::scene(
            "haproxy, http, check",
            "a port that opens later",
            "second: DOWN L4CON; second: UP L4OK; 80 x 200",
            |scene| {
                let servers = ["{far4}:{web} check", "{far4}:{p2} check"];
                let _proxy = start(scene, "mode http", servers)?;
                let before = settled(scene)?;
                let _server = scene.nginx("far", "server { listen {p2}; return 200; }", scene.port("p2")?)?;
                let after = until_second(scene, "UP")?;
                Ok(format!("{before}; {after}; {}", codes(scene)?))
            },
        ),
        Line::scene(
            "haproxy, http, check",
            "a server that ends",
            "second: UP L4OK; second: DOWN L4CON; 80 x 200",
            |scene| {
                let server = scene.nginx("far", "server { listen {p2}; return 200; }", scene.port("p2")?)?;
                let _proxy = start(scene, "mode http", ["{far4}:{web} check", "{far4}:{p2} check"])?;
                let before = until_second(scene, "UP")?;
                server.signal(nix::sys::signal::Signal::SIGTERM)?;
                let after = until_second(scene, "DOWN")?;
                Ok(format!("{before}; {after}; {}", codes(scene)?))
            },
        ),
    ]
}

fn requests() -> Vec<Line> {
    vec![
        Line::scene("haproxy, http, redispatch", "one closed port, without check", "80 x 200", |scene| {
            requested(
                scene,
                "mode http\n retries 2\n option redispatch 1",
                ["{far4}:{web}", "{far4}:{closed}"],
            )
        }),
        Line::scene("haproxy, tcp, redispatch", "one closed port, without check", "80 x 200", |scene| {
            requested(
                scene,
                "mode tcp\n retries 2\n option redispatch 1",
                ["{far4}:{web}", "{far4}:{closed}"],
            )
        }),
        Line::scene(
            "haproxy, http, retries 0",
            "one closed port, without check",
            "40 x 200, 40 x 503",
            |scene| requested(scene, "mode http\n retries 0", ["{far4}:{web}", "{far4}:{closed}"]),
        ),
        Line::scene("haproxy, send-proxy", "the server asks for the client", "127.0.0.1 through", |scene| {
            let _proxy =
                start(scene, "mode tcp", ["{far4}:{proxied} send-proxy", "{far4}:{proxied} send-proxy"])?;
            scene.shown("client", &["curl", "-sS", "http://127.0.0.1:{p1}/"])
        }),
        Line::scene("haproxy, source ADDRESS", "the server asks for the client", "10.77.1.2", |scene| {
            let servers = ["{far4}:{web} source {client4}", "{far4}:{web} source {client4}"];
            let _proxy = start(scene, "mode tcp", servers)?;
            scene.shown("client", &["curl", "-sS", "http://127.0.0.1:{p1}/who"])
        }),
        Line::scene(
            "haproxy, tcp, option splice-auto",
            "4 MiB through a pipe of the kernel",
            "exit 0\n4194304",
            |scene| {
                let _proxy = start(scene, "mode tcp\n option splice-auto", ["{far4}:{web}", "{far4}:{web}"])?;
                scene.shown(
                    "client",
                    &["curl", "-so", "/dev/null", "-w", "%{size_download}\n", "http://127.0.0.1:{p1}/big"],
                )
            },
        ),
        Line::scene(
            "haproxy, option tcp-smart-connect, tfo",
            "a server with Fast Open",
            "80 x 200",
            |scene| {
                requested(
                    scene,
                    "mode tcp\n option tcp-smart-connect",
                    ["{far4}:{web} tfo", "{near4}:{web} tfo"],
                )
            },
        ),
        Line::scene(
            "haproxy, http-reuse always",
            "requests on one connection to the server",
            "100 x 200",
            |scene| {
                let servers = ["{far4}:{web}", "{near4}:{web}"];
                let _proxy = start(scene, "mode http\n http-reuse always", servers)?;
                tally(
                    scene,
                    &[
                        "curl",
                        "-s",
                        "-o",
                        "/dev/null",
                        "-w",
                        "%{http_code}\n",
                        "http://127.0.0.1:{p1}/[1-100]",
                    ],
                )
            },
        ),
    ]
}

/// Starts HAProxy, waits until both servers were checked, and makes requests.
fn checked(scene: &Scene<'_>, mode: &str, servers: [&str; 2]) -> Result<String> {
    let _proxy = start(scene, mode, servers)?;
    let states = settled(scene)?;
    Ok(format!("{states}; {}", codes(scene)?))
}

fn requested(scene: &Scene<'_>, mode: &str, servers: [&str; 2]) -> Result<String> {
    let _proxy = start(scene, mode, servers)?;
    codes(scene)
}

fn start(scene: &Scene<'_>, mode: &str, [first, second]: [&str; 2]) -> Result<Process> {
    let text = format!(
        "global\n nbthread 1\n stats socket {{folder}}/stats level admin\n\
         defaults\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n {mode}\n\
         frontend all\n bind 127.0.0.1:{{p1}}\n default_backend servers\n\
         backend servers\n balance roundrobin\n default-server inter 1s fastinter 100ms downinter 100ms rise 1 fall 2\n \
         server first {first}\n server second {second}\n"
    );
    let file = scene.write("haproxy.cfg", &text)?;
    scene.server("client", &["haproxy", "-db", "-f", &file], scene.port("p1")?)
}

/// Waits until the first check of both servers has ended. Returns the states of both.
fn settled(scene: &Scene<'_>) -> Result<String> {
    until("both servers are checked", || {
        let [first, second] = states(scene)?;
        Ok((is_checked(&first) && is_checked(&second)).then(|| format!("first: {first}, second: {second}")))
    })
}

fn until_second(scene: &Scene<'_>, expected: &str) -> Result<String> {
    until(&format!("the second server is {expected}"), || {
        let [_, second] = states(scene)?;
        Ok((second.starts_with(expected) && is_checked(&second)).then(|| format!("second: {second}")))
    })
}

/// Returns false before the first check has ended, and while a further one runs.
fn is_checked(state: &str) -> bool {
    !state.contains("INI") && !state.ends_with(' ') && !state.contains('*')
}

/// Returns status and result of the last check, as `show stat` has them: "UP L4OK".
fn states(scene: &Scene<'_>) -> Result<[String; 2]> {
    let mut socket = UnixStream::connect(scene.folder().join("stats")).context("socket of HAProxy")?;
    socket.write_all(b"show stat\n")?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    let mut rows = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = rows.next().context("no header of show stat")?;
    let column =
        |name: &str| header.iter().position(|field| *field == name).with_context(|| format!("no {name}"));
    let (name, status, check) = (column("svname")?, column("status")?, column("check_status")?);
    let rows: Vec<_> = rows.collect();
    let state = |server: &str| {
        let row = rows.iter().find(|row| row.get(name) == Some(&server));
        row.map(|row| format!("{} {}", row[status], row[check]))
            .with_context(|| format!("no server {server}: {text}"))
    };
    Ok([state("first")?, state("second")?])
}

/// Makes requests through the proxy, each on a connection of its own, and returns how many got which code.
fn codes(scene: &Scene<'_>) -> Result<String> {
    let url = format!("http://127.0.0.1:{{p1}}/[1-{REQUESTS}]");
    tally(scene, &["curl", "-s", "-o", "/dev/null", "-H", "Connection: close", "-w", "%{http_code}\n", &url])
}

/// Runs curl, which prints a code for each request, and counts them.
pub(crate) fn tally(scene: &Scene<'_>, words: &[&str]) -> Result<String> {
    let text = scene.shown("client", words)?;
    let mut counts = BTreeMap::<&str, u32>::new();
    // The first line has the exit code, that of the last request.
    text.lines().skip(1).for_each(|code| *counts.entry(code).or_default() += 1);
    let counts: Vec<String> = counts.iter().map(|(code, count)| format!("{count} x {code}")).collect();
    Ok(counts.join(", "))
}
