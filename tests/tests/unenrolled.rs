//! Pods that the directory knows and that are not enrolled, in a mesh that is STRICT throughout. A mode concerns enrolled
//! destinations: such pods go as without Tacit, with each other and to addresses outside. STRICT pods still refuse them.

use anyhow::{Result, ensure};
use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::OnceLock,
    time::Duration,
};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, agent_program, fresh_port, observe};
use tacit_topology::{HANG, Pod, Tunnel, WorkloadEntry, run, within};

/// Two pods that are not enrolled, one on each node, an enrolled one, and one that no directory names.
fn plan() -> Plan {
    Plan::new("unenr")
        .policy(STRICT_MESH)
        .config("unnamedPodTimeout: 1h\n")
        .pod("a", "shop", "left")
        .pod("a", "shop", "unnamed")
        .pod("b", "shop", "right")
        .pod("b", "shop", "strict")
}

fn control() -> Plan {
    Plan::new("unenrc")
        .pod("a", "shop", "left")
        .pod("a", "shop", "unnamed")
        .pod("b", "shop", "right")
        .pod("b", "shop", "strict")
}

fn directory(mesh: &Mesh) -> Vec<WorkloadEntry> {
    let named = mesh.directory().into_iter().filter(|entry| entry.name != "unnamed");
    let entry = |entry: WorkloadEntry| match entry.name.as_str() {
        "strict" => entry,
        _ => WorkloadEntry { tunnel: Tunnel::None, ..entry },
    };
    named.map(entry).collect()
}

fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || plan().with_directories(|_, mesh| Ok(directory(mesh))))
}

fn both(pod: &Pod) -> [IpAddr; 2] {
    [pod.ipv4().into(), pod.ipv6().into()]
}

fn is_echoed(from: &Pod, to: &Pod) -> Result<bool> {
    let mut echoed = Vec::new();
    for address in both(to) {
        let server = Server::start(to, SocketAddr::new(address, fresh_port()), &["echo"])?;
        echoed.push(Client::echo(from, server.address(), "hello").is_ok());
    }
    ensure!(echoed[0] == echoed[1], "IPv4 and IPv6 differ: {echoed:?}");
    Ok(echoed[0])
}

