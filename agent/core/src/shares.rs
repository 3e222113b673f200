//! The shares of the node: each resource that a pod, a source address or a namespace can use up, with its bound in total, the
//! share of one holder, and the reason for both figures.
//!
//! A full share is the loss of its holder alone: the agent refuses the holder's next use and counts the refusal. [`SHARES`] is the
//! only place of these figures. `tacit status` and the metrics show the use of every row as a [`ShareUse`].
//!
//! | module | content |
//! |---|---|
//! | `ledger` | counts the units of every holder, and admits by the rule below |
//! | `connections` | the ledgers of connections: by pod, by source, by source at a pod |
//! | `queue` | a ledger whose newcomers wait, with fair turns |
//!
//! # Rule
//!
//! A holder may hold a further unit while it holds less than its share, and less than [`GREED`] times what is free. One greedy
//! holder so leaves a third of the total, two leave a fifth, `n` leave `1 / (2n + 1)`. A holder that has nothing always gets a
//! unit while one is free, however many others are greedy.

pub mod connections;
pub mod ledger;
pub mod queue;

use tacit_abi::limits;

pub use ledger::{Full, Ledger};

/// A holder holds less than this multiple of the free units. 1 would leave half of the total idle beside one busy pod; 2
/// leaves a third.
pub const GREED: u64 = 2;

/// One resource of the node.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Stable name: the metric's label.
    pub resource: &'static str,
    /// The counted units, in words.
    pub counts: &'static str,
    /// The party whose units are bounded.
    pub holder: Holder,
    /// Bound over all holders.
    pub total: Total,
    /// Bound of one holder.
    pub each: Each,
    /// The effect of a full share on its holder.
    pub effect: &'static str,
    /// The reason for the figures.
    pub reason: &'static str,
}

/// The party whose units are bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// A pod of this node.
    Pod,
    /// A remote address.
    Source,
    /// A remote address, at one pod of this node.
    SourceAtPod,
    /// A namespace.
    Namespace,
    /// An object of the API.
    Object,
}

impl Holder {
    /// Returns the name for status and documents.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Source => "source",
            Self::SourceAtPod => "source_at_pod",
            Self::Namespace => "namespace",
            Self::Object => "object",
        }
    }
}

/// A bound over all holders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Total {
    /// This many units.
    Fixed(u64),
    /// A part of the descriptors that the process may have open, but no more than `most` units.
    Descriptors {
        /// Sixteenths of the limit.
        sixteenths: u64,
        /// Descriptors of one unit.
        a_unit: u64,
        /// Units.
        most: u64,
    },
    /// None for the node: each holder has its share, whatever others hold.
    Unbounded,
}

/// The bound of one holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Each {
    /// This many units.
    Fixed(u64),
    /// Two thirds of the total: the rule of [`GREED`] for a holder that is alone.
    Rule,
}

/// The bounds of one share on this node, in units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Over all holders; `u64::MAX` for none.
    pub total: u64,
    /// Of one holder.
    pub each: u64,
}

/// The capacities of the node that bounds depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Descriptors that the process may have open.
    pub descriptors: u64,
}

impl Share {
    /// Returns the fixed bound of one holder. `u64::MAX` if the bound depends on what is free.
    #[must_use]
    pub const fn fixed(&self) -> u64 {
        match self.each {
            Each::Fixed(units) => units,
            Each::Rule => u64::MAX,
        }
    }

    /// Returns the bounds on a node with `capacity`.
    #[must_use]
    pub fn bounds(&self, capacity: Capacity) -> Bounds {
        let total = match self.total {
            Total::Fixed(units) => units,
            Total::Descriptors { sixteenths, a_unit, most } => {
                (capacity.descriptors.saturating_mul(sixteenths) / 16 / a_unit).clamp(1, most)
            }
            Total::Unbounded => u64::MAX,
        };
        let each = match self.each {
            Each::Fixed(units) => units.min(total),
            Each::Rule => alone(total),
        };
        Bounds { total, each }
    }
}

/// Returns what the rule of [`GREED`] leaves to a holder that is alone.
fn alone(total: u64) -> u64 {
    let greedy = u128::from(total) * u128::from(GREED);
    u64::try_from(greedy.div_ceil(u128::from(GREED) + 1)).unwrap_or(total)
}

