//! One agent takes over from another while pods talk: none of their connections notices, and nothing goes in clear. That holds
//! for a permissive pod too, which would go on in clear without an agent.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::HashSet,
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tacit_abi::ABI_VERSION;
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe};
use tacit_topology::{Agent, until};

/// Longer than any test here: an agent that ends well does not wait for it.
const DRAIN: &str = "drainTimeout: 10m\n";
/// Clients at a time.
const CLIENTS: usize = 4;
/// What every connection says.
const WORDS: &[u8] = b"words of";

#[test]
#[ignore = "needs root"]
fn an_agent_that_stands_by_takes_over_and_no_connection_notices() -> Result<()> {
    for node in ["a", "b"] {
        let mut mesh = plan().with_agents()?;
        let server = serve(&mesh)?;
        let capture = mesh.topology().capture()?;
        // Twice: the second one listens where the first has, the first one beside the last.
        let mut next = take_over(&mesh, mesh.agent(node)?, "next", &server)?;
        ensure!(mesh.agent_mut(node)?.wait_end()?.success(), "{}", mesh.agent(node)?.log()?);
        let mut third = take_over(&mesh, &next, "third", &server)?;
        ensure!(next.wait_end()?.success(), "{}", next.log()?);
        assert_eq!(capture.finish()?.occurrences(WORDS), 0, "in clear while agents of node {node} changed");
        // As after any end: nothing of the earlier ones is in its way.
        ensure!(third.terminate()?.success(), "{}", third.log()?);
        mesh.agent_mut(node)?.restart()?;
        mesh.agent_mut(node)?.wait_ready()?;
        observe::wait_enrolled(mesh.agent(node)?)?;
        Client::echo(mesh.pod("client")?, server.address(), "words of the last one")?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn control_connections_fail_while_no_agent_takes_over() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let load = load(&mesh, &server, "again")?;
    ensure!(mesh.agent_mut("a")?.terminate()?.success());
    mesh.agent_mut("a")?.restart()?;
    mesh.agent_mut("a")?.wait_ready()?;
    let (_, failures) = outcome(load)?;
    ensure!(!failures.is_empty(), "an agent was away, and nothing noticed");
    Ok(())
}

/// Refused connections cost nearly nothing, so clients that do not pause take all the time that the node has.
#[test]
#[ignore = "needs root"]
fn an_agent_starts_among_clients_that_retry_without_a_pause() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let quiet = restarted(&mut mesh)?;
    let storm = load(&mesh, &server, "storm")?;
    let stormy = restarted(&mut mesh)?;
    let (echoed, failures) = outcome(storm)?;
    println!("ready after {quiet:?}, among {CLIENTS} clients that do not pause after {stormy:?}");
    ensure!(echoed > 0 && !failures.is_empty(), "no storm: {echoed} echoed, {failures:?}");
    Ok(())
}

/// The agent of node a ends and starts again; returns how long it took from its start until it was ready.
fn restarted(mesh: &mut Mesh) -> Result<Duration> {
    let agent = mesh.agent_mut("a")?;
    ensure!(agent.terminate()?.success());
    let begin = Instant::now();
    agent.restart()?;
    agent.wait_ready()?;
    Ok(begin.elapsed())
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_stands_by_serves_at_once_when_the_other_dies() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let next = stand_by(&mesh, mesh.agent("a")?, "next")?;
    dies_and_next_serves(&mut mesh, next, &server).map(drop)
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_stands_by_serves_also_when_the_pinned_maps_have_changed() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let next = stand_by(&mesh, mesh.agent("a")?, "next")?;
    // Else it pins it again.
    mesh.agent("a")?.pause()?;
    let pin = mesh.agent("a")?.files().pin_path().join(format!("maps-v{ABI_VERSION}/PODS"));
    fs::remove_file(&pin)?;
    let next = dies_and_next_serves(&mut mesh, next, &server)?;
    ensure!(pin.exists(), "what the programs use is not pinned: {}", next.log()?);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_agent_does_not_stand_by_for_pins_of_another_version() -> Result<()> {
    let mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let last = mesh.agent("a")?;
    let other = last.files().pin_path().join("maps-v0");
    fs::create_dir(&other)?;
    let mut next = last.start_beside(mesh.topology().node("a")?, "next")?;
    let status = next.wait_end()?;
    fs::remove_dir(&other)?;
    let log = next.log()?;
    ensure!(!status.success() && log.contains("state of another version (maps-v0)"), "{status}: {log}");
    Client::echo(mesh.pod("client")?, server.address(), "words of the first one")
}

#[test]
#[ignore = "needs root"]
fn an_agent_whose_successor_dies_first_ends_as_if_there_had_been_none() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let mut next = stand_by(&mesh, mesh.agent("a")?, "next")?;
    next.kill()?;
    Client::echo(mesh.pod("client")?, server.address(), "words of the first one")?;
    ensure!(mesh.agent_mut("a")?.terminate()?.success());
    let log = mesh.agent("a")?.log()?;
    ensure!(!log.contains("handing over"), "handed over to nobody: {log}");
    mesh.agent_mut("a")?.restart()?;
    mesh.agent_mut("a")?.wait_ready()?;
    Client::echo(mesh.pod("client")?, server.address(), "words of the last one")
}

