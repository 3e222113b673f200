//! Two nodes with their pods, and on demand an agent on each: what an attack is run in.
//!
//! ```text
//! node a: attacker, other, client      node b: victim (of the mesh), stranger (in the mesh's ranges, of no agent)
//!         outsider                             on a bridge: guarded, tenant, open, neighbour
//!                                              on the node's network: host
//! ```
//! The directory has attacker, other, client, victim, guarded, tenant and open, and a silent pod that is nowhere.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tacit_topology::{
    Agent, HANG, MeshFiles, Netns, Node, Pod, Process, Topology, WorkloadEntry, directory_text, run, until,
};

use crate::{
    Family, shares,
    step_process::simple,
    translation::SERVICE,
    wire::{PREFIX, Recorder, Sighting},
};

/// Port of the victim's application: TCP, then MPTCP, SCTP and DCCP.
pub(crate) const PORT: u16 = 9100;
/// A port of the victim whose mode is DISABLE while the namespace of the victims is STRICT.
pub(crate) const DISABLED_PORT: u16 = 9110;
/// Silence of an agent after which the kernel decides alone. An agent on an emulated machine beats late, but not so late.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(3);
/// Port where the stranger answers datagrams. The agents allow it as plaintext.
pub(crate) const ALLOWED_PORT: u16 = 9153;
const DISCARD: u16 = 9;
/// Both flags of client and server: a cookie is not asked for, so that the very first SYN carries data.
const FASTOPEN: &str = "1543";
const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                      metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";
/// The namespace of the victims is STRICT but for one port, and one of them has a policy that allows nothing.
const STRICT_NAMESPACE: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                                metadata: {name: default, namespace: attack}\nspec: {mtls: {mode: STRICT}}\n---\n\
                                apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                                metadata: {name: victim, namespace: attack}\n\
                                spec:\n  selector: {matchLabels: {app: victim}}\n  mtls: {mode: STRICT}\n\
                                \x20 portLevelMtls: {9110: {mode: DISABLE}}\n---\n\
                                apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                                metadata: {name: nothing, namespace: attack}\n\
                                spec: {selector: {matchLabels: {app: guarded}}}\n";

/// Modes of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Modes {
    /// All pods are STRICT, those without an entry in the directory too.
    Strict,
    /// The namespace of the victims is STRICT. All other pods are PERMISSIVE.
    StrictNamespace,
}

/// The programs to start.
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
    /// Time that a step waits for a connection or an answer.
    pub(crate) patience: Duration,
    pub(crate) attacker: Pod,
    pub(crate) other: Pod,
    /// On the attacker's node, as it is.
    pub(crate) client: Pod,
    pub(crate) victim: Pod,
    pub(crate) stranger: Pod,
    /// On the attacker's node, in the pods' cgroup, in no directory.
    pub(crate) outsider: Pod,
    pub(crate) bridged: Bridged,
    modes: Modes,
    pub(crate) topology: Topology,
}

/// Pods on the bridge of the victim's node, and one without a network of its own.
#[derive(Debug, Clone)]
pub(crate) struct Bridged {
    /// The victim: STRICT, with a policy that allows nothing.
    pub(crate) guarded: Pod,
    /// STRICT.
    pub(crate) tenant: Pod,
    /// PERMISSIVE.
    pub(crate) open: Pod,
    /// In no directory.
    pub(crate) neighbour: Pod,
    /// With the node's network, in no directory.
    pub(crate) host: Pod,
}

impl Bridged {
    /// Those that have a link.
    pub(crate) fn linked(&self) -> [&Pod; 4] {
        [&self.guarded, &self.tenant, &self.open, &self.neighbour]
    }
}

impl World {
    /// The control: no agent ever ran here.
    pub(crate) fn without_tacit(programs: &Programs) -> Result<Self> {
        // The agents' ports are open too: what an attack on them carries must be seen to leave.
        Self::build("atkctl", programs, &format!("{PORT},{DISABLED_PORT},15056,15058,15008"))
    }

