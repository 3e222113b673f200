//! A node, its pods, and the address plan.
//!
//! Node `n` (counted from 0) has 10.76.0.`n+1` and fd76::`n+1` on the wire. Its pods are in 10.77.`n+1`.0/24 and
//! fd77:`n+1`::/64, where the node itself has .1 and ::1. Its bridged pods are in 10.77.`n+101`.0/24 and
//! fd77:`n+101`::/64, with the same addresses on the bridge. Every topology has the same plan, because namespaces
//! isolate topologies that run at the same time.

use crate::{
    cgroup,
    netns::Netns,
    pod::{Membership, Pod},
    process::Process,
    sweep::Prefix,
    wait::until,
};
use anyhow::{Context, Result, bail};
use std::{
    ffi::OsStr,
    fmt::Write,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

/// Pods of this namespace have cgroups as the kubelet names them: `pod` with the UID, which is the pod's name here.
pub const KUBELET_NAMESPACE: &str = "pod";
/// Name of the node-to-node link, in every node.
pub(crate) const WIRE: &str = "wire";
/// Name of the bridge of bridged pods, as the bridge plugin of CNI names it.
pub(crate) const BRIDGE: &str = "cni0";
/// Distance of the third byte of bridged pods' addresses from the node's number.
const BRIDGED: u8 = 100;
/// Host part of the last pod's address, which bounds the number of pods of a node.
const LAST_POD: u8 = 253;

/// A node: a namespace that forwards between the wire and its pods.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    netns: Netns,
    prefix: Prefix,
    cgroups: PathBuf,
    next_pod: AtomicU8,
    bridge: OnceLock<()>,
}

/// Link between a pod and its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// Point to point, as CNI's ptp plugin makes it: the node is the pod's only neighbour.
    Routed,
    /// A port of the node's bridge, as CNI's bridge plugin makes it: the other pods are neighbours.
    Bridged,
}

