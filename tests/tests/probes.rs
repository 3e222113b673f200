//! Probes of the kubelet: `tacit probe` asks one agent, the health port the agent that serves the node. Two agents of a node are
//! told apart where a wrong answer would end the wrong one, and nobody else can use the port.

use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        ptrace,
        resource::{UsageWho, getrusage},
        time::TimeValLike,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};
use tacit_tests::{Client, Mesh, Plan, Server, agent_program, fresh_port, observe};
use tacit_topology::{Agent, HANG, MeshFiles, Netns, Process, until};

/// `timeoutSeconds` of the probes in `deploy/`.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// More than the health port's places, and than its queue in the kernel.
const IDLE_CONNECTIONS: usize = 3000;
/// Descriptors that the connections to the health port may take: `admin_connections`, and some that come and go.
const DESCRIPTORS_MAX: usize = 64 + 16;

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Ready,
    NotReady,
    Nothing,
}

#[test]
#[ignore = "needs root"]
fn of_two_agents_the_one_that_serves_answers_and_no_sick_successor_takes_that_away() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?.netns().clone();
    assert_eq!(readiness(&node)?, Answer::Ready);
    let mut next = start_standby(&mesh)?;
    ensure!(probe(&next.files().socket(), "ready")?, "the successor that stands by is not ready");
    next.pause()?;
    ensure!(!probe(&next.files().socket(), "ready")?, "the stuck successor has the answer of another agent");
    ensure!(probe(&mesh.agent("a")?.files().socket(), "ready")?, "the agent that serves is not ready");
    assert_eq!(readiness(&node)?, Answer::Ready, "kubelet would replace the agent that serves");
    next.resume()?;

    // A stuck agent that serves is not ready. The successor can take over, so it is.
    mesh.agent("a")?.pause()?;
    assert_eq!(readiness(&node)?, Answer::Nothing, "the stuck agent has the answer of its successor");
    ensure!(!probe(&mesh.agent("a")?.files().socket(), "ready")?, "the stuck agent is ready");
    ensure!(probe(&next.files().socket(), "ready")?, "the successor has the answer of the stuck agent");
    mesh.agent_mut("a")?.kill()?;
    until("the answer of the successor", || Ok((readiness(&node)? == Answer::Ready).then_some(())))?;
    next.wait_ready()?;
    ensure!(next.terminate()?.success(), "{}", next.log()?);
    assert_eq!(readiness(&node)?, Answer::Nothing, "there is no agent");
    Ok(())
}

/// The new version of a broken update: it runs and never gets certificates.
#[test]
#[ignore = "needs root"]
fn a_successor_that_could_not_serve_is_not_ready_and_the_agent_that_serves_stays_so() -> Result<()> {
    let mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?;
    let last = mesh.agent("a")?;
    let other = last.files().config().with_file_name("other.yaml");
    let text = fs::read_to_string(last.files().config())?;
    let issuer = "issuer: {istio: {address: \"127.0.0.1:1\", rootFile: absent.pem, tokenFile: absent}}";
    let is_changed = |line: &str| ["issuer: ", "socket: "].iter().any(|field| line.starts_with(field));
    let kept: Vec<&str> = text.lines().filter(|line| !is_changed(line)).collect();
    fs::write(&other, format!("{}\n{issuer}\nsocket: other.sock\n", kept.join("\n")))?;
    let mut command = node.command(agent_program()?)?;
    command.args(["agent", "--stand-by", "--config"]).arg(&other);
    let mut next = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))?;
    let socket = other.with_file_name("other.sock");
    until("the successor", || {
        ensure!(next.ended()?.is_none(), "the successor has exited");
        Ok(probe(&socket, "live")?.then_some(()))
    })?;
    ensure!(!probe(&socket, "ready")?, "a successor without certificates is ready");
    ensure!(probe(&last.files().socket(), "ready")?, "the agent that serves is not ready");
    assert_eq!(readiness(node.netns())?, Answer::Ready);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_drains_is_not_ready() -> Result<()> {
    let mut mesh = plan().config("drainTimeout: 10m\nsuccessorTimeout: 0s\n").with_agents()?;
    let web = mesh.pod("web")?;
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    let steps = ["send:before", "line", "pause", "shut", "read-end"];
    let mut client = Client::start(mesh.pod("client")?, server.address(), &steps)?;
    client.events().first("line")?;
    mesh.agent("a")?.send_sigterm()?;
    let node = mesh.topology().node("a")?.netns().clone();
    until("the agent draining", || Ok((readiness(&node)? == Answer::NotReady).then_some(())))?;
    ensure!(!probe(&mesh.agent("a")?.files().socket(), "ready")?, "the agent drains and is ready");
    ensure!(probe(&mesh.agent("a")?.files().socket(), "live")?, "the agent drains and is not alive");
    client.proceed()?;
    client.finish()?;
    ensure!(mesh.agent_mut("a")?.wait_end()?.success());
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn the_health_port_follows_a_handover() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?.netns().clone();
    let next = start_standby(&mesh)?;
    let last = mesh.agent_mut("a")?;
    last.send_sigterm()?;
    let mut seen = Vec::new();
    let ended = until("the end of the last agent", || {
        seen.push(readiness(&node)?);
        let state = observe::status(last).ok().map(|status| status["state"].clone());
        Ok(state.is_none().then_some(()))
    });
    ended?;
    last.wait_end()?;
    until("the answer of the next agent", || Ok((readiness(&node)? == Answer::Ready).then_some(())))?;
    ensure!(!seen.contains(&Answer::NotReady), "not ready during a handover: {seen:?}");
    ensure!(probe(&next.files().socket(), "ready")?);
    Ok(())
}

