//! Another proxy in a column of its own: a command, started once on each node with the topology in its environment.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::{Node, Pod, Process, Topology, until};

use super::servers;

/// The interface of a `--rival` command, for `--help`.
pub(super) const HELP: &str = "\
The command of --rival runs once on each node, through `sh -c`, as root, in the node's network namespace and in a
cgroup of the node outside the pods'. It puts its proxy in the way, creates the file $TACIT_BENCH_READY and goes on
running; it is killed at the end, with everything it started there. CPU and memory are those of all processes in its
cgroup. Its environment:
  TACIT_BENCH_NODE         a (clients) or b (servers)
  TACIT_BENCH_NETNS        the node's network namespace, a name in /run/netns; the command is in it already
  TACIT_BENCH_ADDRESS      the node's IPv4 address on the wire; TACIT_BENCH_ADDRESS6 for IPv6
  TACIT_BENCH_PEER         the other node's IPv4 address on the wire; TACIT_BENCH_PEER6 for IPv6
  TACIT_BENCH_CGROUP       the cgroup v2 directory that holds the pods of the node
  TACIT_BENCH_PODS         the pods of the node, one a line: NAMESPACE NAME NETNS IPV4 IPV6 CGROUP
  TACIT_BENCH_PEER_PODS    the pods of the other node, in the same form
  TACIT_BENCH_FILES        a folder for files, the same on both nodes, removed at the end
  TACIT_BENCH_READY        create this file when connections between pods go through the proxy
`--rival relays` are two plain relays of the load generator in the places of the agents, without TLS, identity, policy or
guard: what passing through user space twice costs. The first listens in the client's pod on the far pod's address, and
reaches the second by IPv6. Connections within a node are direct.
Pods reach each other by their addresses, IPv4, TCP ports 80, 5201 and 7001 to 7004. What the command prints goes to
standard error.";

/// The name of [`relays`] on the command line.
const RELAYS: &str = "relays";
/// Ports of the second relay, above those of the servers.
const ABOVE: u16 = 20_000;

/// The command that `--rival` asks for.
pub(super) fn command(asked: &str, load: &Path) -> String {
    if asked == RELAYS { relays(load) } else { asked.to_owned() }
}

fn relays(load: &Path) -> String {
    let (load, ports) = (load.display(), servers::PORTS.map(|port| port.to_string()).join(" "));
    format!(
        r#"set -e
pod() {{ echo "$1" | awk -v name="$2" -v column="$3" '$2 == name {{ print $column }}'; }}
if [ "$TACIT_BENCH_NODE" = a ]; then place=client far="$TACIT_BENCH_PEER_PODS"; else place=far far="$TACIT_BENCH_PODS"; fi
netns=$(pod "$TACIT_BENCH_PODS" $place 3) far4=$(pod "$far" far 4) far6=$(pod "$far" far 5)
routes=""
for port in {ports}; do
    between="[$far6]:$((port + {ABOVE}))"
    if [ $place = client ]; then routes="$routes $far4:$port $between"; else routes="$routes $between $far4:$port"; fi
done
if [ $place = client ]; then ip -n "$netns" address add "$far4/32" dev lo; fi
ip netns exec "$netns" '{load}' relay $routes | {{ read -r ready; echo "$ready" > "$TACIT_BENCH_READY"; cat; }}"#
    )
}

/// A running one.
pub(super) struct Rival {
    node: String,
    process: Process,
    cgroup: PathBuf,
    ready: PathBuf,
}

impl Rival {
    /// Starts it on `node`, without waiting.
    pub(super) fn start(topology: &Topology, node: &Node, pods: &[&Pod], command: &str) -> Result<Self> {
        let peer =
            topology.nodes().iter().find(|other| other.name() != node.name()).context("one node alone")?;
        let files = topology.files().join("rival");
        fs::create_dir_all(&files).with_context(|| format!("make {}", files.display()))?;
        let ready = files.join(format!("ready-{}", node.name()));
        let of = |node: &Node| -> String {
            let own = pods.iter().filter(|pod| pod.node() == node.name());
            own.map(|pod| describe(pod)).collect::<Vec<_>>().join("\n")
        };
        let mut shell = node.command("sh")?;
        shell.args(["-c", command]);
        shell.env("TACIT_BENCH_NODE", node.name()).env("TACIT_BENCH_NETNS", node.netns().name());
        shell.env("TACIT_BENCH_ADDRESS", node.wire_ipv4().to_string());
        shell.env("TACIT_BENCH_ADDRESS6", node.wire_ipv6().to_string());
        shell.env("TACIT_BENCH_PEER", peer.wire_ipv4().to_string());
        shell.env("TACIT_BENCH_PEER6", peer.wire_ipv6().to_string());
        shell.env("TACIT_BENCH_CGROUP", node.pods_cgroup());
        shell.env("TACIT_BENCH_PODS", of(node)).env("TACIT_BENCH_PEER_PODS", of(peer));
        shell.env("TACIT_BENCH_FILES", &files).env("TACIT_BENCH_READY", &ready);
        let process =
            Process::spawn(shell.stdin(Stdio::null()).stdout(to_stderr()?).stderr(Stdio::inherit()))?;
        let cgroup = cgroup_of(process.id(), &node.pods_cgroup(), topology.prefix())?;
        Ok(Self { node: node.name().to_owned(), process, cgroup, ready })
    }

    /// Waits until it has made its file.
    pub(super) fn wait_ready(&mut self) -> Result<()> {
        let (process, ready) = (&mut self.process, &self.ready);
        until(&format!("rival on node {} ready ({} created)", self.node, ready.display()), || {
            if let Some(status) = process.ended()? {
                bail!("the rival ended: {status}");
            }
            Ok(ready.exists().then_some(()))
        })
    }

    pub(super) fn node(&self) -> &str {
        &self.node
    }

    /// All processes of it that run now.
    pub(super) fn processes(&self) -> Result<Vec<u32>> {
        let mut found = BTreeSet::new();
        members(&self.cgroup, &mut found)?;
        Ok(found.into_iter().collect())
    }
}

/// Results go to standard output; what a rival prints is none.
fn to_stderr() -> Result<Stdio> {
    Ok(File::options().append(true).open("/dev/stderr").context("open /dev/stderr")?.into())
}

fn describe(pod: &Pod) -> String {
    let (netns, cgroup) = (pod.netns().name(), pod.cgroup().display());
    format!("{} {} {netns} {} {} {cgroup}", pod.namespace(), pod.name(), pod.ipv4(), pod.ipv6())
}

/// The cgroup directory that a command of the node stands in, as soon as it does.
fn cgroup_of(id: u32, pods_cgroup: &Path, prefix: &str) -> Result<PathBuf> {
    let mount = pods_cgroup.ancestors().nth(2).context("the pods' cgroup has no place")?;
    until("the rival in its cgroup", || {
        let text = fs::read_to_string(format!("/proc/{id}/cgroup")).context("the rival ended at once")?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
        Ok(path.filter(|path| path.starts_with(prefix)).map(|path| mount.join(path)))
    })
}

/// Processes of the cgroup and of those below it.
fn members(cgroup: &Path, found: &mut BTreeSet<u32>) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    let entries = fs::read_dir(cgroup).with_context(|| format!("list {}", cgroup.display()))?;
    let below = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    below.into_iter().try_for_each(|path| members(&path, found))
}