    /// An agent on each node, all STRICT.
    pub(crate) fn with_tacit(programs: &Programs) -> Result<Self> {
        let mut world = Self::build("atk", programs, &format!("{PORT},{DISABLED_PORT}"))?;
        let allowed = |family| format!("\"{}/udp\"", address(&world.stranger, family, ALLOWED_PORT));
        let extra = format!(
            // Pods that no source names are attackers here, and the suite takes longer than their usual time.
            "heartbeatTimeout: {}s\nunnamedPodTimeout: 1h\nallowClear: [{}, {}]\n",
            HEARTBEAT.as_secs(),
            allowed(Family::V4),
            allowed(Family::V6)
        );
        let workloads = world.directory();
        for node in world.topology.nodes() {
            let files = MeshFiles::write(&world.topology, node, &workloads, STRICT, &extra)?;
            files.set_directory_text(&world.directory_text())?;
            let mut agent = Agent::start_limited(node, &programs.agent, &files, shares::DESCRIPTORS)?;
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
        let client = a.pod("attack", "client")?;
        let (victim, stranger) = (b.pod("attack", "victim")?, b.outside_pod("attack", "stranger")?);
        let outsider = a.pod("outside", "outsider")?;
        let bridged = Bridged {
            guarded: b.bridged_pod("attack", "guarded")?,
            tenant: b.bridged_pod("attack", "tenant")?,
            open: b.bridged_pod("open", "open")?,
            neighbour: b.bridged_pod("outside", "neighbour")?,
            host: b.host_network_pod("outside", "host")?,
        };
        let mut pods = vec![&attacker, &other, &client, &victim, &stranger, &outsider, &bridged.host];
        pods.extend(bridged.linked());
        for pod in &pods {
            sysctl(pod.netns(), "ipv4/tcp_fastopen", FASTOPEN)?;
        }
        for pod in bridged.linked() {
            for address in [on_link(pod, Family::V4), on_link(pod, Family::V6)] {
                let length = if address.is_ipv4() { 24 } else { 64 };
                ip(pod.netns(), &format!("addr add {address}/{length} dev eth0"))?;
            }
        }
        // Without this the control of a spoofed node address would be stopped by the kernel.
        sysctl(a.netns(), "ipv4/conf/all/accept_local", "1")?;
        sysctl(b.netns(), "ipv4/conf/all/accept_local", "1")?;
        for family in [Family::V4, Family::V6] {
            ip(a.netns(), &format!("route add blackhole {}", shares::silent_address(family)))?;
        }
        let holds = pods.into_iter().map(Pod::keep_alive).collect::<Result<_>>()?;
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
            client,
            victim,
            stranger,
            outsider,
            bridged,
            modes: Modes::Strict,
            topology,
        };
        world.serve(&world.victim.clone(), ports)?;
        world.serve(&world.stranger.clone(), &format!("{PORT},{ALLOWED_PORT}"))?;
        world.serve(&world.bridged.guarded.clone(), ports)?;
        for pod in [world.bridged.neighbour.clone(), world.client.clone()] {
            world.serve(&pod, &PORT.to_string())?;
        }
        Ok(world)
    }

