//! Pods that the directory knows and that are not enrolled, in a mesh that is STRICT throughout. A mode concerns enrolled
//! destinations: such pods go as without Tacit, with each other and to addresses outside. STRICT pods still refuse them.

use anyhow::{Result, ensure};
use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::OnceLock,
};
use tacit_tests::{Client, Mesh, Plan, Server, agent_program, fresh_port};
use tacit_topology::{HANG, Pod, Tunnel, WorkloadEntry, run};

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                      metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

/// Two pods that are not enrolled, one on each node, an enrolled one, and one that no directory names.
fn plan() -> Plan {
    Plan::new("unenr")
        .policy(STRICT)
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

#[test]
#[ignore = "needs root"]
fn control_all_reach_each_other_without_tacit() -> Result<()> {
    let mesh = control().without_agents()?;
    for (from, to) in [("left", "right"), ("left", "strict"), ("unnamed", "right")] {
        ensure!(is_echoed(mesh.pod(from)?, mesh.pod(to)?)?, "{from} to {to}");
    }
    Ok(())
}
