//! Datagrams of a pod whose answers are expected: what tells an answer from an unsolicited packet.
//!
//! Each pod has [`limits::ANSWERS_PER_POD`] cells of its own in one array, so no pod can take another's. A flow may be in
//! [`ANSWER_WAYS`] cells, chosen by a keyed hash. A cell holds a second, independent part of the hash and the time of the
//! pod's last datagram. A pod with more flows than cells loses its own oldest ones.

use crate::{
    Packet, PodCells,
    cells::{is_noted_within, mix, noted, tag},
    limits,
};

/// Neighbouring cells in which a flow may be.
pub const ANSWER_WAYS: u32 = 4;
/// Time after the pod's last datagram during which answers are expected, in seconds. Connection tracking of Linux
/// allows 120.
const EXPECTED_SECONDS: u64 = 180;
const SECOND: u64 = 1_000_000_000;

/// Returns a flow's hash. It is the same for a datagram of the pod and for its answer.
#[inline(always)]
fn hash(seed: u64, mark: u32, packet: &Packet) -> u64 {
    let remote = &packet.remote.0;
    let words = [
        (remote[0] as u64) << 32 | remote[1] as u64,
        (remote[2] as u64) << 32 | remote[3] as u64,
        (packet.local_port as u64) << 32 | (packet.remote_port as u64) << 8 | packet.protocol as u64,
    ];
    let mut state = mix(seed ^ mark as u64);
    for word in words {
        state = mix(state ^ word);
    }
    state
}

/// Returns the first of a flow's cells in the array, and the tag that marks the flow. `None` for a pod without a slot.
#[inline(always)]
#[must_use]
pub fn answer_cells(seed: u64, pod: PodCells, packet: &Packet) -> Option<(u32, u64)> {
    if pod.slot >= limits::SLOTS {
        return None;
    }
    let hash = hash(seed, pod.mark, packet);
    let set = hash as u32 & (limits::ANSWERS_PER_POD - ANSWER_WAYS);
    Some((pod.slot * limits::ANSWERS_PER_POD + set, tag(hash)))
}

/// Returns what a cell holds after a datagram of the flow `tag`.
#[inline(always)]
#[must_use]
pub const fn remember(tag: u64, now: u64) -> u64 {
    noted(tag, now / SECOND)
}

/// Returns true if `cell` says that answers of the flow `tag` are expected.
#[inline(always)]
#[must_use]
pub const fn is_expected(cell: u64, tag: u64, now: u64) -> bool {
    is_noted_within(cell, tag, now / SECOND, EXPECTED_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Address, Segment, protocol};

    const POD: PodCells = PodCells::new(3, 70);

    fn packet(remote: u32, local_port: u16) -> Packet {
        Packet {
            local: Address::from_v4_be(7),
            remote: Address::from_v4_be(remote),
            protocol: protocol::UDP,
            local_port,
            remote_port: 53,
            segment: Segment::Data,
            is_discovery: false,
        }
    }

    #[test]
    fn only_the_flow_that_was_sent_is_expected_and_for_a_bounded_time() {
        let (index, tag) = answer_cells(1, POD, &packet(9, 4000)).expect("a slot");
        let at = 40_000_000 * SECOND;
        let cell = remember(tag, at);
        assert!(is_expected(cell, tag, at) && is_expected(cell, tag, at + EXPECTED_SECONDS * SECOND));
        assert!(!is_expected(cell, tag, at + (EXPECTED_SECONDS + 1) * SECOND));
        assert!(!is_expected(0, tag, at));
        for other in [packet(8, 4000), packet(9, 4001), Packet { protocol: 132, ..packet(9, 4000) }] {
            let (_, other) = answer_cells(1, POD, &other).expect("a slot");
            assert_ne!(tag, other);
        }
        assert_eq!(index / limits::ANSWERS_PER_POD, 3);
        assert_eq!(answer_cells(1, POD, &packet(9, 4000)), Some((index, tag)));
        assert_ne!(answer_cells(2, POD, &packet(9, 4000)), Some((index, tag)));
    }

    #[test]
    fn a_cell_expects_nothing_for_the_next_pod_of_its_slot() {
        let flow = packet(9, 4000);
        let cells = (0..10_000).filter_map(|cgroup| answer_cells(1, PodCells::new(3, cgroup), &flow));
        let tags: std::collections::HashSet<u64> = cells.map(|(_, tag)| tag).collect();
        assert_eq!(tags.len(), 10_000);
        // Another flow of the next pod does not stand for it either.
        let remote = |word: u32| Packet { remote: Address([0x20, word, 0, 1]), ..flow };
        let tag = |cgroup: u64, word: u32| {
            answer_cells(1, PodCells::new(3, cgroup), &remote(word)).map(|(_, tag)| tag)
        };
        assert_ne!(tag(70, 5), tag(70 ^ 3, 5 ^ 3));
    }

    #[test]
    fn each_field_of_a_flow_counts() {
        let flow = Packet { remote: Address([1, 2, 3, 4]), ..packet(9, 4000) };
        let remotes = [[5, 2, 3, 4], [1, 5, 3, 4], [1, 2, 5, 4], [1, 2, 3, 5], [0, 2, 3, 4], [1, 2, 4, 3]];
        let others = remotes.map(|words| Packet { remote: Address(words), ..flow });
        let ports = [
            Packet { local_port: 4001, ..flow },
            Packet { local_port: 0, ..flow },
            Packet { remote_port: 54, ..flow },
            Packet { remote_port: 0, ..flow },
            Packet { remote_port: flow.local_port, local_port: flow.remote_port, ..flow },
            Packet { protocol: 0, ..flow },
        ];
        let tag = |packet: &Packet| answer_cells(1, POD, packet).map(|(_, tag)| tag);
        let tags: std::collections::HashSet<_> =
            others.iter().chain(&ports).chain([&flow]).map(|packet| tag(packet).expect("a slot")).collect();
        assert_eq!(tags.len(), others.len() + ports.len() + 1);
    }

    #[test]
    fn tags_are_independent_of_cells() {
        let tags: std::collections::HashSet<u64> = (0..20_000)
            .filter_map(|port| answer_cells(5, PodCells::new(0, 7), &packet(9, port)))
            .map(|(_, tag)| tag)
            .collect();
        assert_eq!(tags.len(), 20_000);
    }

    #[test]
    fn cells_are_inside_the_pods_own_part_of_the_array() {
        for port in 0..5000 {
            let (index, _) = answer_cells(5, PodCells::new(1, 7), &packet(9, port)).expect("a slot");
            assert!(index >= limits::ANSWERS_PER_POD && index + ANSWER_WAYS <= 2 * limits::ANSWERS_PER_POD);
        }
        assert_eq!(answer_cells(5, PodCells::new(u32::MAX, 7), &packet(9, 1)), None);
        assert_eq!(answer_cells(5, PodCells::new(limits::SLOTS, 7), &packet(9, 1)), None);
    }

    #[test]
    fn flows_are_spread_over_all_cells() {
        let sets: std::collections::HashSet<u32> = (0..20_000)
            .filter_map(|port| answer_cells(5, PodCells::new(0, 7), &packet(9, port)))
            .map(|(index, _)| index)
            .collect();
        assert_eq!(sets.len() as u32, limits::ANSWERS_PER_POD / ANSWER_WAYS);
    }
}
