//! Lines of OpenBSD's netcat, which scripts use to wait for a port.

use std::fs;

use tacit_topology::until;

use crate::table::Line;

pub(crate) fn lines() -> Vec<Line> {
    vec![
        Line::command(
            "an open port",
            "exit 0\n\nConnection to 10.77.2.2 80 port",
            &["nc.openbsd", "-zvn", "{far4}", "{web}"],
        ),
        Line::command(
            "a closed port",
            "exit 1\n\nnc.openbsd: connect to 10.77.2.2 port 79 (tcp) failed: Connection refused",
            &["nc.openbsd", "-zvn", "{far4}", "{closed}"],
        ),
        Line::command(
            "a closed port, IPv6",
            "failed: Connection refused",
            &["nc.openbsd", "-zvn6", "{far6}", "{closed}"],
        ),
        Line::command(
            "a closed port of the same node",
            "failed: Connection refused",
            &["nc.openbsd", "-zvn", "{near4}", "{closed}"],
        ),
        Line::command(
            "an address that does not answer",
            "exit 1\n",
            &["nc.openbsd", "-zvn", "-w", "1", "{silent4}", "{web}"],
        ),
        Line::command(
            "an address that a router rejects",
            "exit 1\n",
            &["nc.openbsd", "-zvn", "{unreachable4}", "{web}"],
        ),
        Line::command(
            "a range of ports",
            "79 (tcp) failed: Connection refused",
            &["nc.openbsd", "-zvn", "{far4}", "78-80"],
        ),
        Line::command(
            "from an address",
            "exit 0\n",
            &["nc.openbsd", "-zvn", "-s", "{client4}", "{far4}", "{web}"],
        ),
        Line::scene("nc -z in a loop", "a port that opens later", "refused, then open", |scene| {
            let check = || scene.shown("client", &["nc.openbsd", "-zn", "{far4}", "{p1}"]);
            let before = check()?;
            let _server =
                scene.server("far", &["nc.openbsd", "-lkn", "{far4}", "{p1}"], scene.port("p1")?)?;
            until("the port is open", || Ok(check()?.starts_with("exit 0").then_some(())))?;
            Ok(format!("{}, then open", if before == "exit 1" { "refused" } else { "open" }))
        }),
        Line::scene("nc -N", "text to nc -l, which answers", "exit 0\nanswer; question", |scene| {
            let port = scene.port("p1")?;
            let listen = ["sh", "-c", "printf answer | nc.openbsd -lNn {far4} {p1}"];
            let mut server = scene.server("far", &listen, port)?;
            let ask = ["sh", "-c", "printf question | nc.openbsd -Nn {far4} {p1}"];
            let answer = scene.shown("client", &ask)?;
            server.wait()?;
            Ok(format!("{answer}; {}", fs::read_to_string(scene.log("far", port))?))
        }),
    ]
}
