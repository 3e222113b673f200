//! Files of an agent: `tacit.yaml`, `directory.yaml` and `policy.yaml`, one set for each node.
//!
//! Each node has its own directory and policy, so a test can give one node a wrong one. The nodes share the issuer's
//! folder, and so the root of the mesh.

use crate::{node::Node, pod::Pod, topology::Topology};
use anyhow::{Context, Result};
use std::{
    fmt::Write,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Value of `tunnel` of a workload in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// Peers reach the workload through the tunnel.
    Tacit,
    /// Peers reach the workload through a tunnel to the agent of another mesh.
    Hbone,
    /// Peers reach the workload as plaintext.
    None,
}

/// One workload of `directory.yaml`.
#[derive(Debug, Clone)]
pub struct WorkloadEntry {
    /// Pod name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Node of the workload.
    pub node: String,
    /// Labels, for policy selectors.
    pub labels: Vec<(String, String)>,
    /// Value of `tunnel`.
    pub tunnel: Tunnel,
    /// Value of `egress`, if the entry has one.
    pub egress: Option<&'static str>,
    /// Value of `connect`, if the entry has one.
    pub connect: Option<&'static str>,
}

impl WorkloadEntry {
    /// Returns the right entry of a pod. Its service account and its label `app` are the pod's name.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        Self {
            name: pod.name().to_owned(),
            namespace: pod.namespace().to_owned(),
            service_account: pod.name().to_owned(),
            addresses: vec![pod.ipv4().into(), pod.ipv6().into()],
            node: pod.node().to_owned(),
            labels: vec![("app".to_owned(), pod.name().to_owned())],
            tunnel: Tunnel::Tacit,
            egress: None,
            connect: None,
        }
    }

    fn write(&self, out: &mut String) {
        let addresses: Vec<_> = self.addresses.iter().map(|address| format!("\"{address}\"")).collect();
        let labels: Vec<_> =
            self.labels.iter().map(|(key, value)| format!("\"{key}\": \"{value}\"")).collect();
        let tunnel = match self.tunnel {
            Tunnel::Tacit => "tacit",
            Tunnel::Hbone => "hbone",
            Tunnel::None => "none",
        };
        let _ = writeln!(out, "  - name: \"{}\"", self.name);
        let _ = writeln!(out, "    namespace: \"{}\"", self.namespace);
        let _ = writeln!(out, "    serviceAccount: \"{}\"", self.service_account);
        let _ = writeln!(out, "    addresses: [{}]", addresses.join(", "));
        let _ = writeln!(out, "    node: \"{}\"", self.node);
        let _ = writeln!(out, "    labels: {{{}}}", labels.join(", "));
        let _ = writeln!(out, "    tunnel: {tunnel}");
        if let Some(egress) = self.egress {
            let _ = writeln!(out, "    egress: {egress}");
        }
        if let Some(connect) = self.connect {
            let _ = writeln!(out, "    connect: {connect}");
        }
    }
}

/// The three files of one node.
#[derive(Debug, Clone)]
pub struct MeshFiles {
    folder: PathBuf,
    issuer: PathBuf,
    pin_path: PathBuf,
    /// Name of the agent's log and socket.
    agent: String,
    config: PathBuf,
}

impl MeshFiles {
    /// Trust domain of every topology.
    pub const TRUST_DOMAIN: &str = "cluster.local";
    /// Address of an agent's metrics and readiness, in its node's namespace.
    pub const METRICS: &str = "127.0.0.1:15020";
    /// Address of an agent's readiness for the kubelet, in its node's namespace.
    pub const HEALTH: &str = "127.0.0.1:15022";

