//! Every outcome of the programs, as an index into the per-CPU counters, with the words an operator reads.

/// Name (metric label) and meaning of a [`Reason`].
#[derive(Clone, Copy, Debug)]
pub struct ReasonText {
    /// Stable label.
    pub name: &'static str,
    /// What happened and with which verdict.
    pub help: &'static str,
}

macro_rules! reasons {
    ($($variant:ident, $name:literal, $help:literal;)+) => {
        /// Why a program decided as it did; the number is the index of its counter.
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
    ConnectNotEnrolled, "connect_not_enrolled", "connect from a process that is in no enrolled pod: left alone";
    ConnectNotStream, "connect_not_tcp", "connect of another protocol than TCP: left alone by the connect hook";
    ConnectOutsideMesh, "connect_outside_mesh", "connect to an address outside the mesh ranges: left alone";
    ConnectOwnAddress, "connect_own_address", "connect of a pod to itself: left alone";
    ConnectCaptured, "connect_captured", "connect into the mesh: sent to the agent";
    ConnectForeignNetns, "connect_foreign_netns", "mesh connect from a network namespace that is not the pod's: denied";
    ConnectNoStorage, "connect_no_storage", "no memory to remember a destination: denied";
    PendingFull, "pending_full", "table of pending connections full: the connection is reset, its destination is not known";
    NamesFull, "names_full", "no memory for a client's address: the application sees the agent's";
    InboundTunnel, "inbound_tunnel", "inbound connection to the tunnel port: to the agent";
    InboundRefused, "inbound_to_refuse", "inbound plaintext under STRICT: to the agent, which resets and logs it";
    InboundPermitted, "inbound_permitted", "inbound plaintext under PERMISSIVE: straight to the application";
    InboundDisabled, "inbound_disabled", "inbound plaintext under DISABLE: straight to the application";
    InboundNode, "inbound_node", "inbound connection from the node itself (probe): straight to the application";
    InboundLocal, "inbound_local", "connection inside the pod or from the agent: straight to the application";
    InboundReserved, "inbound_reserved", "connection from outside, or one that was not captured, to a port of the agent: refused";
    InboundUnknown, "inbound_unknown", "inbound connection to a mesh address without a mode: refused";
    InboundForeign, "inbound_foreign", "inbound connection to an address outside the mesh: straight to the application";
    InboundNoAgent, "inbound_no_agent", "the agent is needed for an inbound connection and not there: refused";
    InboundStale, "inbound_stale", "the agent is needed for an inbound connection and gives no sign of life: refused";
    ConnectAgentStale, "connect_stale_denied", "mesh connect of a strict pod while the agent gives no sign of life: denied";
    ConnectStaleClear, "connect_stale_clear", "mesh connect of an open pod while the agent gives no sign of life: passed in clear";
    ConnectUnknownPod, "connect_unknown_pod", "mesh connect of a pod that has no entry yet, the mesh being STRICT: denied";
    ConnectAllowedClear, "connect_allowed_clear", "mesh connect to a destination of allowClear: left alone";
    GuardTcp, "guard_tcp", "TCP of a strict pod's socket in clear into the mesh: dropped";
    GuardUdp, "guard_udp", "UDP of a strict pod in clear into the mesh: dropped";
    GuardIcmp, "guard_icmp", "ICMP of a strict pod's socket into the mesh: dropped";
    GuardOther, "guard_other", "another IP protocol, or a part of a packet, of a strict pod into the mesh: dropped";
    GuardSpoofed, "guard_spoofed", "packet into the mesh with a source address that is not the strict pod's: dropped on its link";
    GuardNotIp, "guard_not_ip", "frame of a strict pod that is neither IP nor plain ARP: dropped on its link";
    GuardUnreadable, "guard_unreadable", "packet of a strict pod that ends before its headers do: dropped";
    GuardClear, "guard_open_clear", "packet of an open pod in clear into the mesh: passed";
    GuardReply, "guard_reply_clear", "packet of a connection that was accepted in clear, as its mode allows: passed";
    GuardUdpClear, "guard_udp_clear", "UDP in clear into the mesh of a pod with `udp: allow`: passed";
    GuardAllowed, "guard_allowed_clear", "packet to or from a destination of allowClear: passed";
    GuardInboundTcp, "guard_inbound_tcp", "TCP in clear from the mesh to a strict port: dropped";
    GuardInboundUdp, "guard_inbound_udp", "UDP in clear from the mesh to a strict pod: dropped";
    GuardInboundOther, "guard_inbound_other", "another IP protocol in clear from the mesh to a strict pod: dropped";
    InboundJudged, "inbound_to_judge", "inbound plaintext to a pod that authorization policies select: to the agent, which lets it through or resets it";
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
