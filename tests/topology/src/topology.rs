//! Nodes joined by a wire, and the address plan.
//!
//! Node `n` (counted from 0) has 10.76.0.`n+1` and fd76::`n+1` on the wire. Its pods are in 10.77.`n+1`.0/24 and
//! fd77:`n+1`::/64, where the node itself has .1 and ::1. Every topology has the same plan, because namespaces isolate
//! topologies that run at the same time.

use crate::{
    capture::Capture,
    cgroup,
    netns::{NETNS_DIR, Netns},
    pod::{Membership, Pod},
    process::run,
    sweep::{Prefix, Sweeper},
    wait::until,
};
use anyhow::{Context, Result, bail};
use std::{
    ffi::OsStr,
    fmt::Write,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

/// Name of the node-to-node link, in every node.
pub(crate) const WIRE: &str = "wire";
/// Host part of the last pod's address, which bounds the number of pods of a node.
const LAST_POD: u8 = 250;

/// Nodes, their wire and their pods. Dropping the topology removes all of them.
#[derive(Debug)]
pub struct Topology {
    prefix: Prefix,
    cgroups: PathBuf,
    nodes: Vec<Node>,
    sweeper: Mutex<Sweeper>,
}

/// One node: a namespace that forwards between the wire and its pods.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    netns: Netns,
    prefix: Prefix,
    cgroups: PathBuf,
    next_pod: AtomicU8,
}

