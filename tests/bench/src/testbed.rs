//! One column of the comparison: two nodes, three pods, the servers in them, and what stands in the way.
//!
//! `client` and `near` are on node a, `far` is on node b. The servers run in all testbeds from the beginning, idle but
//! for the testbed that is being loaded.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tacit_topology::{Agent, MeshFiles, Pod, Process, Topology, WorkloadEntry, until};

use super::{programs::Programs, rival::Rival, servers};

/// A testbed. Dropped in this order, the topology last.
pub(super) struct Testbed {
    agents: Vec<Agent>,
    rivals: Vec<Rival>,
    _servers: Vec<Process>,
    _holds: Vec<Process>,
    pub(super) client: Pod,
    pub(super) near: Pod,
    pub(super) far: Pod,
    topology: Topology,
}

impl Testbed {
    /// Without anything in the way.
    pub(super) fn direct(tag: &str, programs: &Programs) -> Result<Self> {
        let topology = Topology::new(tag)?;
        let (a, b) = (topology.node("a")?, topology.node("b")?);
        let client = a.pod("bench", "client")?;
        let near = a.pod("bench", "near")?;
        let far = b.pod("bench", "far")?;
        let holds = [&client, &near, &far].into_iter().map(Pod::keep_alive).collect::<Result<_>>()?;
        let mut running = Vec::new();
        for pod in [&near, &far] {
            running.extend(servers::start(pod, programs, &topology.files().join(pod.name()))?);
        }
        Ok(Self {
            agents: Vec::new(),
            rivals: Vec::new(),
            _servers: running,
            _holds: holds,
            client,
            near,
            far,
            topology,
        })
    }

    /// With an agent on each node; `extra` are further lines of their `tacit.yaml`.
    pub(super) fn tacit(tag: &str, programs: &Programs, extra: &str) -> Result<Self> {
        let mut testbed = Self::direct(tag, programs)?;
        let workloads = [&testbed.client, &testbed.near, &testbed.far].map(WorkloadEntry::of);
        for node in testbed.topology.nodes() {
            let files = MeshFiles::write(&testbed.topology, node, &workloads, "", extra)?;
            let mut agent = Agent::start_quiet(node, &programs.agent, &files)?;
            // One after the other: the first makes the root that they share.
            agent.wait_ready()?;
            wait_enrolled(&agent)?;
            testbed.agents.push(agent);
        }
        Ok(testbed)
    }

    /// With another proxy: `command` runs on each node.
    pub(super) fn rival(tag: &str, programs: &Programs, command: &str) -> Result<Self> {
        let mut testbed = Self::direct(tag, programs)?;
        let pods = [&testbed.client, &testbed.near, &testbed.far];
        let nodes = testbed.topology.nodes().iter();
        // All are started before the first is waited for: they may need each other.
        testbed.rivals =
            nodes.map(|node| Rival::start(&testbed.topology, node, &pods, command)).collect::<Result<_>>()?;
        testbed.rivals.iter_mut().try_for_each(Rival::wait_ready)?;
        Ok(testbed)
    }

    /// Processes that stand in the way on node a and on node b.
    pub(super) fn proxies(&self) -> Result<[Vec<u32>; 2]> {
        let of = |node: &str| -> Result<Vec<u32>> {
            let mut ids: Vec<u32> =
                self.agents.iter().filter(|agent| agent.node() == node).filter_map(Agent::id).collect();
            for rival in self.rivals.iter().filter(|rival| rival.node() == node) {
                ids.extend(rival.processes()?);
            }
            Ok(ids)
        };
        Ok([of("a")?, of("b")?])
    }

    /// The agent of a node.
    pub(super) fn agent(&self, node: &str) -> Result<&Agent> {
        let found = self.agents.iter().find(|agent| agent.node() == node);
        found.with_context(|| format!("no agent on node {node}"))
    }

    /// Ends the agent of a node and starts it again; returns the time from its start until all pods are enrolled.
    pub(super) fn restart(&mut self, node: &str) -> Result<Duration> {
        let found = self.agents.iter_mut().find(|agent| agent.node() == node);
        let agent = found.with_context(|| format!("no agent on node {node}"))?;
        agent.terminate()?;
        let begin = Instant::now();
        agent.restart()?;
        agent.wait_ready()?;
        wait_enrolled(agent)?;
        Ok(begin.elapsed())
    }

    /// The nodes and their wire.
    pub(super) fn topology(&self) -> &Topology {
        &self.topology
    }

    /// All cgroups that processes of it stand in.
    pub(super) fn cgroups(&self) -> Result<[PathBuf; 2]> {
        let pods = self.topology.node("a")?.pods_cgroup();
        let mount = pods.ancestors().nth(2).context("the pods' cgroup has no place")?;
        let prefix = self.topology.prefix();
        Ok([mount.join(prefix), mount.join(format!("{prefix}-host"))])
    }

    /// Ends the agents in good order and removes everything.
    pub(super) fn close(self) -> Result<()> {
        let Self { mut agents, rivals, _servers, _holds, client, near, far, topology } = self;
        for agent in &mut agents {
            let ended = agent.terminate()?;
            ensure!(ended.success(), "the agent of node {} ended with {ended}", agent.node());
            agent.uninstall()?;
        }
        drop((agents, rivals, _servers, _holds, client, near, far));
        topology.close()
    }
}

/// Waits until all pods of the agent's node are enrolled.
pub(super) fn wait_enrolled(agent: &Agent) -> Result<()> {
    until(&format!("all pods of node {} enrolled", agent.node()), || {
        let status: Value = serde_json::from_str(&agent.status()?).context("status is no JSON")?;
        let pods = status["pods"].as_array().context("status has no pods")?;
        let all = !pods.is_empty() && pods.iter().all(|pod| pod["state"] == "enrolled");
        Ok((all && status["state"] == "ready").then_some(()))
    })
}
