//! Nodes joined by a wire.

use crate::{
    capture::Capture,
    cgroup,
    netns::{NETNS_DIR, Netns},
    node::Node,
    process::run,
    sweep::{Prefix, Sweeper},
};
use anyhow::{Context, Result, bail};
use std::{
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// Nodes, their wire and their pods. Dropping the topology removes all of them.
#[derive(Debug)]
pub struct Topology {
    prefix: Prefix,
    cgroups: PathBuf,
    nodes: Vec<Node>,
    sweeper: Mutex<Sweeper>,
}

impl Topology {
    /// Builds two nodes, `a` and `b`. `tag` (1 to 8 letters a-z) becomes part of all names.
    ///
    /// # Errors
    /// Fails without root, or if a tool (`ip`, `nsenter`, `mount`) or the cgroup v2 hierarchy is missing.
    pub fn new(tag: &str) -> Result<Self> {
        Self::with_nodes(tag, &["a", "b"])
    }

    /// Builds two nodes with these names and a wire between them, or a single node.
    ///
    /// # Errors
    /// As [`Topology::new`].
    pub fn with_nodes(tag: &str, names: &[&str]) -> Result<Self> {
        if !(1..=2).contains(&names.len()) {
            bail!("invalid nodes {names:?}: expected one or two");
        }
        let cgroups = cgroup::mount_point()?;
        let prefix = Prefix::fresh(tag)?;
        // From here on, resources are removed on every exit of this function.
        let sweeper = Mutex::new(Sweeper::start(&prefix, &cgroups)?);
        fs::create_dir(prefix.files()).with_context(|| format!("create {}", prefix.files().display()))?;
        let mut topology = Self { prefix, cgroups, nodes: Vec::new(), sweeper };
        topology.build_nodes(names)?;
        mount_bpffs()?;
        Ok(topology)
    }

    /// Returns the node with this name.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name() == name).with_context(|| format!("no node {name}"))
    }

    /// Returns all nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns the prefix of every name of this topology.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.prefix.as_str()
    }

    /// Returns a directory for files, which is removed with the topology.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.prefix.files()
    }

    /// Starts a capture of the wire, which is running when this function returns.
    ///
    /// # Errors
    /// Fails if `tcpdump` cannot be started or there is only one node.
    pub fn capture(&self) -> Result<Capture> {
        match self.nodes.as_slice() {
            [first, second] => Capture::start(first, IpAddr::V4(second.wire_ipv4()), &self.files()),
            _ => bail!("a topology of one node has no wire to capture"),
        }
    }

    /// Removes all resources and returns an error if one could not be removed. Dropping prints the error instead.
    ///
    /// # Errors
    /// Fails if a resource remains.
    pub fn close(self) -> Result<()> {
        self.release()
    }

    fn release(&self) -> Result<()> {
        self.sweeper.lock().unwrap_or_else(PoisonError::into_inner).release()
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
        if let [first, second] = self.nodes.as_slice() {
            first.wire_to(second)?;
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

/// Mounts bpffs if it is missing. The source's name marks the mount, so that the last topology unmounts it.
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
