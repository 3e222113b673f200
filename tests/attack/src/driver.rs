//! The attacker's side: starts a step where the attack wants it, does what has to be done around it, and hears how it
//! went.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, IoSlice, Write as _},
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{ChildStdin, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::{Domain, Socket, Type};
use tacit_topology::{Pod, Process, run};

use crate::{
    Family,
    catalogue::{Attack, Driver, MovedTo, PassedFd},
    judge::Outcome,
    lifecycle, step,
    world::{PORT, World, address, foreign},
};

const PROTOCOL_MPTCP: u16 = 1;
const PROTOCOL_SCTP: u16 = 2;
const PROTOCOL_DCCP: u16 = 3;

/// Runs an attack to its end.
pub(crate) fn drive(world: &mut World, attack: &Attack, family: Family, marker: &str) -> Result<Outcome> {
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

/// A step from start to end.
pub(crate) fn simple(
    world: &World,
    pod: &Pod,
    step: &str,
    target: SocketAddr,
    marker: &str,
    extra: &[&str],
) -> Result<Outcome> {
    Step::start(command(world, pod, step, target, marker, extra))?.end()
}

pub(crate) fn command(
    world: &World,
    pod: &Pod,
    step: &str,
    target: SocketAddr,
    marker: &str,
    extra: &[&str],
) -> Command {
    let mut command = pod.command(&world.programs.own);
    command.args(["step", step, &target.to_string(), marker]).args(extra);
    patient(world, command)
}

/// A step that knows how long to wait.
fn patient(world: &World, mut command: Command) -> Command {
    command.env(step::PATIENCE, world.patience.as_millis().to_string());
    command
}

/// A running step.
pub(crate) struct Step {
    process: Process,
    stdin: Option<ChildStdin>,
    lines: io::Lines<BufReader<std::process::ChildStdout>>,
    first: Option<String>,
}

impl Step {
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let stdin = process.take_stdin();
        let lines = BufReader::new(process.take_stdout().context("stdout")?).lines();
        Ok(Self { process, stdin, lines, first: None })
    }

    /// Waits until the step waits; one that has ended instead has said why.
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        match self.lines.next().transpose()? {
            Some(line) if line == "waiting" => Ok(()),
            other => {
                self.first = other;
                Ok(())
            }
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn go(&mut self) {
        if let Some(mut stdin) = self.stdin.take() {
            // One that has ended has said why.
            let _ = stdin.write_all(b"go\n");
        }
    }

    /// What the step says at its end.
    pub(crate) fn end(mut self) -> Result<Outcome> {
        let told = match self.first.take() {
            Some(line) => line,
            None => self.lines.next().transpose()?.unwrap_or_default(),
        };
        let status = self.process.wait()?;
        if !status.success() {
            bail!("the step ended with {status}: {told}");
        }
        match told.split_once(": ") {
            Some(("absent", why)) => Ok(Outcome { absent: Some(why.to_owned()), ..Outcome::default() }),
            _ => Ok(Outcome { told, ..Outcome::default() }),
        }
    }
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
    let mut command = command(world, &world.attacker, "passed-fd", target, marker, &[]);
    let mut process =
        Process::spawn(command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::piped()))?;
    let lines = BufReader::new(process.take_stdout().context("stdout")?).lines();
    let socket = world.attacker.netns().enter(|| -> io::Result<Socket> {
        let domain = Domain::for_address(target);
        match what {
            PassedFd::Datagram => Socket::new(domain, Type::DGRAM, None),
            PassedFd::Connected => {
                let socket = Socket::new(domain, Type::STREAM, None)?;
                // Where this is held, the socket is passed as it is: still trying.
                let _ = socket.connect_timeout(&target.into(), world.patience);
                socket.set_nonblocking(false)?;
                Ok(socket)
            }
        }
    })??;
    let mut step = Step { process, stdin: None, lines, first: None };
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

fn gateway(pod: &Pod) -> IpAddr {
    let [a, b, c, _] = pod.ipv4().octets();
    IpAddr::from([a, b, c, 1])
}
