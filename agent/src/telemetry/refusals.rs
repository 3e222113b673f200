//! Refused connections, and those that a changed policy ended or an AUDIT policy watches: each is counted by reason;
//! each is logged with who and why, unless that reason floods the log.
//!
//! A peer can provoke refusals as fast as it can connect. So each reason has a bucket of tokens; a refusal
//! that finds it empty is only counted, and the next line of that reason says how many were left out.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tacit_core::refusal::{Refusal, RefusalReason};
use tracing::Level;

use super::{
    access_log,
    flows::{Ends, Reporter},
};

/// Lines one reason may write at once; enough for every pod of a small deployment to show up.
const BURST: u32 = 10;
/// One more line for each reason after this long.
const REFILL: Duration = Duration::from_secs(1);

/// An event on a connection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event<'a> {
    /// It was not let through.
    Refused(&'a Refusal),
    /// It was, and policy no longer allows it.
    Revoked(&'a Refusal),
    /// An AUDIT policy, or one of a dry run, matches it. Other policies decide on it.
    Audited { policy: &'a str },
}

impl Event<'_> {
    fn reason(&self) -> &'static str {
        match self {
            Self::Refused(refusal) | Self::Revoked(refusal) => refusal.reason.label(),
            Self::Audited { .. } => "audited",
        }
    }

    fn detail(&self) -> &str {
        match self {
            Self::Refused(refusal) | Self::Revoked(refusal) => &refusal.detail,
            Self::Audited { policy } => policy,
        }
    }
}

/// Counts events of one kind by reporter and reason, and bounds the log lines of each reason. The reasons are a closed set,
/// which bounds the tables.
#[derive(Debug)]
pub(super) struct Tally<R>(Mutex<Inner<R>>);

#[derive(Debug)]
struct Inner<R> {
    counts: BTreeMap<(Reporter, R), u64>,
    lines: BTreeMap<R, Bucket>,
}

impl<R> Default for Tally<R> {
    fn default() -> Self {
        Self(Mutex::new(Inner { counts: BTreeMap::new(), lines: BTreeMap::new() }))
    }
}

impl<R: Copy + Ord> Tally<R> {
    /// Counts an event and returns whether it is logged.
    pub(super) fn record(&self, reporter: Reporter, reason: R, now: Instant) -> Line {
        let mut inner = self.lock();
        *inner.counts.entry((reporter, reason)).or_default() += 1;
        inner.lines.entry(reason).or_insert_with(|| Bucket::full(now)).take(now)
    }

    /// Events so far, by reporter and reason.
    pub(super) fn totals(&self) -> Vec<((Reporter, R), u64)> {
        self.lock().counts.iter().map(|(key, count)| (*key, *count)).collect()
    }

    /// A panic while the lock is held leaves at most one event uncounted, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Inner<R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log line of an event.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Line {
    /// It is, and this many before it were not.
    Write { suppressed: u64 },
    /// It is not.
    Suppress,
}

impl Line {
    /// Writes the line of `event`, unless it is suppressed.
    pub(super) fn write(self, ends: &Ends, event: Event<'_>) {
        let Self::Write { suppressed } = self else { return };
        let Ends { reporter, source: src, destination: dst } = ends;
        // The level must be known when this is compiled.
        macro_rules! line {
            ($level:expr, $message:literal) => {
                tracing::event!(
                    parent: None,
                    $level,
                    reason = event.reason(),
                    src.addr = %src.address,
                    src.workload = access_log::workload(src),
                    src.namespace = access_log::namespace(src),
                    src.identity = access_log::identity(src),
                    dst.addr = %dst.address,
                    dst.workload = access_log::workload(dst),
                    dst.namespace = access_log::namespace(dst),
                    dst.identity = access_log::identity(dst),
                    direction = reporter.direction(),
                    detail = %event.detail(),
                    // Others of this reason, since the last such line, that were counted but not logged.
                    suppressed,
                    $message
                )
            };
        }
        match event {
            Event::Refused(_) => line!(Level::WARN, "connection refused"),
            Event::Revoked(refusal)
                if matches!(
                    refusal.reason,
                    RefusalReason::CertificateRevoked | RefusalReason::UnknownIssuer
                ) =>
            {
                line!(Level::WARN, "connection closed: the peer's certificate is not trusted any more");
            }
            Event::Revoked(_) => line!(Level::WARN, "connection closed: policy no longer allows it"),
            Event::Audited { .. } => line!(Level::INFO, "connection audited"),
        }
    }
}

/// The tokens of one reason.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// Time at which the last token was added.
    filled: Instant,
    suppressed: u64,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { tokens: BURST, filled: now, suppressed: 0 }
    }

    fn take(&mut self, now: Instant) -> Line {
        let due = now.saturating_duration_since(self.filled).as_millis() / REFILL.as_millis();
        let due = u32::try_from(due).unwrap_or(u32::MAX);
        self.tokens = self.tokens.saturating_add(due).min(BURST);
        // A full bucket owes nothing; otherwise the started interval goes on.
        self.filled = if self.tokens == BURST { now } else { self.filled + REFILL * due };
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                Line::Write { suppressed: std::mem::take(&mut self.suppressed) }
            }
            None => {
                self.suppressed += 1;
                Line::Suppress
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_writes_a_burst_then_one_line_an_interval_with_the_count_left_out() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        for _ in 0..BURST {
            assert_eq!(bucket.take(start), Line::Write { suppressed: 0 });
        }
        for _ in 0..1000 {
            assert_eq!(bucket.take(start + REFILL / 2), Line::Suppress);
        }
        assert_eq!(bucket.take(start + REFILL), Line::Write { suppressed: 1000 });
        assert_eq!(bucket.take(start + REFILL), Line::Suppress);
    }

    #[test]
    fn half_an_interval_is_not_lost() {
        let start = Instant::now();
        let mut bucket = Bucket { tokens: 0, filled: start, suppressed: 0 };
        assert_eq!(bucket.take(start + REFILL * 3 / 2), Line::Write { suppressed: 0 });
        assert_eq!(bucket.take(start + REFILL * 2), Line::Write { suppressed: 0 });
    }

    #[test]
    fn a_quiet_reason_may_burst_again_and_no_more() {
        let start = Instant::now();
        let mut bucket = Bucket { tokens: 0, filled: start, suppressed: 3 };
        let later = start + REFILL * 100_000;
        let written = (0..100).filter(|_| bucket.take(later) != Line::Suppress).count();
        assert_eq!(written, BURST as usize);
    }

    #[test]
    fn every_refusal_is_counted_whether_logged_or_not() {
        let refusals = Tally::default();
        let (now, reason) = (Instant::now(), RefusalReason::PlaintextInStrict);
        for reporter in [Reporter::Source, Reporter::Source, Reporter::Destination] {
            let logged = (0..50).filter(|_| refusals.record(reporter, reason, now) != Line::Suppress).count();
            assert!(logged < 50, "{logged}");
        }
        let expected = [((Reporter::Source, reason), 100), ((Reporter::Destination, reason), 50)];
        assert_eq!(refusals.totals(), expected);
    }
}
