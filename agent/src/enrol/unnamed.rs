//! Cgroups of pods that no source names: each is held for a bounded time, and left alone after that.
//!
//! | the directory | the cgroup |
//! |---|---|
//! | does not name it, for less than `unnamedPodTimeout` | is held to STRICT if that is the mode of the mesh |
//! | is out of date | is held, and its time starts again |
//! | does not name it, for longer | is left alone, as without Tacit |
//! | names it | is the pod's |
//!
//! A directory that is out of date cannot tell that nobody is to name a pod. Only the kubelet and root make cgroups here, so
//! no pod can become an unnamed one.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tacit_core::directory::Directory;
use tacit_kernel::cgroup;

use crate::enrol::{Enroller, NodePods, RESCAN, State};

/// Most cgroups that are looked at, a number: the entries of the kernel's map of pods. More are held.
const CGROUPS_MAX: usize = tacit_abi::limits::PODS as usize;

/// The cgroups of pods that no source names, for the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unnamed {
    /// Number of those within their time.
    pub held: u64,
    /// Number of those that are left alone.
    pub left_alone: u64,
    /// Path of one of them.
    pub example: Option<String>,
}

/// The time of a cgroup that no source names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Since(Instant),
    /// The time has passed, for this agent or an earlier one.
    Passed,
}

/// The cgroups of pods that no source names.
#[derive(Debug, Default)]
pub(super) struct UnnamedCgroups {
    known: HashMap<u64, Held>,
    example: Option<PathBuf>,
    looked_at: Option<Instant>,
}

impl UnnamedCgroups {
    /// Starts with cgroups that an earlier agent left alone.
    pub(super) fn left_alone(cgroups: impl Iterator<Item = u64>) -> Self {
        Self { known: cgroups.map(|id| (id, Held::Passed)).collect(), ..Self::default() }
    }

    /// Takes over what was found at `now`. Each is held for `limit`, from the moment the kernel has no entry of a pod for it:
    /// `has_entry` tells.
    fn update(
        &mut self,
        found: &HashMap<u64, PathBuf>,
        has_entry: impl Fn(u64) -> bool,
        directory: Freshness,
        (now, limit): (Instant, Duration),
    ) {
        self.known.retain(|id, _| found.contains_key(id) && !has_entry(*id));
        for id in found.keys().filter(|id| !has_entry(**id)) {
            let held = self.known.entry(*id).or_insert(Held::Since(now));
            match (*held, directory) {
                (Held::Since(_), Freshness::Outdated) => *held = Held::Since(now),
                (Held::Since(since), Freshness::Current) if now.duration_since(since) >= limit => {
                    *held = Held::Passed;
                }
                _ => {}
            }
        }
        self.example = found.iter().min_by_key(|(_, path)| *path).map(|(_, path)| path.clone());
    }

    /// Returns the cgroups that are to be left alone.
    pub(super) fn passed(&self) -> BTreeSet<u64> {
        self.known.iter().filter(|(_, held)| **held == Held::Passed).map(|(id, _)| *id).collect()
    }

    /// Returns the numbers for the operator. `is_left_alone` tells what the kernel has.
    pub(super) fn shown(&self, is_left_alone: impl Fn(u64) -> bool) -> Unnamed {
        let left_alone = self.known.keys().filter(|id| is_left_alone(**id)).count();
        Unnamed {
            held: (self.known.len() - left_alone) as u64,
            left_alone: left_alone as u64,
            example: self.example.as_ref().map(|path| path.display().to_string()),
        }
    }
}

/// The state of the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freshness {
    Current,
    /// The source does not answer, or its latest version is invalid.
    Outdated,
}

