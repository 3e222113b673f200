//! Agents that are stopped, killed, restarted and uninstalled while pods keep running. A STRICT pod sends no plaintext
//! in the meantime. A PERMISSIVE pod continues as plaintext, as its operator chose.
//!
//! Each test stops an agent, so each has its own mesh.

use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, net::SocketAddr, process::Stdio};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, agent_program, fresh_port, observe, scaled};
use tacit_topology::{HANG, Process, until};

const DRAIN: &str = "drainTimeout: 3s\n";

#[test]
#[ignore = "needs root"]
fn after_a_kill_nothing_goes_in_clear_and_a_new_agent_takes_over() -> Result<()> {
    for node in ["a", "b"] {
        survives(node, |mesh| mesh.agent_mut(node)?.kill().map(drop))?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn after_a_stop_nothing_goes_in_clear_and_a_new_agent_takes_over() -> Result<()> {
    for node in ["a", "b"] {
        survives(node, |mesh| {
            let status = mesh.agent_mut(node)?.terminate()?;
            ensure!(status.success(), "{status}: {}", mesh.agent(node)?.log()?);
            Ok(())
        })?;
    }
    Ok(())
}

/// An agent of which a thread has panicked ends, to be started again.
#[test]
#[ignore = "needs root"]
fn after_a_panic_of_a_worker_nothing_goes_in_clear_and_a_new_agent_takes_over() -> Result<()> {
    for node in ["a", "b"] {
        survives(node, |mesh| {
            let agent = mesh.agent_mut(node)?;
            panic_worker(agent.id().context("the agent does not run")?)?;
            let (status, log) = (agent.wait_end()?, agent.log()?);
            ensure!(log.contains("unexpected error when polling the I/O driver"), "no panic: {log}");
            // It may end before its next heartbeat is due.
            ensure!(log.contains("a task of the agent has failed"), "another end: {log}");
            ensure!(status.code() == Some(1), "{status}: {log}");
            Ok(())
        })?;
    }
    Ok(())
}

/// PERMISSIVE prefers reachability: without an agent an open pod continues as plaintext, and every connection is counted.
#[test]
#[ignore = "needs root"]
fn without_a_sign_of_life_a_permissive_pod_goes_on_in_clear_and_is_counted() -> Result<()> {
    let mut mesh = plan().config("heartbeatTimeout: 1s\n").with_agents()?;
    let server = serve(&mesh)?;
    mesh.agent_mut("a")?.kill()?;
    let marker = marker("stale");
    let capture = mesh.topology().capture()?;
    until("a plaintext connection", || {
        Ok(Client::echo(mesh.pod("client")?, server.address(), &marker).is_ok().then_some(()))
    })?;
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 2);
    mesh.agent_mut("a")?.restart()?;
    mesh.agent_mut("a")?.wait_ready()?;
    let reason = [("reason", "connect_stale_clear")];
    let counted = observe::metric(mesh.agent("a")?, "tacit_kernel_verdicts_total", &reason)?;
    ensure!(counted > 0, "not counted");
    Ok(())
}

/// A stuck agent still has its listeners. A STRICT pod's connections must fail at once and not hang.
#[test]
#[ignore = "needs root"]
fn without_a_sign_of_life_a_strict_pod_is_refused_at_once() -> Result<()> {
    let mesh = plan().policy(STRICT_MESH).config("heartbeatTimeout: 1s\n").with_agents()?;
    let server = serve(&mesh)?;
    Client::echo(mesh.pod("client")?, server.address(), "before")?;
    mesh.agent("a")?.pause()?;
    let refused = until("a rejection", || {
        // The client only connects: while the heartbeat is fresh, the paused agent never responds.
        let events = Client::run(mesh.pod("client")?, server.address(), &[])?;
        Ok(events.iter().any(|event| event["error"] == "ConnectionRefused").then_some(events))
    });
    mesh.agent("a")?.resume()?;
    refused?;
    until("flows again", || {
        Ok(Client::echo(mesh.pod("client")?, server.address(), "after").is_ok().then_some(()))
    })
}

/// Control of the tests above: without Tacit, the capture contains the exchange.
#[test]
#[ignore = "needs root"]
fn control_the_same_exchange_without_tacit_can_be_read() -> Result<()> {
    let mesh = plan().without_agents()?;
    let server = serve(&mesh)?;
    let marker = marker("control");
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, server.address(), &marker)?;
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 2);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn strict_holds_while_the_agent_is_dead() -> Result<()> {
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: web, namespace: shop}\n\
                  spec:\n  selector: {matchLabels: {app: web}}\n  mtls: {mode: STRICT}\n";
    let mut mesh = plan().policy(strict).with_agents()?;
    let (web, open) = (serve(&mesh)?, mesh.pod("open")?.clone());
    let open = Server::start(&open, SocketAddr::new(open.ipv4().into(), fresh_port()), &["echo"])?;
    mesh.agent_mut("b")?.kill()?;
    let events = Client::run(mesh.pod("stranger")?, web.address(), &["read-end"])?;
    ensure!(failed(&events) && web.accepted()? == 0, "{events:?}");
    // PERMISSIVE admits strangers with and without an agent, and the node may always probe.
    Client::echo(mesh.pod("stranger")?, open.address(), "permissive")?;
    let address = web.address();
    mesh.topology().node("b")?.netns().enter(|| std::net::TcpStream::connect_timeout(&address, HANG))??;
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_pod_whose_node_has_no_agent_is_never_reached_in_clear() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    mesh.agent_mut("b")?.kill()?;
    mesh.agent("b")?.uninstall()?;
    let server = serve(&mesh)?;
    let marker = marker("no-agent");
    let capture = mesh.topology().capture()?;
    let events =
        Client::run(mesh.pod("client")?, server.address(), &[&format!("send:{marker}"), "read-end"])?;
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 0);
    ensure!(failed(&events) && server.accepted()? == 0, "{events:?}");
    observe::wait_refused(mesh.agent("a")?, "peer_unreachable", 0, &server.address().ip().to_string())
}

