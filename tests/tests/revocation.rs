//! Revoked certificates on whole nodes: new flows are refused and live ones are cut, whichever end checks. Flows of other workloads go
//! on, which is the control of each test.
//!
//! The list of node a names servers, and that of node b clients, so each test knows which agent decides.

use anyhow::{Result, ensure};
use std::net::SocketAddr;
use tacit_tests::{
    Client, Mesh, Plan, Server,
    crl::{self, Expiry},
    fresh_port, observe,
};
use tacit_topology::{Agent, Pod, until};

const REVOKED: &str = "certificate_revoked";
const UNKNOWN: &str = "revocation_unknown";

/// Clients `cart` and `batch` on node a, and servers `web` and `db` on node b.
fn plan(tag: &str) -> Plan {
    Plan::new(tag)
        .pod("a", "shop", "cart")
        .pod("a", "shop", "batch")
        .pod("b", "shop", "web")
        .pod("b", "shop", "db")
}

fn echo(pod: &Pod) -> Result<Server> {
    Server::start(pod, SocketAddr::new(pod.ipv4().into(), fresh_port()), &["echo"])
}

/// A flow whose first line has come back. It ends by a reset, or sends a second line when it is told to.
struct Flow(Client);

impl Flow {
    fn open(mesh: &Mesh, client: &str, server: &Server) -> Result<Self> {
        let steps = ["send:one", "line", "pause", "send:two", "line", "shut", "read-end"];
        let client = Client::start(mesh.pod(client)?, server.address(), &steps)?;
        client.events().first("line")?;
        Ok(Self(client))
    }

    /// A flow that only waits for its end.
    fn waiting(mesh: &Mesh, client: &str, server: &Server) -> Result<Self> {
        let client = Client::start(mesh.pod(client)?, server.address(), &["send:one", "line", "read-end"])?;
        client.events().first("line")?;
        Ok(Self(client))
    }

    fn wait_cut(self) -> Result<()> {
        let events = self.0.finish()?;
        ensure!(events.iter().any(|event| event["end"] == "ConnectionReset"), "not cut: {events:?}");
        Ok(())
    }

    fn goes_on(mut self) -> Result<()> {
        self.0.proceed()?;
        let events = self.0.finish()?;
        let has = |key: &str, value: &str| events.iter().any(|event| event[key] == value);
        ensure!(has("text", "two") && has("end", "eof"), "cut: {events:?}");
        Ok(())
    }
}

/// Checks that a new connection is refused, and by which agent for which reason.
fn is_refused(mesh: &Mesh, client: &str, server: &Server, agent: &Agent, reason: &str) -> Result<()> {
    let (before, accepted) = (observe::refused(agent, reason)?, server.accepted()?);
    let events = Client::run(mesh.pod(client)?, server.address(), &["read-end"])?;
    let has = |key: &str, value: &str| events.iter().any(|event| event[key] == value);
    let is_reset =
        has("end", "ConnectionReset") || has("error", "ConnectionRefused") || has("error", "ConnectionReset");
    ensure!(is_reset, "{events:?}");
    assert_eq!(server.accepted()?, accepted, "the application was reached");
    observe::wait_refused(agent, reason, before, &mesh.pod(client)?.ipv4().to_string())
}

fn wait_counted(agent: &Agent, count: u64) -> Result<()> {
    let counted = || observe::metric(agent, "tacit_connections_revoked_total", &[("reason", REVOKED)]);
    until("the cut flows counted", || Ok((counted()? == count).then_some(())))?;
    observe::wait_log(agent, &["connection closed: the peer's certificate is not trusted any more"]).map(drop)
}

fn idle_sessions(agent: &Agent) -> Result<u64> {
    Ok(observe::status(agent)?["pool"]["idle_sessions"].as_u64().unwrap_or_default())
}