/// The use of one share at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareUse<H> {
    /// Name of the row in [`SHARES`].
    pub resource: &'static str,
    /// Bounds on this node.
    pub bounds: Bounds,
    /// Units of all holders; of a source at a pod, the units of all sources at that pod.
    pub used: u64,
    /// The holder with the most units, and its units.
    pub fullest: Option<(H, u64)>,
    /// Uses that were refused since the agent started.
    pub refused: u64,
}

impl<H> ShareUse<H> {
    /// Returns true if the fullest holder gets no further unit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let Bounds { total, each } = self.bounds;
        let greedy = total.saturating_sub(self.used).saturating_mul(GREED);
        self.fullest.as_ref().is_some_and(|(_, held)| *held >= each || *held >= greedy)
    }

    /// Returns the same use with the holder as `name` describes it.
    pub fn named<N>(self, name: impl FnOnce(H) -> N) -> ShareUse<N> {
        let Self { resource, bounds, used, fullest, refused } = self;
        ShareUse {
            resource,
            bounds,
            used,
            fullest: fullest.map(|(holder, units)| (name(holder), units)),
            refused,
        }
    }
}

/// Connections by pod.
pub const CONNECTIONS: Share = Share {
    resource: "connections",
    counts: "connections that the agent carries or opens, in both directions, idle tunnel sessions of peers included",
    holder: Holder::Pod,
    total: Total::Descriptors { sixteenths: 14, a_unit: 2, most: u64::MAX },
    each: Each::Rule,
    effect: "new connections of and to the pod are refused (`pod_connections`)",
    reason: "A connection has two sockets. An eighth of the descriptors is for pods' listeners, idle sessions and control.",
};

/// Connections by source address.
pub const SOURCE_CONNECTIONS: Share = Share {
    resource: "source_connections",
    counts: "connections from one address to pods of this node",
    holder: Holder::Source,
    total: CONNECTIONS.total,
    each: Each::Rule,
    effect: "new connections of the address are refused (`source_connections`)",
    reason: "One remote pod must not use up what the pods of this node have.",
};

/// Connections by source address at one pod. The total is the share of the pod.
pub const SOURCE_CONNECTIONS_AT_POD: Share = Share {
    resource: "source_connections_at_pod",
    counts: "connections from one address to one pod of this node",
    holder: Holder::SourceAtPod,
    total: Total::Unbounded,
    each: Each::Rule,
    effect: "new connections of the address to the pod are refused (`source_connections`)",
    reason: "One client must not use up the share of a server: it gets two thirds of the pod's.",
};

/// Idle sessions by pod.
pub const IDLE_SESSIONS: Share = Share {
    resource: "idle_sessions",
    counts: "idle tunnel sessions that pods of this node keep for their next connections",
    holder: Holder::Pod,
    total: Total::Descriptors { sixteenths: 1, a_unit: 1, most: 8192 },
    each: Each::Rule,
    effect: "a session of the pod is closed; its next connection makes a handshake",
    reason: "A session costs a socket and a few KiB here and at its peer.",
};

/// Connections that speak HBONE and carry no flow, by pod.
pub const HBONE_CONNECTIONS: Share = Share {
    resource: "hbone_connections",
    counts: "connections to servers that speak HBONE, without a flow, that pods of this node keep for their next connections",
    holder: Holder::Pod,
    total: Total::Descriptors { sixteenths: 1, a_unit: 4, most: 2048 },
    each: Each::Rule,
    effect: "a connection of the pod is closed; its next connection makes a handshake",
    reason: "A connection costs two descriptors and some KiB here. Half of a sixteenth leaves the other half to listeners and control.",
};

/// Handshakes of incoming tunnels by source address.
pub const HANDSHAKES: Share = Share {
    resource: "handshakes",
    counts: "TLS handshakes of incoming tunnels that are under way",
    holder: Holder::Source,
    total: Total::Fixed(1024),
    each: Each::Fixed(128),
    effect: "the address's further handshakes wait 5 s for their turn, then they are refused (`handshake_limit`)",
    reason: "A handshake costs a millisecond of a core and 30 kB. 128 at a time keep a core busy over a round trip of 100 ms.",
};

