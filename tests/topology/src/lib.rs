//! Nodes and pods made of network namespaces and cgroups, for the demo and the tests.
//!
//! ```text
//!   pod shop/client                                                         pod shop/web
//!   eth0 10.77.1.2, fd77:1::2                                               eth0 10.77.2.2, fd77:2::2
//!      |  veth                                                                 |  veth
//!   node a  (forwards, no NAT)  wire 10.76.0.1, fd76::1 ==== 10.76.0.2, fd76::2  node b
//!           `tacit agent` runs here                                `tacit agent` runs here
//! ```
//!
//! A pod is a network namespace, a cgroup v2 directory and a link to its node. A program started in it is in that
//! cgroup before its first instruction. Pods of a node are under `<cgroup2>/<prefix>/<node>`, which is the agent's
//! `podsCgroup`. Everything else (agents, captures, pods outside the mesh) is under `<cgroup2>/<prefix>-host/<node>`.
//!
//! No address, route or sysctl of the host is changed. Every resource has the topology's prefix in its name and is
//! removed by name: on drop, by a sweeper process when the owner dies, and by [`cleanup_stale`] when both were killed.
//!
//! | module | content |
//! |---|---|
//! | `topology` | [`Topology`]: the nodes and their wire, bpffs |
//! | `node` | [`Node`]: the pods of a node, address plan |
//! | `pod` | [`Pod`]: run programs in it, keep it alive |
//! | `netns`, `cgroup` | one namespace, one cgroup tree |
//! | [`nf_tables`] | rules in a namespace that translate addresses |
//! | `sweep` | removal by name, the sweeper process |
//! | `mesh` | [`MeshFiles`]: `tacit.yaml`, `directory.yaml`, `policy.yaml` of a node |
//! | `agent` | [`Agent`]: start, wait until ready, query, stop, kill, restart |
//! | `capture`, `pcap` | [`Capture`]: a capture of the wire; [`Traffic`]: its content |
//! | `process`, `wait` | run a command, a child that is killed on drop, poll a condition until a deadline |
//! | `scale` | [`scale()`]: the divisor of sizes on an emulated machine |

#![forbid(unsafe_code)]

mod agent;
mod capture;
mod cgroup;
mod mesh;
mod netns;
pub mod nf_tables;
mod node;
mod pcap;
mod pod;
mod process;
mod scale;
mod sweep;
mod topology;
mod wait;

pub use agent::{Agent, http_get};
pub use capture::Capture;
pub use cgroup::mount_point as cgroup_mount;
pub use mesh::{MeshFiles, Tunnel, WorkloadEntry, directory_text};
pub use netns::Netns;
pub use node::{KUBELET_NAMESPACE, Node};
pub use pcap::{TUNNEL_PORT, Traffic};
pub use pod::{Membership, Pod};
pub use process::{Process, run};
pub use scale::scale;
pub use sweep::cleanup_stale;
pub use topology::Topology;
pub use wait::{HANG, until, within};
