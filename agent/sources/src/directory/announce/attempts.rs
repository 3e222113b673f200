//! The order and the pauses of patches. Pure.
//!
//! Each pod has a pause after each attempt, also after one that succeeded: the API may not show the result yet, or another writer may undo
//! it each time. Attempts that fail for a reason that concerns all pods have a common pause beside it.

use std::{collections::HashMap, time::Instant};

use super::Failure;
use crate::kubernetes::{Pause, random};

/// Attempts of pods that need a patch, by UID. Bounded by the pods of the node.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    pods: HashMap<String, Attempt>,
    all: Attempt,
}

#[derive(Debug, Default)]
struct Attempt {
    pause: Pause,
    /// The end of the pause; `None` before the first attempt.
    until: Option<Instant>,
}

impl Attempt {
    fn paused(&mut self, now: Instant) {
        self.until = Some(now + self.pause.next(random()));
    }
}

/// The next attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The pod with this index, now.
    Now(usize),
    /// One of them at that time; `None` if no pod needs a patch.
    At(Option<Instant>),
}

impl Attempts {
    /// Forgets the pods that need no patch any more, after their pause.
    pub(super) fn keep(&mut self, is_wanted: impl Fn(&str) -> bool, now: Instant) {
        self.pods.retain(|uid, attempt| is_wanted(uid) || attempt.until.is_some_and(|until| now < until));
    }

    /// Returns the pod whose pause ended first, among the pods that need a patch. New pods come first.
    pub(super) fn next<'a>(&self, wanted: impl Iterator<Item = &'a str>, now: Instant) -> Next {
        let until = |uid| self.pods.get(uid).and_then(|attempt| attempt.until);
        let Some((index, pod)) = wanted.map(until).enumerate().min_by_key(|(_, until)| *until) else {
            return Next::At(None);
        };
        let due = pod.max(self.all.until);
        if due.is_none_or(|due| due <= now) { Next::Now(index) } else { Next::At(due) }
    }

    /// Takes in the result of an attempt.
    pub(super) fn done(&mut self, uid: &str, failure: Option<&Failure>, now: Instant) {
        self.pods.entry(uid.to_owned()).or_default().paused(now);
        match failure {
            Some(Failure::Api(_)) => self.all.paused(now),
            Some(Failure::Pod(_)) => {}
            None => self.all = Attempt::default(),
        }
    }

    /// Returns the longest pause from `now`, for tests.
    #[cfg(test)]
    pub(super) fn longest(&self, now: Instant) -> std::time::Duration {
        let all = self.pods.values().chain([&self.all]).filter_map(|attempt| attempt.until);
        all.map(|until| until.saturating_duration_since(now)).max().unwrap_or_default()
    }
}