#[test]
#[ignore = "needs root"]
fn a_revoked_client_is_refused_and_its_live_flows_are_cut() -> Result<()> {
    let mesh = crl::mesh(plan("crlcli"))?;
    let (a, b) = (mesh.agent("a")?, mesh.agent("b")?);
    let web = echo(mesh.pod("web")?)?;
    // An idle session, and a live flow of each client.
    Client::echo(mesh.pod("cart")?, web.address(), "idle")?;
    let (cut, other) = (Flow::waiting(&mesh, "cart", &web)?, Flow::open(&mesh, "batch", &web)?);
    crl::set(b, &[&crl::serial(a, "cart")?], Expiry::Later)?;
    cut.wait_cut()?;
    wait_counted(b, 1)?;
    is_refused(&mesh, "cart", &web, b, REVOKED)?;
    other.goes_on()?;
    Client::echo(mesh.pod("batch")?, web.address(), "still")?;
    // A list that does not name the certificate any more.
    crl::set(b, &[], Expiry::Later)?;
    Client::echo(mesh.pod("cart")?, web.address(), "again")
}

#[test]
#[ignore = "needs root"]
fn a_revoked_server_is_refused_and_its_live_flows_are_cut() -> Result<()> {
    let mesh = crl::mesh(plan("crlsrv"))?;
    let (a, b) = (mesh.agent("a")?, mesh.agent("b")?);
    let (web, db) = (echo(mesh.pod("web")?)?, echo(mesh.pod("db")?)?);
    for server in [&web, &db] {
        let flow = Flow::open(&mesh, "cart", server)?;
        Client::echo(mesh.pod("cart")?, server.address(), "second session")?;
        flow.goes_on()?;
    }
    let before = until("idle sessions of both servers", || {
        let idle = idle_sessions(a)?;
        Ok((idle >= 2).then_some(idle))
    })?;
    let (cut, other) = (Flow::waiting(&mesh, "cart", &web)?, Flow::open(&mesh, "cart", &db)?);
    crl::set(a, &[&crl::serial(b, "web")?], Expiry::Later)?;
    cut.wait_cut()?;
    wait_counted(a, 1)?;
    until("idle sessions with the revoked server closed", || Ok((idle_sessions(a)? < before).then_some(())))?;
    is_refused(&mesh, "cart", &web, a, REVOKED)?;
    other.goes_on()?;
    Client::echo(mesh.pod("batch")?, db.address(), "still")
}

#[test]
#[ignore = "needs root"]
fn an_expired_list_refuses_new_flows_and_leaves_live_ones() -> Result<()> {
    let mesh = crl::mesh(plan("crlexp"))?;
    let b = mesh.agent("b")?;
    let web = echo(mesh.pod("web")?)?;
    let live = Flow::open(&mesh, "cart", &web)?;
    crl::set(b, &[], Expiry::Past)?;
    is_refused(&mesh, "batch", &web, b, UNKNOWN)?;
    live.goes_on()?;
    let metrics = b.metrics()?;
    ensure!(metrics.contains("tacit_crl_next_update_timestamp_seconds{issuer="), "{metrics}");
    let expired = observe::wait_status(b, "the expired list", |status| {
        status["revocation_lists"].as_array()?.first()?["seconds_left"].as_i64()
    })?;
    ensure!(expired < 0, "{expired}");
    crl::set(b, &[], Expiry::Later)?;
    Client::echo(mesh.pod("batch")?, web.address(), "current")
}

#[test]
#[ignore = "needs root"]
fn an_invalid_list_leaves_the_last_valid_one_and_a_missing_one_ends_the_start() -> Result<()> {
    let mut mesh = crl::mesh(plan("crlbad"))?;
    let b = mesh.agent("b")?;
    let (web, cart) = (echo(mesh.pod("web")?)?, crl::serial(mesh.agent("a")?, "cart")?);
    crl::set(b, &[&cart], Expiry::Later)?;
    b.files().set_crl("no list")?;
    observe::wait_status(b, "the error of the list", |status| {
        let error = crl::source(status)?["last_error"].as_str()?;
        error.contains("neither PEM nor DER").then_some(())
    })?;
    is_refused(&mesh, "cart", &web, b, REVOKED)?;
    Client::echo(mesh.pod("batch")?, web.address(), "still")?;

    let b = mesh.agent_mut("b")?;
    b.terminate()?;
    b.restart()?;
    let ended = b.wait_end()?;
    ensure!(!ended.success(), "{ended}");
    let log = b.log()?;
    ensure!(log.contains("crl.file: ") && log.contains("crl.pem"), "{log}");
    Ok(())
}
