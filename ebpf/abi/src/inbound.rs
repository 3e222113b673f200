//! The decision on a connection that arrives in a pod.

use crate::{Address, Listener, Mode, Reason, Steered, Tuple, steer_flag, tcp_port};

/// A TCP connection that arrives in an enrolled pod's network namespace.
#[derive(Clone, Copy, Debug)]
pub struct Inbound {
    /// Address it was sent to.
    pub local: Address,
    /// Address it claims to come from.
    pub remote: Address,
    /// Port it was sent to.
    pub port: u16,
    /// Port it claims to come from.
    pub remote_port: u16,
}

impl Inbound {
    /// As its connecting side sees it; the namespace is not known.
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

/// What the steering program can look up.
pub trait InboundFacts {
    /// The enrolled pod that has this address.
    fn steered(&self, local: &Address) -> Option<Steered>;
    /// Was a connection captured under this key, and not accepted by the agent yet?
    fn is_captured(&self, key: &Tuple) -> bool;
    /// The mode of one port, when it has its own.
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32>;
    /// Is it one of the node's own addresses?
    fn is_node(&self, remote: &Address) -> bool;
    /// Is the address inside the mesh's ranges?
    fn in_mesh(&self, address: &Address) -> bool;
    /// Does the agent give no sign of life?
    fn is_stale(&self) -> bool;
}

/// Verdict on an inbound connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// To whatever socket listens there.
    Pass(Reason),
    /// To the agent's listener of this slot; refused when it is not there.
    Agent(u32, Listener, Reason),
    /// To the agent's listener for what the pod of this slot sends; refused when it is not there.
    Capture(u32, Reason),
    /// Refused with a reset.
    Drop(Reason),
}

/// Decides where an inbound connection goes.
///
/// Plaintext that a mode takes goes straight to the application, unless authorization policies select the pod: then it
/// is the agent's to judge, and without the agent it is refused.
#[inline(always)]
pub fn decide_inbound(facts: &impl InboundFacts, flow: &Inbound) -> Steer {
    let tuple = flow.tuple();
    if tuple.is_spread() && !flow.remote.is_loopback() {
        return captured(facts, &tuple);
    }
    // What the pod says to itself, and what the agent says to its applications, which it dials from loopback addresses.
    // Such packets cannot come from outside: the kernel drops a source address that is its own, or a loopback address.
    // (A pod that lets the latter in, by route_localnet, can be sent a SYN; its answer goes to the pod itself.)
    if flow.local.is_loopback() || flow.remote.is_loopback() || flow.local.same(&flow.remote) {
        return Steer::Pass(Reason::InboundLocal);
    }
    let Some(steered) = facts.steered(&flow.local) else {
        return if facts.in_mesh(&flow.local) {
            Steer::Drop(Reason::InboundUnknown)
        } else {
            Steer::Pass(Reason::InboundForeign)
        };
    };
    if flow.port == tcp_port::TUNNEL {
        return agent(facts, steered, Listener::Tunnel, Reason::InboundTunnel);
    }
    if tcp_port::is_reserved(flow.port) {
        return Steer::Drop(Reason::InboundReserved);
    }
    if facts.is_node(&flow.remote) {
        return Steer::Pass(Reason::InboundNode);
    }
    let mode = facts.port_mode(steered.slot, flow.port).unwrap_or(steered.mode);
    match Mode::from_raw(mode) {
        Mode::Strict => agent(facts, steered, Listener::Plaintext, Reason::InboundRefused),
        Mode::Permissive | Mode::Disable if steered.has(steer_flag::JUDGED) => {
            agent(facts, steered, Listener::Plaintext, Reason::InboundJudged)
        }
        Mode::Permissive => Steer::Pass(Reason::InboundPermitted),
        Mode::Disable => Steer::Pass(Reason::InboundDisabled),
    }
}

