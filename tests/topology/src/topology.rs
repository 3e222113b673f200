//! Nodes joined by a wire.

use crate::{
    capture::Capture,
    cgroup,
    netns::{NETNS_DIR, Netns},
    node::Node,
    process::run,
    sweep::{Guard, Prefix},
};
use anyhow::{Context, Result, bail};
use std::{
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// Nodes, their wire and their pods. Dropping it removes all of them.
#[derive(Debug)]
pub struct Topology {
    prefix: Prefix,
    cgroups: PathBuf,
    nodes: Vec<Node>,
    guard: Mutex<Guard>,
}

impl Topology {
    /// Two nodes, `a` and `b`. `tag` (1 to 8 letters a-z) becomes part of all names.
    ///
    /// # Errors
    /// When not root, or when a tool (`ip`, `nsenter`, `mount`) or the cgroup v2 hierarchy is missing.
    pub fn new(tag: &str) -> Result<Self> {
        Self::with_nodes(tag, &["a", "b"])
    }

    /// Two nodes of these names, joined by a wire; or one alone.
    ///
    /// # Errors
    /// As [`Topology::new`].
    pub fn with_nodes(tag: &str, names: &[&str]) -> Result<Self> {
        if !(1..=2).contains(&names.len()) {
            bail!("a wire joins two nodes: {names:?} were asked for");
        }
        let cgroups = cgroup::mount_point()?;
        let prefix = Prefix::fresh(tag)?;
        // From here on, whatever was made is removed however this function ends.
        let guard = Mutex::new(Guard::start(&prefix, &cgroups)?);
        fs::create_dir(prefix.files()).with_context(|| format!("make {}", prefix.files().display()))?;
        let mut topology = Self { prefix, cgroups, nodes: Vec::new(), guard };
        topology.build_nodes(names)?;
        mount_bpffs()?;
        Ok(topology)
    }

    /// The node of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name() == name).with_context(|| format!("no node {name}"))
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// What every name of this topology begins with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.prefix.as_str()
    }

    /// A directory for files, removed with the topology.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.prefix.files()
    }

    /// Starts recording what crosses the wire; it is recording when this returns.
    ///
    /// # Errors
    /// When `tcpdump` cannot be started, or there is one node only.
    pub fn capture(&self) -> Result<Capture> {
        match self.nodes.as_slice() {
            [near, far] => Capture::start(near, IpAddr::V4(far.wire_ipv4()), &self.files()),
            _ => bail!("one node alone has no wire"),
        }
    }

    /// Removes everything and says what could not be removed. Dropping does the same, printing instead.
    ///
    /// # Errors
    /// When something is left.
    pub fn close(self) -> Result<()> {
        self.release()
    }

    fn release(&self) -> Result<()> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner).release()
    }

    fn build_nodes(&mut self, names: &[&str]) -> Result<()> {
        let full: Vec<_> = names.iter().map(|name| format!("{}-{name}", self.prefix.as_str())).collect();
        for ((name, netns), number) in names.iter().zip(Netns::create(&full)?).zip(1..) {
            netns.sysctl(&[
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
            ])?;
            self.nodes.push(Node::new(name, number, netns, &self.prefix, &self.cgroups)?);
        }
        if let [near, far] = self.nodes.as_slice() {
            near.wire_to(far)?;
        }
        Ok(())
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            eprintln!("{error:#}");
        }
    }
}

/// Mounts bpffs where it is missing. The source name marks it as ours, so that the last topology unmounts it.
fn mount_bpffs() -> Result<()> {
    let lock = File::open(NETNS_DIR).with_context(|| format!("open {NETNS_DIR}"))?;
    lock.lock().with_context(|| format!("lock {NETNS_DIR}"))?;
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mounted = mountinfo.lines().any(|line| {
        line.split_once(" - ").is_some_and(|(mount, source)| {
            mount.split(' ').nth(4) == Some("/sys/fs/bpf") && source.starts_with("bpf ")
        })
    });
    if !mounted {
        run(Command::new("mount").args(["-t", "bpf", "tacit-topology"]).arg(Path::new("/sys/fs/bpf")))?;
    }
    Ok(())
}
