//! Two nodes with their pods, and on demand an agent on each: what an attack is run in.
//!
//! ```text
//! node a: attacker, other              node b: victim (of the mesh), stranger (in the mesh's ranges, of no agent)
//! ```

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tacit_topology::{Agent, HANG, MeshFiles, Node, Pod, Process, Topology, WorkloadEntry, until};

use crate::{
    Family,
    wire::{PREFIX, Recorder, Sighting},
};

/// Where the victim's application listens: TCP, then MPTCP, SCTP and DCCP.
pub(crate) const PORT: u16 = 9100;
/// Silence of an agent after which the kernel decides alone. An agent on an emulated machine beats late, but not so late.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(3);
const DISCARD: u16 = 9;
/// Both flags of client and server: a cookie is not asked for, so that the very first SYN carries data.
const FASTOPEN: &str = "1543";
const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                      metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

/// What is started.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    /// `tacit`.
    pub(crate) agent: PathBuf,
    /// This one, for the steps.
    pub(crate) own: PathBuf,
}

/// Nodes, pods, recorders, servers, agents.
pub(crate) struct World {
    // Dropped in this order: processes first, the topology that they run in last.
    pub(crate) agents: Vec<Agent>,
    servers: Vec<Process>,
    #[expect(dead_code, reason = "held for what dropping it does")]
    holds: Vec<Process>,
    recorders: Vec<Recorder>,
    got: Arc<Mutex<HashSet<String>>>,
    pub(crate) programs: Programs,
    /// How long a step waits for a connection or an answer.
    pub(crate) patience: Duration,
    pub(crate) attacker: Pod,
    pub(crate) other: Pod,
    pub(crate) victim: Pod,
    pub(crate) stranger: Pod,
    pub(crate) topology: Topology,
}

impl World {
    /// The control: no agent ever ran here.
    pub(crate) fn without_tacit(programs: &Programs) -> Result<Self> {
        // The agents' ports are open too: what an attack on them carries must be seen to leave.
        Self::build("atkctl", programs, &format!("{PORT},15001,15006,15008"))
    }

    /// An agent on each node, all STRICT.
    pub(crate) fn with_tacit(programs: &Programs) -> Result<Self> {
        let mut world = Self::build("atk", programs, &PORT.to_string())?;
        let extra = format!("heartbeatTimeout: {}s\n", HEARTBEAT.as_secs());
        let workloads = world.directory();
        for node in world.topology.nodes() {
            let files = MeshFiles::write(&world.topology, node, &workloads, STRICT, &extra)?;
            let mut agent = Agent::start(node, &programs.agent, &files)?;
            // One after the other: the first makes the root that they share.
            agent.wait_ready()?;
            wait_enrolled(&agent)?;
            world.agents.push(agent);
        }
        Ok(world)
    }

    fn build(tag: &str, programs: &Programs, ports: &str) -> Result<Self> {
        let topology = Topology::new(tag)?;
        let (a, b) = (topology.node("a")?, topology.node("b")?);
        let (attacker, other) = (a.pod("attack", "attacker")?, a.pod("attack", "other")?);
        let (victim, stranger) = (b.pod("attack", "victim")?, b.outside_pod("attack", "stranger")?);
        for pod in [&attacker, &other, &victim, &stranger] {
            sysctl(pod.netns(), "ipv4/tcp_fastopen", FASTOPEN)?;
        }
        // Without this the control of a spoofed node address would be stopped by the kernel.
        sysctl(a.netns(), "ipv4/conf/all/accept_local", "1")?;
        let holds = [&attacker, &other, &victim, &stranger]
            .map(Pod::keep_alive)
            .into_iter()
            .collect::<Result<_>>()?;
        let recorders = vec![Recorder::start(a)?, Recorder::start(b)?];
        let mut world = Self {
            agents: Vec::new(),
            servers: Vec::new(),
            holds,
            recorders,
            got: Arc::default(),
            programs: programs.clone(),
            patience: HANG,
            attacker,
            other,
            victim,
            stranger,
            topology,
        };
        world.serve(&world.victim.clone(), ports)?;
        world.serve(&world.stranger.clone(), &PORT.to_string())?;
        Ok(world)
    }