    pub(crate) fn serve(&mut self, pod: &Pod, ports: &str) -> Result<()> {
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

    /// Returns true if agents run here.
    pub(crate) fn has_tacit(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The attacker's node.
    pub(crate) fn near_node(&self) -> Result<&Node> {
        self.topology.node("a")
    }

    /// The victim's node.
    pub(crate) fn far_node(&self) -> Result<&Node> {
        self.topology.node("b")
    }

    /// The true directory: strangers are not in it.
    pub(crate) fn directory(&self) -> Vec<WorkloadEntry> {
        let bridged = &self.bridged;
        let far = [&self.victim, &bridged.guarded, &bridged.tenant, &bridged.open];
        let pods = [&self.attacker, &self.other, &self.client].into_iter().chain(far);
        pods.map(WorkloadEntry::of).chain([shares::silent()]).collect()
    }

    /// The text of the directory: the workloads, and a service outside of the mesh.
    pub(crate) fn directory_text(&self) -> String {
        directory_text(&self.directory()) + SERVICE
    }

    /// Changes the modes, and waits until a pod in no directory is held or let go by them.
    pub(crate) fn set_modes(&mut self, modes: Modes) -> Result<()> {
        if self.modes == modes || !self.has_tacit() {
            return Ok(());
        }
        let policy = match modes {
            Modes::Strict => STRICT,
            Modes::StrictNamespace => STRICT_NAMESPACE,
        };
        self.agents.iter().try_for_each(|agent| agent.files().set_policy(policy))?;
        let wanted = if modes == Modes::Strict { "refused" } else { "sent" };
        for pod in [&self.outsider, &self.bridged.neighbour] {
            until("the modes in the kernel", || {
                let target = address(&self.stranger, Family::V4, DISCARD);
                let outcome = simple(self, pod, "udp", target, "modes", &[])?;
                Ok(outcome.told.starts_with(wanted).then_some(()))
            })?;
        }
        self.modes = modes;
        Ok(())
    }

    /// Returns the places where `marker` was seen so far.
    ///
    /// # Errors
    /// Fails if the recorders do not see the packets that were sent last.
    pub(crate) fn sightings(&self, marker: &str) -> Result<BTreeSet<Sighting>> {
        self.fence()?;
        Ok(self.recorders.iter().flat_map(|recorder| recorder.sightings(marker)).collect())
    }

    /// Waits until the applications of the victims got what had reached their sockets before: a datagram of the node, which
    /// a STRICT pod receives as it receives probes, comes after.
    ///
    /// # Errors
    /// Fails if the datagram does not arrive.
    pub(crate) fn wait_delivered(&self) -> Result<()> {
        for pod in [&self.victim, &self.bridged.guarded] {
            let last = marker();
            datagram(self.far_node()?, &last, address(pod, Family::V4, PORT))?;
            until("a datagram of the node at the victim", || Ok(self.has_arrived(&last).then_some(())))?;
        }
        Ok(())
    }

    /// Returns true if the victim's or the stranger's application received `marker`.
    pub(crate) fn has_arrived(&self, marker: &str) -> bool {
        let got = self.got.lock().unwrap_or_else(PoisonError::into_inner);
        got.iter().any(|line| line.contains(marker))
    }

    /// Waits until the recorders have searched all packets that crossed the nodes before. It sends a packet on every
    /// link that counts, which comes after all earlier ones.
    fn fence(&self) -> Result<()> {
        let (a, b) = (self.topology.node("a")?, self.topology.node("b")?);
        let across = fence(a, b.wire_ipv4().into())?;
        self.recorders.iter().try_for_each(|recorder| recorder.wait_for(&across))?;
        let mut far = vec![&self.victim, &self.stranger];
        far.extend(self.bridged.linked());
        for (node, recorder, pods) in [(a, 0, vec![&self.attacker, &self.outsider]), (b, 1, far)] {
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
    /// Fails if a recording has holes, or an agent ended by itself.
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
    datagram(node, &marker, SocketAddr::new(to, DISCARD))?;
    Ok(marker)
}

/// Sends a datagram of the node itself.
pub(crate) fn datagram(node: &Node, marker: &str, to: SocketAddr) -> Result<()> {
    node.netns().enter(|| -> Result<()> {
        let own = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        UdpSocket::bind(own)?.send_to(marker.as_bytes(), to).with_context(|| format!("datagram to {to}"))?;
        Ok(())
    })?
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

/// An address of a bridged pod outside of the mesh's ranges, which its neighbours reach without the node.
pub(crate) fn on_link(pod: &Pod, family: Family) -> IpAddr {
    let host = pod.ipv4().octets()[3];
    match family {
        Family::V4 | Family::Mapped => Ipv4Addr::new(192, 168, 99, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, host.into()).into(),
    }
}

/// Runs an `ip` command in a namespace.
pub(crate) fn ip(netns: &Netns, command: &str) -> Result<()> {
    run(Command::new("ip").args(["-n", netns.name()]).args(command.split(' '))).map(drop)
}

fn sysctl(netns: &Netns, path: &str, value: &str) -> Result<()> {
    netns.enter(|| {
        let path = Path::new("/proc/sys/net").join(path);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
    })?
}