impl Enroller {
    /// Looks for cgroups that `directory` does not name, at most once in [`RESCAN`].
    pub(super) fn look_for_unnamed(&self, state: &mut State, directory: &Directory) {
        let now = Instant::now();
        let (unnamed, pods) = (&mut state.unnamed, &state.pods);
        if unnamed.looked_at.is_some_and(|at| now.duration_since(at) < RESCAN) {
            return;
        }
        unnamed.looked_at = Some(now);
        let is_outdated = self.snapshots.directory.state().stale_since.is_some();
        let freshness = if is_outdated { Freshness::Outdated } else { Freshness::Current };
        let named = Named::of(pods, directory.other_cgroups_on_node(&self.node));
        let root = self.pods_cgroup.path();
        match find(root, &named) {
            Ok(found) => {
                let has_entry = |id| state.known.contains_key(&id);
                unnamed.update(&found, has_entry, freshness, (now, self.unnamed_pod_timeout));
            }
            Err(error) => {
                tracing::warn!(cgroup = %root.display(), %error, "cgroups not read: pods that no source names stay as they are");
            }
        }
    }
}

/// The cgroups that a directory names, with those above them.
struct Named<'a> {
    pods: &'a NodePods,
    /// Cgroups of others than `pods`.
    others: HashSet<&'a Path>,
    above_others: HashSet<&'a Path>,
}

impl<'a> Named<'a> {
    fn of(pods: &'a NodePods, others: impl Iterator<Item = &'a Path>) -> Self {
        let others: HashSet<&Path> = others.collect();
        let above_others = others.iter().flat_map(|path| path.ancestors().skip(1)).collect();
        Self { pods, others, above_others }
    }

    fn has(&self, cgroup: &Path) -> bool {
        self.pods.has_cgroup(cgroup) || self.others.contains(cgroup)
    }

    /// Returns true if there is a named cgroup below `cgroup`.
    fn is_above(&self, cgroup: &Path) -> bool {
        self.pods.is_above(cgroup) || self.above_others.contains(cgroup)
    }
}

/// Returns the cgroups with processes that are nobody's, one or two levels below `root`. An entry of the kernel's map speaks
/// for all below it, so a cgroup with others inside is no pod's here: those inside are looked at.
///
/// # Errors
/// Fails if a cgroup cannot be read. A result without its pods would take the cgroup itself for a pod.
fn find(root: &Path, named: &Named<'_>) -> io::Result<HashMap<u64, PathBuf>> {
    let mut found = HashMap::new();
    for first in below(root)?.unwrap_or_default() {
        if named.has(relative(root, &first)) {
            continue;
        }
        let Some(inside) = below(&first)? else { continue };
        let all = if inside.is_empty() { vec![first] } else { inside };
        for path in all {
            let name = relative(root, &path);
            let is_named = named.has(name) || named.is_above(name);
            if is_named || found.len() >= CGROUPS_MAX || !cgroup::is_populated(&path) {
                continue;
            }
            if let Some(id) = cgroup::id_at(&path) {
                found.insert(id, path);
            }
        }
    }
    Ok(found)
}

fn relative<'a>(root: &Path, path: &'a Path) -> &'a Path {
    path.strip_prefix(root).unwrap_or(path)
}

