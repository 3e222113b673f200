//! Attacks on agents that stop, die or come late, and on what they left in the kernel. In the control nothing happens to
//! anybody: the same step is simply run.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::Stdio,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nix::net::if_::if_nametoindex;
use tacit_topology::{Agent, Process, until};

use crate::{
    Family,
    catalogue::Misfortune,
    driver::gateway,
    judge::Outcome,
    kernel::{CapturedMap, Redirect},
    neighbours::host_end,
    step_process::{Step, command, simple},
    world::{HEARTBEAT, PORT, World, address, wait_enrolled},
};

/// Runs a step under a misfortune, and puts things right again.
pub(crate) fn drive(
    world: &mut World,
    misfortune: Misfortune,
    family: Family,
    marker: &str,
) -> Result<Outcome> {
    let (victim, stranger) = (address(&world.victim, family, PORT), address(&world.stranger, family, PORT));
    let attacker = world.attacker.clone();
    match misfortune {
        Misfortune::UnknownPod(step) => {
            let pod = world.late_pod()?;
            simple(world, &pod, step, stranger, marker, &[])
        }
        Misfortune::ProgramInPod => redirected(world, attacker.cgroup(), marker),
        Misfortune::ProgramAbove => {
            let above = attacker.cgroup().parent().and_then(|pods| pods.parent());
            let above = above.context("the pods' cgroup has a parent")?.to_owned();
            redirected(world, &above, marker)
        }
        Misfortune::PendingFull => {
            let full = CapturedMap::fill(world)?;
            let outcome = simple(world, &attacker, "tcp", victim, marker, &[]);
            full.empty()?;
            outcome
        }
        Misfortune::Stopped(step) => {
            world.agents.first().map_or(Ok(()), Agent::pause)?;
            wait_stale(world)?;
            let outcome = simple(world, &attacker, step, victim, marker, &[]);
            world.agents.first().map_or(Ok(()), Agent::resume)?;
            wait_well(world)?;
            outcome
        }
        Misfortune::Killed(step) => {
            kill(world)?;
            wait_stale(world)?;
            let outcome = simple(world, &attacker, step, victim, marker, &[]);
            restart(world)?;
            outcome
        }
        Misfortune::PinsDeleted => {
            delete_pins(world)?;
            kill(world)?;
            let outcome = simple(world, &attacker, "tcp", victim, marker, &[]);
            restart(world)?;
            outcome
        }
        Misfortune::EmptyDirectory(step) => {
            empty_directory(world)?;
            let outcome = simple(world, &attacker, step, stranger, marker, &[]);
            fill_directory(world)?;
            outcome
        }
        Misfortune::CopiedNamespace => copied_namespace(world, family, marker),
        Misfortune::LateAgent => late_agent(world, stranger, marker),
    }
}

/// A step that connects to nobody, and a program that sends it to the victim.
fn redirected(world: &World, cgroup: &std::path::Path, marker: &str) -> Result<Outcome> {
    let SocketAddr::V4(victim) = address(&world.victim, Family::V4, PORT) else {
        unreachable!("asked for IPv4")
    };
    let _program = Redirect::attach(cgroup, victim).context("attach a program")?;
    let nobody = SocketAddr::from(([192, 0, 2, 1], 9));
    simple(world, &world.attacker, "tcp", nobody, marker, &[])
}

/// Nothing tells that a heartbeat has become stale but the time that has passed.
fn wait_stale(world: &World) -> Result<()> {
    if !world.has_tacit() {
        return Ok(());
    }
    let begin = Instant::now();
    let stale = HEARTBEAT * 3 / 2;
    until("a stale heartbeat", || Ok((begin.elapsed() >= stale).then_some(())))
}

/// The agent beats again: connections go through.
fn wait_well(world: &World) -> Result<()> {
    if !world.has_tacit() {
        return Ok(());
    }
    let target = address(&world.victim, Family::V4, PORT);
    until("the agent taking flows again", || {
        let outcome = simple(world, &world.attacker, "tcp", target, "well", &[])?;
        Ok((outcome.told == "sent").then_some(()))
    })
}

