//! Decision on a connection that a pod opens.
//!
//! Decisions are functions of facts, which the kernel side looks up in maps and the tests in tables. Facts are looked
//! up in order of cost and only as far as needed. A connection outside the mesh costs two lookups: of its pod and of its
//! destination.

use crate::{Address, Pod, Reason, pod_flag};

/// Facts that the connect hook can look up.
pub trait ConnectFacts {
    /// Returns the enrolled pod of the calling process.
    fn pod(&self) -> Option<Pod>;
    /// Returns true for TCP, and for MPTCP, which starts as TCP.
    fn is_tcp(&self) -> bool;
    /// Returns true for addresses in the mesh's ranges.
    fn in_mesh(&self, address: &Address) -> bool;
    /// Returns the cookie of the socket's network namespace.
    fn netns_cookie(&self) -> u64;
    /// Returns true if the socket is in the node's own network namespace.
    fn is_in_node_netns(&self) -> bool;
    /// Returns true if the calling process is an agent's.
    fn is_agent(&self) -> bool;
    /// Returns true if STRICT applies to pods without an entry.
    fn default_is_strict(&self) -> bool;
    /// Returns true for destinations of `allowClear`.
    fn is_allowed_clear(&self, destination: &Address) -> bool;
    /// Returns true if the agent's heartbeat is stale.
    fn is_stale(&self) -> bool;
    /// Returns true if the socket is bound to a device other than the loopback.
    fn is_bound_to_link(&self) -> bool;
    /// Returns true if the pod's share of pending captured connections is used up.
    fn is_share_used_up(&self, slot: u32) -> bool;
}

/// Verdict on an outbound connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// Connects as without Tacit.
    Leave(Reason),
    /// As [`Connect::Leave`], of a held pod and inside its own network namespace, where the guard sees no packet:
    /// [`Exception::Loopback`](crate::Exception::Loopback) is counted too.
    Inside(Reason),
    /// Is redirected to the agent. The hook stores the destination and needs the pod's entry.
    Capture(Pod),
    /// Fails with the error of [`connect_error`], or with EPERM where the kernel has no `bpf_set_retval`.
    Deny(Reason),
}

const ENETUNREACH: i32 = 101;
const ENOBUFS: i32 = 105;
const ECONNREFUSED: i32 = 111;

/// Returns the error of `connect()` for a [`Connect::Deny`].
///
/// ENOBUFS is what Linux returns when a connection cannot be opened for lack of resources. EAGAIN is not used, because
/// event loops read it as "in progress".
#[inline(always)]
#[must_use]
pub const fn connect_error(reason: Reason) -> i32 {
    match reason {
        Reason::ConnectShare | Reason::ConnectNoStorage => ENOBUFS,
        Reason::ConnectDevice => ENETUNREACH,
        _ => ECONNREFUSED,
    }
}

/// Decides on `connect()` to `destination`.
#[inline(always)]
pub fn decide_connect(facts: &impl ConnectFacts, destination: &Address) -> Connect {
    let Some(pod) = facts.pod() else {
        return unknown_pod(facts, destination);
    };
    if pod.has(pod_flag::EXEMPT) {
        return Connect::Leave(Reason::ConnectNotEnrolled);
    }
    let is_held = pod.has(pod_flag::EGRESS_STRICT);
    if !facts.is_tcp() {
        return left(facts, is_held, &pod, destination, Reason::ConnectNotStream);
    }
    if !facts.in_mesh(destination) {
        return left(facts, is_held, &pod, destination, Reason::ConnectOutsideMesh);
    }
    if pod.owns(destination) {
        return left(facts, is_held, &pod, destination, Reason::ConnectOwnAddress);
    }
    if facts.is_allowed_clear(destination) {
        return Connect::Leave(Reason::ConnectAllowedClear);
    }
    // There is no listener yet.
    if pod.netns_cookie == 0 {
        return Connect::Deny(Reason::ConnectNotServed);
    }
    let is_strict = pod.has(pod_flag::EGRESS_STRICT);
    // A namespace that the pod made has neither the agent's listener nor the pod's address. The connection may stay in the pod, or
    // leave it with the pod's address as plaintext.
    match (facts.netns_cookie() != pod.netns_cookie, is_strict) {
        (false, _) => {}
        (true, true) => return Connect::Deny(Reason::ConnectForeignNetns),
        (true, false) => return Connect::Leave(Reason::ConnectNested),
    }
    match (facts.is_stale(), is_strict) {
        (false, _) => {}
        (true, true) => return Connect::Deny(Reason::ConnectAgentStale),
        (true, false) => return Connect::Leave(Reason::ConnectStaleClear),
    }
    // Such a socket cannot reach the agent on the loopback.
    match (facts.is_bound_to_link(), is_strict) {
        (false, _) => {}
        (true, true) => return Connect::Deny(Reason::ConnectDevice),
        (true, false) => return Connect::Leave(Reason::ConnectDeviceClear),
    }
    if facts.is_share_used_up(pod.slot) { Connect::Deny(Reason::ConnectShare) } else { Connect::Capture(pod) }
}