#[test]
#[ignore = "needs root"]
fn a_stop_lets_an_open_flow_finish() -> Result<()> {
    for node in ["a", "b"] {
        // Longer than this test: the agent exits when the flow ends, not at the deadline.
        let mut mesh = plan().config("drainTimeout: 10m\n").with_agents()?;
        let server = serve(&mesh)?;
        let steps = ["send:before", "line", "pause", "send:after", "line", "shut", "read-end"];
        let mut client = Client::start(mesh.pod("client")?, server.address(), &steps)?;
        client.events().first("line")?;
        begin_stop(&mesh, node)?;
        client.proceed()?;
        let events = client.finish()?;
        ensure!(events.iter().any(|event| event["text"] == "after"), "node {node}: {events:?}");
        ensure!(events.iter().any(|event| event["end"] == "eof"), "node {node}: {events:?}");
        let status = mesh.agent_mut(node)?.wait_end()?;
        ensure!(status.success(), "{status}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_that_does_not_finish_is_reset_at_the_drain_deadline() -> Result<()> {
    for node in ["a", "b"] {
        let mut mesh = plan().config(DRAIN).with_agents()?;
        let server = serve(&mesh)?;
        let client =
            Client::start(mesh.pod("client")?, server.address(), &["send:stuck", "line", "read-end"])?;
        client.events().first("line")?;
        begin_stop(&mesh, node)?;
        let events = client.finish()?;
        ensure!(events.iter().any(|event| event["end"] == "ConnectionReset"), "node {node}: {events:?}");
        mesh.agent_mut(node)?.wait_end()?;
    }
    Ok(())
}

/// Sessions that end normally are not rejected connections, which alerts rely on.
#[test]
#[ignore = "needs root"]
fn flows_and_agents_that_end_well_are_not_counted_as_refused() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let address = server.address().to_string();
    let flows = usize::try_from(scaled(200)?)?;
    Client::with_args(mesh.pod("client")?, &["flows", &flows.to_string(), &address])?.finish()?;
    let arrived = server.accepted()?;
    ensure!(arrived == flows, "only {arrived} of {flows} flows arrived");
    assert_eq!(observe::refusals(mesh.agent("a")?)?, Vec::<String>::new());
    mesh.agent_mut("a")?.terminate()?;
    // Node b sees the sessions end before this connection, and counts both in order.
    let open = mesh.pod("open")?;
    let open = Server::start(open, SocketAddr::new(open.ipv4().into(), fresh_port()), &["echo"])?;
    Client::echo(mesh.pod("web")?, open.address(), "same node")?;
    assert_eq!(observe::refusals(mesh.agent("b")?)?, Vec::<String>::new());
    Ok(())
}

/// The kubelet makes a sandbox anew when its pause container ends. The cgroup of the pod stays.
#[test]
#[ignore = "needs root"]
fn a_pod_whose_sandbox_is_made_anew_uses_no_session_of_the_old_one() -> Result<()> {
    let mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    let (client, agent) = (mesh.pod("client")?, mesh.agent("a")?);
    Client::echo(client, server.address(), "before")?;
    let idle = |status: &Value| {
        let shares = status["shares"].as_array()?;
        shares.iter().find(|share| share["resource"] == "idle_sessions")?["used"].as_u64()
    };
    observe::wait_status(agent, "an idle session", |status| (idle(status)? > 0).then_some(()))?;
    let enrolments = || -> Result<usize> {
        let is_enrolment = |line: &&str| line.contains("pod=client") && line.contains("took_ms=");
        Ok(agent.log()?.lines().filter(is_enrolment).count())
    };
    let before = enrolments()?;
    let _process = mesh.topology().node("a")?.renew_sandbox(client)?;
    until("the pod enrolled again", || Ok((enrolments()? > before).then_some(())))?;
    Client::echo(client, server.address(), "after")?;
    let log = agent.log()?;
    ensure!(!log.contains("idle session was dead"), "a session of the old namespace was tried:\n{log}");
    // The session of the new one stays.
    observe::wait_status(agent, "the old session closed", |status| (idle(status)? == 1).then_some(()))
}

#[test]
#[ignore = "needs root"]
fn two_agents_on_one_pin_path_refuse_each_other() -> Result<()> {
    let mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?;
    let files = mesh.agent("a")?.files();
    // Everything differs but the pin path.
    let other = files.config().with_file_name("other.yaml");
    let text = fs::read_to_string(files.config())?;
    let text = text.replace("agent.sock", "other.sock").replace("15020", "15021");
    fs::write(&other, text)?;
    let mut command = node.command(agent_program()?)?;
    command
        .args(["agent", "--config"])
        .arg(&other)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut second = Process::spawn(&mut command)?;
    let status = second.wait().context("the second agent does not exit")?;
    let output = std::io::read_to_string(second.take_stderr().context("stderr")?)?;
    ensure!(!status.success() && output.contains("another agent"), "{status}: {output}");
    Client::echo(mesh.pod("client")?, serve(&mesh)?.address(), "the first agent still serves")
}

#[test]
#[ignore = "needs root"]
fn uninstall_is_refused_while_the_agent_runs_and_then_removes_everything() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let server = serve(&mesh)?;
    ensure!(mesh.agent("a")?.uninstall().is_err(), "uninstall succeeded while the agent runs");
    Client::echo(mesh.pod("client")?, server.address(), "still there")?;
    for node in ["a", "b"] {
        mesh.agent_mut(node)?.terminate()?;
        ensure!(
            mesh.agent(node)?.files().pin_path().exists(),
            "no pins remain after the agent of node {node} exited"
        );
        mesh.agent(node)?.uninstall()?;
        ensure!(!mesh.agent(node)?.files().pin_path().exists(), "pins of node {node} remain");
    }
    // As without Tacit, the server is reached and the capture contains the exchange.
    let marker = marker("uninstalled");
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, server.address(), &marker)?;
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 2);
    Ok(())
}

