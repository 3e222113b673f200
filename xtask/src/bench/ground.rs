//! One column of the comparison: two nodes, three pods, the servers in them, and what stands in the way.
//!
//! `client` and `near` are on node a, `far` is on node b. The servers run in all grounds from the beginning, idle but
//! for the ground that is being loaded.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tacit_topology::{Agent, MeshFiles, Pod, Process, Topology, WorkloadEntry, until};

/// Time for a server to listen.
const START: Duration = Duration::from_secs(20);
/// Time for an agent to end: its drain limit and a margin.
const AGENT_END: Duration = Duration::from_secs(30);

/// Where iperf3 listens.
const IPERF: u16 = 5201;
/// Where `tacit-load` echoes.
const ECHO: u16 = 7001;
/// Where `tacit-load` answers once and closes.
const ANSWER: u16 = 7002;
/// Where nginx listens.
const HTTP: u16 = 80;

/// Bytes of a request on a connection of its own.
pub(super) const REQUEST: u32 = 64;

/// What is started.
#[derive(Clone)]
pub(super) struct Programs {
    pub(super) agent: PathBuf,
    /// nginx, which may not be on `PATH`.
    pub(super) nginx: PathBuf,
    /// `tacit-load`.
    pub(super) load: PathBuf,
}

/// A ground. Dropped in this order, the topology last.
pub(super) struct Ground {
    agents: Vec<Agent>,
    _servers: Vec<Process>,
    _holds: Vec<Process>,
    pub(super) client: Pod,
    pub(super) near: Pod,
    pub(super) far: Pod,
    topology: Topology,
}

impl Ground {
    /// Without anything in the way.
    pub(super) fn direct(tag: &str, programs: &Programs) -> Result<Self> {
        let topology = Topology::new(tag)?;
        let (a, b) = (topology.node("a")?, topology.node("b")?);
        let client = a.pod("bench", "client")?;
        let near = a.pod("bench", "near")?;
        let far = b.pod("bench", "far")?;
        let holds = [&client, &near, &far].into_iter().map(Pod::hold).collect::<Result<_>>()?;
        let mut servers = Vec::new();
        for pod in [&near, &far] {
            servers.extend(serve(pod, programs, &topology.files().join(pod.name()))?);
        }
        Ok(Self { agents: Vec::new(), _servers: servers, _holds: holds, client, near, far, topology })
    }

    /// With an agent on each node; `extra` are further lines of their `tacit.yaml`.
    pub(super) fn tacit(tag: &str, programs: &Programs, extra: &str) -> Result<Self> {
        let mut ground = Self::direct(tag, programs)?;
        let workloads = [&ground.client, &ground.near, &ground.far].map(WorkloadEntry::of);
        for node in ground.topology.nodes() {
            let files = MeshFiles::write(&ground.topology, node, &workloads, "", extra)?;
            let mut agent = Agent::start(node, &programs.agent, &files)?;
            // One after the other: the first makes the root that they share.
            agent.wait_ready()?;
            wait_enrolled(&agent)?;
            ground.agents.push(agent);
        }
        Ok(ground)
    }

    /// Processes that stand in the way on each node.
    pub(super) fn proxies(&self) -> [Vec<u32>; 2] {
        ["a", "b"].map(|node| {
            self.agents.iter().filter(|agent| agent.node() == node).filter_map(Agent::id).collect()
        })
    }

    /// The agent of a node.
    pub(super) fn agent(&self, node: &str) -> Result<&Agent> {
        let found = self.agents.iter().find(|agent| agent.node() == node);
        found.with_context(|| format!("no agent on node {node}"))
    }

    /// The nodes and their wire.
    pub(super) fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Ends the agents in good order and removes everything.
    pub(super) fn close(self) -> Result<()> {
        let Self { mut agents, _servers, _holds, client, near, far, topology } = self;
        for agent in &mut agents {
            let ended = agent.terminate(AGENT_END)?;
            ensure!(ended.success(), "the agent of node {} ended with {ended}", agent.node());
            agent.uninstall()?;
        }
        drop((agents, _servers, _holds, client, near, far));
        topology.close()
    }
}

