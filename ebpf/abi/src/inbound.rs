//! Decision on a connection that arrives in a pod.

use crate::{Address, Listener, Mode, NodeFlow, PodCells, Reason, Steered, Tuple, steer_flag, tcp_port};

/// A TCP connection that arrives in an enrolled pod's network namespace.
#[derive(Clone, Copy, Debug)]
pub struct Inbound {
    /// Destination address.
    pub local: Address,
    /// Source address, which the sender may have spoofed.
    pub remote: Address,
    /// Destination port.
    pub port: u16,
    /// Source port.
    pub remote_port: u16,
}

impl Inbound {
    /// Returns the key under which the host end of the pod's link stores a connection of the node.
    #[inline(always)]
    #[must_use]
    pub const fn node_flow(&self) -> NodeFlow {
        let (node, pod) = ((self.remote, self.remote_port as u32), (self.local, self.port as u32));
        NodeFlow::new(node, pod, crate::protocol::TCP)
    }

    /// Returns true for the targets of captured connections, see `Address::capture_target`.
    #[inline(always)]
    #[must_use]
    pub const fn is_to_capture(&self) -> bool {
        let is_v4 = self.local.is_v4() && self.local.is_loopback() && tcp_port::is_capture(self.port);
        is_v4 || self.tuple().is_spread()
    }

    /// Returns the connection as its connecting side sees it. The namespace cookie is 0, because sk_lookup cannot read it.
    #[inline(always)]
    const fn tuple(&self) -> Tuple {
        Tuple {
            netns_cookie: 0,
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port as u32,
            remote_port: self.port as u32,
        }
    }
}

/// Facts that the steering program can look up.
pub trait InboundFacts {
    /// Returns the enrolled pod with this address.
    fn steered(&self, local: &Address) -> Option<Steered>;
    /// Returns true if a connection was captured under this key and the agent has not accepted it yet.
    fn is_captured(&self, key: &Tuple) -> bool;
    /// Returns the mode of a port that has its own.
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32>;
    /// Returns true if the node itself opens this connection to the pod with these cells, as seen on the host end of its link.
    fn is_node_flow(&self, pod: PodCells, flow: &Inbound) -> bool;
    /// Returns true for addresses in the mesh's ranges.
    fn in_mesh(&self, address: &Address) -> bool;
    /// Returns true if the agent's heartbeat is stale.
    fn is_stale(&self) -> bool;
    /// Returns true if the kernel made a socket for the handshake of this captured connection a moment ago, see `recent`.
    fn is_in_handshake(&self, flow: &Inbound) -> bool;
}

/// Verdict on an inbound connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// Delivered to the socket that listens on the port.
    Pass(Reason),
    /// Redirected to the agent's listener of this slot; reset if the agent has none.
    Agent(u32, Listener, Reason),
    /// Redirected to the agent's listener for captured connections of this slot; reset if the agent has none.
    Capture(u32, Reason),
    /// Reset.
    Drop(Reason),
    /// Not answered.
    Discard(Reason),
}