fn kill(world: &mut World) -> Result<()> {
    world.agents.first_mut().map_or(Ok(()), |agent| agent.kill().map(drop))
}

/// Ends the agent, and removes what it has in the kernel.
fn forget(world: &mut World) -> Result<()> {
    let Some(agent) = world.agents.first_mut() else { return Ok(()) };
    agent.kill()?;
    agent.uninstall().map(drop)
}

fn restart(world: &mut World) -> Result<()> {
    let Some(agent) = world.agents.first_mut() else { return Ok(()) };
    agent.restart()?;
    agent.wait_ready()?;
    wait_enrolled(agent)
}

/// Deletes every pin, and waits until the agent has made them again.
fn delete_pins(world: &World) -> Result<()> {
    let Some(agent) = world.agents.first() else { return Ok(()) };
    let pins = agent.files().pin_path().to_owned();
    let mut deleted = Vec::new();
    for folder in fs::read_dir(&pins).with_context(|| format!("read {}", pins.display()))? {
        for pin in fs::read_dir(folder?.path())? {
            let pin = pin?.path();
            fs::remove_file(&pin).with_context(|| format!("delete {}", pin.display()))?;
            deleted.push(pin);
        }
    }
    until("the pins made again", || Ok(deleted.iter().all(|pin| pin.exists()).then_some(())))
}

fn empty_directory(world: &mut World) -> Result<()> {
    let Some(agent) = world.agents.first_mut() else { return Ok(()) };
    agent.kill()?;
    agent.files().set_directory(&[])?;
    agent.restart()?;
    agent.wait_ready()
}

fn fill_directory(world: &mut World) -> Result<()> {
    let directory = world.directory_text();
    let Some(agent) = world.agents.first_mut() else { return Ok(()) };
    agent.files().set_directory_text(&directory)?;
    wait_enrolled(agent)
}

/// The frame leaves by the pod's true link, which must still be guarded.
fn copied_namespace(world: &mut World, family: Family, marker: &str) -> Result<Outcome> {
    const SCRIPT: &str = r#"
        set -e
        unshare -n sleep infinity & inner=$!
        trap "kill $inner; ip link del n0 2>/dev/null || :" EXIT
        until [ "$(readlink /proc/$inner/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
        ip link add n0 index $1 type veth peer name eth0 netns $inner
        nsenter -t $inner -n sh -c "ip addr add $2/32 dev eth0; ip addr add $3/128 dev eth0 nodad; ip link set eth0 up"
        echo ready; read -r _"#;
    let attacker = world.attacker.clone();
    let neighbours = host_end(&world.other);
    let index = world.near_node()?.netns().enter(|| if_nametoindex(neighbours.as_str()))??;
    let mut shell = attacker.command("sh");
    shell.args(["-c", SCRIPT, "sh", &index.to_string()]);
    shell.args([attacker.ipv4().to_string(), attacker.ipv6().to_string()]);
    let mut copy = Process::spawn(shell.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    let mut line = String::new();
    BufReader::new(copy.take_stdout().context("stdout")?).read_line(&mut line)?;
    ensure!(line == "ready\n", "the copy of the namespace: {line:?}");
    forget(world)?;
    restart(world)?;
    let own = address(&attacker, family, 9200).to_string();
    let target = address(&world.victim, family, PORT);
    let outcome =
        simple(world, &attacker, "packet-udp", target, marker, &[&own, &gateway(&attacker).to_string()]);
    // The end of its input ends the script, and with it the namespace.
    drop(copy.take_stdin());
    copy.wait()?;
    outcome
}

fn late_agent(world: &mut World, stranger: SocketAddr, marker: &str) -> Result<Outcome> {
    forget(world)?;
    let mut step = Step::start(command(world, &world.attacker, "hold", stranger, marker, &[]))?;
    step.wait_ready()?;
    restart(world)?;
    step.go();
    step.end()
}
