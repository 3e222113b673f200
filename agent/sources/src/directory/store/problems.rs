//! Problems of pods, for the log and the status. Each is logged once.

use std::collections::BTreeMap;

use tacit_core::directory::Directory;

use crate::kubernetes::{InvalidObjects, Problem, reported};

/// Problems of the pods in the directory, and the unlogged ones.
#[derive(Debug, Default)]
pub(super) struct Problems {
    of_pods: BTreeMap<String, Vec<String>>,
    /// Conflicts with the namespace of one of their objects.
    conflicts: BTreeMap<String, String>,
    /// Value of [`Directory::conflict_changes`] at the last update.
    conflict_changes: u64,
    unlogged: Vec<Problem>,
    total: u64,
    changed: bool,
}

impl Problems {
    /// Replaces the problems of a pod.
    pub(super) fn set(&mut self, pod: &str, problems: Vec<String>) {
        if problems.is_empty() {
            return self.clear(pod);
        }
        let lines = problems.iter().map(|problem| format!("pod {pod}: {problem}")).collect();
        self.set_lines(pod, lines);
    }

    /// Replaces the problems of a resource of istiod. `key` begins with `istiod/`, which is no namespace of a pod with problems.
    pub(super) fn set_resource(&mut self, key: &str, problems: Vec<String>) {
        if problems.is_empty() {
            return self.clear(key);
        }
        self.set_lines(key, problems);
    }

    fn set_lines(&mut self, pod: &str, lines: Vec<String>) {
        let known = self.of_pods.get(pod);
        if known == Some(&lines) {
            return;
        }
        let new = lines.iter().filter(|line| known.is_none_or(|known| !known.contains(line)));
        let new = new.map(|line| of_pod(pod, line)).collect();
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
            let conflicts = directory.conflicts();
            let conflicts: BTreeMap<String, String> = conflicts
                .map(|conflict| (conflict.to_string(), conflict.namespace().unwrap_or_default().to_owned()))
                .collect();
            self.changed |= conflicts != self.conflicts;
            let new = conflicts.iter().filter(|(line, _)| !self.conflicts.contains_key(*line));
            let new = new.map(of_conflict).collect();
            self.report(new);
            self.conflicts = conflicts;
        }
        std::mem::take(&mut self.changed)
    }

    fn report(&mut self, new: Vec<Problem>) {
        self.changed |= !new.is_empty();
        self.total += new.len() as u64;
        self.unlogged.extend(new);
    }

    /// Returns the problems since the last call.
    pub(super) fn warnings(&mut self) -> Vec<String> {
        listed(&std::mem::take(&mut self.unlogged))
    }

    /// Returns the problems of now.
    pub(super) fn invalid_objects(&self) -> InvalidObjects {
        let of_pods = self.of_pods.iter();
        let of_pods = of_pods.flat_map(|(pod, lines)| lines.iter().map(|line| of_pod(pod, line)));
        let problems: Vec<Problem> = self.conflicts.iter().map(of_conflict).chain(of_pods).collect();
        InvalidObjects { list: listed(&problems), total: self.total }
    }
}

fn of_pod(pod: &str, line: &str) -> Problem {
    let namespace = pod.split_once('/').map_or(pod, |(namespace, _)| namespace);
    Problem { owner: namespace.to_owned(), line: line.to_owned() }
}

fn of_conflict((line, namespace): (&String, &String)) -> Problem {
    Problem { owner: namespace.clone(), line: line.clone() }
}

/// Returns the problems of a report, and how many more there are.
pub(super) fn listed(problems: &[Problem]) -> Vec<String> {
    let (mut lines, more) = reported(problems);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines
}
