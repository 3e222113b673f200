//! The pods that the directory has for this node, and which of them have a cgroup. Pure: no I/O, no clock, no logging.
//!
//! A pod object can name a node and never run there. Thousands of such objects must not delay the pods that run, so work is
//! proportional to changes:
//!
//! ```text
//! directory changed ──> unseen ──look──> present ──> observed and planned on each pass
//!                         ▲        └───> absent  ──> costs nothing
//!                         └── its cgroup was created, or its turn in the slow rescan
//! ```
//! The namespaces take turns in the queue of unseen pods, and one pass takes a bounded number of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    ops::Bound,
    path::{Path, PathBuf},
    sync::Arc,
};

use tacit_core::{
    directory::{Directory, Protocol, Workload, WorkloadChange},
    shares::{Bounds, Capacity, ShareUse, WAITING_PODS},
};

use crate::enrol::{NotYet, Waiting, plan::Wanted};

/// Pods looked at in one pass: some 10 µs each, so that a pass stays at a few milliseconds.
const LOOKS_MAX: usize = 256;
/// Absent pods looked at again in each slow rescan, in case that an event was lost.
const RESCANNED: usize = 64;

/// The directory's list of a pod, and the pod's name. A pod may be in both lists for one version.
type Key = (List, Arc<str>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum List {
    OnNode,
    HostNetwork,
}

/// The pods of this node.
#[derive(Debug, Default)]
pub(super) struct NodePods {
    /// The version that `pods` is of.
    directory: Arc<Directory>,
    pods: HashMap<Key, Arc<Workload>>,
    by_cgroup: HashMap<PathBuf, BTreeSet<Key>>,
    /// Cgroups above those of pods, with the number of pods below.
    parents: HashMap<PathBuf, usize>,
    /// Pods whose cgroup was there at the last look.
    present: BTreeSet<Key>,
    /// Cgroups that existed at the last pass, also those of departed pods. The kernel may have entries of them.
    existing: HashSet<PathBuf>,
    /// Pods without a cgroup, by namespace.
    absent: BTreeMap<Arc<str>, BTreeSet<Key>>,
    unseen: Unseen,
    /// The absent pod that was rescanned last.
    rescanned: Option<(Arc<str>, Key)>,
    /// Absent pods as the operator sees them. `None` if they have changed.
    listed: Option<Arc<Absent>>,
    /// Number of looks at pods, for the tests.
    #[cfg(test)]
    looks: usize,
}

/// The pods to be enrolled that have no cgroup.
#[derive(Debug, Default)]
pub struct Absent {
    /// Pods of each namespace, up to the namespace's share. Their certificates are requested in advance.
    pub listed: Vec<Waiting>,
    /// Number of pods without a cgroup, also of those that are not to be enrolled.
    total: u64,
    /// Number of pods beyond the shares of their namespaces.
    refused: u64,
    /// The namespace with most of them.
    fullest: Option<(Arc<str>, u64)>,
}

impl Absent {
    /// Returns the use of the share of waiting pods.
    #[must_use]
    pub fn share_use(&self) -> ShareUse<String> {
        ShareUse {
            resource: WAITING_PODS.resource,
            // The bound is the same on every node.
            bounds: WAITING_PODS.bounds(Capacity { descriptors: 0 }),
            used: self.total,
            fullest: self.fullest.as_ref().map(|(namespace, pods)| (namespace.to_string(), *pods)),
            refused: self.refused,
        }
    }
}

/// Pods to look at. The namespaces take turns.
#[derive(Debug, Default)]
struct Unseen {
    queued: BTreeSet<Key>,
    namespaces: HashMap<Arc<str>, VecDeque<Key>>,
    /// Namespaces with queued pods, the next one first.
    turns: VecDeque<Arc<str>>,
}

impl Unseen {
    fn push(&mut self, namespace: &Arc<str>, key: &Key) {
        if !self.queued.insert(key.clone()) {
            return;
        }
        let queue = self.namespaces.entry(Arc::clone(namespace)).or_default();
        if queue.is_empty() {
            self.turns.push_back(Arc::clone(namespace));
        }
        queue.push_back(key.clone());
    }

    fn pop(&mut self) -> Option<Key> {
        let namespace = self.turns.pop_front()?;
        let queue = self.namespaces.get_mut(&namespace)?;
        let key = queue.pop_front()?;
        if queue.is_empty() {
            self.namespaces.remove(&namespace);
        } else {
            self.turns.push_back(namespace);
        }
        self.queued.remove(&key);
        Some(key)
    }
}

impl NodePods {
    /// Takes over the changes of `directory` since the last call. Returns true if pods of `node` have changed.
    pub(super) fn follow(&mut self, directory: &Arc<Directory>, node: &str) -> bool {
        let before = std::mem::replace(&mut self.directory, Arc::clone(directory));
        if Arc::ptr_eq(&before, directory) {
            return false;
        }
        let own = directory.changes_on_node(&before, node);
        let host_network = directory.changes_of_host_network(&before);
        let is_changed = !own.is_empty() || !host_network.is_empty() || !directory.has_departed_of(&before);
        own.into_iter().for_each(|change| self.change(List::OnNode, change));
        host_network.into_iter().for_each(|change| self.change(List::HostNetwork, change));
        is_changed
    }

    fn change(&mut self, list: List, WorkloadChange { before, now }: WorkloadChange) {
        let Some(workload) = now.as_ref().or(before.as_ref()) else { return };
        let key = (list, Arc::from(workload.full_name()));
        let keeps_cgroup = match (&before, &now) {
            (Some(before), Some(now)) => before.cgroup == now.cgroup,
            _ => false,
        };
        if let Some(before) = before.filter(|_| !keeps_cgroup) {
            self.forget(&key, &before);
        }
        let Some(now) = now else { return };
        self.listed = None;
        if !keeps_cgroup {
            self.by_cgroup.entry(now.cgroup.clone()).or_default().insert(key.clone());
            above(&now.cgroup).for_each(|above| *self.parents.entry(above.to_owned()).or_default() += 1);
            // A pod that got the cgroup of another object is planned in the next pass. In the queue, the kernel's entry of the
            // cgroup would be nobody's meanwhile, and would be removed.
            if self.existing.contains(&now.cgroup) {
                self.present.insert(key.clone());
            } else {
                self.unseen.push(&now.namespace, &key);
            }
        }
        let now = match list {
            List::OnNode => now,
            // The addresses of these are the node's, and their links too.
            List::HostNetwork => Arc::new(Workload { addresses: Vec::new(), ..(*now).clone() }),
        };
        self.pods.insert(key, now);
    }

    fn forget(&mut self, key: &Key, workload: &Workload) {
        self.pods.remove(key);
        self.present.remove(key);
        for above in above(&workload.cgroup) {
            match self.parents.get_mut(above) {
                Some(count @ 2..) => *count -= 1,
                _ => drop(self.parents.remove(above)),
            }
        }
        self.not_absent(key, &workload.namespace);
        if let Some(keys) = self.by_cgroup.get_mut(&workload.cgroup) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_cgroup.remove(&workload.cgroup);
            }
        }
    }

    fn not_absent(&mut self, key: &Key, namespace: &Arc<str>) {
        let Some(keys) = self.absent.get_mut(namespace) else { return };
        if keys.remove(key) {
            self.listed = None;
        }
        if keys.is_empty() {
            self.absent.remove(namespace);
        }
    }

    /// Notes that a cgroup was created. A pod of it, or below it, is looked at. Returns true if the cgroup is above pods.
    pub(super) fn created(&mut self, cgroup: &Path) -> bool {
        let is_parent = self.parents.contains_key(cgroup);
        let found: Vec<Key> = if is_parent {
            // It is created once.
            let below = self.by_cgroup.iter().filter(|(path, _)| path.starts_with(cgroup));
            below.flat_map(|(_, keys)| keys).cloned().collect()
        } else {
            self.by_cgroup.get(cgroup).into_iter().flatten().cloned().collect()
        };
        found.iter().for_each(|key| self.look_again(key));
        is_parent
    }

    /// Has all absent pods looked at, because events were lost.
    pub(super) fn rescan_all(&mut self) {
        let absent: Vec<Key> = self.absent.values().flatten().cloned().collect();
        absent.iter().for_each(|key| self.look_again(key));
    }

    /// Has a bounded number of absent pods looked at, in turn.
    pub(super) fn rescan_some(&mut self) {
        let start = self.rescanned.take();
        let from = start.as_ref().map_or(Bound::Unbounded, |(namespace, _)| Bound::Included(&**namespace));
        let next = self.absent.range::<str, _>((from, Bound::Unbounded)).flat_map(|(namespace, keys)| {
            let last = start.as_ref().filter(|(last, _)| last == namespace).map(|(_, key)| key);
            let from = last.map_or(Bound::Unbounded, Bound::Excluded);
            keys.range((from, Bound::Unbounded)).map(move |key| (Arc::clone(namespace), key.clone()))
        });
        let next: Vec<(Arc<str>, Key)> = next.take(RESCANNED).collect();
        next.iter().for_each(|(_, key)| self.look_again(key));
        self.rescanned = next.into_iter().next_back();
    }

    fn look_again(&mut self, key: &Key) {
        if let Some(workload) = self.pods.get(key).filter(|_| !self.present.contains(key)) {
            self.unseen.push(&workload.namespace, key);
        }
    }

    /// Looks at unseen pods, at most [`LOOKS_MAX`]. `has_cgroup` reports whether a cgroup exists. Returns true if more are left.
    pub(super) fn look(&mut self, mut has_cgroup: impl FnMut(&Path) -> bool) -> bool {
        for _ in 0..LOOKS_MAX {
            let Some(key) = self.unseen.pop() else { return false };
            // Gone since.
            let Some(workload) = self.pods.get(&key).cloned() else { continue };
            #[cfg(test)]
            {
                self.looks += 1;
            }
            if has_cgroup(&workload.cgroup) {
                self.not_absent(&key, &workload.namespace);
                self.present.insert(key);
            } else {
                self.vanished(key, &workload);
            }
        }
        !self.unseen.turns.is_empty()
    }

    fn vanished(&mut self, key: Key, workload: &Workload) {
        self.present.remove(&key);
        if self.absent.entry(Arc::clone(&workload.namespace)).or_default().insert(key) {
            self.listed = None;
        }
    }

    /// Notes which cgroups exist, and which of the present pods have none any more.
    pub(super) fn keep_present<'a>(&mut self, cgroups: impl Iterator<Item = &'a PathBuf>) {
        self.existing = cgroups.cloned().collect();
        let gone = self.present.iter().filter_map(|key| Some((key.clone(), self.pods.get(key)?.clone())));
        let gone: Vec<_> = gone.filter(|(_, workload)| !self.existing.contains(&workload.cgroup)).collect();
        gone.into_iter().for_each(|(key, workload)| self.vanished(key, &workload));
    }

    /// The pods that are observed and planned.
    pub(super) fn wanted(&self) -> Wanted {
        let present = self.present.iter().filter_map(|key| Some((key.0, self.pods.get(key)?)));
        let (pods, bystanders): (Vec<_>, Vec<_>) = present
            .partition(|(list, workload)| *list == List::OnNode && workload.protocol == Protocol::Tacit);
        let workloads =
            |list: Vec<(List, &Arc<Workload>)>| list.into_iter().map(|(_, w)| Arc::clone(w)).collect();
        Wanted {
            pods: workloads(pods),
            bystanders: workloads(bystanders),
            departed: self.directory.departed().cloned().collect(),
        }
    }

    /// The pod that has a cgroup of this node: one of the directory, or a departed one.
    pub(super) fn entry(&self, cgroup: &Path) -> Option<&Arc<Workload>> {
        let keys = self.by_cgroup.get(cgroup).into_iter().flatten();
        let own = keys.filter(|(list, _)| *list == List::OnNode).find_map(|key| self.pods.get(key));
        own.or_else(|| self.directory.departed().find(|workload| workload.cgroup == cgroup))
    }

    /// Returns true if the cgroup is that of a pod of the directory, whether the cgroup exists or not.
    pub(super) fn has_cgroup(&self, cgroup: &Path) -> bool {
        self.by_cgroup.contains_key(cgroup)
    }

    /// Returns true if the cgroup is above that of a pod.
    pub(super) fn is_above(&self, cgroup: &Path) -> bool {
        self.parents.contains_key(cgroup)
    }

    /// The pods to be enrolled that have no cgroup, each namespace up to its share. The list is made anew only after a change.
    pub(super) fn waiting(&mut self, pods_cgroup: &Path) -> Arc<Absent> {
        if let Some(listed) = &self.listed {
            return Arc::clone(listed);
        }
        let Bounds { total, each } = WAITING_PODS.bounds(Capacity { descriptors: 0 });
        let room = |units: u64| usize::try_from(units).unwrap_or(usize::MAX);
        let mut absent = Absent::default();
        for (namespace, keys) in &self.absent {
            let count = keys.len() as u64;
            absent.total += count;
            absent.refused += count.saturating_sub(each);
            if absent.fullest.as_ref().is_none_or(|(_, most)| count > *most) {
                absent.fullest = Some((Arc::clone(namespace), count));
            }
            let pods =
                keys.iter().filter(|(list, _)| *list == List::OnNode).filter_map(|key| self.pods.get(key));
            let pods = pods.filter(|workload| workload.protocol == Protocol::Tacit);
            let free = room(total).saturating_sub(absent.listed.len());
            absent.listed.extend(pods.take(room(each).min(free)).map(|workload| {
                let reason = NotYet::NoCgroup(pods_cgroup.join(&workload.cgroup)).to_string();
                Waiting { workload: Arc::clone(workload), reason, policy: None }
            }));
        }
        let absent = Arc::new(absent);
        self.listed = Some(Arc::clone(&absent));
        absent
    }
}

fn above(cgroup: &Path) -> impl Iterator<Item = &Path> {
    cgroup.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty())
}

#[cfg(test)]
mod tests;
