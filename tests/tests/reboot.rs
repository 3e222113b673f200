//! The start of an agent after a reboot: nothing is pinned, and no source answers. The agent covers its pods first, with the
//! state that it kept on the node.

use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tacit_tests::{Mesh, Plan, STRICT_MESH, agent_program, cni::CniFolders, fresh_port, observe};
use tacit_topology::{Pod, Process, run, until, within};

/// A STRICT namespace in a PERMISSIVE mesh.
const STRICT_SHOP: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                           metadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";
/// Shortest time after which a packet counts as dropped.
const PATIENCE: Duration = Duration::from_millis(700);
/// A packet counts as dropped after this many times what the slowest one took while nothing was dropped.
const SLOWER: u32 = 4;
/// Lines of the log by which a start is known.
const COVERED: &str = "in force until the sources answer";

/// A mesh whose node `a` is started again and again. `outside` is a pod of the mesh's ranges that no agent covers.
struct Rebooted {
    mesh: Mesh,
    /// The configuration of `a` before any change.
    config: String,
    /// Time after which a packet counts as dropped.
    patience: Duration,
}

impl Rebooted {
    /// Node `a` after the first reboot: its agent does not run, and nothing is pinned.
    fn new(tag: &str, policy: &str) -> Result<Self> {
        let plan = Plan::new(tag).policy(policy).pod("a", "shop", "web").outside("b", "shop", "outside");
        let mesh = plan.with_agents()?;
        let config = fs::read_to_string(mesh.agent("a")?.files().config())?;
        let mut rebooted = Self { mesh, config, patience: PATIENCE };
        let kept = rebooted.kept()?;
        until("the state of the mesh kept", || Ok(kept.exists().then_some(())))?;
        rebooted.reboot()?;
        let slowest = rebooted.all_passes().context("control: nothing is pinned")?;
        rebooted.patience = PATIENCE.max(slowest * SLOWER);
        Ok(rebooted)
    }

    fn kept(&self) -> Result<PathBuf> {
        Ok(self.mesh.agent("a")?.files().state_path().join("state/node-state.yaml"))
    }

    fn reboot(&mut self) -> Result<()> {
        if self.mesh.agent("a")?.id().is_some() {
            self.mesh.agent_mut("a")?.terminate()?;
        }
        self.mesh.agent("a")?.uninstall()?;
        Ok(())
    }

    fn starts(&self) -> Result<usize> {
        Ok(self.mesh.agent("a")?.log()?.matches(COVERED).count())
    }

