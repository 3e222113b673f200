//! Probes of applications' connections: keep-alive, and questions for a closed window.
//!
//! The connection of an application ends at its agent, whose kernel would answer every probe, whether the peer on another node is
//! alive or not. So the guard drops a probe and hands it to the agent. The agent asks the peer's kernel, and delivers the probe after
//! the answer. Without one, the application's kernel counts its own probes, as without Tacit.
//!
//! A probe is dropped only if the agent will read it soon: a connection in order must not end because an agent is busy.

/// Time in which an agent that is not late reads a record, in nanoseconds. It is below a second, the shortest time between two probes.
pub const PROBE_LATE_NS: u64 = 250_000_000;

/// The first bytes of a TCP segment that a program reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHead {
    /// Sequence number.
    pub sequence: u32,
    /// Bytes of the TCP header.
    pub header: u32,
    /// FIN, SYN, RST and others.
    pub flags: u8,
    /// Bytes from the begin of the TCP header to the end of the packet.
    pub length: u32,
}

impl SegmentHead {
    /// Returns the head in the four words of a TCP header before its checksum.
    #[inline(always)]
    #[must_use]
    pub fn new(words: &[u32; 4], length: u32) -> Self {
        let sizes = words[3].to_ne_bytes();
        Self { sequence: u32::from_be(words[1]), header: (sizes[0] >> 4) as u32 * 4, flags: sizes[1], length }
    }

    /// Returns true for a probe of a connection whose next byte is `next`: a segment without data that repeats the number of the
    /// last acknowledged byte, so that the receiver answers it (RFC 9293, 3.8.4).
    #[inline(always)]
    #[must_use]
    pub const fn is_probe(&self, next: u32) -> bool {
        const FIN_SYN_RST: u8 = 0x07;
        self.length == self.header && self.flags & FIN_SYN_RST == 0 && self.sequence == next.wrapping_sub(1)
    }
}

/// The agent that reads a pod's probes, as the programs know it. The map's key is the pod's slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeShare {
    /// Cookie of the network namespace of the pod that the agent serves; 0 for none. Written by the agent.
    pub served: u64,
    /// Position in the ring up to which the agent has to read.
    pub mark: u64,
    /// Time at which the record before that position was added, in nanoseconds.
    pub since: u64,
}

impl ProbeShare {
    /// Returns true if the agent serves the pod and is not late. `consumed` is the position up to which the agent has read the ring.
    #[inline(always)]
    #[must_use]
    pub const fn is_attended(&self, netns_cookie: u64, consumed: u64, now: u64) -> bool {
        self.served == netns_cookie
            && netns_cookie != 0
            && (consumed >= self.mark || now.wrapping_sub(self.since) < PROBE_LATE_NS)
    }

    /// Notes a record up to the position `produced`. The oldest one that the agent has not read stays noted.
    #[inline(always)]
    pub const fn add(&mut self, consumed: u64, produced: u64, now: u64) {
        if consumed >= self.mark {
            self.mark = produced;
            self.since = now;
        }
    }
}

const _: () = assert!(size_of::<ProbeShare>() == 24);

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for ProbeShare {}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: u8 = 0x10;

    fn head(sequence: u32, flags: u8, options: u32, data: u32) -> SegmentHead {
        let header = 20 + options;
        let sizes = u32::from_ne_bytes([(header as u8 / 4) << 4, flags, 0xff, 0xff]);
        let words = [0x1234_5678, sequence.to_be(), 7_u32.to_be(), sizes];
        SegmentHead::new(&words, header + data)
    }

    #[test]
    fn only_an_empty_segment_before_the_next_byte_is_a_probe() {
        for next in [0, 1, 70_000, u32::MAX] {
            let before = next.wrapping_sub(1);
            for options in [0, 12, 40] {
                assert!(head(before, ACK, options, 0).is_probe(next));
                assert!(!head(next, ACK, options, 0).is_probe(next), "an acknowledgement");
                assert!(!head(before, ACK, options, 1).is_probe(next), "data");
                assert!(!head(before.wrapping_sub(1), ACK, options, 0).is_probe(next), "older");
                for flag in [0x01, 0x02, 0x04] {
                    assert!(!head(before, ACK | flag, options, 0).is_probe(next), "flag {flag}");
                }
            }
        }
    }

    #[test]
    fn a_pod_that_no_agent_serves_is_not_attended() {
        let share = ProbeShare::default();
        assert!(!share.is_attended(7, 0, 0) && !share.is_attended(0, 0, 0));
        let share = ProbeShare { served: 7, ..share };
        assert!(share.is_attended(7, 0, 0) && !share.is_attended(8, 0, 0));
    }

    #[test]
    fn an_agent_that_is_late_gets_no_more_probes_until_it_has_read() {
        let mut share = ProbeShare { served: 7, mark: 100, since: 0 };
        share.add(100, 200, 1000);
        share.add(150, 300, 1000 + PROBE_LATE_NS - 1);
        assert_eq!((share.mark, share.since), (200, 1000), "the oldest record counts");
        assert!(share.is_attended(7, 199, 1000 + PROBE_LATE_NS - 1));
        assert!(!share.is_attended(7, 199, 1000 + PROBE_LATE_NS));
        assert!(share.is_attended(7, 200, 1000 + 10 * PROBE_LATE_NS));
        share.add(200, 400, 5);
        assert_eq!((share.mark, share.since), (400, 5));
    }
}
