//! A topology with its pods and, except in a control run, an agent on each node.

use crate::{observe, program::agent_program};
use anyhow::{Context, Result, anyhow};
use std::sync::OnceLock;
use tacit_topology::{Agent, Membership, MeshFiles, Pod, Process, Topology, WorkloadEntry, cleanup_stale};

/// Nodes, pods, policy and configuration of a mesh.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    tag: String,
    pods: Vec<(String, String, String, Membership)>,
    policy: String,
    config: String,
    descriptors: Option<u64>,
}

impl Plan {
    /// Makes a plan of two nodes, `a` and `b`, without pods. `tag` (1 to 8 letters) becomes part of all names.
    #[must_use]
    pub fn new(tag: &str) -> Self {
        Self { tag: tag.to_owned(), ..Self::default() }
    }

    /// Adds a pod of the mesh on `node`, named `namespace/name`. Its service account and its label `app` are its name.
    #[must_use]
    pub fn pod(mut self, node: &str, namespace: &str, name: &str) -> Self {
        self.pods.push((node.to_owned(), namespace.to_owned(), name.to_owned(), Membership::Mesh));
        self
    }

    /// Adds a pod that no agent covers and no directory contains.
    #[must_use]
    pub fn outside(mut self, node: &str, namespace: &str, name: &str) -> Self {
        self.pods.push((node.to_owned(), namespace.to_owned(), name.to_owned(), Membership::Outside));
        self
    }

    /// Sets the policy that both nodes start with.
    #[must_use]
    pub fn policy(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.policy);
        self
    }

    /// Sets additional lines of `tacit.yaml`.
    #[must_use]
    pub fn config(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.config);
        self
    }

    /// Sets the limit of open files of the agents.
    #[must_use]
    pub fn descriptors(mut self, limit: u64) -> Self {
        self.descriptors = Some(limit);
        self
    }

    /// Builds the mesh without agents, for a control run.
    ///
    /// # Errors
    /// Fails if the topology cannot be built.
    pub fn without_agents(self) -> Result<Mesh> {
        cleanup_stale()?;
        let topology = Topology::new(&self.tag)?;
        let mut mesh = Mesh { pods: Vec::new(), pod_processes: Vec::new(), agents: Vec::new(), topology };
        for (node, namespace, name, membership) in &self.pods {
            let node = mesh.topology.node(node)?;
            let pod = match membership {
                Membership::Mesh => node.pod(namespace, name)?,
                Membership::Outside => node.outside_pod(namespace, name)?,
            };
            mesh.pod_processes.push(pod.keep_alive()?);
            mesh.pods.push(pod);
        }
        Ok(mesh)
    }

    /// Builds the mesh with an agent on each node. All agents are ready and all pods enrolled when this returns.
    ///
    /// # Errors
    /// Fails if the topology cannot be built or an agent does not become ready.
    pub fn with_agents(self) -> Result<Mesh> {
        self.with_directories(|_, mesh| Ok(mesh.directory()))
    }

    /// Builds the mesh like [`Plan::with_agents`]. `directory_of` returns the directory of a node, which may be wrong.
    ///
    /// # Errors
    /// As [`Plan::with_agents`].
    pub fn with_directories(
        self,
        directory_of: impl Fn(&str, &Mesh) -> Result<Vec<WorkloadEntry>>,
    ) -> Result<Mesh> {
        let program = agent_program()?;
        let (policy, config, descriptors) = (self.policy.clone(), self.config.clone(), self.descriptors);
        let mut mesh = self.without_agents()?;
        for node in mesh.topology.nodes() {
            let directory = directory_of(node.name(), &mesh)?;
            let files = MeshFiles::write(&mesh.topology, node, &directory, &policy, &config)?;
            let mut agent = match descriptors {
                None => Agent::start(node, &program, &files)?,
                Some(limit) => Agent::start_limited(node, &program, &files, limit)?,
            };
            // Sequential, because the first agent creates the root that the agents share.
            agent.wait_ready()?;
            observe::wait_enrolled(&agent)?;
            mesh.agents.push(agent);
        }
        Ok(mesh)
    }
}

/// A topology, its pods and its agents. All resources are removed when it is dropped or the process exits.
#[derive(Debug)]
pub struct Mesh {
    // Fields are dropped in this order: processes first, the topology last.
    agents: Vec<Agent>,
    pod_processes: Vec<Process>,
    pods: Vec<Pod>,
    topology: Topology,
}

impl Mesh {
    /// Returns the mesh in `cell`, which the first caller builds. If the build fails, every caller gets its error.
    ///
    /// # Errors
    /// Fails if the mesh could not be built.
    pub fn shared(
        cell: &OnceLock<Result<Self, String>>,
        build: impl FnOnce() -> Result<Self>,
    ) -> Result<&Self> {
        cell.get_or_init(|| build().map_err(|error| format!("{error:?}")))
            .as_ref()
            .map_err(|text| anyhow!("{text}"))
    }

    /// Returns the pod with this name.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.name() == name).with_context(|| format!("no pod {name}"))
    }

    /// Returns the topology.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Returns true unless this is a control run.
    #[must_use]
    pub fn has_tacit(&self) -> bool {
        !self.agents.is_empty()
    }

    /// Returns the agent of a node.
    ///
    /// # Errors
    /// Fails if there is none, as in a control run.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents
            .iter()
            .find(|agent| agent.node() == node)
            .with_context(|| format!("no agent on node {node}"))
    }

    /// Returns the agent of a node, to stop or start it.
    ///
    /// # Errors
    /// As [`Mesh::agent`].
    pub fn agent_mut(&mut self, node: &str) -> Result<&mut Agent> {
        self.agents
            .iter_mut()
            .find(|agent| agent.node() == node)
            .with_context(|| format!("no agent on node {node}"))
    }

    /// Returns the right directory of the mesh's pods.
    #[must_use]
    pub fn directory(&self) -> Vec<WorkloadEntry> {
        self.pods.iter().filter(|pod| pod.membership() == Membership::Mesh).map(WorkloadEntry::of).collect()
    }
}
