//! The attacker's side: starts a step where the attack wants it, does what has to be done around it, and hears how it
//! went and where its marker was seen.

use std::{
    fs,
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::{Domain, Socket, Type};
use tacit_topology::{Pod, run, until};

use crate::{
    Family, boot,
    catalogue::{Attack, Driver, MovedTo, PassedFd, Stopped},
    judge::{Outcome, SENT},
    lifecycle, neighbours, shares,
    step_process::{Step, command, patient, simple},
    world::{Modes, PORT, World, address, foreign, marker},
};

const PROTOCOL_MPTCP: u16 = 1;
const PROTOCOL_SCTP: u16 = 2;
const PROTOCOL_DCCP: u16 = 3;

/// Runs one attack, and looks where its marker was.
pub(crate) fn attack(world: &mut World, attack: &Attack, family: Family) -> Result<Outcome> {
    let marker = marker();
    world.set_modes(match attack.driver {
        Driver::Neighbour(_) => Modes::StrictNamespace,
        _ => Modes::Strict,
    })?;
    let mut outcome = drive(world, attack, family, &marker)?;
    outcome.seen.extend(world.sightings(&marker)?);
    if let Some(only) = outcome.only.take() {
        outcome.seen.retain(|place| *place == only);
    }
    if outcome.absent.is_some() {
        return Ok(outcome);
    }
    let must_arrive = match attack.stopped {
        Stopped::Nowhere => true,
        // What the victim could not send is not waited for.
        Stopped::AtShare => outcome.told == SENT,
        _ => attack.must_arrive && world.has_tacit(),
    };
    if must_arrive {
        let arrived = until("the marker at the victim", || Ok(world.has_arrived(&marker).then_some(())));
        outcome.delivered = arrived.is_ok();
    } else if attack.stopped == Stopped::BeforeApplication {
        world.wait_delivered()?;
        outcome.delivered = world.has_arrived(&marker);
    }
    Ok(outcome)
}

/// Runs an attack to its end.
fn drive(world: &mut World, attack: &Attack, family: Family, marker: &str) -> Result<Outcome> {
    let target = address(&world.victim, family, PORT);
    let pod = world.attacker.clone();
    match attack.driver {
        Driver::Step(step) => simple(world, &pod, step, to(step, target), marker, &[]),
        Driver::Port(port) => simple(world, &pod, "tcp", SocketAddr::new(target.ip(), port), marker, &[]),
        Driver::WithOwnAddress(step) => {
            let own = address(&pod, family, 9200).to_string();
            let gateway = gateway(&pod).to_string();
            simple(world, &pod, step, target, marker, &[&own, &gateway])
        }
        Driver::WithForeignAddress(step) => {
            let source = SocketAddr::new(foreign(&pod, family), 9200).to_string();
            simple(world, &pod, step, target, marker, &[&source])
        }
        Driver::NodesAddress => {
            let node = world.near_node()?;
            let ip: IpAddr = match family {
                Family::V6 => node.wire_ipv6().into(),
                Family::V4 | Family::Mapped => node.wire_ipv4().into(),
            };
            simple(world, &pod, "raw", target, marker, &[&SocketAddr::new(ip, 9200).to_string()])
        }
        Driver::NestedCgroup(step) => {
            let nested = pod.container("c")?.container("deep")?;
            simple(world, &nested, step, target, marker, &[])
        }
        Driver::Moved(step, to) => moved(world, step, to, target, marker),
        Driver::NestedNetns => nested_netns(world, target, marker),
        Driver::PassedFd(what) => passed_fd(world, what, target, marker),
        Driver::Simultaneous => simultaneous(world, family, marker),
        Driver::Neighbour(what) => neighbours::drive(world, what, family, marker),
        Driver::Share(shared) => shares::drive(world, shared, family, marker),
        Driver::Boot(start) => boot::drive(world, start, family, marker),
        Driver::Lifecycle(misfortune) => lifecycle::drive(world, misfortune, family, marker),
    }
}

/// Protocols that the victim serves at a port of their own.
fn to(step: &str, target: SocketAddr) -> SocketAddr {
    let offset = match step {
        "mptcp" => PROTOCOL_MPTCP,
        "sctp" => PROTOCOL_SCTP,
        "dccp" => PROTOCOL_DCCP,
        _ => 0,
    };
    SocketAddr::new(target.ip(), target.port() + offset)
}

fn moved(world: &World, step: &str, to: MovedTo, target: SocketAddr, marker: &str) -> Result<Outcome> {
    let mut step = Step::start(command(world, &world.attacker, "after-go", target, marker, &[step]))?;
    step.wait_ready()?;
    let cgroup = match to {
        // The stranger's is out of any agent's sight.
        MovedTo::Outside => world.stranger.cgroup(),
        MovedTo::OtherPod => world.other.cgroup(),
    };
    move_to(cgroup, step.id())?;
    step.go();
    step.end()
}

fn move_to(cgroup: &Path, process: u32) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, process.to_string()).with_context(|| format!("move {process} to {}", file.display()))
}