#[test]
#[ignore = "needs root"]
fn pods_that_are_not_enrolled_reach_each_other() -> Result<()> {
    let mesh = mesh()?;
    let (left, right) = (mesh.pod("left")?, mesh.pod("right")?);
    ensure!(is_echoed(left, right)? && is_echoed(right, left)?);
    for address in both(right) {
        let server = right.netns().enter(|| UdpSocket::bind((address, 0)))??;
        server.set_read_timeout(Some(HANG))?;
        // In the pod's cgroup: the guard looks at sockets of pods.
        let mut step = left.command(agent_program()?.with_file_name("tacit-attack"));
        step.args(["step", "udp", &server.local_addr()?.to_string(), "hello"]);
        let told = run(step.env("TACIT_ATTACK_PATIENCE_MS", "2000"))?;
        ensure!(told.trim() == "sent", "{told}");
        let mut buffer = [0; 16];
        let (bytes, _) = server.recv_from(&mut buffer)?;
        ensure!(&buffer[..bytes] == b"hello");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_strict_pod_refuses_them() -> Result<()> {
    let mesh = mesh()?;
    ensure!(!is_echoed(mesh.pod("left")?, mesh.pod("strict")?)?);
    ensure!(!is_echoed(mesh.pod("right")?, mesh.pod("strict")?)?);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_nobody_names_reaches_nobody() -> Result<()> {
    let mesh = mesh()?;
    ensure!(!is_echoed(mesh.pod("unnamed")?, mesh.pod("right")?)?);
    Ok(())
}

/// Waits until node `a` holds and leaves alone this many pods that no source names.
fn wait_unnamed(mesh: &Mesh, held: u64, left_alone: u64) -> Result<()> {
    observe::wait_status(mesh.agent("a")?, "unnamed pods", |status| {
        let unnamed = &status["unnamed"];
        (unnamed["held"] == held && unnamed["left_alone"] == left_alone).then_some(())
    })
}

#[test]
#[ignore = "needs root"]
fn a_held_pod_is_shown_and_counted() -> Result<()> {
    let mesh = mesh()?;
    wait_unnamed(mesh, 1, 0)?;
    let (unnamed, right) = (mesh.pod("unnamed")?, mesh.pod("right")?);
    let mut step = unnamed.command(agent_program()?.with_file_name("tacit-attack"));
    step.args(["step", "udp", &SocketAddr::new(right.ipv4().into(), fresh_port()).to_string(), "hello"]);
    run(step.env("TACIT_ATTACK_PATIENCE_MS", "500"))?;
    let agent = mesh.agent("a")?;
    let held = observe::metric(agent, "tacit_kernel_verdicts_total", &[("reason", "guard_held")])?;
    ensure!(held > 0, "{}", agent.metrics()?);
    ensure!(observe::metric(agent, "tacit_unnamed_pods", &[("state", "held")])? == 1);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_nobody_names_is_held_for_a_bounded_time_while_the_directory_is_current() -> Result<()> {
    let plan = Plan::new("unnamed").policy(STRICT_MESH).config("unnamedPodTimeout: 1s\n");
    let plan = plan.pod("a", "shop", "unnamed").pod("b", "shop", "right").pod("b", "shop", "strict");
    let mesh = plan.with_directories(|_, mesh| Ok(directory(mesh)))?;
    let (unnamed, right) = (mesh.pod("unnamed")?, mesh.pod("right")?);
    wait_unnamed(&mesh, 0, 1)?;
    ensure!(is_echoed(unnamed, right)? && is_echoed(right, unnamed)?, "left alone after its time");
    ensure!(!is_echoed(unnamed, mesh.pod("strict")?)?, "STRICT pods refuse it");

    // A directory that is out of date cannot say that nobody is to name a pod.
    let files = mesh.agent("a")?.files();
    files.set_directory_text("workloads: [")?;
    observe::wait_status(mesh.agent("a")?, "invalid directory", |status| {
        status["sources"][0]["last_error"].is_string().then_some(())
    })?;
    let late = mesh.topology().node("a")?.pod("shop", "late")?;
    let _process = late.keep_alive()?;
    wait_unnamed(&mesh, 1, 1)?;
    let left_alone = within(3 * LIMIT, || Ok(wait_unnamed_now(&mesh, 0, 2)?.then_some(())))?;
    ensure!(left_alone.is_none(), "held as long as the directory is invalid");
    ensure!(!is_echoed(&late, right)?);
    files.set_directory(&directory(&mesh))?;
    wait_unnamed(&mesh, 0, 2)?;
    ensure!(is_echoed(&late, right)?);

    // Named, it is held to its mode.
    let named = [directory(&mesh), vec![WorkloadEntry::of(&late)]].concat();
    files.set_directory(&named)?;
    wait_unnamed(&mesh, 0, 1)?;
    observe::wait_enrolled(mesh.agent("a")?)?;
    ensure!(!is_echoed(&late, right)? && !is_echoed(right, &late)?, "STRICT since it is named");
    Ok(())
}

/// The bound of that test.
const LIMIT: Duration = Duration::from_secs(1);

fn wait_unnamed_now(mesh: &Mesh, held: u64, left_alone: u64) -> Result<bool> {
    let unnamed = &observe::status(mesh.agent("a")?)?["unnamed"];
    Ok(unnamed["held"] == held && unnamed["left_alone"] == left_alone)
}

#[test]
#[ignore = "needs root"]
fn control_all_reach_each_other_without_tacit() -> Result<()> {
    let mesh = control().without_agents()?;
    for (from, to) in [("left", "right"), ("left", "strict"), ("unnamed", "right")] {
        ensure!(is_echoed(mesh.pod(from)?, mesh.pod(to)?)?, "{from} to {to}");
    }
    Ok(())
}
