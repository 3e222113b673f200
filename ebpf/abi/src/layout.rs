//! Keys, values and sizes of the maps, with the constants that both sides need.

use crate::Address;

/// Raised with every change to a map's layout or meaning. Pinned maps of another version are not adopted.
pub const ABI_VERSION: u32 = 3;

/// TCP ports of the data path, reserved in every enrolled pod where nothing else is said.
pub mod tcp_port {
    /// Captured outbound connections, on the pod's loopback.
    pub const CAPTURE: u16 = 15001;
    /// First of the ports of `::1` that captured IPv6 connections are spread over, see `Address::capture_port_v6`.
    /// Nobody listens on them: the steering program hands what was captured to the listener on [`CAPTURE`], and leaves
    /// everything else alone.
    pub const CAPTURE_V6_FIRST: u16 = 15040;
    /// Number of those ports; a power of two.
    pub const CAPTURE_V6_COUNT: u16 = 16;
    /// Steered inbound plaintext.
    pub const PLAINTEXT: u16 = 15006;
    /// The tunnel.
    pub const TUNNEL: u16 = 15008;

    /// Where an agent listens instead that takes over from one whose listeners are still open. Nobody dials it: who is to
    /// be reached there is led there.
    #[must_use]
    pub const fn spare(port: u16) -> u16 {
        port + 1
    }

    #[inline(always)]
    const fn is_own_or_spare(port: u16, own: u16) -> bool {
        port == own || port == spare(own)
    }

    /// Is it one of these?
    #[inline(always)]
    #[must_use]
    pub const fn is_reserved(port: u16) -> bool {
        is_own_or_spare(port, CAPTURE) || is_own_or_spare(port, PLAINTEXT) || is_own_or_spare(port, TUNNEL)
    }
}

/// Bounds of the maps, in entries.
pub mod limits {
    /// Pods enrolled on one node; Kubernetes' default limit is 110, large nodes run 250-500.
    pub const PODS: u32 = 1024;
    /// Addresses of enrolled pods: one of each family.
    pub const ADDRESSES: u32 = 2 * PODS;
    /// Per-port modes over all pods.
    pub const PORT_MODES: u32 = 16 * 1024;
    /// Ranges of the mesh: where services' ranges are not told, each enrolled service has one. They take memory as they come.
    pub const MESH_RANGES: u32 = 64 * 1024;
    /// The node's own addresses.
    pub const NODE_ADDRESSES: u32 = 1024;
    /// Agents' cgroups: one, and those of predecessors that still drain.
    pub const AGENTS: u32 = 16;
    /// Destinations that may be reached in clear.
    pub const CLEAR: u32 = 1024;
    /// Kinds of dropped packets that are told apart; the least recently seen makes room.
    pub const DROPS: u32 = 4096;
    /// Connections between `connect()` and the agent's (or the application's) `accept()`. Above the sum of accept
    /// backlogs of a busy node; a full map refuses new captured connections and counts them.
    pub const PENDING: u32 = 64 * 1024;
}

/// Settings written into the programs before they are loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Depth of the pods' parent cgroup below the hierarchy's root (the root itself is 0).
    pub pods_level: u32,
    /// [`ABI_VERSION`] of the agent that loads.
    pub abi_version: u32,
    /// Id of the pods' parent cgroup.
    pub pods_cgroup: u64,
    /// 1 when the kernel has `bpf_set_retval` at connect hooks, else 0.
    pub has_set_retval: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}

/// What the agent keeps telling the programs; one entry, written whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// When the agent last said that it lives: nanoseconds of `CLOCK_MONOTONIC`; 0 is never.
    pub heartbeat: u64,
    /// Age in nanoseconds from which on a heartbeat is stale.
    pub stale_after: u64,
    /// [`Mode`] of the mesh: what pods meet that have no entry yet. 0 (never written) leaves them alone.
    pub default_mode: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}

impl State {
    /// Is the agent gone, or stuck? A clock that seems to run backwards (another CPU's) is no sign of it.
    #[inline(always)]
    #[must_use]
    pub const fn is_stale(&self, now: u64) -> bool {
        self.heartbeat == 0 || now.saturating_sub(self.heartbeat) > self.stale_after
    }
}

/// An enrolled pod; map key: its cgroup's id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// The pod's IPv4 address or [`Address::NONE`].
    pub v4: Address,
    /// The pod's IPv6 address or [`Address::NONE`].
    pub v6: Address,
    /// Index of its listeners, see [`listener_index`].
    pub slot: u32,
    /// [`Mode`] of its ports without an own entry.
    pub mode: u32,
    /// Bits of [`pod_flag`].
    pub flags: u32,
    /// Where the agent listens for its captured connections; 0 is [`tcp_port::CAPTURE`].
    pub capture_port: u32,
}

impl Pod {
    /// What a pod without an entry is held to when the mesh is STRICT: no address, no listener, nothing in clear.
    #[inline(always)]
    #[must_use]
    pub const fn unknown() -> Self {
        Self {
            netns_cookie: 0,
            v4: Address::NONE,
            v6: Address::NONE,
            slot: u32::MAX,
            mode: Mode::Strict as u32,
            flags: pod_flag::EGRESS_STRICT,
            capture_port: 0,
        }
    }

    /// The port that its captured connections are sent to.
    #[inline(always)]
    #[must_use]
    pub const fn captures_at(&self) -> u16 {
        if self.capture_port == 0 { tcp_port::CAPTURE } else { self.capture_port as u16 }
    }

    /// Is it one of the pod's addresses?
    #[inline(always)]
    #[must_use]
    pub const fn owns(&self, address: &Address) -> bool {
        address.same(&self.v4) || address.same(&self.v6)
    }

