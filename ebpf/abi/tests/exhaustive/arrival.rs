//! Frames towards a pod, on the host end of its link: which of them prove a flow of the node.

use tacit_abi::{Address, Arrival, ArrivalFacts, Hook, Packet, Pod, Reason, Segment, decide_arrival};

use crate::{
    Row, assert_no_dead_line,
    facts::facts,
    first,
    packets::{self, Subject},
};

facts! {
    /// Facts of a frame towards a pod.
    Facts of Subject {
        of_node: bool,
        node_socket: bool,
        node_flow: bool,
    }
}

impl ArrivalFacts for Facts {
    fn is_node(&self, address: &Address) -> bool {
        assert_eq!(*address, self.subject.packet.remote);
        self.of_node()
    }
    fn is_node_socket(&self) -> bool {
        self.node_socket()
    }
    fn is_node_flow(&self, packet: &Packet) -> bool {
        assert_eq!(*packet, self.subject.packet);
        self.node_flow()
    }
}

impl Facts {
    /// Returns true for a packet between an address of the node and one of the pod.
    fn is_between_node_and_pod(&self) -> bool {
        self.subject.is_own(&self.subject.packet.local) && self.of_node()
    }
}

type Line = Row<Facts, Arrival>;

static LINES: [Line; 3] = [
    Line::new(
        "nothing arrives in the pod's own name",
        |f| f.subject.is_own(&f.subject.packet.remote),
        |_| Arrival::Drop(Reason::GuardSpoofed),
    ),
    // Anyone can make the node's kernel send a bare segment, such as a reset.
    Line::new(
        "a packet of the node's socket proves the flow, unless it is bare and begins none",
        |f| {
            let begins = f.subject.packet.segment != Segment::Bare || f.node_flow();
            f.is_between_node_and_pod() && f.node_socket() && begins
        },
        |_| Arrival::OfNode,
    ),
    Line::new(
        "nobody else sends data in a flow of the node",
        |f| {
            let carries_data = f.subject.has_data() && !f.subject.is_icmp();
            f.is_between_node_and_pod() && !f.node_socket() && carries_data && f.node_flow()
        },
        |_| Arrival::Drop(Reason::GuardSpoofed),
    ),
];

fn check(pod: Pod, packet: Packet) -> u64 {
    Facts::each(Subject { pod, hook: Hook::Link, packet }, |facts| {
        let expected = first(&LINES, facts).unwrap_or(Arrival::Pass);
        assert_eq!(decide_arrival(facts, &pod, &packet), expected, "{facts:?}");
    })
}

#[test]
fn only_a_socket_of_the_node_proves_a_flow_of_the_node() {
    let (pods, kinds) = (packets::pods(), packets::kinds());
    let mut combinations = 0;
    for pair in packets::pairs() {
        let packets = kinds.iter().map(|kind| packets::between(pair, *kind)).chain(packets::protocols());
        for packet in packets {
            // Of the pod, only its addresses count.
            let strict = pods.iter().filter(|pod| pod.mode == 3 && pod.flags & !1 == 0);
            combinations += strict.map(|pod| check(*pod, packet)).sum::<u64>();
        }
    }
    assert_no_dead_line(&LINES);
    println!("{combinations} combinations");
}
