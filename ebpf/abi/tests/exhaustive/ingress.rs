//! Packets to sockets of a pod.

use tacit_abi::{Exception, ExceptionHook, Hook, Packet, Pod, Reason, Segment, Verdict, decide_ingress};

use crate::{
    Excepted, Row, assert_no_dead_line,
    egress::Facts,
    first,
    packets::{self, Subject},
};

type Line = Row<Facts, Verdict>;

const PASS: fn(&Facts) -> Verdict = |_| Verdict::Pass;

/// Packets that arrive whatever the pod's mode is.
static ALWAYS: [Line; 5] = [
    Line::new("at a pod that is not enrolled", |f| f.subject.is_exempt(), PASS),
    Line::new("at an agent's socket", Facts::is_of_agent, PASS),
    // Frames from elsewhere that claim such an address are dropped on the link, see `arrival`.
    Line::new(
        "from the pod itself",
        |f| f.subject.is_own(&f.subject.packet.remote),
        |f| excepted(f, Exception::OwnAddress),
    ),
    Line::new(
        "from an address of the node, in a flow that is proven on the link",
        |f| f.is_of_nodes_address() && f.is_of_node_flow(),
        |f| excepted(f, Exception::NodeFlow),
    ),
    Line::new(
        "at an address of the node, to a pod that no source has named",
        |f| f.subject.is_unnamed() && f.is_at_nodes_address(),
        |_| Verdict::Except(Exception::NodeAddress),
    ),
];

/// TCP that arrives in clear, with the mode of its port.
static TCP: [Line; 5] = [
    Line::new("without data", |f| !f.subject.has_data(), |f| excepted(f, Exception::WithoutData)),
    Line::new(
        "to a port that takes plaintext, if no policy selects the pod or the connection is open",
        |f| f.takes_plaintext() && !(opens(f) && f.subject.is_selected_by_policies()),
        |f| excepted(f, Exception::PlaintextPort),
    ),
    Line::new(
        "on a connection that the pod opened to an address outside that is no neighbour",
        |f| is_of_own_connection(f) && f.is_outside(),
        |_| Verdict::Except(Exception::Outside),
    ),
    Line::new(
        "on a connection that the pod opened to a destination of `allowClear`",
        |f| is_of_own_connection(f) && f.is_to_allowed_clear(),
        |_| Verdict::Except(Exception::AllowClear),
    ),
    Line::new(
        "on a connection that the pod opened, if it may send plaintext",
        |f| is_of_own_connection(f) && !f.subject.sends_no_plaintext(),
        |_| Verdict::Except(Exception::OpenSender),
    ),
];

/// Everything but TCP that arrives in clear.
static DATAGRAMS: [Line; 6] = [
    Line::new(
        "ICMP, whose errors applications need",
        |f| f.subject.is_icmp(),
        |f| excepted(f, Exception::InboundIcmp),
    ),
    Line::new(
        "UDP with `udp: allow`",
        |f| f.subject.is_udp() && f.subject.has_udp_allowed(),
        |f| excepted(f, Exception::UdpAllowed),
    ),
    Line::new(
        "UDP from outside to a pod that is not STRICT: `udp: deny` concerns the mesh",
        |f| f.subject.is_udp() && !is_strict(f) && f.is_outside(),
        |_| Verdict::Except(Exception::Outside),
    ),
    Line::new(
        "another protocol, to a pod that is not STRICT",
        |f| !f.subject.is_udp() && !is_strict(f),
        PASS,
    ),
    Line::new(
        "an answer of a destination of `allowClear`",
        |f| f.is_answer_of_pod() && f.is_to_allowed_clear(),
        |_| Verdict::Except(Exception::AllowClear),
    ),
    Line::new("an answer to what the pod sent", Facts::is_answer_of_pod, |_| {
        Verdict::Except(Exception::Answer)
    }),
];

/// Returns the verdict on what passes at every pod: it is an exception where the pod is held.
fn excepted(facts: &Facts, exception: Exception) -> Verdict {
    let is_denied_udp = facts.subject.is_udp() && !facts.subject.has_udp_allowed();
    if is_strict(facts) || is_denied_udp { Verdict::Except(exception) } else { Verdict::Pass }
}

fn opens(facts: &Facts) -> bool {
    facts.subject.packet.segment == Segment::Syn
}

fn is_of_own_connection(facts: &Facts) -> bool {
    !opens(facts) && facts.how_accepted().is_none() && !facts.takes_plaintext()
}

fn is_strict(facts: &Facts) -> bool {
    facts.subject.is_strict(None)
}

fn specified(facts: &Facts) -> Verdict {
    let subject = &facts.subject;
    if let Some(verdict) = first(&ALWAYS, facts) {
        return verdict;
    }
    if subject.is_tcp() {
        return first(&TCP, facts).unwrap_or(Verdict::Drop(Reason::GuardInboundTcp));
    }
    let dropped = if subject.is_udp() { Reason::GuardInboundUdp } else { Reason::GuardInboundOther };
    first(&DATAGRAMS, facts).unwrap_or(Verdict::Drop(dropped))
}

static EXCEPTED: Excepted = Excepted::new();

fn check(pod: Pod, packet: Packet) -> u64 {
    Facts::each(Subject { pod, hook: Hook::Socket, packet }, |facts| {
        let verdict = decide_ingress(facts, &pod, &packet);
        let expected = specified(facts);
        assert_eq!(verdict, expected, "{facts:?}");
        EXCEPTED.note(verdict, ExceptionHook::Ingress);
    })
}

#[test]
fn a_strict_or_unknown_pod_receives_nothing_in_clear_but_what_is_listed() {
    let combinations = packets::each(check);
    assert_no_dead_line(&ALWAYS);
    assert_no_dead_line(&TCP);
    assert_no_dead_line(&DATAGRAMS);
    EXCEPTED.assert_all_at(&[ExceptionHook::Ingress]);
    assert!(combinations > 0, "nothing was checked");
    println!("{combinations} combinations");
}

#[test]
fn no_protocol_number_arrives_but_those_that_are_listed() {
    let pods = packets::pods();
    let each = |pod: &Pod| packets::protocols().map(|packet| check(*pod, packet)).sum::<u64>();
    let combinations = pods.iter().map(each).sum::<u64>();
    assert!(combinations > 0, "nothing was checked");
    println!("{combinations} combinations");
}