/// Decides for a process of a pod that has no entry yet. The guard decides on protocols other than TCP. A socket in the node's
/// own namespace is the node's, as no process of another pod can make one there.
#[inline(always)]
fn unknown_pod(facts: &impl ConnectFacts, destination: &Address) -> Connect {
    let denied = facts.default_is_strict()
        && facts.is_tcp()
        && facts.in_mesh(destination)
        && !facts.is_allowed_clear(destination)
        && !facts.is_in_node_netns()
        && !facts.is_agent();
    if denied {
        return Connect::Deny(Reason::ConnectUnknownPod);
    }
    let is_held = facts.default_is_strict() && is_loopback(destination) && !facts.is_agent();
    left(facts, is_held, &Pod::unknown(), destination, Reason::ConnectNotEnrolled)
}

/// Returns the verdict on a connection that is left as without Tacit.
#[inline(always)]
fn left(
    facts: &impl ConnectFacts,
    is_held: bool,
    pod: &Pod,
    destination: &Address,
    reason: Reason,
) -> Connect {
    let is_inside = is_held
        && (is_loopback(destination) || pod.owns(destination) && facts.netns_cookie() == pod.netns_cookie);
    if is_inside { Connect::Inside(reason) } else { Connect::Leave(reason) }
}

/// Returns true for destinations that the kernel reaches on the loopback of any network namespace.
#[inline(always)]
fn is_loopback(destination: &Address) -> bool {
    destination.is_loopback() || destination.is_none_of_family()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn v4(last: u8) -> Address {
        Address::from_v4_be(u32::from_ne_bytes([10, 77, 1, last]))
    }

    fn pod() -> Pod {
        Pod { netns_cookie: 7, v4: v4(2), slot: 3, ..Pod::default() }
    }

    #[derive(Clone, Copy)]
    struct Out {
        pod: Option<Pod>,
        tcp: bool,
        mesh: bool,
        netns: u64,
        node_netns: bool,
        agent: bool,
        strict: bool,
        clear: bool,
        stale: bool,
        link: bool,
        full: bool,
    }

    const USUAL: Out = Out {
        pod: None,
        tcp: true,
        mesh: true,
        netns: 7,
        node_netns: false,
        agent: false,
        strict: false,
        clear: false,
        stale: false,
        link: false,
        full: false,
    };

    impl ConnectFacts for Out {
        fn pod(&self) -> Option<Pod> {
            self.pod
        }
        fn is_tcp(&self) -> bool {
            self.tcp
        }
        fn in_mesh(&self, _: &Address) -> bool {
            self.mesh
        }
        fn netns_cookie(&self) -> u64 {
            self.netns
        }
        fn is_in_node_netns(&self) -> bool {
            self.node_netns
        }
        fn is_agent(&self) -> bool {
            self.agent
        }
        fn default_is_strict(&self) -> bool {
            self.strict
        }
        fn is_allowed_clear(&self, _: &Address) -> bool {
            self.clear
        }
        fn is_stale(&self) -> bool {
            self.stale
        }
        fn is_bound_to_link(&self) -> bool {
            self.link
        }
        fn is_share_used_up(&self, slot: u32) -> bool {
            assert_eq!(slot, 3);
            self.full
        }
    }

    #[test]
    fn connect_is_captured_only_from_an_enrolled_pod_into_the_mesh() {
        let of = |pod| Out { pod: Some(pod), ..USUAL };
        let known = of(pod());
        let leave = Connect::Leave;
        let table = [
            (USUAL, v4(9), leave(Reason::ConnectNotEnrolled)),
            (of(Pod { flags: pod_flag::EXEMPT, ..pod() }), v4(9), leave(Reason::ConnectNotEnrolled)),
            (Out { tcp: false, ..known }, v4(9), leave(Reason::ConnectNotStream)),
            (Out { mesh: false, ..known }, v4(9), leave(Reason::ConnectOutsideMesh)),
            (known, v4(2), leave(Reason::ConnectOwnAddress)),
            (Out { clear: true, ..known }, v4(9), leave(Reason::ConnectAllowedClear)),
            (Out { netns: 8, ..known }, v4(9), leave(Reason::ConnectNested)),
            (of(Pod { netns_cookie: 0, ..pod() }), v4(9), Connect::Deny(Reason::ConnectNotServed)),
            (known, v4(9), Connect::Capture(pod())),
        ];
        for (facts, destination, expected) in table {
            assert_eq!(decide_connect(&facts, &destination), expected);
        }
    }

    #[test]
    fn with_a_stale_heartbeat_the_mode_alone_decides() {
        let strict = Pod { flags: pod_flag::EGRESS_STRICT, ..pod() };
        let stale = |pod| Out { pod: Some(pod), stale: true, ..USUAL };
        assert_eq!(decide_connect(&stale(strict), &v4(9)), Connect::Deny(Reason::ConnectAgentStale));
        assert_eq!(decide_connect(&stale(pod()), &v4(9)), Connect::Leave(Reason::ConnectStaleClear));
        let nested = Out { netns: 8, ..stale(strict) };
        assert_eq!(decide_connect(&nested, &v4(9)), Connect::Deny(Reason::ConnectForeignNetns));
    }

    #[test]
    fn a_pod_whose_share_is_used_up_is_denied_in_every_mode() {
        for flags in [0, pod_flag::EGRESS_STRICT] {
            let full = Out { pod: Some(Pod { flags, ..pod() }), full: true, ..USUAL };
            assert_eq!(decide_connect(&full, &v4(9)), Connect::Deny(Reason::ConnectShare));
            let outside = Out { mesh: false, ..full };
            assert_eq!(decide_connect(&outside, &v4(9)), Connect::Leave(Reason::ConnectOutsideMesh));
        }
    }

    #[test]
    fn a_socket_that_is_bound_to_a_link_is_not_captured() {
        let strict = Pod { flags: pod_flag::EGRESS_STRICT, ..pod() };
        let bound = |pod| Out { pod: Some(pod), link: true, ..USUAL };
        let table = [
            (bound(strict), Connect::Deny(Reason::ConnectDevice)),
            (bound(pod()), Connect::Leave(Reason::ConnectDeviceClear)),
            (Out { full: true, ..bound(pod()) }, Connect::Leave(Reason::ConnectDeviceClear)),
            (Out { stale: true, ..bound(strict) }, Connect::Deny(Reason::ConnectAgentStale)),
            (Out { stale: true, ..bound(pod()) }, Connect::Leave(Reason::ConnectStaleClear)),
            (Out { netns: 8, ..bound(strict) }, Connect::Deny(Reason::ConnectForeignNetns)),
            (Out { netns: 8, ..bound(pod()) }, Connect::Leave(Reason::ConnectNested)),
            (Out { mesh: false, ..bound(strict) }, Connect::Leave(Reason::ConnectOutsideMesh)),
        ];
        for (facts, expected) in table {
            assert_eq!(decide_connect(&facts, &v4(9)), expected);
        }
    }

    #[test]
    fn each_denial_has_its_error() {
        for (reason, error) in [
            (Reason::ConnectShare, 105),
            (Reason::ConnectNoStorage, 105),
            (Reason::ConnectDevice, 101),
            (Reason::ConnectAgentStale, 111),
            (Reason::ConnectForeignNetns, 111),
            (Reason::ConnectUnknownPod, 111),
        ] {
            assert_eq!(connect_error(reason), error, "{reason:?}");
        }
    }

    #[test]
    fn in_a_strict_mesh_a_pod_without_an_entry_is_denied() {
        let strict = Out { strict: true, ..USUAL };
        let left = Connect::Leave(Reason::ConnectNotEnrolled);
        let table = [
            (strict, Connect::Deny(Reason::ConnectUnknownPod)),
            (Out { strict: false, ..strict }, left),
            (Out { mesh: false, ..strict }, left),
            (Out { tcp: false, ..strict }, left),
            (Out { clear: true, ..strict }, left),
            (Out { agent: true, ..strict }, left),
            (Out { node_netns: true, ..strict }, left),
        ];
        for (facts, expected) in table {
            assert_eq!(decide_connect(&facts, &v4(9)), expected);
        }
    }
}
