//! A slot of the kernel's tables that another pod had before: nothing of that pod counts for the new one.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    process::{Command, Stdio},
};
use tacit_tests::{Client, Plan, STRICT_MESH, agent_program, fresh_port, observe};
use tacit_topology::{Agent, HANG, Pod, Process, WorkloadEntry, run};

/// Port to which the pods may send datagrams in clear.
const ALLOWED: u16 = 9153;
const MARKER: &str = "answer";
/// Address of the mesh to which packets are lost.
const SILENT: Ipv4Addr = Ipv4Addr::new(10, 77, 250, 1);
/// Connections that a pod begins: fewer than any share.
const BEGUN: u64 = 400;

/// A STRICT pod receives answers to datagrams that it sent. A new pod in the same slot used to receive the old pod's.
#[test]
#[ignore = "needs root"]
fn a_pod_receives_no_answers_to_datagrams_of_the_pod_that_had_its_slot() -> Result<()> {
    let mesh = Plan::new("slots")
        .pod("a", "shop", "old")
        .pod("a", "shop", "new")
        .outside("b", "shop", "stranger")
        .policy(STRICT_MESH)
        .config(&format!("allowClear: [\"10.77.2.2:{ALLOWED}/udp\", \"[fd77:2::2]:{ALLOWED}/udp\"]\n"))
        .with_directories(|_, mesh| Ok(vec![WorkloadEntry::of(mesh.pod("old")?)]))?;
    let (old, new, stranger) = (mesh.pod("old")?, mesh.pod("new")?, mesh.pod("stranger")?);
    let answers = [true, false].map(|is_v4| Answer {
        from: SocketAddr::new(address(stranger, is_v4), ALLOWED),
        port: fresh_port(),
        is_v4,
    });
    for answer in &answers {
        let mut asks = asks(old, answer)?;
        answer.send(stranger, old)?;
        asks.go()?;
        ensure!(asks.line()? == "sent", "control: an answer to the pod that asked does not arrive");
    }

    let agent = mesh.agent("a")?;
    set(agent, &[])?;
    set(agent, &[new])?;
    for answer in &answers {
        let mut serves = serve(new, answer.port)?;
        answer.send(stranger, new)?;
        let to = SocketAddr::new(address(new, answer.is_v4), answer.port);
        // Of the node: it arrives, and after all that was sent before.
        let own = if answer.is_v4 { "0.0.0.0:0" } else { "[::]:0" };
        let node = mesh.topology().node("a")?.netns();
        node.enter(|| UdpSocket::bind(own)?.send_to(b"last", to))??;
        let got = serves.line()?;
        ensure!(got == "got last", "{to}: {got}");
    }
    Ok(())
}

/// Connections that a pod began count for its slot until their sockets close, also after the pod has left. Dropped packets are
/// counted for the pod that sent them.
#[test]
#[ignore = "needs root"]
fn a_new_pod_has_none_of_the_connections_and_drops_of_the_pod_that_left() -> Result<()> {
    let plan = Plan::new("slotsp").pod("a", "shop", "old").pod("a", "shop", "new").policy(STRICT_MESH);
    let mesh = plan.with_directories(|_, mesh| {
        let blackhole = format!("route add blackhole {SILENT}");
        let netns = mesh.topology().node("a")?.netns().name();
        // The other node's turn finds the route made.
        let _ = run(Command::new("ip").args(["-n", netns]).args(blackhole.split(' ')));
        Ok(vec![WorkloadEntry::of(mesh.pod("old")?), silent(mesh.pod("old")?)])
    })?;
    let (agent, old, new) = (mesh.agent("a")?, mesh.pod("old")?, mesh.pod("new")?);
    let (to, count) = (SocketAddr::new(SILENT.into(), 80), BEGUN.to_string());
    let begun = Client::with_args(old, &["pending", &count, &to.to_string()])?;
    ensure!(begun.events().first("pending")?["opened"] == BEGUN);
    observe::wait_status(agent, "connections of the old pod", |status| {
        let row = pending(status)?;
        (row["used"] == BEGUN && row["fullest"] == "shop/old").then_some(())
    })?;
    let mut drops = command(old)?;
    let told = run(drops.args(["step", "udp", &to.to_string(), MARKER]))?;
    ensure!(told.starts_with("refused"), "{told}");
    let shown = |pod: &str| -> Result<bool> {
        let status = observe::status(agent)?;
        Ok(status["guard"]["drops"].as_array().context("drops")?.iter().any(|drop| drop["pod"] == pod))
    };
    ensure!(shown("shop/old")?, "control: a dropped packet is not shown");

    set(agent, &[])?;
    set(agent, &[new])?;
    let status = observe::status(agent)?;
    let row = pending(&status).context("pending_connections")?;
    ensure!(row["used"] == 0, "connections of the old pod count for the new one: {row}");
    ensure!(!shown("shop/new")?, "drops of the old pod are the new one's");
    drop(begun);
    Ok(())
}

