//! Exceptions: the closed list of what passes although it is plaintext of or to a pod that is held. Held are STRICT pods, pods
//! that no source has named in a STRICT mesh, and UDP of pods with `udp: deny`. Each exception has a counter at each hook.

/// Hook at which an exception lets something pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ExceptionHook {
    /// `connect()` of a process of the pod.
    Connect,
    /// A packet from a socket of the pod.
    Egress,
    /// A packet to a socket of the pod.
    Ingress,
    /// A frame of the pod on the host end of its link. Most have passed a socket before, and are counted there too.
    Link,
}

impl ExceptionHook {
    /// All hooks, by number.
    pub const ALL: [Self; 4] = [Self::Connect, Self::Egress, Self::Ingress, Self::Link];

    /// Returns the label of metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Link => "link",
        }
    }
}

/// Name (metric label), hooks and meaning of an [`Exception`].
#[derive(Clone, Copy, Debug)]
pub struct ExceptionText {
    /// Stable label.
    pub name: &'static str,
    /// Hooks at which the exception applies.
    pub hooks: &'static [ExceptionHook],
    /// A description of the plaintext that passes.
    pub help: &'static str,
}

macro_rules! exceptions {
    ($($variant:ident, $name:literal, [$($hook:ident),+], $help:literal;)+) => {
        /// A fact by which a packet or connection of a held pod passes as plaintext.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Exception { $(#[doc = $help] $variant,)+ }

        impl Exception {
            /// All exceptions, by number.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];
        }

        /// Texts by number.
        pub const EXCEPTIONS: &[ExceptionText] =
            &[$(ExceptionText { name: $name, hooks: &[$(ExceptionHook::$hook),+], help: $help },)+];
    };
}

exceptions! {
    Loopback, "loopback", [Connect], "connect() inside the pod's own network namespace: to a loopback address or the pod's own";
    OwnAddress, "own_address", [Egress, Ingress], "between a socket of the pod and the pod's own address, as of a namespace inside the pod";
    Outside, "outside", [Egress, Ingress, Link], "to an address outside the mesh that is no neighbour and no service of a node, or on a TCP connection that the pod opened there";
    WithoutData, "tcp_without_data", [Egress, Ingress, Link], "TCP segment without data and without SYN";
    TunnelCookie, "tunnel_cookie", [Link], "SYN cookie of the agent's tunnel listener";
    NodeFlow, "node_flow", [Egress, Ingress, Link], "in a flow that the node itself began, such as a probe, proven on the host end of the pod's link";
    OwnNode, "own_node", [Egress, Link], "ICMP to the pod's own node, or UDP to no service there";
    PlaintextPort, "plaintext_port", [Egress, Ingress, Link], "TCP of a port whose own mode takes plaintext";
    DisabledPort, "disabled_port", [Link], "plaintext of the agent to a port whose mode is DISABLE";
    NodeAddress, "node_address", [Egress, Ingress], "to an address of the node, for a pod that no source has named yet, or of its TCP from there";
    UdpAllowed, "udp_allow", [Egress, Ingress, Link], "UDP of a pod with `udp: allow`";
    AllowClear, "allow_clear", [Egress, Ingress, Link], "to or from a destination of allowClear";
    InboundIcmp, "inbound_icmp", [Ingress], "ICMP to the pod";
    Answer, "answer", [Ingress], "answer to a datagram that the pod sent";
    OpenSender, "open_sender", [Ingress], "TCP to a STRICT port on a connection that the pod opened, which may send plaintext";
    Discovery, "neighbour_discovery", [Link], "ARP, or neighbour discovery of the kernel";
}

/// Number of counters.
pub const EXCEPTION_COUNTERS: usize = EXCEPTIONS.len() * ExceptionHook::ALL.len();

impl Exception {
    /// Returns the index of the exception's counter at `hook`.
    #[inline(always)]
    #[must_use]
    pub const fn counter(self, hook: ExceptionHook) -> u32 {
        self as u32 * ExceptionHook::ALL.len() as u32 + hook as u32
    }

    /// Returns name, hooks and meaning.
    #[must_use]
    pub const fn text(self) -> &'static ExceptionText {
        &EXCEPTIONS[self as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, vec::Vec};

    #[test]
    fn every_exception_has_its_own_name_and_a_counter_at_each_hook() {
        assert_eq!(Exception::ALL.len(), EXCEPTIONS.len());
        let names: HashSet<_> = EXCEPTIONS.iter().map(|text| text.name).collect();
        assert_eq!(names.len(), EXCEPTIONS.len());
        let pairs =
            Exception::ALL.iter().flat_map(|exception| ExceptionHook::ALL.map(|hook| (*exception, hook)));
        let indexes: Vec<_> = pairs.map(|(exception, hook)| exception.counter(hook) as usize).collect();
        assert!(indexes.iter().copied().eq(0..EXCEPTION_COUNTERS), "{indexes:?}");
    }
}