/// Handshakes of incoming tunnels by the pod that they come to.
pub const POD_HANDSHAKES: Share = Share {
    resource: "pod_handshakes",
    counts: "TLS handshakes of incoming tunnels that are under way, by the pod that they come to",
    holder: Holder::Pod,
    total: HANDSHAKES.total,
    each: Each::Rule,
    effect: "further handshakes to the pod wait 5 s for their turn, then they are refused (`handshake_limit`)",
    reason: "Many source addresses that attack one pod must not keep tunnels of other pods out.",
};

/// Handshakes of outgoing tunnels by pod.
pub const OUTGOING_HANDSHAKES: Share = Share {
    resource: "outgoing_handshakes",
    counts: "TLS handshakes of outgoing tunnels that are under way",
    holder: Holder::Pod,
    total: Total::Fixed(1024),
    each: Each::Rule,
    effect: "further handshakes of the pod wait 10 s for their turn, then they are refused (`handshake_limit`)",
    reason: "As for incoming ones. A peer that does not answer holds a unit for 10 s.",
};

/// Directions of flows with large buffers by pod.
pub const BULK_DIRECTIONS: Share = Share {
    resource: "bulk_directions",
    counts: "directions of flows that use large buffers",
    holder: Holder::Pod,
    total: Total::Fixed(1024),
    each: Each::Fixed(64),
    effect: "further flows of the pod keep small buffers: they are slower over long distances, and nothing is lost",
    reason: "A direction that nobody reads holds up to the kernel's largest buffers, 10 MiB by its defaults.",
};

/// Unread bytes by pod: the bound of each socket that the agent reads for a connection of a pod with `held_connections`, in bytes.
/// `None` for the first 1,024 connections of a pod: the kernel grows their buffers with the rate of reading.
///
/// The agent reads no faster than the other end does, so what is sent to it stays in the kernel. Of `n` connections beyond 1,024,
/// the last one may hold 1/n of [`UNREAD_BYTES`]. Those together hold at most [`UNREAD_BYTES`] times ln(n / 1024): 1.7 times for
/// 5,800 connections. The kernel charges about twice that for its own structures.
#[must_use]
pub fn unread_bytes(held_connections: u64) -> Option<u32> {
    let part = UNREAD_BYTES.checked_div(held_connections)?;
    let part = u32::try_from(part).ok().filter(|part| *part < UNREAD_BYTES_MAX)?;
    Some(part.max(UNREAD_BYTES_MIN))
}

/// Bytes that a pod's first 1,024 connections have unread if each has the kernel's first buffer.
const UNREAD_BYTES: u64 = 128 << 20;
/// Bytes of that buffer: the default of `net.ipv4.tcp_rmem`. Flows whose bytes are not taken are held to it.
pub const UNREAD_BYTES_MAX: u32 = 128 << 10;
/// Fewest unread bytes of one socket: a full TLS record with its overhead.
const UNREAD_BYTES_MIN: u32 = 20 << 10;

/// Returns the bytes that one more flow of HBONE may have in the agent before its application takes them: the window of an HTTP/2
/// stream to or of a pod with `held_connections`. Such a flow has no socket of its own whose buffer the kernel would bound.
///
/// A pod's connections divide [`UNREAD_BYTES`] as in [`unread_bytes`], so that `n` of them together hold at most that many bytes times
/// 1 + ln(n / 128): 4.8 times for 5,800.
#[must_use]
pub fn stream_window_bytes(held_connections: u64) -> u32 {
    let part = UNREAD_BYTES / held_connections.max(1);
    u32::try_from(part).unwrap_or(u32::MAX).clamp(STREAM_WINDOW_MIN, STREAM_WINDOW_MAX)
}

/// Largest window of a stream of HBONE: 100 MiB a second over a round trip of 10 ms. What the client has not acknowledged yet may still
/// be as large, so a larger one would be a larger part of the pod's memory.
pub const STREAM_WINDOW_MAX: u32 = 1 << 20;
/// Smallest window of a stream of HBONE: one full record, as for a socket.
pub const STREAM_WINDOW_MIN: u32 = 20 << 10;

