//! The programs' decisions, as functions of facts. The kernel side looks facts up in maps, the tests in tables.
//!
//! Facts are asked for in order of cost, and only as far as needed: a connection outside the mesh costs one lookup of
//! its pod and one of its destination.

use crate::{Address, Listener, Mode, Pod, Reason, Steered, pod_flag, steer_flag, tcp_port};

/// What the connect hook can look up.
pub trait ConnectFacts {
    /// The enrolled pod the calling process is in.
    fn pod(&self) -> Option<Pod>;
    /// Is it TCP (or MPTCP, which starts as TCP)?
    fn is_tcp(&self) -> bool;
    /// Is the address inside the mesh's ranges?
    fn in_mesh(&self, address: &Address) -> bool;
    /// Cookie of the socket's network namespace.
    fn netns_cookie(&self) -> u64;
    /// Is the calling process an agent's?
    fn is_agent(&self) -> bool;
    /// Are pods that have no entry yet held to STRICT?
    fn default_is_strict(&self) -> bool;
    /// May the destination be reached in clear, as the operator said?
    fn is_allowed_clear(&self, destination: &Address) -> bool;
    /// Does the agent give no sign of life?
    fn is_stale(&self) -> bool;
}

/// Verdict on an outbound connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// Goes as if Tacit were not there.
    Leave(Reason),
    /// Goes to the agent; the pod's facts are needed to remember it.
    Capture(Pod),
    /// Fails with ECONNREFUSED, or EPERM where the kernel cannot choose.
    Deny(Reason),
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
    if !facts.is_tcp() {
        return Connect::Leave(Reason::ConnectNotStream);
    }
    if !facts.in_mesh(destination) {
        return Connect::Leave(Reason::ConnectOutsideMesh);
    }
    if pod.owns(destination) {
        return Connect::Leave(Reason::ConnectOwnAddress);
    }
    if facts.is_allowed_clear(destination) {
        return Connect::Leave(Reason::ConnectAllowedClear);
    }
    // A namespace made inside the pod: the agent's listener is not there, and neither is the pod's address.
    if facts.netns_cookie() != pod.netns_cookie {
        return Connect::Deny(Reason::ConnectForeignNetns);
    }
    match (facts.is_stale(), pod.has(pod_flag::EGRESS_STRICT)) {
        (false, _) => Connect::Capture(pod),
        (true, true) => Connect::Deny(Reason::ConnectAgentStale),
        (true, false) => Connect::Leave(Reason::ConnectStaleClear),
    }
}

/// A process below the pods' cgroup whose pod the agent has not told yet. What is no TCP meets the guard.
#[inline(always)]
fn unknown_pod(facts: &impl ConnectFacts, destination: &Address) -> Connect {
    let held = facts.default_is_strict()
        && facts.is_tcp()
        && facts.in_mesh(destination)
        && !facts.is_allowed_clear(destination)
        && !facts.is_agent();
    if held { Connect::Deny(Reason::ConnectUnknownPod) } else { Connect::Leave(Reason::ConnectNotEnrolled) }
}

/// A TCP connection that arrives in an enrolled pod's network namespace.
#[derive(Clone, Copy, Debug)]
pub struct Inbound {
    /// Address it was sent to.
    pub local: Address,
    /// Address it claims to come from.
    pub remote: Address,
    /// Port it was sent to.
    pub port: u16,
}

/// What the steering program can look up.
pub trait InboundFacts {
    /// The enrolled pod that has this address.
    fn steered(&self, local: &Address) -> Option<Steered>;
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
    /// Refused with a reset.
    Drop(Reason),
}

