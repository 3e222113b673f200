//! A pod: a namespace, a cgroup, one address of each family, and the programs in it.

use crate::{cgroup, netns::Netns, process::Process, wait::until};
use anyhow::{Result, bail};
use std::{
    ffi::OsStr,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

/// Place of a pod's cgroup, which decides whether an agent covers the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// The cgroup is under the node's pods' cgroup.
    Mesh,
    /// The cgroup is elsewhere, so no agent covers the pod.
    Outside,
}

/// A handle to a pod, cheap to clone. The pod is removed with its topology.
#[derive(Debug, Clone)]
pub struct Pod(Arc<PodState>);

#[derive(Debug, Clone)]
struct PodState {
    node: String,
    namespace: String,
    name: String,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
    netns: Netns,
    cgroup: PathBuf,
    membership: Membership,
}

impl Pod {
    pub(crate) fn new(
        node: String,
        namespace: &str,
        name: &str,
        (ipv4, ipv6): (Ipv4Addr, Ipv6Addr),
        (netns, cgroup): (Netns, PathBuf),
        membership: Membership,
    ) -> Self {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        Self(Arc::new(PodState { node, namespace, name, ipv4, ipv6, netns, cgroup, membership }))
    }

    /// Returns the node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.0.node
    }

    /// Returns the Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// Returns the pod's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns the IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Ipv4Addr {
        self.0.ipv4
    }

    /// Returns the IPv6 address.
    #[must_use]
    pub fn ipv6(&self) -> Ipv6Addr {
        self.0.ipv6
    }

    /// Returns the network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.0.netns
    }

    /// Returns the cgroup directory.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Returns the place of the pod's cgroup.
    #[must_use]
    pub fn membership(&self) -> Membership {
        self.0.membership
    }

    /// Returns a handle to a container of the pod. Programs started through it are in a cgroup below the pod's.
    ///
    /// # Errors
    /// Fails if the cgroup cannot be made.
    pub fn container(&self, name: &str) -> Result<Self> {
        let cgroup = self.0.cgroup.join(name);
        cgroup::create(&cgroup)?;
        Ok(Self(Arc::new(PodState { cgroup, ..PodState::clone(&self.0) })))
    }

    /// Returns a handle to a container inside the pod, as Docker in a pod makes it: in the pod's cgroup, with a namespace of its own at
    /// `ipv4`, behind the pod's address `gateway` on a link inside the pod. The pod forwards.
    ///
    /// # Errors
    /// Fails if the namespace cannot be made.
    pub fn nested(&self, ipv4: Ipv4Addr, gateway: Ipv4Addr) -> Result<Self> {
        let (outer, inner) = (self.netns(), format!("{}-inner", self.netns().name()));
        let netns = Netns::create(std::slice::from_ref(&inner))?.remove(0);
        outer.ip(&format!(
            "link add inner type veth peer name eth0 netns {inner}\naddr add {gateway}/24 dev inner\nlink set inner up\n"
        ))?;
        outer.sysctl(&[("ipv4/ip_forward", "1")])?;
        netns.ip(&format!(
            "addr add {ipv4}/24 dev eth0\nlink set eth0 up\nroute add default via {gateway}\n"
        ))?;
        Ok(Self(Arc::new(PodState { ipv4, netns, ..PodState::clone(&self.0) })))
    }

    /// Returns a command that runs `program` in the pod's namespace and cgroup. The child's process id is the program's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.0.netns.command(&self.0.cgroup, program)
    }

    /// Starts a process that keeps the pod alive until the handle is dropped, like the pause container of Kubernetes. The
    /// process is in the pod's cgroup when this function returns.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn keep_alive(&self) -> Result<Process> {
        let mut command = self.command("sleep");
        command.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::spawn(&mut command)?;
        until(&format!("process of pod {}", self.name()), || {
            if let Some(status) = process.ended()? {
                bail!("the process that keeps pod {} alive exited: {status}", self.name());
            }
            let members = fs::read_to_string(self.cgroup().join("cgroup.procs"))?;
            Ok(members.lines().any(|id| id == process.id().to_string()).then_some(()))
        })?;
        Ok(process)
    }
}
