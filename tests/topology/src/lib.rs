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
//! A pod is a network namespace, a cgroup v2 directory and a link to its node; programs started in it stand in that
//! cgroup from before their first instruction. Pods of a node lie under `<cgroup2>/<prefix>/<node>`, which is what an
//! agent is told to watch; everything else that is started (agents, captures, pods outside the mesh) lies under
//! `<cgroup2>/<prefix>-host/<node>`.
//!
//! Nothing leaves these namespaces: no address of the host, no route and no sysctl of the host is touched. Everything
//! made carries the topology's prefix in its name, so it is removed by name: on drop, by a guard process when the
//! owner dies, and by [`cleanup_stale`] should even that have been killed.
//!
//! | module | what it holds |
//! |---|---|
//! | `topology` | [`Topology`]: the nodes and their wire, bpffs |
//! | `node` | [`Node`]: the pods of a node, address plan |
//! | `pod` | [`Pod`]: run programs in it, keep it alive, remove it |
//! | `netns`, `cgroup` | one namespace, one cgroup tree |
//! | `sweep` | removal by name, the guard process |
//! | `mesh` | [`MeshFiles`]: `tacit.yaml`, `directory.yaml`, `policy.yaml` of a node |
//! | `agent` | [`Agent`]: start, wait until ready, ask, stop, kill, restart |
//! | `capture`, `pcap` | [`Capture`]: what crossed the wire; [`Traffic`]: what it was |
//! | `process`, `wait` | run a command to its end, a child killed on drop, poll a condition, up to the limit for hangs |

#![forbid(unsafe_code)]

mod agent;
mod capture;
mod cgroup;
mod mesh;
mod netns;
mod node;
mod pcap;
mod pod;
mod process;
mod sweep;
mod topology;
mod wait;

pub use agent::{Agent, http_get};
pub use capture::Capture;
pub use mesh::{MeshFiles, Tunnel, WorkloadEntry};
pub use netns::Netns;
pub use node::Node;
pub use pcap::{TUNNEL_PORT, Traffic};
pub use pod::{Membership, Pod};
pub use process::{Process, run};
pub use sweep::cleanup_stale;
pub use topology::Topology;
pub use wait::{HANG, until, within};
