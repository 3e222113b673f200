//! Captured connections whose handshake has a socket since a moment ago: what distinguishes a SYN from a segment that missed its socket.
//!
//! The SYN of a held connection is delivered on one CPU, and the application's first segment can arrive on another while the
//! kernel replaces the handshake's socket with the connection's. Before Linux 6.19 a look-up at that moment finds neither, goes on
//! to the listener, and the listener answers with a reset. So `established` notes each such socket when the kernel makes it, and the
//! steering program redirects what comes within a moment and has no socket. A SYN that is answered with a cookie has no socket, and
//! the listener gets the segment that brings the cookie back.
//!
//! A connection's cell is chosen by a keyed hash. Two connections that share a cell overwrite each other: the segments of one are
//! answered as without this.

use crate::{
    Inbound,
    cells::{is_noted_within, mix, noted, tag},
};

/// Cells; a power of two.
pub const RECENT_CELLS: u32 = 1 << 16;
/// Time after a SYN in which what comes without a socket is no SYN. The segment follows within some microseconds. The
/// kernel repeats a SYN after a second, and few clients use the same ends again at once.
const RECENT_MILLISECONDS: u64 = 5;
const MILLISECOND: u64 = 1_000_000;

/// Returns the cell of a connection, and the tag that marks it. The remote end is the application's.
#[inline(always)]
#[must_use]
pub fn recent_cell(seed: u64, flow: &Inbound) -> (u32, u64) {
    let (local, remote) = (&flow.local.0, &flow.remote.0);
    let mut hash = seed;
    for word in [
        (local[0] as u64) << 32 | local[1] as u64,
        (local[2] as u64) << 32 | local[3] as u64,
        (remote[0] as u64) << 32 | remote[1] as u64,
        (remote[2] as u64) << 32 | remote[3] as u64,
        (flow.port as u64) << 32 | flow.remote_port as u64,
    ] {
        hash = mix(hash ^ word);
    }
    (hash as u32 & (RECENT_CELLS - 1), tag(hash))
}

/// Returns what a cell holds after the connection `tag` was noted.
#[inline(always)]
#[must_use]
pub const fn noted_at(tag: u64, now: u64) -> u64 {
    noted(tag, now / MILLISECOND)
}

/// Returns true if `cell` says that the connection `tag` was noted a moment ago.
#[inline(always)]
#[must_use]
pub const fn is_recent(cell: u64, tag: u64, now: u64) -> bool {
    is_noted_within(cell, tag, now / MILLISECOND, RECENT_MILLISECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Address, tcp_port};

    fn flow(remote_port: u16) -> Inbound {
        let loopback = |last| Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, last]));
        Inbound { local: loopback(7), remote: loopback(1), port: tcp_port::CAPTURE, remote_port }
    }

    #[test]
    fn only_the_connection_that_was_noted_is_recent_and_for_a_moment() {
        let (cell, tag) = recent_cell(1, &flow(4000));
        let at = 20_000_000 * MILLISECOND;
        let held = noted_at(tag, at);
        assert!(is_recent(held, tag, at) && is_recent(held, tag, at + RECENT_MILLISECONDS * MILLISECOND));
        assert!(!is_recent(held, tag, at + (RECENT_MILLISECONDS + 1) * MILLISECOND));
        assert!(!is_recent(0, tag, at));
        assert_eq!(recent_cell(1, &flow(4000)), (cell, tag));
        assert_ne!(recent_cell(2, &flow(4000)).1, tag);
    }

    #[test]
    fn each_field_of_a_connection_counts_and_cells_are_inside_the_array() {
        let base = Inbound { local: Address([1, 2, 3, 4]), remote: Address([5, 6, 7, 8]), ..flow(4000) };
        let words = [[9, 2, 3, 4], [1, 9, 3, 4], [1, 2, 9, 4], [1, 2, 3, 9]];
        let locals = words.map(|words| Inbound { local: Address(words), ..base });
        let remotes = words.map(|words| Inbound { remote: Address(words), ..base });
        let ports = [Inbound { port: 1, ..base }, Inbound { remote_port: 1, ..base }];
        let all = locals.iter().chain(&remotes).chain(&ports).chain([&base]);
        let tags: std::collections::HashSet<_> = all.map(|flow| recent_cell(1, flow).1).collect();
        assert_eq!(tags.len(), locals.len() + remotes.len() + ports.len() + 1);
        for port in 0..5000 {
            assert!(recent_cell(5, &flow(port)).0 < RECENT_CELLS);
        }
    }
}
