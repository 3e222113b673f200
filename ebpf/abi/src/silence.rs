//! Messages of the agent to the kernel of an application, about the peer of a connection.
//!
//! The agent's kernel has acknowledged bytes of the application that the peer's kernel does not acknowledge. So no timer of the
//! application's socket runs. The agent tells the socket, by a segment with a TCP option of its own. `established` reads the option, and
//! has the kernel end the connection by keep-alive when the time is over that the application asked for. The agent answers nothing
//! meanwhile. When the peer answers again, the socket gets its options back.
//!
//! Such a segment comes from the pod's loopback. A process of the pod that sends one changes timers of its own pod only.

/// Kind of the option: for experiments (RFC 4727).
pub const TOLD_KIND: u8 = 253;
/// Identifies the option among those of this kind (RFC 6994).
pub const TOLD_MAGIC: [u8; 2] = [0x7a, 0xc1];
/// Length of the option in bytes.
pub const TOLD_BYTES: usize = 12;
/// Time after which the agent notices that the peer is silent, in milliseconds: two retransmissions and a look.
pub const NOTICED_MS: u32 = 1000;

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The peer is silent. The flow ends after so many milliseconds even if its application asked for nothing.
    Silent(u32),
    /// The peer answers again.
    Alive,
}

impl Told {
    /// Returns the option.
    #[must_use]
    pub const fn encode(self) -> [u8; TOLD_BYTES] {
        let (verb, limit) = match self {
            Self::Silent(limit_ms) => (1, limit_ms.to_be_bytes()),
            Self::Alive => (2, [0; 4]),
        };
        let [m, n] = TOLD_MAGIC;
        [TOLD_KIND, TOLD_BYTES as u8, m, n, verb, 0, 0, 0, limit[0], limit[1], limit[2], limit[3]]
    }

    /// Returns what an option tells; `None` if it is not understood.
    #[inline(always)]
    #[must_use]
    pub const fn decode(option: &[u8; TOLD_BYTES]) -> Option<Self> {
        let limit = u32::from_be_bytes([option[8], option[9], option[10], option[11]]);
        match option[4] {
            1 => Some(Self::Silent(limit)),
            2 => Some(Self::Alive),
            _ => None,
        }
    }
}

/// The options of an application's socket that decide when its kernel gives the peer up. Value of the map `SILENCES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `SO_KEEPALIVE`.
    pub keep_alive: u32,
    /// `TCP_KEEPIDLE`, in seconds.
    pub idle_s: u32,
    /// `TCP_KEEPINTVL`, in seconds.
    pub interval_s: u32,
    /// `TCP_KEEPCNT`.
    pub count: u32,
    /// `TCP_USER_TIMEOUT`, in milliseconds; 0 for none.
    pub user_timeout_ms: u32,
    /// The user timeout that stands in for all of these while the peer is silent.
    pub set_ms: u32,
}

impl Limits {
    /// Returns the user timeout for a peer that is silent, from the moment at which that is noticed. `peer_ms` is the limit of the
    /// agent.
    #[inline(always)]
    #[must_use]
    pub const fn of_silence(&self, peer_ms: u32) -> u32 {
        let asked_ms = if self.user_timeout_ms > NOTICED_MS {
            self.user_timeout_ms - NOTICED_MS
        } else if self.user_timeout_ms != 0 {
            1
        } else if self.keep_alive != 0 {
            self.idle_s.saturating_add(self.interval_s.saturating_mul(self.count)).saturating_mul(1000)
        } else {
            u32::MAX
        };
        let least = if asked_ms < peer_ms { asked_ms } else { peer_ms };
        if least == 0 { 1 } else { least }
    }
}

const _: () = assert!(size_of::<Limits>() == 24);

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for Limits {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read_again() {
        for told in [Told::Silent(0), Told::Silent(900_000), Told::Silent(u32::MAX), Told::Alive] {
            assert_eq!(Told::decode(&told.encode()), Some(told));
        }
        assert_eq!(Told::decode(&[0; TOLD_BYTES]), None);
    }

    #[test]
    fn the_limit_is_the_least_that_was_asked_for() {
        let none = Limits { idle_s: 7200, interval_s: 75, count: 9, ..Limits::default() };
        let kept = Limits { keep_alive: 1, idle_s: 5, interval_s: 2, count: 3, ..none };
        for (limits, peer_ms, expected) in [
            (none, 900_000, 900_000),
            (kept, 900_000, 11_000),
            (kept, 10_000, 10_000),
            (Limits { user_timeout_ms: 8000, ..kept }, 900_000, 7000),
            (Limits { user_timeout_ms: 8000, ..none }, 5000, 5000),
            (Limits { user_timeout_ms: 1, ..none }, 5000, 1),
            (
                Limits { keep_alive: 1, idle_s: u32::MAX, interval_s: u32::MAX, count: u32::MAX, ..none },
                5000,
                5000,
            ),
            (none, 0, 1),
        ] {
            assert_eq!(limits.of_silence(peer_ms), expected, "{limits:?} {peer_ms}");
        }
    }
}
