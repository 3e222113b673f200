//! Problems of pods, for the log and the status. Each is logged once.

use std::collections::{BTreeMap, BTreeSet};

use tacit_core::directory::Directory;

use super::range_discovery::truncated;
use crate::kubernetes::InvalidObjects;

/// Problems of the pods in the directory, and the unlogged ones.
#[derive(Debug, Default)]
pub(super) struct Problems {
    of_pods: BTreeMap<String, Vec<String>>,
    conflicts: BTreeSet<String>,
    /// Value of [`Directory::conflict_changes`] at the last update.
    conflict_changes: u64,
    unlogged: Vec<String>,
    total: u64,
    changed: bool,
}

impl Problems {
    /// Replaces the problems of a pod.
    pub(super) fn set(&mut self, pod: &str, problems: Vec<String>) {
        if problems.is_empty() {
            return self.clear(pod);
        }
        let lines: Vec<String> = problems.iter().map(|problem| format!("pod {pod}: {problem}")).collect();
        let known = self.of_pods.get(pod);
        if known == Some(&lines) {
            return;
        }
        let new: Vec<_> =
            lines.iter().filter(|line| known.is_none_or(|known| !known.contains(line))).cloned().collect();
        self.report(new);
        self.of_pods.insert(pod.to_owned(), lines);
    }

    pub(super) fn clear(&mut self, pod: &str) {
        self.changed |= self.of_pods.remove(pod).is_some();
    }

    /// Names of the pods with problems.
    pub(super) fn pods(&self) -> impl Iterator<Item = &String> {
        self.of_pods.keys()
    }

    /// Reads the conflicts of the directory. Returns true if the problems have changed since the last call.
    pub(super) fn update(&mut self, directory: &Directory) -> bool {
        if directory.conflict_changes() != self.conflict_changes {
            self.conflict_changes = directory.conflict_changes();
            let conflicts: BTreeSet<String> =
                directory.conflicts().map(|conflict| conflict.to_string()).collect();
            self.changed |= conflicts != self.conflicts;
            let new = conflicts.difference(&self.conflicts).cloned().collect();
            self.report(new);
            self.conflicts = conflicts;
        }
        std::mem::take(&mut self.changed)
    }

    fn report(&mut self, new: Vec<String>) {
        self.changed |= !new.is_empty();
        self.total += new.len() as u64;
        self.unlogged.extend(new);
    }

    /// Returns the problems since the last call.
    pub(super) fn warnings(&mut self) -> Vec<String> {
        truncated(&std::mem::take(&mut self.unlogged))
    }

    /// Returns the problems of now.
    pub(super) fn invalid_objects(&self) -> InvalidObjects {
        let lines: Vec<String> =
            self.conflicts.iter().chain(self.of_pods.values().flatten()).cloned().collect();
        InvalidObjects { list: truncated(&lines), total: self.total }
    }
}
