//! Keys, values and sizes of the maps, with the constants that both sides use.

use crate::{Address, PodCells, tcp_port};

/// Version of the maps' layout and meaning, raised with every change. Pinned maps of another version are not adopted.
pub const ABI_VERSION: u32 = 8;

/// Bounds of the maps, in entries.
pub mod limits {
    /// Enrolled pods of one node. Kubernetes' default limit is 110; large nodes run 250 to 500.
    pub const SLOTS: u32 = 1024;
    /// Pods of one node that are known, enrolled or not.
    pub const PODS: u32 = 4 * SLOTS;
    /// Addresses of enrolled pods, one of each family.
    pub const ADDRESSES: u32 = 2 * SLOTS;
    /// Connections and datagram flows that the node itself has with one pod. A pod with more loses its own oldest ones. Each
    /// packet of the node makes its entry again, so an entry is needed only until the packet is answered.
    pub const NODE_FLOWS_PER_POD: u32 = 256;
    /// Hardware addresses of the node's interfaces.
    pub const NODE_HARDWARE: u32 = 4 * PODS;
    /// Datagram flows of one pod whose answers are expected. A pod with more loses its own oldest ones.
    pub const ANSWERS_PER_POD: u32 = 1024;
    /// Ports of one pod whose mode differs from the pod's. Real policies have a few. The agent refuses a policy with more.
    pub const PORT_MODES_PER_POD: u32 = 128;
    /// Modes of single ports: the shares of all pods. Entries are allocated on demand, the 2 MiB of hash buckets at once.
    pub const PORT_MODES: u32 = SLOTS * PORT_MODES_PER_POD;
    /// Ranges of the mesh. Without service ranges, each enrolled service needs an entry. Entries are allocated on demand.
    pub const MESH_RANGES: u32 = 64 * 1024;
    /// The node's own addresses.
    pub const NODE_ADDRESSES: u32 = 1024;
    /// Addresses of all nodes of the cluster, up to three for each of 5,000 nodes.
    pub const CLUSTER_NODES: u32 = 16 * 1024;
    /// Ports of load balancers that have addresses of nodes, with the address: the shares of namespaces.
    pub const NODE_SERVICES: u32 = 16 * 1024;
    /// Most of one namespace: a load balancer with three ports at the addresses of 1,300 nodes.
    pub const NODE_SERVICES_PER_NAMESPACE: u32 = NODE_SERVICES / 4;
    /// Entries of the map of these ports: twice what it can have, since new entries come before old ones go. An address that
    /// load balancers have takes one entry too. Entries are allocated on demand, the 1 MiB of hash buckets at once.
    pub const NODE_SERVICE_ENTRIES: u32 = 2 * (NODE_SERVICES + CLUSTER_NODES);
    /// Cgroups of the agent and of predecessors that still drain.
    pub const AGENTS: u32 = 16;
    /// Destinations of `allowClear`.
    pub const CLEAR: u32 = 1024;
    /// Kinds of dropped packets of one pod that are counted each: other end, reason and protocol. A pod with more loses its
    /// least recently seen ones.
    pub const DROPS_PER_POD: u32 = 32;
    /// Shares of drops for pods without a slot. Two such pods may have the same one.
    pub const DROPS_WITHOUT_SLOT: u32 = 64;
    /// Captured connections of one pod whose handshake on the loopback has not ended. A connection counts from `connect()` until
    /// the agent's listener answers, so also for all of the time that it is held. A burst of a busy client fits: a tunnel
    /// needs milliseconds, and each of its connections waits for one. With
    /// [`pod_flag::CONNECT_EARLY`](super::pod_flag::CONNECT_EARLY) the kernel ends the handshake inside `connect()`, except while
    /// the listener's accept queue (4,096) is full.
    pub const CAPTURED_PER_POD: u32 = 2048;
    /// Captured connections whose handshake on the loopback has not ended: the shares of all pods. Entries are allocated on
    /// demand; the map has 32 MiB of hash buckets (16 bytes an entry) from the start.
    pub const CAPTURED: u32 = SLOTS * CAPTURED_PER_POD;
    /// Connections of the agent to one pod's applications whose handshake on the loopback has not ended. The kernel ends it inside
    /// `connect()`, except while the application's accept queue is full.
    pub const DIALLED_PER_POD: u32 = 512;
    /// Connections of the agent to applications whose handshake on the loopback has not ended: the shares of all pods. Entries
    /// are allocated on demand; the map has 8 MiB of hash buckets from the start.
    pub const DIALLED: u32 = SLOTS * DIALLED_PER_POD;
}