/// Connections to the admin port by source address.
pub const ADMIN_CONNECTIONS: Share = Share {
    resource: "admin_connections",
    counts: "connections to the metrics address",
    holder: Holder::Source,
    total: Total::Fixed(64),
    each: Each::Rule,
    effect: "the oldest silent connection of the address with the most is closed for a new one",
    reason: "Two scrapers, a probe and a few people need fewer; each holds a descriptor and some KiB for at most 15 s.",
};

/// Captured connections in the kernel's table by pod.
pub const PENDING_CONNECTIONS: Share = Share {
    resource: "pending_connections",
    counts: "captured connections whose handshake with the agent's listener has not ended, so also those that are held until \
             their destination has answered, in a table of the kernel",
    holder: Holder::Pod,
    total: Total::Fixed(limits::CAPTURED as u64),
    each: Each::Fixed(limits::CAPTURED_PER_POD as u64),
    effect: "`connect()` of the pod fails with ENOBUFS (`connect_share`)",
    reason: "A connection is held for one or two round trips and a handshake. Bursts of a busy client fit; more wait only for destinations that do not answer. The shares of all pods fit.",
};

/// Connections to applications in the kernel's table by pod.
pub const PENDING_DIALS: Share = Share {
    resource: "pending_dials",
    counts: "connections of the agent to a pod's applications whose handshake has not ended, in a table of the kernel",
    holder: Holder::Pod,
    total: Total::Fixed(limits::DIALLED as u64),
    each: Each::Fixed(limits::DIALLED_PER_POD as u64),
    effect: "further connections to the pod's applications are refused (`pending_dials`)",
    reason: "The handshake ends inside `connect()`, except where an application does not accept. The shares of all pods fit.",
};

/// Modes of single ports in the kernel's table by pod.
pub const PORT_MODES: Share = Share {
    resource: "port_modes",
    counts: "ports whose mode differs from the pod's, in a table of the kernel",
    holder: Holder::Pod,
    total: Total::Fixed(limits::PORT_MODES as u64),
    each: Each::Fixed(limits::PORT_MODES_PER_POD as u64),
    effect: "the pod's policy is not applied: the pod is STRICT at all ports",
    reason: "Real policies name a few ports. The shares of all pods fit.",
};

/// Policies by namespace.
pub const POLICIES: Share = Share {
    resource: "policies",
    counts: "PeerAuthentications and AuthorizationPolicies",
    holder: Holder::Namespace,
    total: Total::Unbounded,
    each: Each::Fixed(2048),
    effect: "no policy of the namespace is applied: its pods are STRICT, and all connections to them are denied",
    reason: "Several for each workload of a large namespace. A change sorts all policies of the namespace: a millisecond.",
};

/// Bytes of policies by namespace, as far as the source counts them for each policy.
pub const POLICY_BYTES: Share = Share {
    resource: "policy_bytes",
    counts: "bytes of policies that the API server has",
    holder: Holder::Namespace,
    total: Total::Unbounded,
    each: Each::Fixed(4 << 20),
    effect: POLICIES.effect,
    reason: "The API server accepts objects of 1.5 MiB: two of them, and 1 MiB of others. That is 60,000 principals of 70 bytes.",
};

/// Lookups of one decision by namespace. A lookup searches one value of a flow in an index.
pub const POLICY_LOOKUPS: Share = Share {
    resource: "policy_lookups",
    counts: "lookups that a connection to a pod can need in the policies of the pod's namespace",
    holder: Holder::Namespace,
    total: Total::Unbounded,
    each: Each::Fixed(8192),
    effect: POLICIES.effect,
    reason: "About half a millisecond of a worker, as long as a TLS handshake. A list of exact values is one lookup.",
};

/// Pods without a cgroup by namespace.
pub const WAITING_PODS: Share = Share {
    resource: "waiting_pods",
    counts: "pods of this node that have no cgroup yet",
    holder: Holder::Namespace,
    total: Total::Fixed(1024),
    each: Each::Fixed(128),
    effect: "further pods of the namespace are not listed, and get a certificate when their cgroup is created",
    reason: "More than a node starts at a time. A listed pod has its certificate in advance.",
};