/// iperf3's server of the pod.
pub(super) fn iperf_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), IPERF).into()
}

/// The echo server of the pod.
pub(super) fn echo_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), ECHO).into()
}

/// The pod's server that answers once.
pub(super) fn answer_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), ANSWER).into()
}

/// nginx of the pod.
pub(super) fn http_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), HTTP).into()
}

fn wait_enrolled(agent: &Agent) -> Result<()> {
    until(&format!("all pods of node {} enrolled", agent.node()), START, || {
        let status: serde_json::Value =
            serde_json::from_str(&agent.status()?).context("status is no JSON")?;
        let pods = status["pods"].as_array().context("status has no pods")?;
        let all = !pods.is_empty() && pods.iter().all(|pod| pod["state"] == "enrolled");
        Ok((all && status["state"] == "ready").then_some(()))
    })
}

/// Starts the servers of a pod and waits until all listen.
fn serve(pod: &Pod, programs: &Programs, folder: &std::path::Path) -> Result<Vec<Process>> {
    let text = |address: SocketAddr| address.to_string();
    let mut iperf = pod.command("iperf3");
    iperf.args(["--server", "--port", &IPERF.to_string()]);
    let mut echo = pod.command(&programs.load);
    echo.args(["serve", &text(echo_of(pod))]);
    let mut answer = pod.command(&programs.load);
    answer.args(["serve", &text(answer_of(pod)), "--answer", &REQUEST.to_string()]);
    let nginx = nginx(pod, &programs.nginx, folder)?;
    let mut processes = Vec::new();
    for mut command in [iperf, echo, answer, nginx] {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        processes.push(Process::spawn(&mut command)?);
    }
    until(&format!("servers of pod {} listen", pod.name()), START, || {
        for process in &mut processes {
            if let Some(status) = process.ended()? {
                bail!("a server of pod {} ended: {status}", pod.name());
            }
        }
        // Looked up, not tried: iperf3 takes a connection for a client.
        let sockets = pod.netns().enter(|| {
            ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")))
        })?;
        let sockets = sockets.into_iter().collect::<Result<String, _>>().context("read /proc/net/tcp")?;
        let all = [IPERF, ECHO, ANSWER, HTTP].iter().all(|port| listens(&sockets, *port));
        Ok(all.then_some(()))
    })?;
    Ok(processes)
}

/// One worker, one page of 612 bytes from memory (files would cost the same in all columns and hide the difference),
/// connections kept as long as the client likes.
fn nginx(pod: &Pod, program: &std::path::Path, folder: &std::path::Path) -> Result<Command> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let page = "tacit bench ".repeat(51);
    let text = format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {0}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {0}/body;\n\
         proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi; uwsgi_temp_path {0}/uwsgi;\n\
         scgi_temp_path {0}/scgi; default_type text/plain;\n\
         server {{ listen {HTTP} backlog=4096; return 200 \"{page}\"; }} }}\n",
        folder.display()
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    let mut command = pod.command(program);
    command.arg("-p").arg(folder).arg("-c").arg(file).args(["-e", "stderr"]);
    Ok(command)
}

/// Whether a table of `/proc/net/tcp` (proc_net_tcp) has a listener on the port, whatever its address.
fn listens(table: &str, port: u16) -> bool {
    /// `TCP_LISTEN` of the kernel's tcp_states.h.
    const LISTEN: &str = "0A";
    let end = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some(LISTEN)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listener_listens() {
        let table = "  sl  local_address rem_address   st tx_queue\n   \
            0: 02024D0A:1B59 00000000:0000 0A 00000000:00000000 00:00000000\n   \
            1: 02024D0A:1B5A 0202010A:C001 01 00000000:00000000 00:00000000\n";
        assert!(listens(table, 7001));
        assert!(!listens(table, 7002));
        assert!(!listens(table, 80));
    }
}
