//! A topology with its pods and, unless it is the control run, an agent on each node.

use crate::{observe, program::agent_program};
use anyhow::{Context, Result, anyhow};
use std::sync::OnceLock;
use tacit_topology::{Agent, Membership, MeshFiles, Pod, Process, Topology, WorkloadEntry, cleanup_stale};

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    tag: String,
    pods: Vec<(String, String, String, Membership)>,
    policy: String,
    extra: String,
}

impl Plan {
    /// Two nodes, `a` and `b`, without pods. `tag` (1 to 8 letters) becomes part of all names.
    #[must_use]
    pub fn new(tag: &str) -> Self {
        Self { tag: tag.to_owned(), ..Self::default() }
    }

    /// A pod of the mesh on `node`, named `namespace/name`; its service account and its label `app` are its name.
    #[must_use]
    pub fn pod(mut self, node: &str, namespace: &str, name: &str) -> Self {
        self.pods.push((node.to_owned(), namespace.to_owned(), name.to_owned(), Membership::Mesh));
        self
    }

    /// A pod that no agent watches and no directory names.
    #[must_use]
    pub fn outside(mut self, node: &str, namespace: &str, name: &str) -> Self {
        self.pods.push((node.to_owned(), namespace.to_owned(), name.to_owned(), Membership::Outside));
        self
    }

    /// The policy both nodes start with.
    #[must_use]
    pub fn policy(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.policy);
        self
    }

    /// Further lines of `tacit.yaml`.
    #[must_use]
    pub fn config(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.extra);
        self
    }

    /// Builds it with no agent: the control run.
    ///
    /// # Errors
    /// When the topology cannot be built.
    pub fn without_agents(self) -> Result<Mesh> {
        cleanup_stale()?;
        let topology = Topology::new(&self.tag)?;
        let mut mesh = Mesh { pods: Vec::new(), holds: Vec::new(), agents: Vec::new(), topology };
        for (node, namespace, name, membership) in &self.pods {
            let node = mesh.topology.node(node)?;
            let pod = match membership {
                Membership::Mesh => node.pod(namespace, name)?,
                Membership::Outside => node.outside_pod(namespace, name)?,
            };
            mesh.holds.push(pod.hold()?);
            mesh.pods.push(pod);
        }
        Ok(mesh)
    }

    /// Builds it with an agent on each node, ready and with all pods enrolled.
    ///
    /// # Errors
    /// When the topology cannot be built or an agent does not become ready.
    pub fn with_agents(self) -> Result<Mesh> {
        self.with_agents_told(|_, mesh| Ok(mesh.directory()))
    }

    /// As [`Plan::with_agents`]; `tell` gives the directory of the node whose name it is given, true or not.
    ///
    /// # Errors
    /// As [`Plan::with_agents`].
    pub fn with_agents_told(self, tell: impl Fn(&str, &Mesh) -> Result<Vec<WorkloadEntry>>) -> Result<Mesh> {
        let program = agent_program()?;
        let (policy, extra) = (self.policy.clone(), self.extra.clone());
        let mut mesh = self.without_agents()?;
        for node in mesh.topology.nodes() {
            let directory = tell(node.name(), &mesh)?;
            let files = MeshFiles::write(&mesh.topology, node, &directory, &policy, &extra)?;
            let mut agent = Agent::start(node, &program, &files)?;
            // One after the other: the first makes the root that they share.
            agent.wait_ready()?;
            observe::wait_enrolled(&agent)?;
            mesh.agents.push(agent);
        }
        Ok(mesh)
    }
}

/// A topology, its pods, its agents. Everything is removed when it is dropped or the process ends.
#[derive(Debug)]
pub struct Mesh {
    // Dropped in this order: processes first, the ground they stand on last.
    agents: Vec<Agent>,
    holds: Vec<Process>,
    pods: Vec<Pod>,
    topology: Topology,
}

impl Mesh {
    /// The mesh in `cell`, built by the first test that asks. When building failed, every test is told why.
    ///
    /// # Errors
    /// When it could not be built.
    pub fn shared(
        cell: &OnceLock<Result<Self, String>>,
        build: impl FnOnce() -> Result<Self>,
    ) -> Result<&Self> {
        cell.get_or_init(|| build().map_err(|error| format!("{error:?}")))
            .as_ref()
            .map_err(|text| anyhow!("{text}"))
    }

    /// The pod of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.name() == name).with_context(|| format!("no pod {name}"))
    }

    /// The ground it stands on.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Whether Tacit runs here; it does not in a control run.
    #[must_use]
    pub fn has_tacit(&self) -> bool {
        !self.agents.is_empty()
    }

    /// The agent of that node.
    ///
    /// # Errors
    /// When there is none, as in a control run.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents
            .iter()
            .find(|agent| agent.node() == node)
            .with_context(|| format!("no agent on node {node}"))
    }

    /// The agent of that node, to stop or start it.
    ///
    /// # Errors
    /// As [`Mesh::agent`].
    pub fn agent_mut(&mut self, node: &str) -> Result<&mut Agent> {
        self.agents
            .iter_mut()
            .find(|agent| agent.node() == node)
            .with_context(|| format!("no agent on node {node}"))
    }

    /// The true directory of the pods that belong to the mesh.
    #[must_use]
    pub fn directory(&self) -> Vec<WorkloadEntry> {
        self.pods.iter().filter(|pod| pod.membership() == Membership::Mesh).map(WorkloadEntry::of).collect()
    }
}