/// Decides on an inbound connection.
///
/// Plaintext that the mode allows is delivered to the application. If authorization policies select the pod, the agent
/// decides on the connection first, and it is reset while there is no agent.
#[inline(always)]
pub fn decide_inbound(facts: &impl InboundFacts, flow: &Inbound) -> Steer {
    let tuple = flow.tuple();
    if tuple.is_spread() && !flow.remote.is_loopback() {
        return captured(facts, flow, &tuple);
    }
    // Connections inside the pod, and the agent's dials to applications, come from loopback addresses or the pod's own.
    // The kernel drops packets from outside with one of its own addresses or a loopback address as source. A pod that
    // sets route_localnet admits a loopback source, but its answer stays in the pod.
    if flow.local.is_loopback() || flow.remote.is_loopback() || flow.local.same(&flow.remote) {
        if flow.local.is_v4() && flow.is_to_capture() && facts.is_in_handshake(flow) {
            return Steer::Discard(Reason::InboundRaced);
        }
        return Steer::Pass(Reason::InboundLocal);
    }
    let Some(steered) = facts.steered(&flow.local) else {
        // Of an interface that the pod made, for example, whose ranges may also be the mesh's. This program does not know the pod; the
        // guard does, and decides at the application's socket.
        let is_mesh = facts.in_mesh(&flow.local);
        return Steer::Pass(if is_mesh { Reason::InboundUnknown } else { Reason::InboundForeign });
    };
    if flow.port == tcp_port::TUNNEL {
        return agent(facts, steered, Listener::Tunnel, Reason::InboundTunnel);
    }
    if tcp_port::is_reserved(flow.port) {
        return Steer::Drop(Reason::InboundReserved);
    }
    if facts.is_node_flow(steered.cells(), flow) {
        return Steer::Pass(Reason::InboundNode);
    }
    let mode = facts.port_mode(steered.slot, flow.port).unwrap_or(steered.mode);
    match Mode::from_raw(mode) {
        Mode::Strict => agent(facts, steered, Listener::Plaintext, Reason::InboundRefused),
        Mode::Permissive | Mode::Disable if steered.has(steer_flag::JUDGED) => {
            agent(facts, steered, Listener::Plaintext, Reason::InboundAuthorize)
        }
        Mode::Permissive => Steer::Pass(Reason::InboundPermitted),
        Mode::Disable => Steer::Pass(Reason::InboundDisabled),
    }
}

/// Decides on a connection from the pod's own address to a port that captured connections are spread over.
///
/// The agent gets only captured connections, and no process that listens on such a port may get one. The connect hook
/// binds captured sockets to the pod's address, so connections from `::1` are not captured ones.
#[inline(always)]
fn captured(facts: &impl InboundFacts, flow: &Inbound, key: &Tuple) -> Steer {
    let Some(steered) = facts.steered(&key.local) else {
        return Steer::Drop(Reason::InboundReserved);
    };
    // The end of the handshake removes the entry.
    if facts.is_in_handshake(flow) {
        return Steer::Discard(Reason::InboundRaced);
    }
    if !facts.is_captured(key) {
        return Steer::Drop(Reason::InboundReserved);
    }
    if facts.is_stale() {
        return Steer::Drop(Reason::InboundStale);
    }
    Steer::Capture(steered.slot, Reason::InboundLocal)
}