    /// Is this bit of [`pod_flag`] set?
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// What holds for one pod.
pub mod pod_flag {
    /// It sends nothing in clear into the mesh.
    pub const EGRESS_STRICT: u32 = 1;
    /// Its UDP may pass in clear.
    pub const UDP_ALLOWED: u32 = 2;
    /// It belongs to no mesh: left alone.
    pub const EXEMPT: u32 = 4;
    /// The program that steers its namespace knows the ports that captured IPv6 connections are spread over. An entry of an
    /// earlier agent says that it does not.
    pub const SPREAD: u32 = 8;
}

/// A destination that strict pods may reach in clear.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClearKey {
    /// Its address.
    pub address: Address,
    /// Its port.
    pub port: u32,
    /// Number of its IP protocol.
    pub protocol: u32,
}

/// What was dropped: key of a counter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DropKey {
    /// Id of the pod's cgroup.
    pub cgroup: u64,
    /// The other end's address.
    pub remote: Address,
    /// The `Reason`.
    pub reason: u32,
    /// Number of the IP protocol.
    pub protocol: u32,
}

/// What `steer` needs of an enrolled pod; map key: one of its addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steered {
    /// Index of its listeners.
    pub slot: u32,
    /// [`Mode`] of ports without an own entry.
    pub mode: u32,
    /// Bits of [`steer_flag`].
    pub flags: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}

impl Steered {
    /// Is this bit of [`steer_flag`] set?
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// What holds for plaintext that arrives at one pod.
pub mod steer_flag {
    /// Authorization policies select the pod: the agent decides on plaintext that its mode would let through.
    pub const JUDGED: u32 = 1;
}

/// Key of a port's own mode.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// The pod's slot.
    pub slot: u32,
    /// TCP port.
    pub port: u32,
}

/// What an inbound plaintext connection meets, as a number in maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    /// Plaintext passes; peers are told not to tunnel.
    Disable = 1,
    /// Plaintext and mTLS both pass.
    Permissive = 2,
    /// Only mTLS passes. Any number that is no mode is read as this.
    Strict = 3,
}

impl Mode {
    /// From a map's number; unknown is [`Mode::Strict`].
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
    /// Takes connections to the tunnel port.
    Tunnel = 0,
    /// Takes plaintext that needs the agent's look (STRICT: to refuse it by name; authorization policies: to judge it).
    Plaintext = 1,
}

/// Number of [`Listener`]s a pod has.
pub const LISTENERS_PER_POD: u32 = 2;

/// Index into the listeners' map.
#[inline(always)]
#[must_use]
pub const fn listener_index(slot: u32, listener: Listener) -> u32 {
    slot * LISTENERS_PER_POD + listener as u32
}

/// A connection as its connecting side sees it: key from `connect()` to the other side's `accept()`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Cookie of the network namespace both ends live in.
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
    /// Was it captured over IPv6 and spread, so that the steering program has to hand it to the agent?
    #[inline(always)]
    #[must_use]
    pub const fn is_spread(&self) -> bool {
        let first = tcp_port::CAPTURE_V6_FIRST as u32;
        self.remote.same(&Address::LOOPBACK_V6)
            && self.remote_port >= first
            && self.remote_port < first + tcp_port::CAPTURE_V6_COUNT as u32
    }

    /// The key under which a captured connection is kept. The steering program is not told in which namespace it runs, so
    /// a spread connection is known by its source alone: the pod's own address.
    #[inline(always)]
    #[must_use]
    pub const fn of_captured(self) -> Self {
        if self.is_spread() { Self { netns_cookie: 0, ..self } } else { self }
    }
}

/// Address and port that stand behind a [`Tuple`]: the destination asked for, or the client behind an agent's dial.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The address.
    pub address: Address,
    /// The port.
    pub port: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}

/// What a [`Names`] entry is for.
pub mod names_kind {
    /// An application's connection that was captured: `peer` is what it asked for, `own` its pod's address.
    pub const CAPTURED: u32 = 1;
    /// The agent's connection to an application: `peer` is the client it stands for.
    pub const DIALLED: u32 = 2;
    /// The application's end of such a connection.
    pub const ACCEPTED: u32 = 3;
    /// A connection that an application accepted in clear from a mesh address, as its port's mode allowed: the names
    /// are true as they are.
    pub const CLEAR: u32 = 4;
}

/// The truth about a socket, kept in the socket: what its application should be told.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Answer for `getpeername` and `accept`.
    pub peer: Address,
    /// Answer for `getsockname`, for [`names_kind::CAPTURED`] only: the address of the pod that the socket is of.
    pub own: Address,
    /// Port that goes with `peer`.
    pub peer_port: u32,
    /// One of [`names_kind`].
    pub kind: u32,
}

/// Data of a mesh range's key in the longest-prefix map; IPv4 prefixes are lengthened by 96.
pub type MeshKey = [u32; 4];

const _: () = {
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<Settings>() == 24);
    assert!(size_of::<State>() == 24);
    assert!(size_of::<Pod>() == 56);
    assert!(size_of::<ClearKey>() == 24);
    assert!(size_of::<DropKey>() == 32);
    assert!(size_of::<Steered>() == 16);
    assert!(size_of::<PortKey>() == 8);
    assert!(size_of::<Tuple>() == 48);
    assert!(size_of::<Destination>() == 24);
    assert!(size_of::<Names>() == 40);
};

#[cfg(feature = "user")]
mod user {
    use super::{
        Address, ClearKey, Destination, DropKey, Names, Pod, PortKey, Settings, State, Steered, Tuple,
    };

    // SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for State {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ClearKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DropKey {}
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
