//! The times to renew credentials: pure, driven by `manager`.
//!
//! Renewal starts at half of the lifetime, so a whole half remains to ride out an issuer that is down. Attempts that fail
//! are repeated with growing pauses; what is held stays in use until it expires. The lifetime is counted from the moment
//! the credentials were obtained and not from the certificate's own first moment, which is backdated: a certificate of
//! ten seconds backdated by a minute would otherwise be past its half from the start.

use std::time::{Duration, SystemTime};

/// Pause after the first failed attempt; doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause: an issuer that comes back is noticed within about a minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The next step of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// Nothing before this moment.
    Wait(SystemTime),
    /// Ask for new credentials; those held are still good.
    Renew,
    /// Ask for new credentials; nothing usable is held.
    Expired,
}

/// The facts that decide the time of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenewalSchedule {
    /// Since when the credentials are held; with `not_after` equal to it, nothing is held yet.
    pub obtained: SystemTime,
    /// Their last moment of validity.
    pub not_after: SystemTime,
    /// Attempts that failed since they were obtained.
    pub failures: u32,
    /// Time at which the latest of those failed.
    pub failed_at: SystemTime,
    /// Random, drawn once per attempt: spreads the retries of many agents, 0 to 255 for 75 % to 125 % of the pause.
    pub jitter: u8,
}

impl RenewalSchedule {
    /// Returns the step at `now`.
    #[must_use]
    pub fn next(&self, now: SystemTime) -> Renewal {
        let lifetime = self.not_after.duration_since(self.obtained).unwrap_or_default();
        let remaining = self.not_after.duration_since(now).unwrap_or_default();
        let (since, pause) = match self.failures {
            0 => (self.obtained, lifetime / 2),
            _ => (self.failed_at, self.pause(remaining)),
        };
        // A clock that was set back makes the certificate one of the future, which peers refuse: renew at once.
        let due = if now < since { now } else { since + pause };
        match (now < due, remaining.is_zero()) {
            (true, _) => Renewal::Wait(due),
            (false, false) => Renewal::Renew,
            (false, true) => Renewal::Expired,
        }
    }

    /// The pause after the latest failure: never so long that no attempt is left before the expiry.
    fn pause(&self, remaining: Duration) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(16);
        let full = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
        let full = full.min((remaining / 4).max(FIRST_PAUSE));
        full * 3 / 4 + full * u32::from(self.jitter) / 510
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn held(obtained: u64, not_after: u64, failures: u32, failed_at: u64) -> RenewalSchedule {
        RenewalSchedule {
            obtained: at(obtained),
            not_after: at(not_after),
            failures,
            failed_at: at(failed_at),
            jitter: 0,
        }
    }

    #[test]
    fn renewal_follows_the_table() {
        for (schedule, now, expected) in [
            (held(1000, 3000, 0, 0), 1000, Renewal::Wait(at(2000))),
            (held(1000, 3000, 0, 0), 1999, Renewal::Wait(at(2000))),
            (held(1000, 3000, 0, 0), 2000, Renewal::Renew),
            (held(1000, 3000, 0, 0), 2999, Renewal::Renew),
            (held(1000, 3000, 0, 0), 3000, Renewal::Expired),
            (held(1000, 3000, 0, 0), 9000, Renewal::Expired),
            // Nothing held: at once.
            (held(0, 0, 0, 0), 1000, Renewal::Expired),
            // Failures: 3, 45 seconds (three quarters of 4 and 60).
            (held(1000, 3000, 3, 2000), 2000, Renewal::Wait(at(2003))),
            (held(1000, 3000, 3, 2000), 2003, Renewal::Renew),
            (held(1000, 3000, 30, 2000), 2000, Renewal::Wait(at(2045))),
            // Shortly before the expiry the pauses shrink.
            (held(1000, 3000, 30, 2984), 2984, Renewal::Wait(at(2987))),
            // Expired and failing: still a pause between attempts.
            (held(1000, 3000, 3, 5000), 5000, Renewal::Wait(at(5000) + Duration::from_millis(750))),
            (held(1000, 3000, 3, 5000), 5001, Renewal::Expired),
            // The clock was set back by ten years.
            (held(316_000_000, 316_002_000, 0, 0), 1000, Renewal::Renew),
            (held(316_000_000, 316_002_000, 3, 316_001_000), 1000, Renewal::Renew),
        ] {
            assert_eq!(schedule.next(at(now)), expected, "{schedule:?} at {now}");
        }
    }

    #[test]
    fn a_pause_is_bounded_whatever_the_failures_and_jitter() {
        for failures in 1..200 {
            for jitter in [0, 127, 255] {
                let schedule = RenewalSchedule { jitter, ..held(0, 10_000_000, failures, 100) };
                let Renewal::Wait(until) = schedule.next(at(100)) else { panic!("no pause") };
                let pause = until.duration_since(at(100)).expect("later");
                assert!(pause >= FIRST_PAUSE * 3 / 4 && pause <= LONGEST_PAUSE * 5 / 4, "{pause:?}");
            }
        }
    }
}
