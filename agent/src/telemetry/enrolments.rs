//! Durations of enrolments, as a histogram.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper ends in seconds. 50 ms is what an enrolment may take.
const BOUNDS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, f64::INFINITY];

/// Counts enrolments by how long they took.
#[derive(Debug, Default)]
pub(super) struct Enrolments {
    /// By bound; each enrolment is in one.
    counts: [AtomicU64; BOUNDS.len()],
    sum_micros: AtomicU64,
}

/// The totals of the histogram.
#[derive(Debug)]
pub(super) struct Durations {
    pub(super) sum_seconds: f64,
    pub(super) count: u64,
    /// Upper end in seconds, and how many lie between it and the one before.
    pub(super) buckets: [(f64, u64); BOUNDS.len()],
}

impl Enrolments {
    pub(super) fn record(&self, took: Duration) {
        let is_within = |bound: &f64| took.as_secs_f64() <= *bound;
        let bucket = BOUNDS.iter().position(is_within).unwrap_or(BOUNDS.len() - 1);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    pub(super) fn totals(&self) -> Durations {
        let counts = self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let sum = Duration::from_micros(self.sum_micros.load(Ordering::Relaxed));
        let mut buckets = BOUNDS.map(|bound| (bound, 0));
        buckets.iter_mut().zip(counts).for_each(|((_, held), count)| *held = count);
        Durations { sum_seconds: sum.as_secs_f64(), count: counts.iter().sum(), buckets }
    }
}
