//! Requests between the applications: the same ones with and without Tacit.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use tacit_topology::{Pod, run};

use super::servers::{HTTP, MARIADB, PASSWORD, USER};

/// The pods of the demo. `frontend` and `apache` are on node a, `nginx` and `mariadb` on node b.
pub(super) struct Pods {
    pub(super) frontend: Pod,
    pub(super) apache: Pod,
    pub(super) nginx: Pod,
    pub(super) mariadb: Pod,
}

/// One request and what it showed.
pub(super) struct Request {
    /// Client and server, for the reader.
    pub(super) what: &'static str,
    /// Does it cross the wire between the nodes?
    pub(super) crosses: bool,
}

/// Runs every request once; each must succeed and carry `marker` both ways.
pub(super) fn run_all(pods: &Pods, marker: &str) -> Result<Vec<Request>> {
    let four = |pod: &Pod| IpAddr::V4(pod.ipv4());
    let six = |pod: &Pod| IpAddr::V6(pod.ipv6());
    let mut done = Vec::new();
    let mut note = |what, crosses, result: Result<()>| -> Result<()> {
        result.context(what)?;
        done.push(Request { what, crosses });
        Ok(())
    };
    note("curl (node a) -> nginx (node b), IPv4", true, http(&pods.frontend, four(&pods.nginx), marker))?;
    note("curl (node a) -> nginx (node b), IPv6", true, http(&pods.frontend, six(&pods.nginx), marker))?;
    note("curl (node b) -> Apache (node a)", true, http(&pods.nginx, four(&pods.apache), marker))?;
    note(
        "mariadb client (node a) -> MariaDB (node b)",
        true,
        database(&pods.frontend, four(&pods.mariadb), marker),
    )?;
    note(
        "curl (node a) -> Apache (node a), same node",
        false,
        http(&pods.frontend, four(&pods.apache), marker),
    )?;
    Ok(done)
}

/// Asks for the page with the marker in a header; the page has it too.
fn http(from: &Pod, to: IpAddr, marker: &str) -> Result<()> {
    let page = run(from.command("curl").args([
        "--silent",
        "--show-error",
        "--fail",
        "--noproxy",
        "*",
        "--max-time",
        "20",
        "--header",
        &format!("X-Note: {marker}"),
        &format!("http://{}/", SocketAddr::new(to, HTTP)),
    ]))?;
    ensure!(page.contains(marker), "the page came back without the marker: {page:?}");
    Ok(())
}

/// Writes the marker into a table and reads it back.
fn database(from: &Pod, to: IpAddr, marker: &str) -> Result<()> {
    let sql = format!(
        "CREATE OR REPLACE TABLE notes (text VARCHAR(200)); INSERT INTO notes VALUES ('{marker}'); SELECT text FROM notes;"
    );
    let rows = run(from.command("mariadb").args([
        "--no-defaults",
        "--protocol=tcp",
        "--skip-ssl",
        "--connect-timeout=20",
        "--batch",
        "--skip-column-names",
        &format!("--host={to}"),
        &format!("--port={MARIADB}"),
        &format!("--user={USER}"),
        &format!("--password={PASSWORD}"),
        &format!("--execute={sql}"),
        "shop",
    ]))?;
    ensure!(rows.trim() == marker, "the table returned {rows:?}");
    Ok(())
}

/// Does plain HTTP get through? What is refused must be refused by a reset or a refusal, not by silence.
pub(super) fn plaintext_passes(from: &Pod, to: &Pod) -> Result<bool> {
    let url = format!("http://{}/", SocketAddr::new(to.ipv4().into(), HTTP));
    let output = from
        .command("curl")
        .args(["--silent", "--fail", "--noproxy", "*", "--max-time", "10", "--output", "/dev/null", &url])
        .status()
        .context("run curl")?;
    // curl: 0 success, 7 refused, 52 empty reply, 56 reset. 28 is a time-out.
    match output.code() {
        Some(0) => Ok(true),
        Some(7 | 56) => Ok(false),
        other => anyhow::bail!("curl neither got through nor was refused: exit code {other:?}"),
    }
}