/// The agent of node a dies, and `next`, which stands by, serves its pods.
fn dies_and_next_serves(mesh: &mut Mesh, mut next: Agent, server: &Server) -> Result<Agent> {
    mesh.agent_mut("a")?.kill()?;
    next.wait_ready()?;
    observe::wait_enrolled(&next)?;
    Client::echo(mesh.pod("client")?, server.address(), "words after a death")?;
    Ok(next)
}

/// `last` is asked to end, and `name` takes over from it; a flow that was open before ends well on `last`.
fn take_over(mesh: &Mesh, last: &Agent, name: &str, server: &Server) -> Result<Agent> {
    let steps = ["send:words of before", "line", "pause", "send:words of after", "line", "shut", "read-end"];
    let mut open = Client::start(mesh.pod("client")?, server.address(), &steps)?;
    open.events().first("line")?;
    let mut next = stand_by(mesh, last, name)?;
    let verified = held_programs(&next)?;
    let load = load(mesh, server, "again")?;
    last.ask_to_end()?;
    observe::wait_enrolled(&next)?;
    for program in observe::status(&next)?["programs"].as_array().context("no programs")? {
        let known = program["id"].as_u64().is_some_and(|id| verified.contains(&id));
        ensure!(known, "loaded while taking over, not before: {program}");
    }
    open.proceed()?;
    let told = open.finish()?;
    ensure!(told.iter().any(|event| event["text"] == "words of after"), "{told:?}");
    ensure!(told.iter().any(|event| event["end"] == "eof"), "{told:?}");
    // By the port of the metrics, which the last one had.
    next.wait_ready()?;
    let (echoed, failures) = outcome(load)?;
    ensure!(failures.is_empty(), "{failures:?} beside {echoed} that worked: {}", next.log()?);
    Ok(next)
}

fn stand_by(mesh: &Mesh, last: &Agent, name: &str) -> Result<Agent> {
    let next = last.start_beside(mesh.topology().node(last.node())?, name)?;
    // Nobody answers at first.
    until("the next agent standing by", || {
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })
    .with_context(|| next.log().unwrap_or_default())?;
    Ok(next)
}

/// Ids of the programs that an agent has descriptors of.
fn held_programs(agent: &Agent) -> Result<HashSet<u64>> {
    let folder = format!("/proc/{}/fdinfo", agent.id().context("the agent does not run")?);
    let mut ids = HashSet::new();
    for entry in fs::read_dir(folder)? {
        // Others are closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u64>().ok());
        ids.extend(id);
    }
    Ok(ids)
}

/// Clients that each make one connection after the other; `kind` is `again` or `storm`.
fn load(mesh: &Mesh, server: &Server, kind: &str) -> Result<Vec<Client>> {
    let start = |_| {
        let client = Client::with_args(mesh.pod("client")?, &[kind, &server.address().to_string()])?;
        client.events().first("begun")?;
        Ok(client)
    };
    (0..CLIENTS).map(start).collect()
}

/// How many connections were echoed, and the others' errors.
fn outcome(load: Vec<Client>) -> Result<(u64, Vec<Value>)> {
    let (mut echoed, mut failures) = (0, Vec::new());
    for mut client in load {
        client.proceed()?;
        let told = client.finish()?;
        let outcome = told.iter().find(|event| event["event"] == "again").context("no outcome")?;
        echoed += outcome["echoed"].as_u64().context("echoed")?;
        let failed = outcome["failures"].as_object().context("failures")?;
        failures.extend((!failed.is_empty()).then(|| Value::from(failed.clone())));
    }
    Ok((echoed, failures))
}

fn plan() -> Plan {
    Plan::new("next").pod("a", "shop", "client").pod("b", "shop", "web").config(DRAIN)
}

fn serve(mesh: &Mesh) -> Result<Server> {
    let web = mesh.pod("web")?;
    Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])
}