/// Decides where an inbound connection goes.
///
/// Plaintext that a mode takes goes straight to the application, unless authorization policies select the pod: then it
/// is the agent's to judge, and without the agent it is refused.
#[inline(always)]
pub fn decide_inbound(facts: &impl InboundFacts, flow: &Inbound) -> Steer {
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

    fn pod() -> Pod {
        Pod { netns_cookie: 7, v4: v4(2), slot: 3, ..Pod::default() }
    }

    #[derive(Clone, Copy)]
    struct Out {
        pod: Option<Pod>,
        tcp: bool,
        mesh: bool,
        netns: u64,
        agent: bool,
        strict: bool,
        clear: bool,
        stale: bool,
    }

    const USUAL: Out = Out {
        pod: None,
        tcp: true,
        mesh: true,
        netns: 7,
        agent: false,
        strict: false,
        clear: false,
        stale: false,
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
            (Out { netns: 8, ..known }, v4(9), Connect::Deny(Reason::ConnectForeignNetns)),
            (known, v4(9), Connect::Capture(pod())),
        ];
        for (facts, destination, expected) in table {
            assert_eq!(decide_connect(&facts, &destination), expected);
        }
    }

    #[test]
    fn without_a_sign_of_life_the_mode_alone_decides() {
        let strict = Pod { flags: pod_flag::EGRESS_STRICT, ..pod() };
        let stale = |pod| Out { pod: Some(pod), stale: true, ..USUAL };
        assert_eq!(decide_connect(&stale(strict), &v4(9)), Connect::Deny(Reason::ConnectAgentStale));
        assert_eq!(decide_connect(&stale(pod()), &v4(9)), Connect::Leave(Reason::ConnectStaleClear));
        let nested = Out { netns: 8, ..stale(pod()) };
        assert_eq!(decide_connect(&nested, &v4(9)), Connect::Deny(Reason::ConnectForeignNetns));
        let here = |mode| In { stale: true, ..known(mode, None) };
        let dropped = Steer::Drop(Reason::InboundStale);
        assert_eq!(decide_inbound(&here(Mode::Strict), &to(80)), dropped);
        assert_eq!(decide_inbound(&here(Mode::Permissive), &to(tcp_port::TUNNEL)), dropped);
        let passed = Steer::Pass(Reason::InboundPermitted);
        assert_eq!(decide_inbound(&here(Mode::Permissive), &to(80)), passed);
    }

    #[test]
    fn a_pod_without_an_entry_is_held_to_strict_when_the_mesh_is() {
        let strict = Out { strict: true, ..USUAL };
        let left = Connect::Leave(Reason::ConnectNotEnrolled);
        let table = [
            (strict, Connect::Deny(Reason::ConnectUnknownPod)),
            (Out { strict: false, ..strict }, left),
            (Out { mesh: false, ..strict }, left),
            (Out { tcp: false, ..strict }, left),
            (Out { clear: true, ..strict }, left),
            (Out { agent: true, ..strict }, left),
        ];
        for (facts, expected) in table {
            assert_eq!(decide_connect(&facts, &v4(9)), expected);
        }
    }

    #[derive(Clone, Copy)]
    struct In {
        steered: Option<Steered>,
        port_mode: Option<u32>,
        node: bool,
        mesh: bool,
        stale: bool,
    }

    impl InboundFacts for In {
        fn steered(&self, _: &Address) -> Option<Steered> {
            self.steered
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
            node: false,
            mesh: true,
            stale: false,
        }
    }

    fn to(port: u16) -> Inbound {
        Inbound { local: v4(2), remote: v4(9), port }
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
        let dial = Inbound { local: v4(2), remote: v4(2), port: 80 };
        assert_eq!(decide_inbound(&known(Mode::Strict, None), &dial), Steer::Pass(Reason::InboundLocal));
        for v4_source in [true, false] {
            let dial = Inbound { local: v4(2), remote: Address::dial_source(v4_source, 7), port: 80 };
            assert_eq!(decide_inbound(&known(Mode::Strict, None), &dial), Steer::Pass(Reason::InboundLocal));
        }
    }

    #[test]
    fn an_address_without_a_mode_is_refused_inside_the_mesh_only() {
        let facts = |mesh| In { steered: None, mesh, ..known(Mode::Strict, None) };
        assert_eq!(decide_inbound(&facts(true), &to(80)), Steer::Drop(Reason::InboundUnknown));
        assert_eq!(decide_inbound(&facts(false), &to(80)), Steer::Pass(Reason::InboundForeign));
    }
}