/// Stops one node's agent by `stop` and restarts it.
fn survives(node: &str, stop: impl FnOnce(&mut Mesh) -> Result<()>) -> Result<()> {
    let mut mesh = plan().policy(STRICT_MESH).config(DRAIN).with_agents()?;
    let server = serve(&mesh)?;
    Client::echo(mesh.pod("client")?, server.address(), "before")?;
    let before = pinned_programs(&observe::status(mesh.agent(node)?)?);
    ensure!(!before.is_empty(), "no program is pinned");

    let marker = marker("gap");
    let capture = mesh.topology().capture()?;
    stop(&mut mesh)?;
    let reached = server.accepted()?;
    let events =
        Client::run(mesh.pod("client")?, server.address(), &[&format!("send:{marker}"), "read-end"])?;
    let near = mesh.pod("near")?;
    let local = SocketAddr::new(near.ipv4().into(), fresh_port());
    let _local = Server::start(near, local, &["echo"])?;
    let near_events =
        Client::run(mesh.pod("client")?, local, &[&format!("send:{marker}"), "shut", "read-end"])?;
    assert_eq!(
        capture.finish()?.occurrences(marker.as_bytes()),
        0,
        "plaintext while node {node} had no agent"
    );
    ensure!(failed(&events) && server.accepted()? == reached, "while node {node} had no agent: {events:?}");
    ensure!(
        failed(&near_events) == (node == "a"),
        "same node while node {node} had no agent: {near_events:?}"
    );

    mesh.agent_mut(node)?.restart()?;
    mesh.agent_mut(node)?.wait_ready()?;
    observe::wait_enrolled(mesh.agent(node)?)?;
    Client::echo(mesh.pod("client")?, server.address(), "after")?;
    let after = pinned_programs(&observe::status(mesh.agent(node)?)?);
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    Ok(())
}