/// A pod of which nobody answers.
fn silent(like: &Pod) -> WorkloadEntry {
    WorkloadEntry {
        name: "silent".to_owned(),
        addresses: vec![SILENT.into()],
        node: "c".to_owned(),
        ..WorkloadEntry::of(like)
    }
}

fn pending(status: &Value) -> Option<&Value> {
    status["shares"].as_array()?.iter().find(|share| share["resource"] == "pending_connections")
}

/// A datagram from the allowed destination to a port at which a pod has asked.
struct Answer {
    from: SocketAddr,
    port: u16,
    is_v4: bool,
}

impl Answer {
    fn send(&self, stranger: &Pod, to: &Pod) -> Result<()> {
        let to = SocketAddr::new(address(to, self.is_v4), self.port).to_string();
        let mut command = command(stranger)?;
        let told = run(command.args(["step", "raw", &to, MARKER, &self.from.to_string()]))?;
        ensure!(told.trim() == "sent", "{told}");
        Ok(())
    }
}

fn address(pod: &Pod, is_v4: bool) -> IpAddr {
    if is_v4 { pod.ipv4().into() } else { pod.ipv6().into() }
}

/// Sets the directory, and waits until these pods are enrolled and no others.
fn set(agent: &Agent, pods: &[&Pod]) -> Result<()> {
    let entries: Vec<_> = pods.iter().map(|pod| WorkloadEntry::of(pod)).collect();
    agent.files().set_directory(&entries)?;
    observe::wait_status(agent, "the pods of the directory", |status| {
        let shown = status["pods"].as_array()?;
        let is_enrolled = |pod: &&Pod| {
            shown.iter().any(|entry| entry["name"] == pod.name() && entry["state"] == "enrolled")
        };
        (shown.len() == pods.len() && pods.iter().all(is_enrolled)).then_some(())
    })
}

/// A process of a pod that prints lines.
struct Running {
    process: Process,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Running {
    fn start(mut command: Command) -> Result<Self> {
        let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let lines = BufReader::new(process.take_stdout().context("stdout")?).lines();
        Ok(Self { process, lines })
    }

    fn line(&mut self) -> Result<String> {
        Ok(self.lines.next().context("no line")??)
    }

    fn go(&mut self) -> Result<()> {
        let mut stdin = self.process.take_stdin().context("stdin")?;
        Ok(stdin.write_all(b"go\n")?)
    }
}

fn command(pod: &Pod) -> Result<Command> {
    let mut command = pod.command(agent_program()?.with_file_name("tacit-attack"));
    command.env("TACIT_ATTACK_PATIENCE_MS", HANG.as_millis().to_string());
    Ok(command)
}

/// Starts a pod's step, which sends a datagram and waits for the word to wait for the answer.
fn asks(pod: &Pod, answer: &Answer) -> Result<Running> {
    let mut command = command(pod)?;
    command.args(["step", "late-answer", &answer.from.to_string(), MARKER, &answer.port.to_string()]);
    let mut asks = Running::start(command)?;
    let line = asks.line()?;
    ensure!(line == "waiting", "{line}");
    Ok(asks)
}

/// Starts a pod's server, which prints the datagrams that it gets.
fn serve(pod: &Pod, port: u16) -> Result<Running> {
    let mut command = command(pod)?;
    command.args(["step", "serve", &port.to_string(), "-"]);
    let mut serves = Running::start(command)?;
    let line = serves.line()?;
    ensure!(line == "ready", "{line}");
    Ok(serves)
}
