//! Handover from one agent to the next while pods exchange data: no connection fails, and no plaintext is sent. The pods
//! are PERMISSIVE, so without an agent they would send plaintext.

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

/// Longer than any test here. An agent that drains correctly exits before the deadline. None waits for a successor.
const ENDS: &str = "drainTimeout: 10m\nsuccessorTimeout: 0s\n";
/// As above, but an agent waits for a successor for longer than any test.
const ENDS_WITH_SUCCESSOR: &str = "drainTimeout: 10m\nsuccessorTimeout: 5m\n";
/// Number of concurrent clients.
const CLIENTS: usize = 4;
/// Text that every connection sends.
const MARKER: &[u8] = b"text of";

#[test]
#[ignore = "needs root"]
fn an_agent_that_stands_by_takes_over_and_no_connection_notices() -> Result<()> {
    for node in ["a", "b"] {
        let mut mesh = plan().with_agents()?;
        let server = serve(&mesh)?;
        let capture = mesh.topology().capture()?;
        // Two handovers: the successor listens on the spare ports first, and on the original ports in the second handover.
        let mut next = hand_over(&mesh, mesh.agent(node)?, "next", &server)?;
        ensure!(mesh.agent_mut(node)?.wait_end()?.success(), "{}", mesh.agent(node)?.log()?);
        let mut third = hand_over(&mesh, &next, "third", &server)?;
        ensure!(next.wait_end()?.success(), "{}", next.log()?);
        assert_eq!(capture.finish()?.occurrences(MARKER), 0, "plaintext during the handover of node {node}");
        // The predecessors' listeners and pins must not block a restart.
        ensure!(third.terminate()?.success(), "{}", third.log()?);
        mesh.agent_mut(node)?.restart()?;
        mesh.agent_mut(node)?.wait_ready()?;
        observe::wait_enrolled(mesh.agent(node)?)?;
        Client::echo(mesh.pod("client")?, server.address(), "text of the last one")?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn control_connections_fail_while_no_agent_takes_over() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let load = load(&mesh, &server, "repeat")?;
    ensure!(mesh.agent_mut("a")?.terminate()?.success());
    mesh.agent_mut("a")?.restart()?;
    mesh.agent_mut("a")?.wait_ready()?;
    let (_, failures) = outcome(load)?;
    ensure!(!failures.is_empty(), "no connection failed while no agent ran");
    Ok(())
}

/// A refused connection takes almost no time, so clients that retry without a pause use all CPU time of the node.
#[test]
#[ignore = "needs root"]
fn an_agent_starts_among_clients_that_retry_without_a_pause() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let unloaded = restart_time(&mut mesh)?;
    let storm = load(&mesh, &server, "storm")?;
    let loaded = restart_time(&mut mesh)?;
    let (echoed, failures) = outcome(storm)?;
    println!("ready after {unloaded:?}; with {CLIENTS} clients that do not pause after {loaded:?}");
    ensure!(
        echoed > 0 && !failures.is_empty(),
        "expected echoed connections and failures: {echoed} echoed, {failures:?}"
    );
    Ok(())
}

/// Restarts the agent of node a and returns the time from its start until it is ready.
fn restart_time(mesh: &mut Mesh) -> Result<Duration> {
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
    let next = start_standby_agent(&mesh, mesh.agent("a")?, "next")?;
    kill_and_fail_over(&mut mesh, next, &server).map(drop)
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_stands_by_serves_also_when_the_pinned_maps_have_changed() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let next = start_standby_agent(&mesh, mesh.agent("a")?, "next")?;
    // A running agent would pin the map again.
    mesh.agent("a")?.pause()?;
    let pin = mesh.agent("a")?.files().pin_path().join(format!("maps-v{ABI_VERSION}/PODS"));
    fs::remove_file(&pin)?;
    let next = kill_and_fail_over(&mut mesh, next, &server)?;
    ensure!(pin.exists(), "the successor did not pin the map that its programs use: {}", next.log()?);
    Ok(())
}

/// As Kubernetes does it for a pod of the DaemonSet that is deleted: the next agent starts after the last one got its signal.
#[test]
#[ignore = "needs root"]
fn an_agent_that_is_told_to_end_serves_until_its_successor_stands_by() -> Result<()> {
    let mut mesh = plan_with(ENDS_WITH_SUCCESSOR).with_agents()?;
    let server = serve(&mesh)?;
    let mut last = start_standby_agent(&mesh, mesh.agent("a")?, "last")?;
    last = kill_and_fail_over(&mut mesh, last, &server)?;
    let load = load(&mesh, &server, "repeat")?;
    last.send_sigterm()?;
    until("the last agent waiting", || Ok(last.log()?.contains("serving on until").then_some(())))?;
    let mut next = last.start_standby(mesh.topology().node("a")?, "next")?;
    // The socket does not exist at first.
    until("the next agent", || Ok(observe::status(&next).is_ok().then_some(())))?;
    observe::wait_enrolled(&next)?;
    next.wait_ready()?;
    ensure!(last.wait_end()?.success(), "{}", last.log()?);
    let (echoed, failures) = outcome(load)?;
    ensure!(failures.is_empty(), "failures {failures:?}, {echoed} connections echoed: {}", next.log()?);
    next.send_sigterm()?;
    until("the next agent waiting", || Ok(next.log()?.contains("serving on until").then_some(())))?;
    Client::echo(mesh.pod("client")?, server.address(), "text while it waits")?;
    // A second signal ends the wait.
    ensure!(next.terminate()?.success(), "{}", next.log()?);
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
    let mut next = last.start_standby(mesh.topology().node("a")?, "next")?;
    let status = next.wait_end()?;
    fs::remove_dir(&other)?;
    let log = next.log()?;
    ensure!(!status.success() && log.contains("state of another version (maps-v0)"), "{status}: {log}");
    Client::echo(mesh.pod("client")?, server.address(), "text of the first one")
}