impl Topology {
    /// Builds two nodes, `a` and `b`. `tag` (1 to 8 letters a-z) becomes part of all names.
    ///
    /// # Errors
    /// Fails if not root, or when a tool (`ip`, `nsenter`, `mount`) or the cgroup v2 hierarchy is missing.
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
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("no node {name}"))
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
            let node = Node {
                name: (*name).to_owned(),
                number,
                netns,
                prefix: self.prefix.clone(),
                cgroups: self.cgroups.clone(),
                next_pod: AtomicU8::new(2),
            };
            cgroup::create(&node.pods_cgroup())?;
            self.nodes.push(node);
        }
        if let [first, second] = self.nodes.as_slice() {
            let peer = second.netns.name();
            first.netns.ip(&format!("link add {WIRE} type veth peer name {WIRE} netns {peer}\n"))?;
            first.join_wire(second)?;
            second.join_wire(first)?;
            first.netns.wait_for_links()?;
            second.netns.wait_for_links()?;
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

impl Node {
    /// Returns the node's name, without the prefix.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns the node's IPv4 address on the wire.
    #[must_use]
    pub fn wire_ipv4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 76, 0, self.number)
    }

    /// Returns the node's IPv6 address on the wire.
    #[must_use]
    pub fn wire_ipv6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd76, 0, 0, 0, 0, 0, 0, self.number.into())
    }

    /// Returns the cgroup directory of the node's pods.
    #[must_use]
    pub fn pods_cgroup(&self) -> PathBuf {
        self.cgroups.join(self.prefix.as_str()).join(&self.name)
    }

    /// Returns the folder in which an agent of this node pins its programs.
    #[must_use]
    pub fn pin_path(&self) -> PathBuf {
        PathBuf::from(format!("/sys/fs/bpf/{}-{}", self.prefix.as_str(), self.name))
    }

    /// Returns a directory for the node's files. It is created on first use and removed with the topology.
    ///
    /// # Errors
    /// Fails if it cannot be made.
    pub fn files(&self) -> Result<PathBuf> {
        let path = self.prefix.files().join(&self.name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }

    /// Returns a command in the node's namespace, outside the pods' cgroup.
    ///
    /// # Errors
    /// Fails if the cgroup cannot be made.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        self.command_in("exec", program)
    }

    /// Returns a command like [`Node::command`], in the host cgroup `group` of this node.
    pub(crate) fn command_in(&self, group: &str, program: impl AsRef<OsStr>) -> Result<Command> {
        let cgroup = self.host_cgroup().join(group);
        cgroup::create(&cgroup)?;
        Ok(self.netns.command(&cgroup, program))
    }

    /// Adds a pod under the pods' cgroup. It has no process before [`Pod::keep_alive`] or [`Pod::command`].
    ///
    /// # Errors
    /// Fails if a part of the pod cannot be made or the node is full.
    pub fn pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        self.add_pod(namespace, name, Membership::Mesh)
    }

    /// Adds a pod whose cgroup is outside the pods' cgroup, so no agent covers it.
    ///
    /// # Errors
    /// As [`Node::pod`].
    pub fn outside_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        self.add_pod(namespace, name, Membership::Outside)
    }

    fn add_pod(&self, namespace: &str, name: &str, membership: Membership) -> Result<Pod> {
        let reserved = self
            .next_pod
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next <= LAST_POD).then(|| next + 1));
        let Ok(host) = reserved else { bail!("node {} has no free pod address", self.name) };
        let short = format!("{namespace}_{name}");
        let netns = Netns::create(&[format!("{}-{short}", self.netns.name())])?.remove(0);
        let cgroup = match membership {
            Membership::Mesh => self.pods_cgroup().join(&short),
            Membership::Outside => self.host_cgroup().join(&short),
        };
        cgroup::create(&cgroup)?;
        let pod = Pod::new(
            self.name.clone(),
            namespace,
            name,
            (self.pod_ipv4(host), self.pod_ipv6(host)),
            (netns, cgroup),
            membership,
        );
        self.link_pod(&pod, host)?;
        Ok(pod)
    }

    /// Adds a point-to-point link like CNI's ptp plugin, so the node is the pod's only neighbour.
    fn link_pod(&self, pod: &Pod, host: u8) -> Result<()> {
        let (v4, v6) = (pod.ipv4(), pod.ipv6());
        let (gw4, gw6) = (self.pod_ipv4(1), self.pod_ipv6(1));
        let link = format!("pod{host}");
        let mut text = String::new();
        let _ = writeln!(text, "link add {link} type veth peer name eth0 netns {}", pod.netns().name());
        let _ = writeln!(text, "addr add {gw4}/32 dev {link}");
        let _ = writeln!(text, "addr add {gw6}/128 dev {link} nodad");
        let _ = writeln!(text, "link set {link} up");
        let _ = writeln!(text, "route add {v4}/32 dev {link} src {gw4}");
        let _ = writeln!(text, "route add {v6}/128 dev {link} src {gw6}");
        self.netns.ip(&text)?;
        text.clear();
        let _ = writeln!(text, "addr add {v4}/32 dev eth0");
        let _ = writeln!(text, "addr add {v6}/128 dev eth0 nodad");
        let _ = writeln!(text, "link set eth0 up");
        let _ = writeln!(text, "route add {gw4}/32 dev eth0 scope link");
        let _ = writeln!(text, "route add default via {gw4} dev eth0");
        let _ = writeln!(text, "route add {gw6}/128 dev eth0");
        let _ = writeln!(text, "route add default via {gw6} dev eth0");
        pod.netns().ip(&text)?;
        pod.netns().wait_for_links()?;
        self.netns.wait_for_links()
    }

    fn join_wire(&self, other: &Self) -> Result<()> {
        let mut text = String::new();
        let _ = writeln!(text, "addr add {}/24 dev {WIRE}", self.wire_ipv4());
        let _ = writeln!(text, "addr add {}/64 dev {WIRE} nodad", self.wire_ipv6());
        let _ = writeln!(text, "link set {WIRE} up");
        let _ = writeln!(text, "route add {}/24 via {}", other.pod_ipv4(0), other.wire_ipv4());
        let _ = writeln!(text, "route add {}/64 via {}", other.pod_ipv6(0), other.wire_ipv6());
        self.netns.ip(&text)
    }

    fn host_cgroup(&self) -> PathBuf {
        self.cgroups.join(format!("{}-host", self.prefix.as_str())).join(&self.name)
    }

    fn pod_ipv4(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, host)
    }

    fn pod_ipv6(&self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, self.number.into(), 0, 0, 0, 0, 0, host.into())
    }
}

impl Netns {
    /// Waits until no address is tentative.
    fn wait_for_links(&self) -> Result<()> {
        until(&format!("links of {} ready", self.name()), || {
            self.enter(|| {
                let links = fs::read_to_string("/proc/thread-self/net/if_inet6").context("read if_inet6")?;
                Ok((!links.lines().any(may_be_tentative)).then_some(()))
            })?
        })
    }
}

/// Returns true if the flags column of a line of `/proc/net/if_inet6` has the flag, or cannot be parsed.
fn may_be_tentative(line: &str) -> bool {
    /// `IFA_F_TENTATIVE` of linux/if_addr.h.
    const TENTATIVE: u32 = 0x40;
    let flags = line.split_whitespace().nth(4).and_then(|flags| u32::from_str_radix(flags, 16).ok());
    flags.is_none_or(|flags| flags & TENTATIVE != 0)
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