/// Ports of load balancers at addresses of nodes in the kernel's table, by namespace.
pub const NODE_SERVICES: Share = Share {
    resource: "node_services",
    counts: "ports of load balancers at addresses that nodes have, each with its address, in a table of the kernel",
    holder: Holder::Namespace,
    total: Total::Fixed(limits::NODE_SERVICES as u64),
    each: Each::Fixed(limits::NODE_SERVICES_PER_NAMESPACE as u64),
    effect: "the namespace's port numbers count at all addresses of nodes that load balancers have: STRICT pods send no plaintext to them",
    reason: "A load balancer with three ports at the addresses of 1,300 nodes. Port numbers have a bitmap, which cannot be full. The largest namespaces give way first.",
};

/// All shares of the node, in the order of `tacit status`.
pub const SHARES: &[Share] = &[
    CONNECTIONS,
    SOURCE_CONNECTIONS,
    SOURCE_CONNECTIONS_AT_POD,
    IDLE_SESSIONS,
    HBONE_CONNECTIONS,
    HANDSHAKES,
    POD_HANDSHAKES,
    OUTGOING_HANDSHAKES,
    BULK_DIRECTIONS,
    ADMIN_CONNECTIONS,
    PENDING_CONNECTIONS,
    PENDING_DIALS,
    PORT_MODES,
    POLICIES,
    POLICY_BYTES,
    POLICY_LOOKUPS,
    WAITING_PODS,
    NODE_SERVICES,
];

/// Returns the row with this name.
#[must_use]
pub fn of(resource: &str) -> Option<&'static Share> {
    SHARES.iter().find(|share| share.resource == resource)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_distinct_and_fit_a_metric_label() {
        let names: HashSet<_> = SHARES.iter().map(|share| share.resource).collect();
        assert_eq!(names.len(), SHARES.len());
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
        assert!(SHARES.iter().all(|share| of(share.resource).is_some()));
    }

    #[test]
    fn no_share_is_its_total() {
        for descriptors in [64, 1024, 20_000, 1 << 20, u64::MAX] {
            for share in SHARES {
                let Bounds { total, each } = share.bounds(Capacity { descriptors });
                assert!(each > 0, "{share:?}");
                assert!(total < 4 || each < total, "{} of {total} for {}", each, share.resource);
            }
        }
    }

    #[test]
    fn the_unread_bytes_of_a_pod_grow_with_the_logarithm_of_its_connections() {
        assert_eq!([0, 1, 1024].map(unread_bytes), [None; 3]);
        assert!(unread_bytes(1100).is_some_and(|bytes| bytes < UNREAD_BYTES_MAX));
        assert_eq!(unread_bytes(u64::MAX), Some(UNREAD_BYTES_MIN));
        let all: u64 = (1..=5834).filter_map(unread_bytes).map(u64::from).sum();
        assert!((1..UNREAD_BYTES * 175 / 100).contains(&all), "{all}");
    }

    #[test]
    fn the_windows_of_a_pods_streams_grow_with_the_logarithm_of_their_number() {
        assert_eq!([0, 1, 128].map(stream_window_bytes), [STREAM_WINDOW_MAX; 3]);
        assert_eq!(stream_window_bytes(1024), 128 << 10);
        assert_eq!(stream_window_bytes(u64::MAX), STREAM_WINDOW_MIN);
        let all: u64 = (1..=5834).map(|held| u64::from(stream_window_bytes(held))).sum();
        assert!((UNREAD_BYTES * 47 / 10..UNREAD_BYTES * 5).contains(&all), "{all}");
    }

    #[test]
    fn sockets_and_idle_sessions_leave_descriptors_for_listeners_and_control() {
        let capacity = Capacity { descriptors: 20_000 };
        let sockets = 2 * CONNECTIONS.bounds(capacity).total
            + IDLE_SESSIONS.bounds(capacity).total
            + 2 * HBONE_CONNECTIONS.bounds(capacity).total;
        assert_eq!(20_000 - sockets, 626);
        assert_eq!(CONNECTIONS.bounds(capacity), Bounds { total: 8750, each: 5834 });
    }
}