impl Node {
    /// Makes a node without pods. Its number starts at 1 and is part of its addresses.
    pub(crate) fn new(name: &str, number: u8, netns: Netns, prefix: &Prefix, cgroups: &Path) -> Result<Self> {
        let (name, prefix, cgroups) = (name.to_owned(), prefix.clone(), cgroups.to_owned());
        let node = Self {
            name,
            number,
            netns,
            prefix,
            cgroups,
            next_pod: AtomicU8::new(2),
            bridge: OnceLock::new(),
        };
        cgroup::create(&node.pods_cgroup())?;
        Ok(node)
    }

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
        self.add_pod(namespace, name, Membership::Mesh, Layout::Routed)
    }

    /// Adds a pod like [`Node::pod`], whose link is a port of the node's bridge.
    ///
    /// # Errors
    /// As [`Node::pod`].
    pub fn bridged_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        self.add_pod(namespace, name, Membership::Mesh, Layout::Bridged)
    }

    /// Adds a pod with `hostNetwork`: its cgroup is under the pods' cgroup, its namespace and addresses are the node's.
    ///
    /// # Errors
    /// Fails if the cgroup cannot be made.
    pub fn host_network_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        let cgroup = self.pods_cgroup().join(format!("{namespace}_{name}"));
        cgroup::create(&cgroup)?;
        let addresses = (self.wire_ipv4(), self.wire_ipv6());
        let place = (self.netns.clone(), cgroup);
        Ok(Pod::new(self.name.clone(), namespace, name, addresses, place, Membership::Mesh))
    }

    /// Adds a pod whose cgroup is outside the pods' cgroup, so no agent covers it.
    ///
    /// # Errors
    /// As [`Node::pod`].
    pub fn outside_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        self.add_pod(namespace, name, Membership::Outside, Layout::Routed)
    }

    fn add_pod(&self, namespace: &str, name: &str, membership: Membership, layout: Layout) -> Result<Pod> {
        let reserved = self
            .next_pod
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next <= LAST_POD).then(|| next + 1));
        let Ok(host) = reserved else { bail!("node {} has no free pod address", self.name) };
        let short = format!("{namespace}_{name}");
        let netns = Netns::create(&[format!("{}-{short}", self.netns.name())])?.remove(0);
        let in_cgroup = if namespace == KUBELET_NAMESPACE { format!("pod{name}") } else { short };
        let cgroup = match membership {
            Membership::Mesh => self.pods_cgroup().join(&in_cgroup),
            Membership::Outside => self.host_cgroup().join(&in_cgroup),
        };
        cgroup::create(&cgroup)?;
        let pod = Pod::new(
            self.name.clone(),
            namespace,
            name,
            (self.pod_ipv4(layout, host), self.pod_ipv6(layout, host)),
            (netns, cgroup),
            membership,
        );
        match layout {
            Layout::Routed => self.link_pod(&pod, host)?,
            Layout::Bridged => self.plug_pod(&pod, host)?,
        }
        pod.netns().wait_for_links()?;
        self.netns.wait_for_links()?;
        Ok(pod)
    }

    /// Makes the sandbox of a routed pod anew, as after the end of its pause container: all its processes end, and namespace and
    /// link are replaced. Cgroup and addresses stay. Returns the process that keeps the pod alive.
    ///
    /// # Errors
    /// Fails if a part cannot be removed or made.
    pub fn renew_sandbox(&self, pod: &Pod) -> Result<Process> {
        let members = pod.cgroup().join("cgroup.procs");
        fs::write(pod.cgroup().join("cgroup.kill"), "1").context("end the pod's processes")?;
        until("the pod's processes ended", || Ok(fs::read_to_string(&members)?.is_empty().then_some(())))?;
        let host = pod.ipv4().octets()[3];
        self.netns.ip(&format!("link del pod{host}\n"))?;
        pod.netns().renew()?;
        self.link_pod(pod, host)?;
        pod.netns().wait_for_links()?;
        self.netns.wait_for_links()?;
        pod.keep_alive()
    }

    /// Adds a point-to-point link like CNI's ptp plugin, so the node is the pod's only neighbour.
    fn link_pod(&self, pod: &Pod, host: u8) -> Result<()> {
        let (v4, v6) = (pod.ipv4(), pod.ipv6());
        let (gw4, gw6) = (self.pod_ipv4(Layout::Routed, 1), self.pod_ipv6(Layout::Routed, 1));
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
        pod.netns().ip(&text)
    }

    /// Makes the pod's link a port of the bridge.
    fn plug_pod(&self, pod: &Pod, host: u8) -> Result<()> {
        let (gw4, gw6) = (self.pod_ipv4(Layout::Bridged, 1), self.pod_ipv6(Layout::Bridged, 1));
        let mut text = String::new();
        if self.bridge.set(()).is_ok() {
            let _ = writeln!(text, "link add {BRIDGE} type bridge forward_delay 0");
            let _ = writeln!(text, "addr add {gw4}/24 dev {BRIDGE}");
            let _ = writeln!(text, "addr add {gw6}/64 dev {BRIDGE} nodad");
            let _ = writeln!(text, "link set {BRIDGE} up");
        }
        let link = format!("pod{host}");
        let _ = writeln!(text, "link add {link} type veth peer name eth0 netns {}", pod.netns().name());
        let _ = writeln!(text, "link set {link} master {BRIDGE} up");
        self.netns.ip(&text)?;
        text.clear();
        let _ = writeln!(text, "addr add {}/24 dev eth0", pod.ipv4());
        let _ = writeln!(text, "addr add {}/64 dev eth0 nodad", pod.ipv6());
        let _ = writeln!(text, "link set eth0 up");
        let _ = writeln!(text, "route add default via {gw4} dev eth0");
        let _ = writeln!(text, "route add default via {gw6} dev eth0");
        pod.netns().ip(&text)
    }

    /// Adds the wire to the other node, with addresses and routes at both ends.
    pub(crate) fn wire_to(&self, other: &Self) -> Result<()> {
        let peer = other.netns.name();
        self.netns.ip(&format!("link add {WIRE} type veth peer name {WIRE} netns {peer}\n"))?;
        self.join_wire(other)?;
        other.join_wire(self)?;
        self.netns.wait_for_links()?;
        other.netns.wait_for_links()
    }

    fn join_wire(&self, other: &Self) -> Result<()> {
        let mut text = String::new();
        let _ = writeln!(text, "addr add {}/24 dev {WIRE}", self.wire_ipv4());
        let _ = writeln!(text, "addr add {}/64 dev {WIRE} nodad", self.wire_ipv6());
        let _ = writeln!(text, "link set {WIRE} up");
        for layout in [Layout::Routed, Layout::Bridged] {
            let (pods4, pods6) = (other.pod_ipv4(layout, 0), other.pod_ipv6(layout, 0));
            let _ = writeln!(text, "route add {pods4}/24 via {}", other.wire_ipv4());
            let _ = writeln!(text, "route add {pods6}/64 via {}", other.wire_ipv6());
        }
        self.netns.ip(&text)
    }

    fn host_cgroup(&self) -> PathBuf {
        self.cgroups.join(format!("{}-host", self.prefix.as_str())).join(&self.name)
    }

    fn pod_ipv4(&self, layout: Layout, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.subnet(layout), host)
    }

    fn pod_ipv6(&self, layout: Layout, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, self.subnet(layout).into(), 0, 0, 0, 0, 0, host.into())
    }

    fn subnet(&self, layout: Layout) -> u8 {
        match layout {
            Layout::Routed => self.number,
            Layout::Bridged => self.number + BRIDGED,
        }
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
