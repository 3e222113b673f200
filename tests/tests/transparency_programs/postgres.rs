//! Lines of PostgreSQL: psql and pgbench in pod `client`, the server in `far`.

use std::fs;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tacit_topology::{Process, until};

use crate::{stage::Scene, table::Line};

/// Port of the server.
const PORT: u16 = 5432;
const SERVER: &str = "postgresql://app@{far4}/postgres";
/// PostgreSQL refuses to run as root. Another user may not reach the programs, which can be in a home, so it keeps root's
/// capability for that. `no_setuid_fixup` has access(2) regard it.
const AS_NOBODY: [&str; 7] = [
    "setpriv",
    "--reuid=nobody",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
    "--securebits=+no_setuid_fixup",
];

/// Makes a database and starts the server of all lines.
pub(crate) fn servers(scene: &Scene<'_>) -> Result<Vec<Process>> {
    let initdb = [
        &AS_NOBODY[..],
        &["initdb", "-D", "{folder}/data", "-U", "app", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"],
    ];
    let made = scene.shown("far", &initdb.concat())?;
    ensure!(made.starts_with("exit 0"), "initdb: {made}");
    scene.write("data/pg_hba.conf", "host all all all trust\n")?;
    let server = [
        &AS_NOBODY[..],
        &[
            "postgres",
            "-D",
            "{folder}/data",
            "-p",
            "5432",
            "-F",
            "-c",
            "listen_addresses=*",
            "-c",
            "unix_socket_directories=",
            "-c",
            "jit=off",
            "-c",
            "autovacuum=off",
        ],
    ];
    Ok(vec![scene.server("far", &server.concat(), PORT)?])
}

pub(crate) fn lines() -> Vec<Line> {
    vec![
        Line::command(
            "a query",
            "exit 0\n10.77.1.2|10.77.2.2",
            &["psql", "-XAtc", "select host(inet_client_addr()), host(inet_server_addr())", SERVER],
        ),
        Line::command(
            "a query, IPv6",
            "exit 0\nfd77:1::2|fd77:2::2",
            &[
                "psql",
                "-XAtc",
                "select host(inet_client_addr()), host(inet_server_addr())",
                "postgresql://app@[{far6}]/postgres",
            ],
        ),
        Line::command(
            "the first of two hosts refuses",
            "exit 0\n5432",
            &[
                "psql",
                "-XAtc",
                "select inet_server_port()",
                "postgresql://app@{far4}:{closed},{far4}:5432/postgres",
            ],
        ),
        Line::command(
            "the first of two hosts refuses, IPv6",
            "exit 0\n5432",
            &[
                "psql",
                "-XAtc",
                "select inet_server_port()",
                "postgresql://app@[{far6}]:{closed},[{far6}]:5432/postgres",
            ],
        ),
        Line::command(
            "the first of two hosts, of the same node, refuses",
            "exit 0\n5432",
            &[
                "psql",
                "-XAtc",
                "select inet_server_port()",
                "postgresql://app@{near4}:{closed},{far4}:5432/postgres",
            ],
        ),
        Line::command(
            "the first of two hosts does not answer",
            "exit 0\n5432",
            &[
                "psql",
                "-XAtc",
                "select inet_server_port()",
                "postgresql://app@{silent4}:5432,{far4}:5432/postgres?connect_timeout=2",
            ],
        ),
        Line::command(
            "the first of two hosts is rejected by a router",
            "exit 0\n5432",
            &[
                "psql",
                "-XAtc",
                "select inet_server_port()",
                "postgresql://app@{unreachable4}:5432,{far4}:5432/postgres",
            ],
        ),
        Line::command(
            "only a host that can be written is wanted",
            "exit 0\n5432",
            &[
                "psql",
                "-XAtc",
                "select inet_server_port()",
                "postgresql://app@{far4}:{closed},{far4}:5432/postgres?target_session_attrs=read-write",
            ],
        ),
        Line::command(
            "a closed port",
            "exit 2\n",
            &["psql", "-XAtc", "select 1", "postgresql://app@{far4}:{closed}/postgres"],
        ),
        Line::command(
            "all hosts refuse",
            "exit 2\n",
            &["psql", "-XAtc", "select 1", "postgresql://app@{far4}:{closed},{near4}:{closed}/postgres"],
        ),
        Line::command(
            "an address that does not answer",
            "exit 2\n",
            &["psql", "-XAtc", "select 1", "postgresql://app@{silent4}/postgres?connect_timeout=2"],
        ),
        Line::command(
            "an open port",
            "exit 0\n10.77.2.2:5432 - accepting connections",
            &["pg_isready", "-h", "{far4}"],
        ),
        Line::command(
            "a closed port",
            "exit 2\n10.77.2.2:79 - no response",
            &["pg_isready", "-h", "{far4}", "-p", "{closed}"],
        ),
        Line::command(
            "a query that is cancelled after its limit",
            "canceling statement due to statement timeout",
            &["psql", "-XAtc", "set statement_timeout = 300", "-c", "select pg_sleep(60)", SERVER],
        ),
        Line::scene(
            "psql",
            "a query that the user cancels",
            "canceling statement due to user request",
            cancelled,
        ),
        Line::command(
            "the server ends the connection",
            "terminating connection due to administrator command",
            &["psql", "-XAtc", "select pg_terminate_backend(pg_backend_pid())", SERVER],
        ),
        Line::command(
            "an answer of 8 MiB",
            "exit 0\n8388609",
            &[
                "sh",
                "-c",
                "psql -XAtc \"select repeat('x', 8388608)\" postgresql://app@{far4}/postgres | wc -c",
            ],
        ),
        Line::command(
            "COPY of 100,000 lines",
            "exit 0\nCOPY 100000",
            &[
                "sh",
                "-c",
                "seq 100000 | psql -Xc 'create temporary table t (n int)' -c '\\copy t from stdin' postgresql://app@{far4}/postgres | tail -1",
            ],
        ),
        Line::command(
            "keep-alive options",
            "exit 0\n1",
            &[
                "psql",
                "-XAtc",
                "select 1",
                "postgresql://app@{far4}/postgres?keepalives_idle=1&keepalives_interval=1&keepalives_count=2&tcp_user_timeout=3000",
            ],
        ),
        Line::scene("pgbench -c 4", "transactions on open connections", "400/400, 0 failed", |scene| {
            load(scene, &[])
        }),
        Line::scene("pgbench -C -c 4", "a connection for each transaction", "400/400, 0 failed", |scene| {
            load(scene, &["-C"])
        }),
    ]
}

/// Runs pgbench with a script of its own. Returns the numbers of its transactions.
fn load(scene: &Scene<'_>, options: &[&str]) -> Result<String> {
    let script = scene.write("script.sql", "select sum(n) from generate_series(1, 100) n;\n")?;
    let words = [
        &["pgbench", "-n", "-c", "4", "-t", "100", "-f", &script, "-h", "{far4}", "-U", "app"],
        options,
        &["postgres"],
    ]
    .concat();
    let text = scene.shown("client", &words)?;
    let number = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("none").trim().to_owned()
    };
    let (processed, failed) =
        (number("number of transactions actually processed:"), number("number of failed transactions:"));
    Ok(format!("{processed}, {} failed", failed.split(' ').next().unwrap_or_default()))
}

/// Interrupts psql while its query runs. It then asks the server over a second connection to cancel the query.
fn cancelled(scene: &Scene<'_>) -> Result<String> {
    let log = scene.folder().join("psql.log");
    let file = fs::File::create(&log)?;
    let sleeping = ["psql", "-XAtc", "select pg_sleep(100000)", SERVER];
    let mut psql =
        Process::spawn(scene.command("client", &sleeping)?.stdout(file.try_clone()?).stderr(file))?;
    let running =
        "select count(*) from pg_stat_activity where state = 'active' and query = 'select pg_sleep(100000)'";
    until("the query runs", || {
        Ok(scene.shown("client", &["psql", "-XAtc", running, SERVER])?.ends_with("\n1").then_some(()))
    })?;
    psql.signal(Signal::SIGINT)?;
    let status = psql.wait()?;
    Ok(format!("{status}, {}", fs::read_to_string(log)?))
}
