//! Lines of Redis: redis-cli in pod `client`, servers in `far`, and replicas.

use anyhow::Result;
use tacit_topology::{Process, until};

use crate::{stage::Scene, table::Line};

/// Port of the server in pod `far`.
const PORT: u16 = 6379;

/// Starts the server of all lines.
pub(crate) fn servers(scene: &Scene<'_>) -> Result<Vec<Process>> {
    Ok(vec![start(scene, "far", PORT, &[])?])
}

fn start(scene: &Scene<'_>, pod: &str, port: u16, options: &[&str]) -> Result<Process> {
    let number = port.to_string();
    let common = [
        "redis-server",
        "--port",
        &number,
        "--bind",
        "0.0.0.0",
        "::",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        "{folder}",
        "--repl-diskless-sync-delay",
        "0",
    ];
    scene.server(pod, &[&common, options].concat(), port)
}

pub(crate) fn lines() -> Vec<Line> {
    let mut lines = commands();
    lines.extend(replicas());
    lines
}

fn commands() -> Vec<Line> {
    vec![
        Line::command("ping", "exit 0\nPONG", &["redis-cli", "-h", "{far4}", "PING"]),
        Line::command("ping, IPv6", "exit 0\nPONG", &["redis-cli", "-h", "{far6}", "PING"]),
        Line::command("a closed port", "exit 1\n", &["redis-cli", "-h", "{far4}", "-p", "{closed}", "PING"]),
        Line::command(
            "a closed port of the same node",
            "exit 1\n",
            &["redis-cli", "-h", "{near4}", "-p", "{closed}", "PING"],
        ),
        Line::command(
            "an address that does not answer",
            "exit 1\n",
            &["redis-cli", "-h", "{silent4}", "PING"],
        ),
        Line::command(
            "the server asks for the client",
            "10.77.1.2",
            &["sh", "-c", "redis-cli -h {far4} CLIENT INFO | tr ' ' '\\n' | grep addr= | sed 's/:[0-9]*$//'"],
        ),
        Line::command(
            "commands in a pipe",
            "errors: 0, replies: 2000",
            &["sh", "-c", "seq 2000 | sed 's/.*/SET key& value&/' | redis-cli -h {far4} --pipe"],
        ),
        Line::command(
            "a blocking command with a limit",
            "exit 0",
            &["redis-cli", "-h", "{far4}", "BLPOP", "nothing", "1"],
        ),
        Line::command(
            "a value of 2 MiB",
            "2097152",
            &[
                "sh",
                "-c",
                "head -c 2097152 /dev/zero | tr '\\0' x | redis-cli -h {far4} -x SET big && redis-cli -h {far4} STRLEN big",
            ],
        ),
        Line::command(
            "MIGRATE to a closed port",
            "IOERR",
            &[
                "sh",
                "-c",
                "redis-cli -h {far4} SET moved 1; redis-cli -h {far4} MIGRATE {client4} {closed} moved 0 1000",
            ],
        ),
        Line::command(
            "redis-benchmark",
            "exit 0\n0",
            &["sh", "-c", "redis-benchmark -h {far4} -q -n 2000 -c 16 -t set,get | grep -ci error; true"],
        ),
    ]
}

fn replicas() -> Vec<Line> {
    vec![
        Line::scene("redis-server, replicaof", "a replica copies and follows", "first second", |scene| {
            let _replica = replica(scene, "{far4}", PORT)?;
            let write = |key: &str, value: &str| {
                scene.shown("client", &["redis-cli", "-h", "{far4}", "SET", key, value])
            };
            let read = |key: &str, value: &str| {
                until(&format!("{key} in the replica"), || {
                    let text = scene.shown("client", &["redis-cli", "-p", "{p1}", "GET", key])?;
                    Ok(text.ends_with(value).then_some(value.to_owned()))
                })
            };
            write("copied", "first")?;
            let first = read("copied", "first")?;
            write("followed", "second")?;
            Ok(format!("{first} {}", read("followed", "second")?))
        }),
        Line::scene("redis-server, replicaof", "the primary asks for the replica", "10.77.1.2", |scene| {
            let _replica = replica(scene, "{far4}", PORT)?;
            let lines = until("a replica that is online", || {
                let text = scene.shown("client", &["redis-cli", "-h", "{far4}", "INFO", "replication"])?;
                let of_this = format!("port={},state=online", scene.port("p1")?);
                Ok(text.lines().find(|line| line.contains(&of_this)).map(str::to_owned))
            })?;
            Ok(lines
                .split(',')
                .next()
                .unwrap_or_default()
                .split_once(':')
                .map_or("", |(_, ip)| ip)
                .to_owned())
        }),
        Line::scene(
            "redis-server, replicaof",
            "the primary ends, and begins anew",
            "up, down, up",
            |scene| {
                let port = scene.port("p2")?;
                let primary = start(scene, "far", port, &[])?;
                let _replica = replica(scene, "{far4}", port)?;
                drop(primary);
                let down = link(scene, "down")?;
                let _again = start(scene, "far", port, &[])?;
                Ok(format!("up, {down}, {}", link(scene, "up")?))
            },
        ),
        Line::scene("redis-server, replicaof", "a closed port", "Connection refused", |scene| {
            let port = scene.port("p1")?;
            let _replica = start(scene, "client", port, &["--replicaof", "{far4}", "{closed}"])?;
            until("an error in the replica's log", || {
                let log = std::fs::read_to_string(scene.log("client", port))?;
                let error = log.lines().find_map(|line| line.split_once("Error condition on socket"));
                Ok(error.map(|(_, text)| text.to_owned()))
            })
        }),
    ]
}

/// Starts a replica in pod `client` and waits until it follows its primary.
fn replica(scene: &Scene<'_>, primary: &str, port: u16) -> Result<Process> {
    let options = ["--replicaof", primary, &port.to_string()];
    let replica = start(scene, "client", scene.port("p1")?, &options)?;
    link(scene, "up")?;
    Ok(replica)
}

/// Waits for a state of the replica's connection to its primary.
fn link(scene: &Scene<'_>, state: &str) -> Result<String> {
    let wanted = format!("master_link_status:{state}");
    until(&wanted, || {
        let text = scene.shown("client", &["redis-cli", "-p", "{p1}", "INFO", "replication"])?;
        Ok(text.lines().any(|line| line.trim() == wanted).then(|| state.to_owned()))
    })
}