/// Settings written into the programs before they are loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Depth of the pods' parent cgroup below the hierarchy's root (the root itself is 0).
    pub pods_level: u32,
    /// [`ABI_VERSION`] of the agent that loads the programs.
    pub abi_version: u32,
    /// Id of the pods' parent cgroup.
    pub pods_cgroup: u64,
    /// 1 when the kernel has `bpf_set_retval` at connect hooks, else 0.
    pub has_set_retval: u32,
    /// 1 when the kernel has `bpf_skc_to_tcp6_sock` at connect hooks, else 0.
    pub has_tcp6_sock: u32,
    /// Cookie of the node's own network namespace. The kernel never gives 0.
    pub node_netns_cookie: u64,
}

/// State that the agent keeps up to date for the programs. It is one entry, written whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Time of the last heartbeat in nanoseconds of `CLOCK_MONOTONIC`; 0 before the first one.
    pub heartbeat: u64,
    /// Age in nanoseconds above which the heartbeat is stale.
    pub stale_after: u64,
    /// [`Mode`] of the mesh, applied to pods without an entry. 0 (never written) leaves them alone.
    pub default_mode: u32,
    /// Explicit padding, zero.
    pub pad: u32,
    /// Secret of the hashes of [`crate::answer_cells`] and [`crate::NodeFlow::key`], so that pods cannot choose cells or forge a
    /// flow. The first heartbeat sets it; it stays the same while the map is pinned.
    pub seed: u64,
}

impl State {
    /// Returns true if the agent is gone or stuck. Clocks of two CPUs may differ, so a heartbeat in the future is fresh.
    #[inline(always)]
    #[must_use]
    pub const fn is_stale(&self, now: u64) -> bool {
        self.heartbeat == 0 || now.saturating_sub(self.heartbeat) > self.stale_after
    }
}

/// A pod that is known: enrolled, or exempt. The map's key is the id of the pod's cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// The pod's IPv4 address or [`Address::NONE`].
    pub v4: Address,
    /// The pod's IPv6 address or [`Address::NONE`].
    pub v6: Address,
    /// Index of the pod's listeners, see [`listener_index`].
    pub slot: u32,
    /// [`Mode`] of ports without an entry of their own.
    pub mode: u32,
    /// Bits of [`pod_flag`].
    pub flags: u32,
    /// Port on which the agent listens for the pod's captured connections; 0 is [`tcp_port::CAPTURE`].
    pub capture_port: u32,
}

impl Pod {
    /// Returns the entry that applies to a pod without one in a STRICT mesh: no address, no listener, no plaintext.
    #[inline(always)]
    #[must_use]
    pub const fn unknown() -> Self {
        Self {
            netns_cookie: 0,
            v4: Address::NONE,
            v6: Address::NONE,
            slot: u32::MAX,
            mode: Mode::Strict as u32,
            flags: pod_flag::EGRESS_STRICT | pod_flag::UNKNOWN,
            capture_port: 0,
        }
    }

    /// Returns the port that the pod's captured connections are redirected to.
    #[inline(always)]
    #[must_use]
    pub const fn effective_capture_port(&self) -> u16 {
        if self.capture_port == 0 { tcp_port::CAPTURE } else { self.capture_port as u16 }
    }

    /// Returns true for the pod's addresses. A pod without an address of a family does not own the unspecified one.
    #[inline(always)]
    #[must_use]
    pub const fn owns(&self, address: &Address) -> bool {
        !address.is_none() && (address.same(&self.v4) || address.same(&self.v6))
    }