/// Redirects to a listener, but not to a stale agent's. A stuck agent's listeners still exist and would block the peer.
#[inline(always)]
fn agent(facts: &impl InboundFacts, steered: Steered, listener: Listener, reason: Reason) -> Steer {
    if facts.is_stale() {
        return Steer::Drop(Reason::InboundStale);
    }
    Steer::Agent(steered.slot, listener, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn v4(last: u8) -> Address {
        Address::from_v4_be(u32::from_ne_bytes([10, 77, 1, last]))
    }

    #[derive(Clone, Copy)]
    struct In {
        steered: Option<Steered>,
        port_mode: Option<u32>,
        captured: bool,
        node: bool,
        mesh: bool,
        stale: bool,
        handshake: bool,
    }

    impl InboundFacts for In {
        fn steered(&self, _: &Address) -> Option<Steered> {
            self.steered
        }
        fn is_captured(&self, key: &Tuple) -> bool {
            assert_eq!((key.netns_cookie, key.local_port), (0, 4000));
            self.captured
        }
        fn port_mode(&self, slot: u32, _: u16) -> Option<u32> {
            assert_eq!(slot, 3);
            self.port_mode
        }
        fn is_node_flow(&self, pod: PodCells, _: &Inbound) -> bool {
            assert_eq!(pod.slot, 3);
            self.node
        }
        fn in_mesh(&self, _: &Address) -> bool {
            self.mesh
        }
        fn is_stale(&self) -> bool {
            self.stale
        }
        fn is_in_handshake(&self, flow: &Inbound) -> bool {
            assert_eq!(flow.remote_port, 4000);
            self.handshake
        }
    }

    fn known(mode: Mode, port_mode: Option<Mode>) -> In {
        In {
            steered: Some(Steered { slot: 3, mode: mode as u32, ..Steered::default() }),
            port_mode: port_mode.map(|m| m as u32),
            captured: false,
            node: false,
            mesh: true,
            stale: false,
            handshake: false,
        }
    }

    fn to(port: u16) -> Inbound {
        Inbound { local: v4(2), remote: v4(9), port, remote_port: 4000 }
    }

    const REFUSED: Steer = Steer::Agent(3, Listener::Plaintext, Reason::InboundRefused);

    #[test]
    fn the_mode_of_its_port_decides_on_plaintext() {
        use Mode::{Disable, Permissive, Strict};
        let table = [
            (known(Strict, None), REFUSED),
            (known(Permissive, None), Steer::Pass(Reason::InboundPermitted)),
            (known(Disable, None), Steer::Pass(Reason::InboundDisabled)),
            (known(Strict, Some(Permissive)), Steer::Pass(Reason::InboundPermitted)),
            (known(Permissive, Some(Strict)), REFUSED),
            (known(Disable, Some(Strict)), REFUSED),
        ];
        for (facts, expected) in table {
            assert_eq!(decide_inbound(&facts, &to(80)), expected);
        }
    }

    #[test]
    fn with_a_stale_heartbeat_the_mode_alone_decides() {
        let here = |mode| In { stale: true, ..known(mode, None) };
        let dropped = Steer::Drop(Reason::InboundStale);
        assert_eq!(decide_inbound(&here(Mode::Strict), &to(80)), dropped);
        assert_eq!(decide_inbound(&here(Mode::Permissive), &to(tcp_port::TUNNEL)), dropped);
        let passed = Steer::Pass(Reason::InboundPermitted);
        assert_eq!(decide_inbound(&here(Mode::Permissive), &to(80)), passed);
    }

    #[test]
    fn plaintext_to_a_pod_with_policies_goes_to_the_agent_or_is_reset() {
        use Mode::{Disable, Permissive, Strict};
        let selected = |mode, port_mode, stale| {
            let steered = Steered { slot: 3, mode: mode as u32, flags: steer_flag::JUDGED, mark: 0 };
            In { steered: Some(steered), stale, ..known(mode, port_mode) }
        };
        let to_agent = |reason| Steer::Agent(3, Listener::Plaintext, reason);
        let table = [
            (Permissive, None, Reason::InboundAuthorize),
            (Disable, None, Reason::InboundAuthorize),
            (Strict, Some(Permissive), Reason::InboundAuthorize),
            (Permissive, Some(Strict), Reason::InboundRefused),
            (Strict, None, Reason::InboundRefused),
        ];
        for (mode, port_mode, reason) in table {
            assert_eq!(decide_inbound(&selected(mode, port_mode, false), &to(80)), to_agent(reason));
            let dead = decide_inbound(&selected(mode, port_mode, true), &to(80));
            assert_eq!(dead, Steer::Drop(Reason::InboundStale), "{mode:?} {port_mode:?}");
        }
        let probe = In { node: true, ..selected(Permissive, None, true) };
        assert_eq!(decide_inbound(&probe, &to(80)), Steer::Pass(Reason::InboundNode));
    }

    #[test]
    fn an_unknown_mode_is_read_as_strict() {
        let steered = Some(Steered { slot: 3, mode: 99, ..Steered::default() });
        let facts = In { steered, ..known(Mode::Disable, None) };
        assert_eq!(decide_inbound(&facts, &to(80)), REFUSED);
        let facts = In { port_mode: Some(0), ..known(Mode::Disable, None) };
        assert_eq!(decide_inbound(&facts, &to(80)), REFUSED);
    }

    #[test]
    fn connections_to_the_agents_ports_reach_no_application() {
        let facts = known(Mode::Disable, None);
        let tunnel = Steer::Agent(3, Listener::Tunnel, Reason::InboundTunnel);
        assert_eq!(decide_inbound(&facts, &to(tcp_port::TUNNEL)), tunnel);
        let listeners = [tcp_port::CAPTURE, tcp_port::PLAINTEXT, tcp_port::TUNNEL_LISTENER];
        for port in listeners.into_iter().chain(listeners.map(tcp_port::spare)).chain([tcp_port::ANSWER]) {
            assert_eq!(decide_inbound(&facts, &to(port)), Steer::Drop(Reason::InboundReserved));
        }
    }

    #[test]
    fn probes_and_local_connections_pass_under_strict() {
        let node = In { node: true, ..known(Mode::Strict, None) };
        assert_eq!(decide_inbound(&node, &to(80)), Steer::Pass(Reason::InboundNode));
        let dial = Inbound { remote: v4(2), ..to(80) };
        assert_eq!(decide_inbound(&known(Mode::Strict, None), &dial), Steer::Pass(Reason::InboundLocal));
        for v4_source in [true, false] {
            let dial = Inbound { remote: Address::dial_source(v4_source, 7), ..to(80) };
            assert_eq!(decide_inbound(&known(Mode::Strict, None), &dial), Steer::Pass(Reason::InboundLocal));
        }
    }

    #[test]
    fn only_captured_connections_to_the_spread_ports_go_to_the_agent() {
        let own = Address::from_octets([0xfd, 0x77, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        let sent = Inbound {
            local: Address::LOOPBACK_V6,
            remote: own,
            port: tcp_port::CAPTURE_V6_FIRST,
            remote_port: 4000,
        };
        let facts = In { captured: true, ..known(Mode::Strict, None) };
        let (taken, local) = (Steer::Capture(3, Reason::InboundLocal), Steer::Pass(Reason::InboundLocal));
        let reserved = Steer::Drop(Reason::InboundReserved);
        let last = tcp_port::CAPTURE_V6_FIRST + tcp_port::CAPTURE_V6_COUNT - 1;
        let table = [
            (facts, sent, taken),
            (facts, Inbound { port: last, ..sent }, taken),
            (In { captured: false, ..facts }, sent, reserved),
            (In { steered: None, ..facts }, sent, reserved),
            (In { stale: true, ..facts }, sent, Steer::Drop(Reason::InboundStale)),
            (In { handshake: true, ..facts }, sent, Steer::Discard(Reason::InboundRaced)),
            (In { handshake: true, captured: false, ..facts }, sent, Steer::Discard(Reason::InboundRaced)),
            (In { handshake: true, steered: None, ..facts }, sent, reserved),
            (facts, Inbound { remote: Address::LOOPBACK_V6, ..sent }, local),
            (facts, Inbound { port: last + 1, ..sent }, local),
            (facts, Inbound { port: tcp_port::CAPTURE_V6_FIRST - 1, ..sent }, local),
            (facts, Inbound { local: own, ..sent }, local),
            (facts, Inbound { local: own, remote: v4(9), ..sent }, REFUSED),
        ];
        for (facts, flow, expected) in table {
            assert_eq!(decide_inbound(&facts, &flow), expected, "{flow:?}");
        }
    }

    #[test]
    fn a_segment_of_a_handshake_that_missed_its_socket_is_not_answered() {
        let loopback = |last| Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, last]));
        let sent = Inbound { local: loopback(7), remote: loopback(1), ..to(tcp_port::CAPTURE) };
        let (first, again) = (known(Mode::Strict, None), In { handshake: true, ..known(Mode::Strict, None) });
        let (raced, local) = (Steer::Discard(Reason::InboundRaced), Steer::Pass(Reason::InboundLocal));
        let spare = Inbound { port: tcp_port::spare(tcp_port::CAPTURE), ..sent };
        let table = [
            (first, sent, local),
            (again, sent, raced),
            (again, spare, raced),
            (again, Inbound { port: 80, ..sent }, local),
            (again, Inbound { port: tcp_port::PLAINTEXT, ..sent }, local),
            (again, Inbound { local: v4(2), ..sent }, local),
            (again, to(tcp_port::CAPTURE), Steer::Drop(Reason::InboundReserved)),
        ];
        for (facts, flow, expected) in table {
            assert_eq!(decide_inbound(&facts, &flow), expected, "{flow:?}");
        }
    }

    #[test]
    fn an_address_without_a_mode_is_left_to_the_guard() {
        let facts = |mesh| In { steered: None, mesh, ..known(Mode::Strict, None) };
        assert_eq!(decide_inbound(&facts(true), &to(80)), Steer::Pass(Reason::InboundUnknown));
        assert_eq!(decide_inbound(&facts(false), &to(80)), Steer::Pass(Reason::InboundForeign));
    }
}