/// Returns the cgroups in `path`; `None` if that is gone.
fn below(path: &Path) -> io::Result<Option<Vec<PathBuf>>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::Arc;

    use tacit_core::directory::{AddressConflict, Workload};
    use tacit_testing::Scratch;

    use crate::enrol::testing::workload;

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_cgroup_is_left_alone_after_its_time_with_a_current_directory() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let found: HashMap<u64, PathBuf> = [(7, PathBuf::from("/cgroup/other"))].into();
        let mut unnamed = UnnamedCgroups::default();
        for (seconds, directory, passed) in [
            (0, Freshness::Current, false),
            (59, Freshness::Current, false),
            (59, Freshness::Outdated, false),
            (118, Freshness::Current, false),
            (119, Freshness::Current, true),
            (120, Freshness::Outdated, true),
        ] {
            unnamed.update(&found, |_| false, directory, (at(seconds), LIMIT));
            assert_eq!(unnamed.passed().contains(&7), passed, "after {seconds} s, {directory:?}");
        }
        let shown = Unnamed { held: 0, left_alone: 1, example: Some("/cgroup/other".to_owned()) };
        assert_eq!(unnamed.shown(|id| id == 7), shown);
        unnamed.update(&HashMap::new(), |_| false, Freshness::Current, (at(121), LIMIT));
        unnamed.update(&found, |_| false, Freshness::Current, (at(122), LIMIT));
        assert!(unnamed.passed().is_empty(), "named in between: its time starts again");
        assert_eq!(unnamed.shown(|_| false).held, 1);
    }

    #[test]
    fn a_cgroup_with_a_pods_entry_is_held_for_the_whole_time_once_the_entry_is_gone() {
        let start = Instant::now();
        let found: HashMap<u64, PathBuf> = [(7, PathBuf::new())].into();
        let mut unnamed = UnnamedCgroups::left_alone([7].into_iter());
        for (seconds, has_entry, passed) in [
            (0, false, true),
            (1, true, false),
            (90, true, false),
            (91, false, false),
            (150, false, false),
            (151, false, true),
        ] {
            let now = start + Duration::from_secs(seconds);
            unnamed.update(&found, |_| has_entry, Freshness::Current, (now, LIMIT));
            assert_eq!(unnamed.passed().contains(&7), passed, "after {seconds} s");
        }
    }

    #[test]
    fn what_an_earlier_agent_left_alone_is_not_held_again() {
        let found: HashMap<u64, PathBuf> = [(7, PathBuf::new()), (8, PathBuf::new())].into();
        let mut unnamed = UnnamedCgroups::left_alone([7].into_iter());
        unnamed.update(&found, |_| false, Freshness::Current, (Instant::now(), LIMIT));
        assert_eq!(unnamed.passed(), [7].into());
    }

    #[test]
    fn a_cgroup_with_named_ones_inside_is_nobodys() {
        let root = Scratch::new();
        for path in ["named/container", "class/named", "class/other", "pod", "deep/a/named", "empty"] {
            let path = root.path().join(path);
            fs::create_dir_all(&path).expect("made");
            let populated = u8::from(!path.ends_with("empty"));
            fs::write(path.join("cgroup.events"), format!("populated {populated}\nfrozen 0\n"))
                .expect("written");
        }
        let mut directory = Directory::default();
        for (name, cgroup) in [("one", "class/named"), ("two", "deep/a/named")] {
            let pod = Workload { name: name.into(), cgroup: cgroup.into(), ..workload(name, &[]) };
            directory.insert(pod, AddressConflict::Replace);
        }
        directory.set_departed(vec![Arc::new(Workload { cgroup: "named".into(), ..workload("three", &[]) })]);
        let mut pods = NodePods::default();
        pods.follow(&Arc::new(directory.clone()), "a");
        let found = find(root.path(), &Named::of(&pods, directory.other_cgroups_on_node("a"))).expect("read");
        let mut found: Vec<&Path> = found.values().map(|path| relative(root.path(), path)).collect();
        found.sort_unstable();
        assert_eq!(found, [Path::new("class/other"), Path::new("pod")]);
    }

    #[test]
    fn a_cgroup_that_cannot_be_read_is_no_pod() {
        let root = Scratch::new();
        let class = root.path().join("class");
        fs::create_dir(&class).expect("made");
        fs::write(class.join("cgroup.events"), "populated 1\n").expect("written");
        let pods = NodePods::default();
        let nothing = Named::of(&pods, std::iter::empty());
        assert_eq!(find(root.path(), &nothing).expect("read").len(), 1, "control: it can be read");
        let (unreadable, gone) = (class.join("cgroup.events"), root.path().join("gone"));
        assert!(find(&unreadable, &nothing).is_err());
        assert!(find(&gone, &nothing).expect("nothing is there").is_empty());
    }
}