    /// Returns true if any address of the pod is known.
    #[inline(always)]
    #[must_use]
    pub const fn has_addresses(&self) -> bool {
        !self.v4.is_none() || !self.v6.is_none()
    }

    /// Returns true if this bit of [`pod_flag`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// Flags of a pod.
pub mod pod_flag {
    flags! {
        /// The pod sends no plaintext into the mesh.
        EGRESS_STRICT = 1;
        /// The pod's UDP may pass as plaintext.
        UDP_ALLOWED = 2;
        /// The pod is known and not enrolled: it is left alone, but cannot send from addresses that are not its own.
        EXEMPT = 4;
        /// The steering program of the pod's namespace supports the ports that captured IPv6 connections are spread over.
        /// Entries of earlier agents lack the flag.
        SPREAD = 8;
        /// Authorization policies select the pod, so connections reach it through the agent only.
        JUDGED = 16;
        /// No source has named the pod yet. Only [`super::Pod::unknown`] has the flag, no entry of the map.
        UNKNOWN = 32;
        /// `connect()` of the pod succeeds before the destination has answered.
        CONNECT_EARLY = 64;
    }
}

/// A destination of `allowClear`, which STRICT pods may reach as plaintext.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClearKey {
    /// Destination address.
    pub address: Address,
    /// Destination port.
    pub port: u32,
    /// IP protocol number.
    pub protocol: u32,
}

/// Facts about an enrolled pod for `steer`. The map's key is one of the pod's addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steered {
    /// Index of the pod's listeners.
    pub slot: u32,
    /// [`Mode`] of ports without an entry of their own.
    pub mode: u32,
    /// Bits of [`steer_flag`].
    pub flags: u32,
    /// The pod's [`PodCells::mark`].
    pub mark: u32,
}

impl Steered {
    /// Returns the pod's cells in the tables of flows.
    #[inline(always)]
    #[must_use]
    pub const fn cells(&self) -> PodCells {
        PodCells { slot: self.slot, mark: self.mark }
    }

    /// Returns true if this bit of [`steer_flag`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// Flags for plaintext that arrives at a pod.
pub mod steer_flag {
    flags! {
        /// Authorization policies select the pod, so the agent decides on plaintext that the mode allows.
        JUDGED = 1;
    }
}

/// Key of the mode of a single port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// The pod's slot.
    pub slot: u32,
    /// TCP port.
    pub port: u32,
}

/// mTLS mode of a workload's inbound connections. Maps hold it as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Mode {
    /// Plaintext passes, and peers do not tunnel. Authenticated flows pass too.
    Disable = 1,
    /// Plaintext and mTLS both pass.
    Permissive = 2,
    /// Only mTLS passes. Unknown numbers are read as this mode.
    Strict = 3,
}

impl Mode {
    /// Returns the mode for a number in a map; [`Mode::Strict`] for an unknown one.
    #[inline(always)]
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        match raw {
            1 => Self::Disable,
            2 => Self::Permissive,
            _ => Self::Strict,
        }
    }
}

/// The agent's listeners in a pod, by index into its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Listener {
    /// Accepts connections to the tunnel port.
    Tunnel = 0,
    /// Accepts plaintext that the agent rejects with a log line (STRICT) or checks against authorization policies.
    Plaintext = 1,
}

/// Number of [`Listener`]s of a pod.
pub const LISTENERS_PER_POD: u32 = 2;

/// Returns the index into the map of listeners.
#[inline(always)]
#[must_use]
pub const fn listener_index(slot: u32, listener: Listener) -> u32 {
    slot * LISTENERS_PER_POD + listener as u32
}

/// Key of a connection from `connect()` to the other side's `accept()`, as the connecting side sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Cookie of the network namespace of both ends.
    pub netns_cookie: u64,
    /// Connecting side's address.
    pub local: Address,
    /// Accepting side's address.
    pub remote: Address,
    /// Connecting side's port.
    pub local_port: u32,
    /// Accepting side's port.
    pub remote_port: u32,
}

