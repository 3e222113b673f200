//! Refused connections, and those that a changed policy ended or an AUDIT policy watches: each is counted by reason;
//! each is logged with who and why, unless that reason floods the log.
//!
//! A peer can provoke refusals as fast as it can connect. So each reason has a bucket of tokens; a refusal
//! that finds it empty is only counted, and the next line of that reason says how many were left out.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::Level;

use super::{
    access_log,
    flows::{Party, Reporter},
};

/// Lines one reason may write at once; enough for every pod of a small deployment to show up.
const BURST: u32 = 10;
/// One more line for each reason after this long.
const REFILL: Duration = Duration::from_secs(1);

/// A connection that was not let through.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Which end refused.
    pub reporter: Reporter,
    /// Who wanted to connect.
    pub source: Party,
    /// To whom.
    pub destination: Party,
    /// A stable label: it becomes a metric label, so there are few of them.
    pub reason: &'static str,
    /// What the operator needs to know beyond the reason.
    pub detail: String,
}

/// What happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// It was not let through.
    Refused,
    /// It was, and policy no longer allows it.
    Revoked,
    /// A policy asked to be told of it; its fate is another's to tell.
    Audited,
}

/// All connections of one [`What`]. Bounded by the reasons, which are literals of this program.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    counts: BTreeMap<(Reporter, &'static str), u64>,
    lines: HashMap<&'static str, Bucket>,
}

impl Refusals {
    pub(super) fn record(&self, what: What, refusal: &Refusal, now: Instant) {
        let mut inner = self.lock();
        *inner.counts.entry((refusal.reporter, refusal.reason)).or_default() += 1;
        let line = inner.lines.entry(refusal.reason).or_insert_with(|| Bucket::full(now)).take(now);
        drop(inner);
        if let Line::Write { suppressed } = line {
            write(what, refusal, suppressed);
        }
    }

    /// Refusals so far, by reporter and reason.
    pub(super) fn totals(&self) -> Vec<((Reporter, &'static str), u64)> {
        self.lock().counts.iter().map(|(key, count)| (*key, *count)).collect()
    }

    /// A panic while the lock is held leaves at most one refusal uncounted, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(what: What, refusal: &Refusal, suppressed: u64) {
    let (src, dst) = (&refusal.source, &refusal.destination);
    // The level must be known when this is compiled.
    macro_rules! line {
        ($level:expr, $message:literal) => {
            tracing::event!(
                parent: None,
                $level,
                reason = refusal.reason,
                src.addr = %src.address,
                src.workload = access_log::workload(src),
                src.namespace = access_log::namespace(src),
                src.identity = access_log::identity(src),
                dst.addr = %dst.address,
                dst.workload = access_log::workload(dst),
                dst.namespace = access_log::namespace(dst),
                dst.identity = access_log::identity(dst),
                direction = refusal.reporter.direction(),
                detail = %refusal.detail,
                // Others of this reason, since the last such line, that were counted but not logged.
                suppressed,
                $message
            )
        };
    }
    match what {
        What::Refused => line!(Level::WARN, "connection refused"),
        What::Revoked => line!(Level::WARN, "connection closed: policy no longer allows it"),
        What::Audited => line!(Level::INFO, "connection audited"),
    }
}

/// Whether a refusal is logged.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// It is, and this many before it were not.
    Write { suppressed: u64 },
    /// It is not.
    Suppress,
}

/// The tokens of one reason.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// When the last token was added.
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
    use crate::telemetry::flows::tests::party;

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
        let refusals = Refusals::default();
        let now = Instant::now();
        for reporter in [Reporter::Source, Reporter::Source, Reporter::Destination] {
            for _ in 0..50 {
                refusals.record(What::Refused, &refusal(reporter), now);
            }
        }
        let expected = [((Reporter::Source, "plaintext"), 100), ((Reporter::Destination, "plaintext"), 50)];
        assert_eq!(refusals.totals(), expected);
    }

    fn refusal(reporter: Reporter) -> Refusal {
        Refusal {
            reporter,
            source: party("web", "10.77.1.2:40000"),
            destination: party("api", "10.77.2.3:80"),
            reason: "plaintext",
            detail: "the destination takes mutual TLS only".to_owned(),
        }
    }
}
