//! Two nodes, four pods, real programs: the same traffic without Tacit, with it, and with it under STRICT.

use anyhow::{Context as _, Result, ensure};
use tacit_topology::{Agent, MeshFiles, Pod, Process, Topology, Traffic, WorkloadEntry, until};
use xtask_support::progress::{Progress, Style};

use super::{
    Prepared,
    servers::Server,
    traffic::{self, Pods},
    verdict::Verdict,
};

/// Text that every application sends and receives. The demo searches the wire for it.
const MARKER: &str = "tacit-demo-marker-4c9e1f";
/// Steps of [`play`].
const STEPS: usize = 6;

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
    metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

/// Runs the scenario to its end, removes what it made and prints what it found.
pub(crate) fn run(prepared: &Prepared) -> Result<()> {
    let verdict = play(prepared)?;
    eprint!("{}", verdict.table(Style::of_stderr()));
    if prepared.json {
        println!("{}", verdict.json());
    }
    ensure!(verdict.ok(), "the demo did not show what Tacit promises");
    Ok(())
}

/// Everything that runs; dropped in this order, the topology last.
struct Stage {
    agents: Vec<Agent>,
    servers: Vec<Server>,
    holders: Vec<Process>,
    pods: Pods,
    outsider: Pod,
    topology: Topology,
}

fn play(prepared: &Prepared) -> Result<Verdict> {
    let mut progress = Progress::new(STEPS);
    tacit_topology::cleanup_stale()?;
    let mut stage = progress.step("two nodes and their pods, in network namespaces", build)?;
    progress.step("nginx, Apache and MariaDB, each in a pod", || stage.start_servers(prepared))?;
    let (_, control) = progress.step("control: the same traffic without Tacit", || stage.traffic())?;
    progress.step("one agent on each node", || stage.start_agents(prepared))?;
    let (requests, tunnelled) = progress.step("traffic with Tacit, PERMISSIVE", || stage.traffic())?;
    let flows = stage.flows()?;
    let plaintext_under_permissive = traffic::plaintext_passes(&stage.outsider, &stage.pods.nginx)?;
    let plaintext_under_strict =
        progress.step("STRICT: the same, and plaintext from outside", || stage.strict())?;
    let verdict = Verdict {
        marker_without_tacit: control.occurrences(MARKER.as_bytes()),
        marker_with_tacit: tunnelled.occurrences(MARKER.as_bytes()),
        bytes_without_tacit: control.bytes,
        bytes_with_tacit: tunnelled.bytes,
        tunnel_bytes: tunnelled.tunnel_bytes,
        tunnel_is_tls: tunnelled.tunnel_is_tls(),
        clear_bytes: tunnelled.clear_bytes,
        clear_bytes_without_tacit: control.clear_bytes,
        requests,
        flows,
        servers: stage.servers.iter().map(|s| s.name).collect(),
        plaintext_under_permissive,
        plaintext_under_strict,
    };
    stage.take_down()?;
    Ok(verdict)
}

fn build() -> Result<Stage> {
    let topology = Topology::new("demo")?;
    let (a, b) = (topology.node("a")?, topology.node("b")?);
    let pods = Pods {
        frontend: a.pod("shop", "frontend")?,
        apache: a.pod("shop", "apache")?,
        nginx: b.pod("shop", "nginx")?,
        mariadb: b.pod("shop", "mariadb")?,
    };
    let outsider = a.outside_pod("legacy", "cron")?;
    let all = [&pods.frontend, &pods.apache, &pods.nginx, &pods.mariadb, &outsider];
    let holders = all.into_iter().map(Pod::keep_alive).collect::<Result<_>>()?;
    Ok(Stage { agents: Vec::new(), servers: Vec::new(), holders, pods, outsider, topology })
}

impl Stage {
    fn start_servers(&mut self, prepared: &Prepared) -> Result<()> {
        let folder = self.topology.files();
        let page = format!("<p>{MARKER}</p>\n");
        self.servers.push(Server::nginx(&prepared.nginx, &self.pods.nginx, &folder.join("nginx"), &page)?);
        self.servers.push(Server::apache(&self.pods.apache, &folder.join("apache"), &page)?);
        self.servers.push(Server::mariadb(&self.pods.mariadb, &folder.join("mariadb"))?);
        Ok(())
    }

    fn start_agents(&mut self, prepared: &Prepared) -> Result<()> {
        let pods = &self.pods;
        let workloads = [&pods.frontend, &pods.apache, &pods.nginx, &pods.mariadb].map(WorkloadEntry::of);
        for node in self.topology.nodes() {
            let files = MeshFiles::write(&self.topology, node, &workloads, "", "")?;
            self.agents.push(Agent::start(node, &prepared.agent, &files)?);
        }
        self.agents.iter_mut().try_for_each(Agent::wait_ready)
    }

    fn traffic(&self) -> Result<(Vec<traffic::Request>, Traffic)> {
        let capture = self.topology.capture()?;
        let requests = traffic::run_all(&self.pods, MARKER)?;
        Ok((requests, capture.finish()?))
    }

    /// Flows that the source agents have carried, by their own metrics.
    fn flows(&self) -> Result<u64> {
        let mut sum = 0.0;
        for agent in &self.agents {
            let text = agent.metrics()?;
            let opened = text.lines().filter(|line| {
                line.starts_with("istio_tcp_connections_opened_total") && line.contains("reporter=\"source\"")
            });
            for line in opened {
                let value = line.rsplit(' ').next().context("a metric without value")?;
                sum += value.parse::<f64>().with_context(|| format!("metric line {line:?}"))?;
            }
        }
        Ok(sum as u64)
    }

    /// Turns the mesh to STRICT, asks everything again, and then from outside: was that answered?
    fn strict(&self) -> Result<bool> {
        for agent in &self.agents {
            agent.files().set_policy(STRICT)?;
            until("STRICT in force", || {
                let status = agent.status()?;
                Ok((status.contains("\"STRICT\"") && !status.contains("\"PERMISSIVE\"")).then_some(()))
            })?;
        }
        traffic::run_all(&self.pods, MARKER).context("meshed traffic under STRICT")?;
        traffic::plaintext_passes(&self.outsider, &self.pods.nginx)
    }

    fn take_down(self) -> Result<()> {
        let Self { mut agents, servers, holders, pods, outsider, topology } = self;
        for agent in &mut agents {
            let ended = agent.terminate()?;
            ensure!(ended.success(), "the agent of node {} ended with {ended}", agent.node());
            agent.uninstall()?;
        }
        drop((agents, servers, holders, pods, outsider));
        topology.close()
    }
}