/// What the pod sends from its own address to a port that captured connections are spread over. Only what was captured is
/// the agent's; nothing of it may come to a process of the pod that listens there. Connections from `::1` are the pod's own
/// affair: the connect hook binds what it captures to the pod's address.
#[inline(always)]
fn captured(facts: &impl InboundFacts, key: &Tuple) -> Steer {
    let Some(steered) = facts.steered(&key.local) else {
        return Steer::Drop(Reason::InboundReserved);
    };
    if !facts.is_captured(key) {
        return Steer::Drop(Reason::InboundReserved);
    }
    if facts.is_stale() {
        return Steer::Drop(Reason::InboundStale);
    }
    Steer::Capture(steered.slot, Reason::InboundLocal)
}

/// A stuck agent's listeners still exist, and would hold the peer until it gives up.
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
        fn is_node(&self, _: &Address) -> bool {
            self.node
        }
        fn in_mesh(&self, _: &Address) -> bool {
            self.mesh
        }
        fn is_stale(&self) -> bool {
            self.stale
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
        }
    }

    fn to(port: u16) -> Inbound {
        Inbound { local: v4(2), remote: v4(9), port, remote_port: 4000 }
    }

    const REFUSED: Steer = Steer::Agent(3, Listener::Plaintext, Reason::InboundRefused);

    #[test]
    fn plaintext_meets_the_mode_of_its_port() {
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
    fn without_a_sign_of_life_the_mode_alone_decides() {
        let here = |mode| In { stale: true, ..known(mode, None) };
        let dropped = Steer::Drop(Reason::InboundStale);
        assert_eq!(decide_inbound(&here(Mode::Strict), &to(80)), dropped);
        assert_eq!(decide_inbound(&here(Mode::Permissive), &to(tcp_port::TUNNEL)), dropped);
        let passed = Steer::Pass(Reason::InboundPermitted);
        assert_eq!(decide_inbound(&here(Mode::Permissive), &to(80)), passed);
    }

    #[test]
    fn plaintext_to_a_judged_pod_goes_to_the_agent_or_nowhere() {
        use Mode::{Disable, Permissive, Strict};
        let judged = |mode, port_mode, stale| {
            let steered = Steered { slot: 3, mode: mode as u32, flags: steer_flag::JUDGED, pad: 0 };
            In { steered: Some(steered), stale, ..known(mode, port_mode) }
        };
        let to_agent = |reason| Steer::Agent(3, Listener::Plaintext, reason);
        let table = [
            (Permissive, None, Reason::InboundJudged),
            (Disable, None, Reason::InboundJudged),
            (Strict, Some(Permissive), Reason::InboundJudged),
            (Permissive, Some(Strict), Reason::InboundRefused),
            (Strict, None, Reason::InboundRefused),
        ];
        for (mode, port_mode, reason) in table {
            assert_eq!(decide_inbound(&judged(mode, port_mode, false), &to(80)), to_agent(reason));
            let dead = decide_inbound(&judged(mode, port_mode, true), &to(80));
            assert_eq!(dead, Steer::Drop(Reason::InboundStale), "{mode:?} {port_mode:?}");
        }
        let probe = In { node: true, ..judged(Permissive, None, true) };
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
    fn the_agents_ports_are_the_agents() {
        let facts = known(Mode::Disable, None);
        let tunnel = Steer::Agent(3, Listener::Tunnel, Reason::InboundTunnel);
        assert_eq!(decide_inbound(&facts, &to(tcp_port::TUNNEL)), tunnel);
        let spare = [tcp_port::CAPTURE, tcp_port::PLAINTEXT, tcp_port::TUNNEL].map(tcp_port::spare);
        for port in [tcp_port::CAPTURE, tcp_port::PLAINTEXT].into_iter().chain(spare) {
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
    fn of_what_a_pod_sends_to_the_spread_ports_only_what_was_captured_is_the_agents() {
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
    fn an_address_without_a_mode_is_refused_inside_the_mesh_only() {
        let facts = |mesh| In { steered: None, mesh, ..known(Mode::Strict, None) };
        assert_eq!(decide_inbound(&facts(true), &to(80)), Steer::Drop(Reason::InboundUnknown));
        assert_eq!(decide_inbound(&facts(false), &to(80)), Steer::Pass(Reason::InboundForeign));
    }
}