impl Tuple {
    /// Returns true for the target of a spread IPv6 connection, which the steering program redirects to the agent.
    #[inline(always)]
    #[must_use]
    pub const fn is_spread(&self) -> bool {
        let first = tcp_port::CAPTURE_V6_FIRST as u32;
        self.remote.same(&Address::LOOPBACK_V6)
            && self.remote_port >= first
            && self.remote_port < first + tcp_port::CAPTURE_V6_COUNT as u32
    }

    /// Returns true for a connection to a port of the agent's capture listener, or to one that captured connections are
    /// spread over.
    #[inline(always)]
    #[must_use]
    pub const fn is_to_capture(&self) -> bool {
        self.is_spread()
            || self.remote.is_loopback()
                && (self.remote_port == tcp_port::CAPTURE as u32
                    || self.remote_port == tcp_port::spare(tcp_port::CAPTURE) as u32)
    }

    /// Returns the key under which a captured connection is stored. sk_lookup cannot read its namespace's cookie, so the
    /// key of a spread connection leaves the cookie out. Its source, the pod's own address, identifies the pod.
    #[inline(always)]
    #[must_use]
    pub const fn of_captured(self) -> Self {
        if self.is_spread() { Self { netns_cookie: 0, ..self } } else { self }
    }
}

/// Address and port behind a [`Tuple`]: a captured connection's destination, or the client that the agent dials for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The address.
    pub address: Address,
    /// The port.
    pub port: u32,
    /// Slot of the pod in whose share the entry counts.
    pub slot: u32,
}

/// Kinds of [`Names`] entries.
pub mod names_kind {
    /// A captured connection of an application: `peer` is its destination, `own` the pod's address.
    pub const CAPTURED: u32 = 1;
    /// A connection of the agent to an application: `peer` is the client that the agent dials for.
    pub const DIALLED: u32 = 2;
    /// The application's end of a connection that the agent dialled.
    pub const ACCEPTED: u32 = 3;
    /// A plaintext connection that an application accepted, as its port's mode allowed. The kernel's own names are right.
    pub const CLEAR: u32 = 4;
    /// A plaintext connection from the node itself, proven on the host end of the pod's link, that an application accepted.
    pub const NODE: u32 = 5;
    /// A tunnel that the agent opened or accepted. It passes a pod's link to `peer` only.
    pub const TUNNEL: u32 = 6;
    /// A plaintext connection of the agent to a port whose mode is DISABLE. It passes a pod's link to `peer` only.
    pub const DISABLED: u32 = 8;
    /// The agent's end of a captured connection: `peer` is the connection's destination.
    pub const REDIRECTED: u32 = 7;
}

/// Names that a socket's application sees, stored in the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Answer for `getpeername` and `accept`; of the agent's connections that pass a pod's link, the other end.
    pub peer: Address,
    /// Answer for `getsockname`, for [`names_kind::CAPTURED`] only: the address of the socket's pod.
    pub own: Address,
    /// Port of `peer`.
    pub peer_port: u32,
    /// One of [`names_kind`].
    pub kind: u32,
    /// Slot of the pod, for [`names_kind::CAPTURED`] and [`names_kind::DIALLED`].
    pub slot: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}

/// Address in a key of the longest-prefix map of mesh ranges. IPv4 prefix lengths are raised by 96.
pub type MeshKey = [u32; 4];

const _: () = {
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<Settings>() == 32);
    assert!(size_of::<State>() == 32);
    assert!(size_of::<Pod>() == 56);
    assert!(size_of::<ClearKey>() == 24);
    assert!(size_of::<Steered>() == 16);
    assert!(size_of::<PortKey>() == 8);
    assert!(size_of::<Tuple>() == 48);
    assert!(size_of::<Destination>() == 24);
    assert!(size_of::<Names>() == 48);
};

#[cfg(feature = "user")]
mod user {
    use super::{Address, ClearKey, Destination, Names, Pod, PortKey, Settings, State, Steered, Tuple};

    // SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for State {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ClearKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Steered {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PortKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Destination {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Names {}
}

#[cfg(test)]
mod tests;
