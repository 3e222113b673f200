//! Outcomes of the programs: indexes into the per-CPU counters, with metric labels and texts for operators.

/// Name (metric label) and meaning of a [`Reason`].
#[derive(Clone, Copy, Debug)]
pub struct ReasonText {
    /// Stable label.
    pub name: &'static str,
    /// Event and verdict.
    pub help: &'static str,
}

macro_rules! reasons {
    ($($variant:ident, $name:literal, $help:literal;)+) => {
        /// Reason of a program's decision; the number is the index of its counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Reason { $(#[doc = $help] $variant,)+ }

        /// Texts by index.
        pub const REASONS: &[ReasonText] = &[$(ReasonText { name: $name, help: $help },)+];

        #[cfg(test)]
        const ALL: &[Reason] = &[$(Reason::$variant,)+];
    };
}

reasons! {
    ConnectNotEnrolled, "connect_not_enrolled", "connect of a process outside all enrolled pods: left alone";
    ConnectNotStream, "connect_not_tcp", "connect of a protocol other than TCP: left alone by the connect hook";
    ConnectOutsideMesh, "connect_outside_mesh", "connect to an address outside the mesh ranges: left alone";
    ConnectOwnAddress, "connect_own_address", "connect of a pod to itself: left alone";
    ConnectCaptured, "connect_captured", "connect into the mesh: redirected to the agent";
    ConnectForeignNetns, "connect_foreign_netns", "mesh connect of a STRICT pod from a network namespace that is not the pod's: denied";
    ConnectNoStorage, "connect_no_storage", "no memory to store a destination: denied";
    PendingFull, "pending_full", "share of pending connections used up meanwhile, or no memory: the connection is reset because its destination is lost";
    NamesFull, "names_full", "share of pending connections used up, or no memory for a client's address: the agent's connection to the application is refused, or the application sees the unspecified address";
    InboundTunnel, "inbound_tunnel", "inbound connection to the tunnel port: redirected to the agent";
    InboundRefused, "inbound_to_refuse", "inbound plaintext under STRICT: redirected to the agent, which resets and logs it";
    InboundPermitted, "inbound_permitted", "inbound plaintext under PERMISSIVE: passed to the application";
    InboundDisabled, "inbound_disabled", "inbound plaintext under DISABLE: passed to the application";
    InboundNode, "inbound_node", "inbound connection that the node itself sent (probe): passed to the application";
    InboundLocal, "inbound_local", "connection inside the pod or from the agent: passed to the application";
    InboundReserved, "inbound_reserved", "connection from outside, or one that was not captured, to a port of the agent: reset";
    InboundUnknown, "inbound_unknown", "inbound connection to a mesh address without a mode, such as one of an interface that a pod made: passed, the guard decides at the socket";
    InboundForeign, "inbound_foreign", "inbound connection to an address outside the mesh: passed to the application";
    InboundNoAgent, "inbound_no_agent", "inbound connection that needs the agent, which has no listener: reset";
    InboundStale, "inbound_stale", "inbound connection that needs the agent, whose heartbeat is stale: reset";
    ConnectAgentStale, "connect_stale_denied", "mesh connect of a STRICT pod while the agent's heartbeat is stale: denied";
    ConnectStaleClear, "connect_stale_clear", "mesh connect of an open pod while the agent's heartbeat is stale: passed as plaintext";
    ConnectUnknownPod, "connect_unknown_pod", "mesh connect of a pod without an entry in a STRICT mesh: denied";
    ConnectAllowedClear, "connect_allowed_clear", "mesh connect to a destination of allowClear: left alone";
    GuardTcp, "guard_tcp", "plaintext TCP of a STRICT pod's socket into the mesh: dropped";
    GuardUdp, "guard_udp", "plaintext UDP of a STRICT pod into the mesh: dropped";
    GuardIcmp, "guard_icmp", "ICMP of a STRICT pod's socket into the mesh: dropped";
    GuardOther, "guard_other", "another IP protocol, or a later fragment, of a STRICT pod into the mesh: dropped";
    GuardSpoofed, "guard_spoofed", "frame with an address that is not the pod's, or one towards a pod that claims the pod's or the node's: dropped on its link";
    GuardNotIp, "guard_not_ip", "frame of a STRICT pod that is neither IP nor plain ARP, or one of any pod with nested VLAN tags: dropped on its link";
    GuardUnreadable, "guard_unreadable", "packet of a STRICT pod that ends before its headers do: dropped";
    GuardClear, "guard_open_clear", "plaintext packet of an open pod into the mesh: passed";
    GuardInboundTcp, "guard_inbound_tcp", "plaintext TCP to a STRICT port, or past the agent to a pod that policies select: dropped";
    GuardInboundUdp, "guard_inbound_udp", "plaintext UDP to a STRICT pod that is no answer to it: dropped";
    GuardInboundOther, "guard_inbound_other", "another IP protocol to a STRICT pod that is no answer to it: dropped";
    GuardEncapsulated, "guard_encapsulated", "packet of a STRICT pod that a node would unpack, such as VXLAN or GRE: dropped";
    GuardHeld, "guard_held", "packet of or to a pod without an entry, in a STRICT mesh, that the rules for a STRICT pod refuse: dropped";
    InboundAuthorize, "inbound_to_judge", "inbound plaintext to a pod that authorization policies select: redirected to the agent, which passes or resets it";
    ConnectShare, "connect_share", "mesh connect of a pod whose share of pending connections is used up: denied";
    ConnectDevice, "connect_device", "mesh connect of a STRICT pod by a socket that is bound to a device other than the loopback: denied";
    ConnectDeviceClear, "connect_device_clear", "mesh connect of an open pod by a socket that is bound to a device other than the loopback: passed as plaintext";
    ConnectHeld, "connect_held", "SYN of a captured connection: held until the destination has answered";
    ConnectHeldFull, "connect_held_full", "SYN of a captured connection while the agent's queue is full: dropped, the kernel sends it again";
    InboundRaced, "inbound_raced", "segment of a captured connection that came while the kernel replaced its socket: dropped, the application's kernel sends it again";
    ConnectUnanswered, "connect_unanswered", "SYN of a captured connection while no agent serves the pod: passed to the agent's listener, or refused without one";
    ConnectNotServed, "connect_not_served", "mesh connect of a pod that no agent serves yet, or that cannot be served: denied";
    ConnectNested, "connect_nested", "mesh connect of an open pod from a network namespace that the pod made: left alone";
    ProbeHeld, "probe_held", "keep-alive or window probe of an application: held until the peer has answered";
    ProbePassed, "probe_passed", "keep-alive or window probe of an application that no agent serves, or whose agent is late: answered by the agent's kernel";
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_reason_has_its_own_counter_and_name() {
        assert_eq!(ALL.len(), REASONS.len());
        for (index, reason) in ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
        let names: HashSet<_> = REASONS.iter().map(|r| r.name).collect();
        assert_eq!(names.len(), REASONS.len());
    }
}