/// A namespace behind the pod's own, with a route through it: what a pod with NET_ADMIN can make.
fn nested_netns(world: &World, target: SocketAddr, marker: &str) -> Result<Outcome> {
    const SCRIPT: &str = r#"
        unshare -n sleep 60 & inner=$!
        until [ "$(readlink /proc/$inner/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
        ip link add n0 type veth peer name n1 netns $inner
        ip addr add 192.168.77.1/24 dev n0 && ip link set n0 up
        nsenter -t $inner -n sh -c 'ip addr add 192.168.77.2/24 dev n1; ip link set n1 up; ip route add default via 192.168.77.1'
        echo 1 >/proc/sys/net/ipv4/ip_forward
        nsenter -t $inner -n "$@"; status=$?
        kill $inner; exit $status"#;
    let mut shell = world.attacker.command("sh");
    shell.args(["-c", SCRIPT, "sh"]).arg(&world.programs.own);
    shell.args(["step", "udp", &target.to_string(), marker]);
    Step::start(patient(world, shell))?.end()
}

/// The socket is made by this process: in the pod's namespace, in a cgroup of no pod.
fn passed_fd(world: &World, what: PassedFd, target: SocketAddr, marker: &str) -> Result<Outcome> {
    let (ours, theirs) = UnixStream::pair()?;
    let command = command(world, &world.attacker, "passed-fd", target, marker, &[]);
    let mut step = Step::start_with(command, OwnedFd::from(theirs).into())?;
    let socket = world.attacker.netns().enter(|| -> io::Result<Socket> {
        let domain = Domain::for_address(target);
        match what {
            PassedFd::Datagram => Socket::new(domain, Type::DGRAM, None),
            PassedFd::Connected => {
                let socket = Socket::new(domain, Type::STREAM, None)?;
                // If Tacit denies the connection, the socket is passed unconnected.
                let _ = socket.connect_timeout(&target.into(), world.patience);
                socket.set_nonblocking(false)?;
                Ok(socket)
            }
        }
    })??;
    step.wait_ready()?;
    let rights = [socket.as_raw_fd()];
    sendmsg::<()>(
        ours.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &[ControlMessage::ScmRights(&rights)],
        MsgFlags::empty(),
        None,
    )?;
    step.end()
}

/// Both SYNs are lost on their way; when they are repeated, each meets a socket that connects as well.
fn simultaneous(world: &World, family: Family, marker: &str) -> Result<Outcome> {
    let (near, far) = (address(&world.attacker, family, 9300), address(&world.victim, family, 9300));
    let routes = [("a", &world.victim), ("b", &world.attacker)];
    for (node, pod) in routes {
        black_hole(world, node, pod, "add")?;
    }
    let mut attacker =
        Step::start(command(world, &world.attacker, "simultaneous", far, marker, &[&near.to_string()]))?;
    let mut victim =
        Step::start(command(world, &world.victim, "simultaneous", near, marker, &[&far.to_string()]))?;
    attacker.wait_ready()?;
    victim.wait_ready()?;
    for (node, pod) in routes {
        black_hole(world, node, pod, "del")?;
    }
    attacker.go();
    victim.go();
    let outcome = attacker.end()?;
    victim.end()?;
    Ok(outcome)
}

fn black_hole(world: &World, node: &str, pod: &Pod, what: &str) -> Result<()> {
    let netns = world.topology.node(node)?.netns().name().to_owned();
    for address in [format!("{}/32", pod.ipv4()), format!("{}/128", pod.ipv6())] {
        let metric = ["metric", "1"];
        run(Command::new("ip").args(["-n", &netns, "route", what, "blackhole", &address]).args(metric))?;
    }
    Ok(())
}

pub(crate) fn gateway(pod: &Pod) -> IpAddr {
    let [a, b, c, _] = pod.ipv4().octets();
    IpAddr::from([a, b, c, 1])
}