#[test]
#[ignore = "needs root"]
fn an_agent_whose_successor_dies_first_ends_as_if_there_had_been_none() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let mut next = start_standby_agent(&mesh, mesh.agent("a")?, "next")?;
    next.kill()?;
    Client::echo(mesh.pod("client")?, server.address(), "text of the first one")?;
    ensure!(mesh.agent_mut("a")?.terminate()?.success());
    let log = mesh.agent("a")?.log()?;
    ensure!(!log.contains("handing over"), "handover without a successor: {log}");
    mesh.agent_mut("a")?.restart()?;
    mesh.agent_mut("a")?.wait_ready()?;
    Client::echo(mesh.pod("client")?, server.address(), "text of the last one")
}

/// Kills the agent of node a and waits until the standby `next` serves its pods.
fn kill_and_fail_over(mesh: &mut Mesh, mut next: Agent, server: &Server) -> Result<Agent> {
    mesh.agent_mut("a")?.kill()?;
    next.wait_ready()?;
    observe::wait_enrolled(&next)?;
    Client::echo(mesh.pod("client")?, server.address(), "text of a flow after a death")?;
    Ok(next)
}

/// Stops `last` and waits until the successor `name` has taken over. A flow that was open before completes on `last`.
fn hand_over(mesh: &Mesh, last: &Agent, name: &str, server: &Server) -> Result<Agent> {
    let steps = ["send:text of before", "line", "pause", "send:text of after", "line", "shut", "read-end"];
    let mut open = Client::start(mesh.pod("client")?, server.address(), &steps)?;
    open.events().first("line")?;
    let mut next = start_standby_agent(mesh, last, name)?;
    let verified = open_programs(&next)?;
    let load = load(mesh, server, "repeat")?;
    last.send_sigterm()?;
    observe::wait_enrolled(&next)?;
    for program in observe::status(&next)?["programs"].as_array().context("no programs")? {
        let known = program["id"].as_u64().is_some_and(|id| verified.contains(&id));
        ensure!(known, "program loaded during the handover, not before: {program}");
    }
    open.proceed()?;
    let events = open.finish()?;
    ensure!(events.iter().any(|event| event["text"] == "text of after"), "{events:?}");
    ensure!(events.iter().any(|event| event["end"] == "eof"), "{events:?}");
    // Readiness is read from the metrics port, which `last` had before.
    next.wait_ready()?;
    let (echoed, failures) = outcome(load)?;
    ensure!(failures.is_empty(), "failures {failures:?}, {echoed} connections echoed: {}", next.log()?);
    Ok(next)
}

fn start_standby_agent(mesh: &Mesh, last: &Agent, name: &str) -> Result<Agent> {
    let next = last.start_standby(mesh.topology().node(last.node())?, name)?;
    // The socket does not exist at first.
    until("the next agent standing by", || {
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })
    .with_context(|| next.log().unwrap_or_default())?;
    Ok(next)
}

/// Returns the ids of the programs that an agent holds descriptors of.
fn open_programs(agent: &Agent) -> Result<HashSet<u64>> {
    let folder = format!("/proc/{}/fdinfo", agent.id().context("the agent does not run")?);
    let mut ids = HashSet::new();
    for entry in fs::read_dir(folder)? {
        // The agent closes other descriptors in the meantime.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u64>().ok());
        ids.extend(id);
    }
    Ok(ids)
}

/// Starts clients that open sequential connections; `kind` is `repeat` or `storm`.
fn load(mesh: &Mesh, server: &Server, kind: &str) -> Result<Vec<Client>> {
    let start = |_| {
        let client = Client::with_args(mesh.pod("client")?, &[kind, &server.address().to_string()])?;
        client.events().first("started")?;
        Ok(client)
    };
    (0..CLIENTS).map(start).collect()
}

/// Returns the number of echoed connections and the errors of the others.
fn outcome(load: Vec<Client>) -> Result<(u64, Vec<Value>)> {
    let (mut echoed, mut failures) = (0, Vec::new());
    for mut client in load {
        client.proceed()?;
        let events = client.finish()?;
        let outcome = events.iter().find(|event| event["event"] == "repeat").context("no outcome")?;
        echoed += outcome["echoed"].as_u64().context("echoed")?;
        let failed = outcome["failures"].as_object().context("failures")?;
        failures.extend((!failed.is_empty()).then(|| Value::from(failed.clone())));
    }
    Ok((echoed, failures))
}

fn plan() -> Plan {
    plan_with(ENDS)
}

fn plan_with(config: &str) -> Plan {
    Plan::new("next").pod("a", "shop", "client").pod("b", "shop", "web").config(config)
}

fn serve(mesh: &Mesh) -> Result<Server> {
    let web = mesh.pod("web")?;
    Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])
}