/// Makes a worker's wait for events fail as for a bad descriptor: the runtime of the thread panics then.
fn panic_worker(process: u32) -> Result<()> {
    let mut threads = fs::read_dir(format!("/proc/{process}/task"))?.filter_map(Result::ok);
    let is_worker = |thread: &fs::DirEntry| {
        fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim_end() == "tacit-flows-0")
    };
    let worker = threads.find(is_worker).context("no worker")?;
    let worker = Pid::from_raw(worker.file_name().to_string_lossy().parse()?);
    ptrace::seize(worker, ptrace::Options::empty())?;
    until("a worker that waits for events", || {
        ptrace::interrupt(worker)?;
        waitpid(worker, Some(WaitPidFlag::__WALL))?;
        let mut registers = ptrace::getregs(worker)?;
        let is_waiting = fail_wait(&mut registers);
        if is_waiting {
            ptrace::setregs(worker, registers)?;
            ptrace::detach(worker, None)?;
        } else {
            ptrace::cont(worker, None)?;
        }
        Ok(is_waiting.then_some(()))
    })
}

/// Replaces the result of an interrupted `epoll_wait`. Returns false if the thread was elsewhere.
#[cfg(target_arch = "x86_64")]
fn fail_wait(registers: &mut nix::libc::user_regs_struct) -> bool {
    let calls = [nix::libc::SYS_epoll_wait, nix::libc::SYS_epoll_pwait];
    let is_waiting = calls.iter().any(|call| registers.orig_rax == call.cast_unsigned())
        && registers.rax == (-nix::libc::c_long::from(nix::libc::EINTR)).cast_unsigned();
    if is_waiting {
        registers.rax = (-nix::libc::c_long::from(nix::libc::EBADF)).cast_unsigned();
    }
    is_waiting
}

/// As above.
#[cfg(target_arch = "aarch64")]
fn fail_wait(registers: &mut nix::libc::user_regs_struct) -> bool {
    let is_waiting = registers.regs[8] == nix::libc::SYS_epoll_pwait.cast_unsigned()
        && registers.regs[0] == (-nix::libc::c_long::from(nix::libc::EINTR)).cast_unsigned();
    if is_waiting {
        registers.regs[0] = (-nix::libc::c_long::from(nix::libc::EBADF)).cast_unsigned();
    }
    is_waiting
}

/// Sends SIGTERM and returns when the agent drains or has exited.
fn begin_stop(mesh: &Mesh, node: &str) -> Result<()> {
    let agent = mesh.agent(node)?;
    agent.send_sigterm()?;
    until("the agent draining", || {
        Ok(observe::status(agent).map_or(true, |status| status["state"] == "draining").then_some(()))
    })
}

/// Returns the ids of pinned programs by name and attachment.
fn pinned_programs(status: &Value) -> BTreeMap<String, u64> {
    let programs = status["programs"].as_array().cloned().unwrap_or_default();
    let pinned = programs.iter().filter(|program| program["pinned"].is_string());
    pinned
        .map(|program| {
            (
                format!("{} at {}", program["name"], program["attached_to"]),
                program["id"].as_u64().unwrap_or(0),
            )
        })
        .collect()
}

/// Returns true if the client got no byte and no clean end of file.
fn failed(events: &[Value]) -> bool {
    let silent = !events.iter().any(|event| event["event"] == "line" || event["bytes"].as_u64() > Some(0));
    let ended_well = events.iter().any(|event| event["end"] == "eof");
    silent && !ended_well
}

fn plan() -> Plan {
    Plan::new("life")
        .pod("a", "shop", "client")
        .pod("a", "shop", "near")
        .pod("b", "shop", "web")
        .pod("b", "shop", "open")
        .outside("a", "shop", "stranger")
}

fn serve(mesh: &Mesh) -> Result<Server> {
    let web = mesh.pod("web")?;
    Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])
}

/// Returns a text that occurs nowhere else.
fn marker(what: &str) -> String {
    format!("marker-{what}-{}-{}", std::process::id(), fresh_port())
}
