//! Counters of the authority.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Certificates issued, and refusals by reason.
#[derive(Debug, Default)]
pub(super) struct Counters {
    issued: AtomicU64,
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl Counters {
    pub(super) fn issued(&self) {
        self.issued.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refused(&self, reason: &'static str) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// Returns the certificates issued, and the refusals by reason.
    pub(super) fn totals(&self) -> (u64, Vec<(&'static str, u64)>) {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        (
            self.issued.load(Ordering::Relaxed),
            refused.iter().map(|(reason, count)| (*reason, *count)).collect(),
        )
    }
}
