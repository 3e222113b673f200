//! A pod: a namespace, a cgroup, one address of each family, and the programs started in it.

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

/// Whether an agent has to do with the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// Its cgroup lies under the node's pods' cgroup.
    Mesh,
    /// Its cgroup lies elsewhere: to an agent it is a stranger.
    Outside,
}

/// A handle to a pod; the pod itself is removed with its topology. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pod(Arc<Parts>);

#[derive(Debug, Clone)]
struct Parts {
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
        Self(Arc::new(Parts { node, namespace, name, ipv4, ipv6, netns, cgroup, membership }))
    }

    /// Name of its node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.0.node
    }

    /// Its Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its address.
    #[must_use]
    pub fn ipv4(&self) -> Ipv4Addr {
        self.0.ipv4
    }

    /// Its address.
    #[must_use]
    pub fn ipv6(&self) -> Ipv6Addr {
        self.0.ipv6
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.0.netns
    }

    /// Its cgroup directory.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Whether it is under the pods' cgroup.
    #[must_use]
    pub fn membership(&self) -> Membership {
        self.0.membership
    }

    /// The same pod seen from a container of it: its programs stand in a cgroup below the pod's.
    ///
    /// # Errors
    /// When the cgroup cannot be made.
    pub fn container(&self, name: &str) -> Result<Self> {
        let cgroup = self.0.cgroup.join(name);
        cgroup::create(&cgroup)?;
        Ok(Self(Arc::new(Parts { cgroup, ..Parts::clone(&self.0) })))
    }

    /// A command in the pod: it stands in the pod's namespace and cgroup before the program begins, and the child's
    /// process id is the program's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.0.netns.command(&self.0.cgroup, program)
    }

    /// Keeps a process in the pod, as the pause container of Kubernetes does, until the handle is dropped.
    /// It is in the pod when this returns.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn hold(&self) -> Result<Process> {
        let mut command = self.command("sleep");
        command.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::spawn(&mut command)?;
        until(&format!("process of pod {}", self.name()), || {
            if let Some(status) = process.ended()? {
                bail!("the process that holds pod {} ended: {status}", self.name());
            }
            let members = fs::read_to_string(self.cgroup().join("cgroup.procs"))?;
            Ok(members.lines().any(|id| id == process.id().to_string()).then_some(()))
        })?;
        Ok(process)
    }
}
