//! Tests of the small decisions on map entries.

use super::*;
use crate::NodeFlow;

const V4: Address = Address::from_v4_be(u32::from_ne_bytes([10, 77, 1, 2]));
const V6: Address = Address([0xfd77_u32 << 16, 1, 2, 3]);

#[test]
fn a_heartbeat_is_stale_after_its_limit_or_before_the_first() {
    let table =
        [(0, 0, true), (0, 5, true), (5, 15, false), (5, 16, true), (20, 5, false), (20, u64::MAX, true)];
    for (heartbeat, now, expected) in table {
        let state = State { heartbeat, stale_after: 10, ..State::default() };
        assert_eq!(state.is_stale(now), expected, "{heartbeat} at {now}");
    }
}

#[test]
fn a_pod_owns_its_addresses_of_both_families() {
    let pod = |v4, v6| Pod { v4, v6, ..Pod::default() };
    let table = [
        (pod(V4, V6), [true, true], true),
        (pod(V4, Address::NONE), [true, false], true),
        (pod(Address::NONE, V6), [false, true], true),
        (pod(Address::NONE, Address::NONE), [false, false], false),
    ];
    for (pod, owned, has_addresses) in table {
        assert_eq!([V4, V6].map(|address| pod.owns(&address)), owned, "{pod:?}");
        assert_eq!(pod.has_addresses(), has_addresses, "{pod:?}");
    }
}

#[test]
fn a_flag_is_its_own_bit() {
    let flags = pod_flag::EGRESS_STRICT | pod_flag::EXEMPT;
    let pod = Pod { flags, ..Pod::default() };
    assert!(pod.has(pod_flag::EGRESS_STRICT) && pod.has(pod_flag::EXEMPT));
    assert!(!pod.has(pod_flag::UDP_ALLOWED) && !pod.has(pod_flag::SPREAD) && !pod.has(pod_flag::JUDGED));
    assert!(Steered { flags: steer_flag::JUDGED, ..Steered::default() }.has(steer_flag::JUDGED));
    assert!(!Steered::default().has(steer_flag::JUDGED));
}

#[test]
fn numbers_in_maps_have_one_meaning() {
    let modes = [0, 1, 2, 3, 4, u32::MAX].map(Mode::from_raw);
    let strict = Mode::Strict;
    assert_eq!(modes, [strict, Mode::Disable, Mode::Permissive, strict, strict, strict]);
    let capture_port = |port| Pod { capture_port: port, ..Pod::default() }.effective_capture_port();
    assert_eq!([0, 15057].map(capture_port), [tcp_port::CAPTURE, 15057]);
    let index = |listener| listener_index(3, listener);
    assert_eq!([Listener::Tunnel, Listener::Plaintext].map(index), [6, 7]);
    let flow = NodeFlow::new((V4, 1), (V6, 2), 17);
    let expected = NodeFlow { node: V4, pod: V6, node_port: 1, pod_port: 2, protocol: 17 };
    assert_eq!(flow, expected);
}

#[test]
fn only_a_spread_connection_is_stored_without_its_namespace() {
    let first = u32::from(tcp_port::CAPTURE_V6_FIRST);
    let last = first + u32::from(tcp_port::CAPTURE_V6_COUNT) - 1;
    let table = [
        (Address::LOOPBACK_V6, first - 1, false),
        (Address::LOOPBACK_V6, first, true),
        (Address::LOOPBACK_V6, last, true),
        (Address::LOOPBACK_V6, last + 1, false),
        (V6, first, false),
        (V4.capture_target(80, 5), first, false),
    ];
    for (remote, remote_port, expected) in table {
        let tuple = Tuple { netns_cookie: 7, local: V6, remote, local_port: 40_000, remote_port };
        assert_eq!(tuple.is_spread(), expected, "{remote_port}");
        let netns_cookie = if expected { 0 } else { 7 };
        assert_eq!(tuple.of_captured(), Tuple { netns_cookie, ..tuple }, "{remote_port}");
    }
}
