//! Verdicts that pass, and differ in what is counted and remembered.

use super::*;
use Exception::OpenSender;

#[test]
fn plaintext_of_an_open_pod_into_the_mesh_is_counted_by_its_data() {
    let table = [
        (MESH, Segment::Data, Verdict::Clear(GuardClear)),
        (MESH, Segment::Syn, Verdict::Clear(GuardClear)),
        (MESH, Segment::Bare, Verdict::Pass),
        (OUTSIDE, Segment::Data, Verdict::Pass),
        (OUTSIDE, Segment::Bare, Verdict::Pass),
    ];
    for (facts, segment, expected) in table {
        let verdict = decide_egress(&facts, &open(), Hook::Socket, &tcp(segment));
        assert_eq!(verdict, expected, "{segment:?}");
    }
}

#[test]
fn only_protocols_without_connections_are_remembered_for_answers() {
    let allowed = Facts { allowed: true, ..MESH };
    let table = [
        (OUTSIDE, protocol::TCP, Except(Outside)),
        (OUTSIDE, protocol::ICMP, Except(Outside)),
        (OUTSIDE, protocol::ICMP_V6, Except(Outside)),
        (OUTSIDE, protocol::UDP, Ask(Outside)),
        (OUTSIDE, SCTP, Ask(Outside)),
        (allowed, protocol::TCP, Except(AllowClear)),
        (allowed, protocol::ICMP, Except(AllowClear)),
        (allowed, protocol::UDP, Ask(AllowClear)),
        (allowed, SCTP, Ask(AllowClear)),
    ];
    for (facts, number, expected) in table {
        let verdict = decide_egress(&facts, &strict(), Hook::Socket, &packet(number));
        assert_eq!(verdict, expected, "protocol {number}");
    }
}

#[test]
fn answers_reach_a_strict_pod_on_connections_that_it_may_open() {
    let open_egress = Pod { flags: 0, ..strict() };
    let table = [
        (OUTSIDE, strict(), Except(Outside)),
        (MESH, strict(), Verdict::Drop(GuardInboundTcp)),
        (Facts { allowed: true, ..MESH }, strict(), Except(AllowClear)),
        (MESH, open_egress, Except(OpenSender)),
    ];
    for (facts, pod, expected) in table {
        assert_eq!(decide_ingress(&facts, &pod, &tcp(Segment::Data)), expected, "{facts:?}");
    }
    assert_eq!(decide_ingress(&MESH, &open(), &packet(SCTP)), Verdict::Pass);
    assert_eq!(decide_ingress(&MESH, &strict(), &packet(SCTP)), Verdict::Drop(GuardInboundOther));
}