    /// Writes the three files of `node`. `extra` are further lines of `tacit.yaml` (top-level fields).
    ///
    /// # Errors
    /// Fails if a file cannot be written.
    pub fn write(
        topology: &Topology,
        node: &Node,
        workloads: &[WorkloadEntry],
        policy: &str,
        extra: &str,
    ) -> Result<Self> {
        let folder = node.files()?;
        let files = Self {
            issuer: topology.files().join("issuer"),
            pin_path: node.pin_path(),
            agent: "agent".to_owned(),
            config: folder.join("tacit.yaml"),
            folder,
        };
        files.set_directory(workloads)?;
        files.set_policy(policy)?;
        let text = format!(
            "trustDomain: {domain}\nnode: {name}\npodsCgroup: {pods}\nmeshRanges: [10.77.0.0/16, \"fd77::/16\"]\n\
             directory: {{file: directory.yaml}}\npolicy: {{file: policy.yaml}}\n\
             issuer: {{embedded: {{directory: {issuer}}}}}\npinPath: {pins}\nsocket: {socket}\n\
             statePath: {state}\nmetrics: {metrics}\nhealth: {health}\n{extra}",
            domain = Self::TRUST_DOMAIN,
            name = node.name(),
            pods = node.pods_cgroup().display(),
            issuer = files.issuer.display(),
            pins = files.pin_path.display(),
            socket = files.socket().display(),
            state = files.state_path().display(),
            metrics = Self::METRICS,
            health = Self::HEALTH,
        );
        fs::write(files.config(), text).with_context(|| format!("write {}", files.config().display()))?;
        Ok(files)
    }

    /// Replaces `directory.yaml`.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn set_directory(&self, workloads: &[WorkloadEntry]) -> Result<()> {
        self.set_directory_text(&directory_text(workloads))
    }

    /// Replaces `directory.yaml` with `text`, which may be invalid.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn set_directory_text(&self, text: &str) -> Result<()> {
        replace(&self.folder.join("directory.yaml"), text)
    }

    /// Replaces `policy.yaml` with `text`, which may be invalid.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn set_policy(&self, text: &str) -> Result<()> {
        replace(&self.folder.join("policy.yaml"), text)
    }

    /// Replaces `crl.pem`, which the agent reads if its configuration says so, with `text`, which may be invalid.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn set_crl(&self, text: &str) -> Result<()> {
        replace(&self.folder.join("crl.pem"), text)
    }

    /// Replaces `partner.pem`, which the agent reads if its configuration says so, with `text`, which may be invalid.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn set_partner(&self, text: &str) -> Result<()> {
        replace(&self.folder.join("partner.pem"), text)
    }

    /// Returns the path of `tacit.yaml`.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.config.clone()
    }

    /// Returns the path of the agent's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join(format!("{}.sock", self.agent))
    }

    /// Returns the folder in which the node's agent pins its programs.
    #[must_use]
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// Returns the folder of what the node's agent keeps for a reboot.
    #[must_use]
    pub fn state_path(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Returns the folder of the issuer's `root-key.pem` and `root-cert.pem`, which the nodes share.
    #[must_use]
    pub fn issuer(&self) -> &Path {
        &self.issuer
    }

    /// Returns the files of a second agent on the node, named `agent`. Only the socket and the log differ.
    pub(crate) fn standby(&self, agent: &str) -> Result<Self> {
        let config = self.folder.join(format!("{agent}.yaml"));
        let files = Self { agent: agent.to_owned(), config, ..self.clone() };
        let socket = |files: &Self| format!("socket: {}\n", files.socket().display());
        let text = fs::read_to_string(&self.config).context("read the first agent's configuration")?;
        fs::write(&files.config, text.replace(&socket(self), &socket(&files)))
            .with_context(|| format!("write {}", files.config.display()))?;
        Ok(files)
    }

    pub(crate) fn agent(&self) -> &str {
        &self.agent
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.agent))
    }
}

/// Returns the text of a `directory.yaml` without services.
#[must_use]
pub fn directory_text(workloads: &[WorkloadEntry]) -> String {
    let mut text = String::from(if workloads.is_empty() { "workloads: []\n" } else { "workloads:\n" });
    workloads.iter().for_each(|workload| workload.write(&mut text));
    text
}

/// Replaces a watched file atomically, so its reader never sees a part of the text.
fn replace(path: &Path, text: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).with_context(|| format!("write {}", fresh.display()))?;
    fs::rename(&fresh, path).with_context(|| format!("replace {}", path.display()))
}