    /// Starts the agent with sources that accept connections and never answer, and `extra` lines of configuration. Its programs
    /// are attached when this returns.
    fn start_without_sources(&mut self, extra: &str) -> Result<TcpListener> {
        let node = self.mesh.topology().node("a")?;
        let silent = node.netns().enter(|| TcpListener::bind("127.0.0.1:0"))??;
        let file = self.mesh.agent("a")?.files().config();
        // With the certificate of any authority: without one, the client needs the system's, which a bare machine does not have.
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
             clusters: [{{name: a, cluster: {{server: \"http://{}\", certificate-authority: \"{}\"}}}}]\n\
             users: [{{name: a, user: {{}}}}]\ncontexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n",
            silent.local_addr()?,
            self.mesh.agent("a")?.files().issuer().join("root-cert.pem").display()
        );
        fs::write(file.with_file_name("silent.yaml"), kubeconfig)?;
        let text = ["directory", "policy"].iter().fold(self.config.clone(), |text, source| {
            text.replace(&format!("{{file: {source}.yaml}}"), "{kubernetes: {kubeconfig: silent.yaml}}")
        });
        fs::write(&file, text + extra)?;
        let before = self.starts()?;
        self.mesh.agent_mut("a")?.restart()?;
        let covered = until("the pods covered", || Ok((self.starts()? > before).then_some(())));
        covered.with_context(|| self.mesh.agent("a").and_then(|agent| agent.log()).unwrap_or_default())?;
        silent.set_nonblocking(true)?;
        let asked = until("the agent has asked a source", || match silent.accept() {
            Ok(connection) => Ok(Some(connection)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        });
        asked.with_context(|| self.mesh.agent("a").and_then(|agent| agent.log()).unwrap_or_default())?;
        Ok(silent)
    }

    /// Sends plaintext both ways until it arrives. Returns the time of the slowest packet.
    fn all_passes(&self) -> Result<Duration> {
        let mut slowest = Duration::ZERO;
        for (from, to) in self.ways()? {
            let server = Receiver::start(to.command(attack_program()?), to.name())?;
            for (address, protocol, marker) in packets(to) {
                let sent = || -> Result<Option<Duration>> {
                    let begin = Instant::now();
                    step(from.command(attack_program()?), protocol, server.at(address), &marker, CONNECTS)?;
                    Ok(server.has_got(&marker, CONNECTS)?.then(|| begin.elapsed()))
                };
                slowest = slowest.max(until(&format!("{marker} from {} arrived", from.name()), sent)?);
            }
        }
        Ok(slowest)
    }

    /// Fails if a packet of plaintext arrives, in either direction.
    fn nothing_passes(&self) -> Result<()> {
        let (mut servers, mut senders) = (Vec::new(), Vec::new());
        for (from, to) in self.ways()? {
            let server = Receiver::start(to.command(attack_program()?), to.name())?;
            for (address, protocol, marker) in packets(to) {
                let mut command = from.command(attack_program()?);
                sends(&mut command, protocol, server.at(address), &marker, self.patience);
                senders.push(command.spawn().context("a sender")?);
            }
            servers.push((from.name(), server));
        }
        for mut sender in senders {
            sender.wait()?;
        }
        let arrived = within(self.patience, || {
            for (from, server) in &servers {
                if let Some(line) = server.text()?.lines().find(|line| line.starts_with("got ")) {
                    return Ok(Some(format!("{line} from {from}")));
                }
            }
            Ok(None)
        })?;
        ensure!(arrived.is_none(), "{}", arrived.unwrap_or_default());
        Ok(())
    }

    fn ways(&self) -> Result<[(&Pod, &Pod); 2]> {
        let (web, outside) = (self.mesh.pod("web")?, self.mesh.pod("outside")?);
        Ok([(web, outside), (outside, web)])
    }

    fn origin(&self) -> Result<String> {
        let agent = self.mesh.agent("a")?;
        let status = observe::wait_status(agent, "starting", |status| {
            (status["state"] == "starting").then(|| status["node_state"]["origin"].clone())
        })?;
        Ok(status.as_str().unwrap_or_default().to_owned())
    }
}

/// Limit of one attempt of many. An attempt that succeeds ends at once.
const CONNECTS: Duration = Duration::from_secs(5);

/// One packet of each protocol and family, each with its marker.
fn packets(to: &Pod) -> impl Iterator<Item = (IpAddr, &'static str, String)> {
    let addresses = [IpAddr::from(to.ipv4()), to.ipv6().into()];
    addresses.into_iter().flat_map(|address| {
        ["tcp", "udp"].map(|protocol| {
            let family = if address.is_ipv4() { "v4" } else { "v6" };
            (address, protocol, format!("{protocol}-{family}"))
        })
    })
}

fn attack_program() -> Result<PathBuf> {
    Ok(agent_program()?.with_file_name("tacit-attack"))
}

/// A server for TCP and UDP on all addresses of its namespace.
struct Receiver {
    _process: Process,
    output: PathBuf,
    port: u16,
}

impl Receiver {
    fn start(mut command: Command, name: &str) -> Result<Self> {
        let port = fresh_port();
        let output = std::env::temp_dir().join(format!("tacit-reboot-{}-{name}-{port}", std::process::id()));
        command.args(["step", "serve", &port.to_string(), "-"]);
        let process = Process::spawn(command.stdin(Stdio::null()).stdout(File::create(&output)?))?;
        let server = Self { _process: process, output, port };
        until("the server ready", || Ok(server.text()?.contains("ready").then_some(())))?;
        Ok(server)
    }

    fn at(&self, address: IpAddr) -> SocketAddr {
        SocketAddr::new(address, self.port)
    }

    fn text(&self) -> Result<String> {
        fs::read_to_string(&self.output).context("output of the server")
    }

    fn has_got(&self, marker: &str, limit: Duration) -> Result<bool> {
        let got = within(limit, || Ok(self.text()?.contains(&format!("got {marker}\n")).then_some(())))?;
        Ok(got.is_some())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It is in the folder of temporary files.
        let _ = fs::remove_file(&self.output);
    }
}

/// Sends `marker` once. What the system says about it does not count; the receiver does.
fn step(
    mut command: Command,
    protocol: &str,
    target: SocketAddr,
    marker: &str,
    limit: Duration,
) -> Result<()> {
    sends(&mut command, protocol, target, marker, limit);
    run(&mut command)?;
    Ok(())
}

fn sends(command: &mut Command, protocol: &str, target: SocketAddr, marker: &str, limit: Duration) {
    command.args(["step", protocol, &target.to_string(), marker]);
    command.env("TACIT_ATTACK_PATIENCE_MS", limit.as_millis().to_string()).stdout(Stdio::null());
}

#[test]
#[ignore = "needs root"]
fn a_strict_mesh_holds_after_a_reboot_before_a_source_answers() -> Result<()> {
    let mut node = Rebooted::new("reboot", STRICT_MESH)?;
    let silent = node.start_without_sources("")?;
    node.nothing_passes()?;
    ensure!(node.origin()? == "the kept state", "{}", node.origin()?);
    pods_with_the_nodes_network_work(&node)?;
    drop(silent);

    // A file that is missing ends the agent, and its programs stay.
    node.reboot()?;
    let file = node.mesh.agent("a")?.files().config();
    fs::write(&file, &node.config)?;
    fs::rename(file.with_file_name("directory.yaml"), file.with_file_name("directory.gone"))?;
    let agent = node.mesh.agent_mut("a")?;
    agent.restart()?;
    ensure!(!agent.wait_end()?.success());
    node.nothing_passes()?;
    Ok(())
}

/// A control plane serves the API that is to name it, at the node's addresses, and connects to the mesh.
fn pods_with_the_nodes_network_work(node: &Rebooted) -> Result<()> {
    let (a, b) = (node.mesh.topology().node("a")?, node.mesh.topology().node("b")?);
    let pod = a.host_network_pod("kube-system", "control")?;
    let server = Receiver::start(pod.command(attack_program()?), "control")?;
    for address in [IpAddr::from(a.wire_ipv4()), a.wire_ipv6().into()] {
        let arrives = until("the node's addresses known", || {
            step(b.command(attack_program()?)?, "tcp", server.at(address), "hello", CONNECTS)?;
            Ok(server.has_got("hello", CONNECTS)?.then_some(()))
        });
        arrives.with_context(|| format!("{address}"))?;
    }
    let outside = node.mesh.pod("outside")?;
    let server = Receiver::start(outside.command(attack_program()?), "outside")?;
    for (address, protocol, marker) in packets(outside).filter(|(_, protocol, _)| *protocol == "tcp") {
        step(pod.command(attack_program()?), protocol, server.at(address), &marker, CONNECTS)?;
        ensure!(server.has_got(&marker, CONNECTS)?, "{marker} to {address}");
    }
    Ok(())
}

/// No address is known as a node's yet, so each may be one.
#[test]
#[ignore = "needs root"]
fn node_ports_are_held_after_a_reboot_before_a_source_answers() -> Result<()> {
    let mut node = Rebooted::new("rebootnp", STRICT_MESH)?;
    let _silent = node.start_without_sources("")?;
    let patience = node.patience;
    let other = node.mesh.topology().node("b")?;
    let at = |port| SocketAddr::new(other.wire_ipv4().into(), port);
    let arrives = |port| -> Result<bool> {
        let socket = other.netns().enter(|| UdpSocket::bind(at(port)))??;
        socket.set_read_timeout(Some(patience))?;
        step(node.mesh.pod("web")?.command(attack_program()?), "udp", at(port), "hello", patience)?;
        Ok(socket.recv(&mut [0; 16]).is_ok())
    };
    for port in [30_000, 32_767] {
        ensure!(!arrives(port)?, "plaintext to port {port} of another node");
    }
    for port in [29_999, 32_768] {
        ensure!(arrives(port)?, "control: port {port} is outside the mesh");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn without_a_kept_state_the_configuration_applies() -> Result<()> {
    let mut node = Rebooted::new("nostate", STRICT_MESH)?;
    let kept = node.kept()?;
    fs::remove_file(&kept)?;
    let silent = node.start_without_sources("")?;
    node.all_passes().context("control: Istio's default")?;
    drop(silent);
    node.reboot()?;
    let silent = node.start_without_sources("minimumMode: STRICT\n")?;
    node.nothing_passes().context("minimumMode")?;
    drop(silent);
    node.reboot()?;
    fs::write(&kept, "version: 1\nmeshMode: PERMI")?;
    let _silent = node.start_without_sources("")?;
    node.nothing_passes().context("a state that cannot be used")?;
    ensure!(node.origin()?.starts_with("STRICT, because"), "{}", node.origin()?);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_strict_namespace_holds_all_pods_after_a_reboot() -> Result<()> {
    let mut node = Rebooted::new("rebootns", STRICT_SHOP)?;
    let _silent = node.start_without_sources("")?;
    node.nothing_passes()?;
    Ok(())
}

/// Before the agent starts nothing of Tacit runs, as the control in [`Rebooted::new`] shows. With the CNI plugin no pod runs either.
#[test]
#[ignore = "needs root"]
fn with_the_cni_plugin_no_pod_starts_before_the_agent_covers_it() -> Result<()> {
    let mut node = Rebooted::new("rebootc", STRICT_SHOP)?;
    let folders = CniFolders::new("reboot")?;
    fs::write(node.mesh.agent("a")?.files().config(), node.config.clone() + &folders.section(""))?;
    let agent = node.mesh.agent_mut("a")?;
    agent.restart()?;
    folders.wait_chained()?;
    agent.terminate()?;
    let pins = agent.files().pin_path().to_owned();
    run(Command::new(agent_program()?).arg("uninstall").arg("--pin-path").arg(pins))?;
    node.all_passes().context("control: after the reboot nothing is pinned")?;

    let mut call = folders.call("ADD", "web", None)?;
    let passed = within(node.patience, || Ok(call.has_ended()?.then_some(())))?;
    ensure!(passed.is_none(), "a pod starts before the agent");
    node.mesh.agent_mut("a")?.restart()?;
    let end = call.finish()?;
    ensure!(end.is_passed, "{end:?}");
    node.nothing_passes()
}

#[test]
#[ignore = "needs root"]
fn control_a_permissive_mesh_passes_after_a_reboot() -> Result<()> {
    let mut node = Rebooted::new("rebootpe", "")?;
    let _silent = node.start_without_sources("")?;
    node.all_passes()?;
    ensure!(node.origin()? == "the kept state", "{}", node.origin()?);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn addresses_of_the_node_inside_the_ranges_are_its_own() -> Result<()> {
    let mut node = Rebooted::new("rebootin", STRICT_MESH)?;
    node.config = node.config.replace("meshRanges: [", "meshRanges: [10.76.0.0/16, \"fd76::/16\", ");
    let _silent = node.start_without_sources("")?;
    pods_with_the_nodes_network_work(&node)?;
    node.nothing_passes()?;
    // The next agent finds pinned maps.
    node.mesh.agent_mut("a")?.kill()?;
    node.mesh.agent_mut("a")?.restart()?;
    let agent = node.mesh.agent("a")?;
    until("the operator's socket", || Ok(agent.status().ok()))?;
    ensure!(node.origin()? == "the pinned maps of an earlier agent", "{}", node.origin()?);
    pods_with_the_nodes_network_work(&node)?;
    node.nothing_passes()
}