    fn serve(&mut self, pod: &Pod, ports: &str) -> Result<()> {
        let mut command = pod.command(&self.programs.own);
        command.args(["step", "serve", ports, "-"]);
        let mut server = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let mut lines = BufReader::new(server.take_stdout().context("stdout")?).lines();
        match lines.next() {
            Some(Ok(line)) if line == "ready" => {}
            other => bail!("the victim's server said {other:?}"),
        }
        let got = self.got.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                got.lock().unwrap_or_else(PoisonError::into_inner).insert(line);
            }
        });
        self.servers.push(server);
        Ok(())
    }

    /// A pod that comes now. Nobody is told of it.
    pub(crate) fn late_pod(&mut self) -> Result<Pod> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("late{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.topology.node("a")?.pod("attack", &name)
    }

    /// Whether agents run here.
    pub(crate) fn has_tacit(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The attacker's node.
    pub(crate) fn near_node(&self) -> Result<&Node> {
        self.topology.node("a")
    }

    /// The true directory: the stranger is not in it.
    pub(crate) fn directory(&self) -> Vec<WorkloadEntry> {
        [&self.attacker, &self.other, &self.victim].into_iter().map(WorkloadEntry::of).collect()
    }

    /// Where `marker` was seen until now.
    ///
    /// # Errors
    /// When the recorders do not get to see what was sent last.
    pub(crate) fn sightings(&self, marker: &str) -> Result<BTreeSet<Sighting>> {
        self.fence()?;
        Ok(self.recorders.iter().flat_map(|recorder| recorder.sightings(marker)).collect())
    }

    /// Whether the victim's or the stranger's application got `marker`.
    pub(crate) fn has_arrived(&self, marker: &str) -> bool {
        let got = self.got.lock().unwrap_or_else(PoisonError::into_inner);
        got.iter().any(|line| line.contains(marker))
    }

    /// What crossed the nodes before this has been searched when it returns: a packet on every link that counts comes
    /// after all that was there before.
    fn fence(&self) -> Result<()> {
        let (a, b) = (self.topology.node("a")?, self.topology.node("b")?);
        let across = fence(a, b.wire_ipv4().into())?;
        self.recorders.iter().try_for_each(|recorder| recorder.wait_for(&across))?;
        for (node, recorder, pods) in
            [(a, 0, vec![&self.attacker]), (b, 1, vec![&self.victim, &self.stranger])]
        {
            for pod in pods {
                let told = fence(node, pod.ipv4().into())?;
                self.recorders.get(recorder).context("two recorders")?.wait_for(&told)?;
            }
        }
        Ok(())
    }

    /// Ends the recordings.
    ///
    /// # Errors
    /// When one has holes, or an agent ended by itself.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.recorders.iter_mut().try_for_each(Recorder::finish)
    }
}

/// A marker that no other run, attack or family has.
pub(crate) fn marker() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id() << 12);
    format!("{PREFIX}{number:08x}")
}

/// Sends a fence from a node; returns its marker.
fn fence(node: &Node, to: IpAddr) -> Result<String> {
    let marker = marker();
    node.netns().enter(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.send_to(marker.as_bytes(), (to, DISCARD)).with_context(|| format!("fence to {to}"))?;
        Ok(())
    })??;
    Ok(marker)
}

/// Waits until an agent has enrolled every pod it knows of its node.
pub(crate) fn wait_enrolled(agent: &Agent) -> Result<()> {
    until(&format!("pods of node {} enrolled", agent.node()), || {
        let Ok(text) = agent.status() else { return Ok(None) };
        let status: Value = serde_json::from_str(&text)?;
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let all = !pods.is_empty() && pods.iter().all(|pod| pod["state"] == "enrolled");
        Ok(all.then_some(()))
    })
}

/// A pod's address in the family an attack uses.
pub(crate) fn address(pod: &Pod, family: Family, port: u16) -> SocketAddr {
    let ip = match family {
        Family::V4 => IpAddr::V4(pod.ipv4()),
        Family::V6 => IpAddr::V6(pod.ipv6()),
        Family::Mapped => IpAddr::V6(pod.ipv4().to_ipv6_mapped()),
    };
    SocketAddr::new(ip, port)
}

/// An address next to the pod's that nobody has.
pub(crate) fn foreign(pod: &Pod, family: Family) -> IpAddr {
    let [a, b, c, _] = pod.ipv4().octets();
    match family {
        Family::V4 => Ipv4Addr::new(a, b, c, 251).into(),
        Family::Mapped => Ipv4Addr::new(a, b, c, 251).to_ipv6_mapped().into(),
        Family::V6 => {
            let mut segments = pod.ipv6().segments();
            segments[7] = 0xfb;
            Ipv6Addr::from(segments).into()
        }
    }
}

fn sysctl(netns: &tacit_topology::Netns, path: &str, value: &str) -> Result<()> {
    netns.enter(|| {
        let path = Path::new("/proc/sys/net").join(path);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
    })?
}
