//! The topology of the other tests: pods reach each other without an agent, and every resource is removed.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tacit_topology::{HANG, Membership, Pod, Process, Topology, cleanup_stale, run, until};

const MARKER: &[u8] = b"topology-marker-5c2f";

#[test]
#[ignore = "needs root"]
fn pods_of_both_nodes_reach_each_other_as_plaintext() -> Result<()> {
    let topology = Topology::new("top")?;
    let client = topology.node("a")?.pod("shop", "client")?;
    let near = topology.node("a")?.pod("shop", "near")?;
    let far = topology.node("b")?.pod("shop", "far")?;
    let capture = topology.capture()?;
    for server in [&near, &far] {
        exchange(&client, server, IpAddr::V4(server.ipv4()))?;
        exchange(&client, server, IpAddr::V6(server.ipv6()))?;
    }
    let traffic = capture.finish()?;
    // Only pod `far` is across the wire. Each family crosses it twice: the request and the response.
    assert_eq!(traffic.occurrences(MARKER), 4);
    assert_eq!((traffic.tunnel_bytes, traffic.client_hellos()), (0, 0));
    topology.close()
}

#[test]
#[ignore = "needs root"]
fn a_program_runs_in_its_pods_cgroup_and_namespace() -> Result<()> {
    let topology = Topology::new("top")?;
    let node = topology.node("a")?;
    for pod in [node.pod("shop", "in")?, node.outside_pod("shop", "out")?] {
        let process = pod.keep_alive()?;
        let members = || fs::read_to_string(pod.cgroup().join("cgroup.procs"));
        until("process in its cgroup", || Ok(members()?.contains(&process.id().to_string()).then_some(())))?;
        let inside = run(pod.command("stat").args(["-Lc", "%i", "/proc/self/ns/net"]))?;
        let named = run(Command::new("stat").args(["-Lc", "%i"]).arg(pod.netns().path()))?;
        assert_eq!(inside, named);
        let is_mesh = pod.cgroup().starts_with(node.pods_cgroup());
        assert_eq!(is_mesh, pod.membership() == Membership::Mesh);
    }
    topology.close()
}

#[test]
#[ignore = "needs root"]
fn nothing_remains_after_close() -> Result<()> {
    let topology = Topology::new("top")?;
    let prefix = topology.prefix().to_owned();
    let pod = topology.node("b")?.pod("shop", "web")?;
    let process = pod.keep_alive()?;
    fs::create_dir_all(topology.node("b")?.pin_path().join("maps"))?;
    assert!(!leftovers(&prefix)?.is_empty());
    topology.close()?;
    drop(process);
    assert_eq!(leftovers(&prefix)?, Vec::<PathBuf>::new());
    Ok(())
}

/// The sweeper process removes all resources when the owner is killed. The owner is this test in another process.
#[test]
#[ignore = "needs root"]
fn nothing_remains_when_the_owner_is_killed() -> Result<()> {
    let mut owner = Command::new(std::env::current_exe()?);
    owner.args(["--exact", "--include-ignored", "--nocapture", "owner_that_waits_to_be_killed"]);
    let mut owner = Process::spawn(owner.env("TOPOLOGY_OWNER", "1").stdout(Stdio::piped()))?;
    let mut stdout = owner.take_stdout().context("stdout")?;
    let mut output = String::new();
    let prefix = loop {
        let mut byte = [0];
        ensure!(stdout.read(&mut byte)? == 1, "the owner exited: {output}");
        output.push(char::from(byte[0]));
        if let Some((_, prefix)) =
            output.trim_end_matches('\n').split_once("built ").filter(|_| output.ends_with('\n'))
        {
            break prefix.to_owned();
        }
    };
    assert!(!leftovers(&prefix)?.is_empty());
    drop(owner);
    until("everything removed", || Ok(leftovers(&prefix)?.is_empty().then_some(())))
}

#[test]
#[ignore = "needs root"]
fn owner_that_waits_to_be_killed() -> Result<()> {
    if std::env::var_os("TOPOLOGY_OWNER").is_none() {
        return Ok(());
    }
    let topology = Topology::new("top")?;
    let process = topology.node("a")?.pod("shop", "web")?.keep_alive()?;
    println!("built {}", topology.prefix());
    loop {
        std::thread::park();
        std::hint::black_box(&process);
    }
}

#[test]
#[ignore = "needs root"]
fn leftovers_of_a_dead_process_are_removed_and_others_kept() -> Result<()> {
    let living = Topology::new("top")?;
    let mut gone = Process::spawn(Command::new("true").stdout(Stdio::null()))?;
    let dead = format!("tacit-top{}x0", gone.id());
    gone.wait()?;
    run(Command::new("ip").args(["netns", "add", &format!("{dead}-a")]))?;
    fs::create_dir(std::env::temp_dir().join(&dead))?;
    cleanup_stale()?;
    assert_eq!(leftovers(&dead)?, Vec::<PathBuf>::new());
    assert!(!leftovers(living.prefix())?.is_empty());
    living.close()
}

fn exchange(client: &Pod, server: &Pod, address: IpAddr) -> Result<()> {
    let listener = server.netns().enter(|| TcpListener::bind(SocketAddr::new(address, 0)))??;
    let address = listener.local_addr()?;
    let mut sent = client.netns().enter(|| TcpStream::connect_timeout(&address, HANG))??;
    let (mut accepted, _) = listener.accept()?;
    let mut buffer = [0; MARKER.len()];
    sent.write_all(MARKER)?;
    accepted.read_exact(&mut buffer)?;
    accepted.write_all(&buffer)?;
    sent.read_exact(&mut buffer)?;
    ensure!(buffer == MARKER, "response differs from the request");
    Ok(())
}

/// Returns all resources of this machine whose name begins with `prefix`.
fn leftovers(prefix: &str) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let cgroups =
        mounts.lines().find_map(|line| line.split(' ').nth(1).filter(|_| line.contains(" cgroup2 ")));
    let folders =
        [Path::new("/run/netns"), Path::new("/sys/fs/bpf"), Path::new(cgroups.context("cgroup v2")?)];
    let temporary = std::env::temp_dir();
    let folders = folders.into_iter().chain([temporary.as_path()]);
    let entries = folders.filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    Ok(entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|e| e.path())
        .collect())
}
