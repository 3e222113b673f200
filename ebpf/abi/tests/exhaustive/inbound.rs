//! Connections that arrive in a pod: the decision of the steering program, and then the guard's.

use tacit_abi::{
    Address, Inbound, InboundFacts, Listener, Mode, PodCells, Reason, Steer, Steered, Tuple, decide_inbound,
    steer_flag, tcp_port,
};

use crate::{
    Row, assert_no_dead_line,
    facts::{Every, RawMode, facts, subsets},
    first,
    packets::{
        APPLICATION, LOOPBACK_V4, OTHER_LINK_LOCAL, OTHER_V4, OTHER_V6, OWN_LINK_LOCAL, POD_V4, POD_V6,
    },
};

const SLOT: u32 = 3;
const MARK: u32 = 70;

/// Entry of the pod with the destination address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry(Steered);

impl Every for Entry {
    const COUNT: usize = RawMode::COUNT << steer_flag::ALL.len();
    fn nth(index: usize) -> Self {
        let flags = subsets(&steer_flag::ALL).nth(index / RawMode::COUNT).unwrap_or_default();
        Self(Steered { slot: SLOT, mode: RawMode::nth(index % RawMode::COUNT).0, flags, mark: MARK })
    }
}

facts! {
    /// Facts of a connection that arrives.
    Facts of Inbound {
        entry: Option<Entry>,
        captured: bool,
        port_mode: Option<RawMode>,
        node_flow: bool,
        in_mesh: bool,
        stale: bool,
        handshake: bool,
    }
}

impl InboundFacts for Facts {
    fn steered(&self, local: &Address) -> Option<Steered> {
        let expected = if self.is_to_spread_port() { self.subject.remote } else { self.subject.local };
        assert_eq!(*local, expected);
        self.entry().map(|entry| entry.0)
    }
    fn is_captured(&self, key: &Tuple) -> bool {
        assert_eq!((key.local, key.remote), (self.subject.remote, self.subject.local));
        self.captured()
    }
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32> {
        assert_eq!((slot, port), (SLOT, self.subject.port));
        self.port_mode().map(|mode| mode.0)
    }
    fn is_node_flow(&self, pod: PodCells, _: &Inbound) -> bool {
        assert_eq!(pod, PodCells { slot: SLOT, mark: MARK });
        self.node_flow()
    }
    fn in_mesh(&self, address: &Address) -> bool {
        assert_eq!(*address, self.subject.local);
        self.in_mesh()
    }
    fn is_stale(&self) -> bool {
        self.stale()
    }
    fn is_in_handshake(&self, flow: &Inbound) -> bool {
        assert_eq!(flow.local, self.subject.local);
        self.handshake()
    }
}

impl Facts {
    /// Returns true for the targets of captured IPv6 connections, unless the source is another loopback connection's.
    fn is_to_spread_port(&self) -> bool {
        let Inbound { local, remote, port, .. } = self.subject;
        let is_spread = local == Address::LOOPBACK_V6 && (15040..15056).contains(&port);
        is_spread && !is_loopback(&remote)
    }

    /// Returns true for segments of captured IPv4 connections that missed the socket of the handshake.
    fn is_missed_segment(&self) -> bool {
        let is_target = self.subject.local == LOOPBACK_V4 && [15056, 15057].contains(&self.subject.port);
        is_target && !self.is_to_spread_port() && self.handshake()
    }

    fn is_inside_the_pod(&self) -> bool {
        let Inbound { local, remote, .. } = self.subject;
        is_loopback(&local) || is_loopback(&remote) || local == remote
    }

    fn is_to_an_agents_port(&self) -> bool {
        [15008, 15009, 15056, 15057, 15058, 15059, 15060, 15061].contains(&self.subject.port)
    }

    fn mode(&self) -> Option<RawMode> {
        let entry = self.entry()?;
        Some(self.port_mode().unwrap_or(RawMode(entry.0.mode)))
    }

    fn is_selected_by_policies(&self) -> bool {
        self.entry().is_some_and(|entry| entry.0.flags & steer_flag::JUDGED != 0)
    }
}

fn is_loopback(address: &Address) -> bool {
    [LOOPBACK_V4, Address::LOOPBACK_V6].contains(address)
}

