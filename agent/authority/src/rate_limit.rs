//! Rate limits of callers: one token bucket for each, pure.
//!
//! The number of buckets is bounded. If the table is full, buckets that have refilled are removed. If none has, a new caller is
//! refused, so that invented callers cannot use up memory.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use super::config::Rate;

/// Maximum number of buckets. The largest clusters have 5,000 nodes. A bucket takes some 100 bytes.
const CALLERS_MAX: usize = 16_384;

/// The buckets of all callers.
#[derive(Debug)]
pub(super) struct RateLimits<K> {
    rate: Rate,
    by_caller: HashMap<K, Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Requests left at `at`, including fractions.
    left: f64,
    at: Instant,
}

impl<K: Eq + Hash> RateLimits<K> {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, by_caller: HashMap::new() }
    }

    /// Takes one request of `caller` at `now`. Returns the time until the next request is allowed if none is left.
    pub(super) fn take(&mut self, caller: K, now: Instant) -> Result<(), Duration> {
        let (per_second, burst) = (f64::from(self.rate.per_second), f64::from(self.rate.burst));
        let refilled = |bucket: &Bucket| {
            let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
            (bucket.left + passed * per_second).min(burst)
        };
        if self.by_caller.len() >= CALLERS_MAX && !self.by_caller.contains_key(&caller) {
            self.by_caller.retain(|_, bucket| refilled(bucket) < burst);
            if self.by_caller.len() >= CALLERS_MAX {
                return Err(Duration::from_secs_f64(burst / per_second));
            }
        }
        let bucket = self.by_caller.entry(caller).or_insert(Bucket { left: burst, at: now });
        let left = refilled(bucket);
        if left < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - left) / per_second));
        }
        *bucket = Bucket { left: left - 1.0, at: now };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { per_second: 2, burst: 3 };

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (mut limits, start) = (RateLimits::new(RATE), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        for (ms, passes) in [
            (0, true),
            (0, true),
            (0, true),
            (0, false),
            (499, false),
            (500, true),
            (500, false),
            (1500, true),
            (1500, true),
            (1500, false),
            (60_000, true),
            (60_000, true),
            (60_000, true),
            (60_000, false),
        ] {
            assert_eq!(limits.take("a", at(ms)).is_ok(), passes, "after {ms} ms");
        }
        assert_eq!(limits.take("a", at(60_000)), Err(Duration::from_millis(500)));
    }

    #[test]
    fn one_caller_does_not_use_up_what_another_has() {
        let (mut limits, now) = (RateLimits::new(RATE), Instant::now());
        while limits.take("a", now).is_ok() {}
        assert_eq!(limits.take("b", now), Ok(()));
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_away() {
        let (mut limits, start) = (RateLimits::new(RATE), Instant::now());
        let later = start + Duration::from_secs(100);
        while limits.take("a", later).is_ok() {}
        assert!(limits.take("a", start).is_err());
    }

    #[test]
    fn a_full_table_forgets_only_callers_that_have_all_their_requests_again() {
        let (mut limits, start) = (RateLimits::new(RATE), Instant::now());
        for caller in 0..CALLERS_MAX {
            assert_eq!(limits.take(caller, start), Ok(()));
        }
        assert!(limits.take(CALLERS_MAX, start).is_err());
        let later = start + Duration::from_millis(500);
        assert_eq!(limits.take(CALLERS_MAX, later), Ok(()));
        assert_eq!(limits.by_caller.len(), 1);
    }
}