/// As a pod with the node's network can do it.
#[test]
#[ignore = "needs root"]
fn idle_connections_keep_no_probe_out_and_a_client_gets_nothing_but_readiness() -> Result<()> {
    let mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?.netns();
    let agent = mesh.agent("a")?;
    let before = descriptors(agent)?;
    let health: SocketAddr = MeshFiles::HEALTH.parse()?;
    let mut idle = Vec::new();
    for number in 0..IDLE_CONNECTIONS {
        let mut stream = node.enter(|| TcpStream::connect_timeout(&health, HANG))??;
        // Half of them begin a request. One that was closed meanwhile cannot.
        if number % 2 == 0 {
            let _ = stream.write_all(b"GET /healthz/ready HTTP/1.1\r\n");
        }
        idle.push(stream);
    }
    assert_eq!(readiness(node)?, Answer::Ready, "probes are kept out");
    let taken = descriptors(agent)?.saturating_sub(before);
    ensure!(taken > 0, "control: the connections do not reach the agent");
    ensure!(taken <= DESCRIPTORS_MAX, "{taken} descriptors taken");
    drop(idle);
    let answer = exchange(node, health, None, "GET /healthz/ready")?;
    ensure!(answer.ends_with("\r\n\r\nready\n"), "{answer}");
    for request in ["GET /metrics", "GET /status", "GET /healthz/live", "POST /healthz/ready"] {
        let answer = exchange(node, health, None, request)?;
        ensure!(answer.starts_with("HTTP/1.1 40"), "{request}: {answer}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn the_health_port_is_reached_from_the_node_and_from_no_pod() -> Result<()> {
    let mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?;
    let health: SocketAddr = MeshFiles::HEALTH.parse()?;
    let (ipv4, ipv6) = (node.wire_ipv4(), node.wire_ipv6());
    // Control: the node's own loopback, and another port of the node from the same pod.
    assert_eq!(readiness(node.netns())?, Answer::Ready);
    let other = node.netns().enter(|| TcpListener::bind((ipv4, 0)))??;
    let open = other.local_addr()?;
    let pod = mesh.pod("stranger")?.netns();
    pod.enter(|| TcpStream::connect_timeout(&open, HANG))?
        .context("control: the pod does not reach its node")?;
    let port = health.port();
    let targets = [health, (ipv4, port).into(), (ipv6, port).into(), ([127, 0, 0, 2], port).into()];
    for name in ["stranger", "client"] {
        let pod = mesh.pod(name)?.netns();
        for target in targets {
            let reached = pod.enter(|| TcpStream::connect_timeout(&target, PROBE_TIMEOUT))?;
            ensure!(reached.is_err(), "the pod {name} reaches {target}");
        }
    }
    // Packets from elsewhere to 127.0.0.1, which `route_localnet` lets in: the kernel connects, and the agent closes.
    let answer = exchange(node.netns(), health, Some(ipv4.into()), "GET /healthz/ready")?;
    ensure!(answer.is_empty(), "an answer to {ipv4}: {answer}");
    assert_eq!(readiness(node.netns())?, Answer::Ready);
    Ok(())
}

/// Stops all threads but that of the watchdog and that of the log, as a deadlock would.
#[test]
#[ignore = "needs root"]
fn an_agent_whose_control_threads_are_stuck_ends_itself_and_its_successor_serves() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let node = mesh.topology().node("a")?.netns().clone();
    let mut next = start_standby(&mesh)?;
    let last = mesh.agent_mut("a")?;
    let process = last.id().context("the agent does not run")?;
    // Threads run again when the thread that stopped them has ended, also if it failed.
    thread::scope(|scope| {
        let stuck = scope.spawn(|| -> Result<()> {
            let stopped = stop_threads(process, &["tacit-watchdog", "tacit-log"])?;
            ensure!(stopped.len() > 2, "control: only {stopped:?} stopped");
            assert_eq!(readiness(&node)?, Answer::Nothing, "control: the agent is not stuck");
            until("the end of the agent", || {
                // A stopped thread ends only when the thread that stopped it looks. The main thread is the harness' child.
                for thread in stopped.iter().filter(|thread| thread.as_raw().cast_unsigned() != process) {
                    let _ = waitpid(*thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
                }
                Ok((fs::read_dir(format!("/proc/{process}/task"))?.count() == 1).then_some(()))
            })
        });
        stuck.join().map_err(|_| anyhow::anyhow!("the control failed"))?
    })?;
    let status = last.wait_end()?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(last.log()?.contains("control threads of this agent do not run"), "{}", last.log()?);
    next.wait_ready()?;
    until("the answer of the successor", || Ok((readiness(&node)? == Answer::Ready).then_some(())))?;
    Ok(())
}

/// Figures of ADR 19. The cost of a container runtime comes on top of the process.
#[test]
#[ignore = "needs root"]
fn a_probe_of_the_health_port_costs_a_fraction_of_a_process() -> Result<()> {
    const PROCESSES: u32 = 50;
    const REQUESTS: u32 = 500;
    let mesh = plan().with_agents()?;
    let (agent, node) = (mesh.agent("a")?, mesh.topology().node("a")?.netns());
    let children = || -> Result<Duration> {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let used = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Ok(Duration::from_micros(u64::try_from(used)?))
    };
    let (of_children, of_agent) = (children()?, cpu_time(agent)?);
    for _ in 0..PROCESSES {
        ensure!(probe(&agent.files().socket(), "ready")?);
    }
    let process = (children()? - of_children + (cpu_time(agent)? - of_agent)) / PROCESSES;
    let of_agent = cpu_time(agent)?;
    for _ in 0..REQUESTS {
        ensure!(readiness(node)? == Answer::Ready);
    }
    let request = (cpu_time(agent)? - of_agent) / REQUESTS;
    println!("CPU of a probe: by a process {process:?}, over the health port {request:?}");
    ensure!(request * 5 < process, "{request:?} over the port, {process:?} by a process");
    Ok(())
}

/// Asks as the kubelet does, in the namespace of the node.
fn readiness(node: &Netns) -> Result<Answer> {
    let health = MeshFiles::HEALTH.parse()?;
    // A refused connection, one without an answer in time, and one that breaks off.
    let answer = exchange(node, health, None, "GET /healthz/ready").unwrap_or_default();
    Ok(match answer.split(' ').nth(1) {
        Some("200") => Answer::Ready,
        Some("503") => Answer::NotReady,
        None => Answer::Nothing,
        Some(_) => anyhow::bail!("{answer}"),
    })
}

/// Sends a request from `source` and returns the answer.
fn exchange(
    netns: &Netns,
    target: SocketAddr,
    source: Option<std::net::IpAddr>,
    request: &str,
) -> Result<String> {
    netns.enter(|| {
        let socket = socket2::Socket::new(socket2::Domain::for_address(target), socket2::Type::STREAM, None)?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&target.into(), PROBE_TIMEOUT)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
        stream.write_all(
            format!("{request} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        let mut answer = String::new();
        match stream.read_to_string(&mut answer) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(String::new()),
            read => read.map(|_| answer).context("no answer"),
        }
    })?
}

/// Returns true if `tacit probe` succeeds.
fn probe(socket: &Path, what: &str) -> Result<bool> {
    let mut command = std::process::Command::new(agent_program()?);
    command.args(["probe", what, "--socket"]).arg(socket);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?.success())
}

fn start_standby(mesh: &Mesh) -> Result<Agent> {
    let next = mesh.agent("a")?.start_standby(mesh.topology().node("a")?, "next")?;
    // The socket does not exist at first.
    until("the next agent standing by", || {
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })
    .with_context(|| next.log().unwrap_or_default())?;
    Ok(next)
}

/// Stops all threads of `process` whose names are not among `running`, until the calling thread ends.
fn stop_threads(process: u32, running: &[&str]) -> Result<Vec<Pid>> {
    let mut stopped: Vec<Pid> = Vec::new();
    let mut known = HashSet::new();
    loop {
        let before = stopped.len();
        for entry in fs::read_dir(format!("/proc/{process}/task"))? {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("comm"))?;
            let thread = Pid::from_raw(entry.file_name().to_string_lossy().parse()?);
            if running.contains(&name.trim_end()) || !known.insert(thread) {
                continue;
            }
            ptrace::seize(thread, ptrace::Options::empty())?;
            ptrace::interrupt(thread)?;
            waitpid(thread, Some(WaitPidFlag::__WALL))?;
            stopped.push(thread);
        }
        // A thread that still ran may have started another one.
        if stopped.len() == before {
            return Ok(stopped);
        }
    }
}

fn descriptors(agent: &Agent) -> Result<usize> {
    let process = agent.id().context("the agent does not run")?;
    Ok(fs::read_dir(format!("/proc/{process}/fd"))?.count())
}

/// Returns the CPU time of all threads of `agent`.
fn cpu_time(agent: &Agent) -> Result<Duration> {
    let process = agent.id().context("the agent does not run")?;
    let mut total = 0;
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let text = fs::read_to_string(entry?.path().join("schedstat"))?;
        total += text.split(' ').next().context("schedstat")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}

fn plan() -> Plan {
    Plan::new("probe")
        .pod("a", "shop", "client")
        .pod("b", "shop", "web")
        .outside("a", "shop", "stranger")
        .config("successorTimeout: 0s\n")
}