type Line = Row<Facts, Steer>;

/// Connections that reach the socket that listens on the port.
static PASSED: [Line; 4] = [
    Line::new(
        "inside the pod, but not to a port of captured connections",
        |f| f.is_inside_the_pod() && !f.is_to_spread_port() && !f.is_missed_segment(),
        |_| Steer::Pass(Reason::InboundLocal),
    ),
    Line::new(
        "to an address that no pod has, where the guard decides",
        |f| !f.is_to_spread_port() && f.entry().is_none() && !f.is_missed_segment(),
        |f| Steer::Pass(if f.in_mesh() { Reason::InboundUnknown } else { Reason::InboundForeign }),
    ),
    Line::new(
        "from the node itself, proven on the link, but not to a port of the agent",
        |f| !f.is_to_spread_port() && f.entry().is_some() && !f.is_to_an_agents_port() && f.node_flow(),
        |_| Steer::Pass(Reason::InboundNode),
    ),
    Line::new(
        "to a port that takes plaintext, of a pod that no policy selects",
        |f| {
            let is_to_application = !f.is_to_spread_port() && !f.is_to_an_agents_port();
            let takes_plaintext = f.mode().is_some_and(RawMode::takes_plaintext);
            is_to_application && takes_plaintext && !f.is_selected_by_policies()
        },
        |f| {
            let is_disabled = f.mode().is_some_and(|mode| mode.0 == Mode::Disable as u32);
            Steer::Pass(if is_disabled { Reason::InboundDisabled } else { Reason::InboundPermitted })
        },
    ),
];

fn specified(facts: &Facts) -> Steer {
    if let Some(passed) = first(&PASSED, facts) {
        return passed;
    }
    let fresh = |steer| if facts.stale() { Steer::Drop(Reason::InboundStale) } else { steer };
    if facts.is_to_spread_port() {
        let is_ours = facts.entry().is_some() && facts.captured();
        return if facts.entry().is_some() && facts.handshake() {
            Steer::Discard(Reason::InboundRaced)
        } else if is_ours {
            fresh(Steer::Capture(SLOT, Reason::InboundLocal))
        } else {
            Steer::Drop(Reason::InboundReserved)
        };
    }
    if facts.is_missed_segment() {
        return Steer::Discard(Reason::InboundRaced);
    }
    let mode = facts.mode().expect("an address without a mode passes");
    let agent = |listener, reason| fresh(Steer::Agent(SLOT, listener, reason));
    match facts.subject.port {
        tcp_port::TUNNEL => agent(Listener::Tunnel, Reason::InboundTunnel),
        _ if facts.is_to_an_agents_port() => Steer::Drop(Reason::InboundReserved),
        _ if mode.takes_plaintext() => agent(Listener::Plaintext, Reason::InboundAuthorize),
        _ => agent(Listener::Plaintext, Reason::InboundRefused),
    }
}

fn check(local: Address, remote: Address, port: u16) -> u64 {
    let flow = Inbound { local, remote, port, remote_port: 4000 };
    Facts::each(flow, |facts| assert_eq!(decide_inbound(facts, &flow), specified(facts), "{facts:?}"))
}

#[test]
fn a_connection_to_a_pod_passes_the_agent_only_as_listed() {
    let v4 = ([POD_V4, OTHER_V4, LOOPBACK_V4].as_slice(), [POD_V4, OTHER_V4, LOOPBACK_V4].as_slice());
    let v6 = [POD_V6, OTHER_V6, OWN_LINK_LOCAL, OTHER_LINK_LOCAL, Address::LOOPBACK_V6, Address::NONE];
    let mut combinations = 0;
    for (locals, remotes) in [v4, (v6.as_slice(), v6.as_slice())] {
        for (local, remote) in
            locals.iter().flat_map(|local| remotes.iter().map(move |remote| (local, remote)))
        {
            let ports = (14_990..=15_070).chain([0, APPLICATION, u16::MAX]);
            combinations += ports.map(|port| check(*local, *remote, port)).sum::<u64>();
        }
    }
    combinations += (0..=u16::MAX).map(|port| check(POD_V4, OTHER_V4, port)).sum::<u64>();
    assert_no_dead_line(&PASSED);
    println!("{combinations} combinations");
}
