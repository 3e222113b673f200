//! The annotations that a pod should have. Pure.
//!
//! | pod | annotation | mark | change |
//! |---|---|---|---|
//! | enrolled by its label, and takes tunnels | any | any, not both as announced | [`Change::Announce`] |
//! | enrolled by its label, and takes no tunnel yet | any | any | none: an agent that starts again finds its pods announced |
//! | not enrolled, or takes plaintext alone | `enabled` | yes | [`Change::Withdraw`] |
//! | not enrolled, or takes plaintext alone | another value, or none | yes | [`Change::Unmark`] |
//! | not enrolled, or takes plaintext alone | any | no | none: others wrote it |

use std::{collections::HashSet, path::PathBuf};

use super::OwnPod;

/// The pods of this node as enrolment has them, by the directory's cgroup path.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Serving {
    /// Pods whose listeners accept tunnels.
    pub tunnelled: HashSet<PathBuf>,
    /// Pods that no tunnel can serve, such as those with a proxy of their own.
    pub plaintext_alone: HashSet<PathBuf>,
}

/// A change of a pod's annotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Writes the annotation and the mark.
    Announce,
    /// Removes both.
    Withdraw,
    /// Removes the mark. The annotation has another value by now, which is not the agent's.
    Unmark,
}

/// Returns the changes that the pods need. Enrolled pods come first: anybody who may create pods can make thousands with a mark.
pub(super) fn changes<'p>(pods: &'p [OwnPod], serving: &Serving) -> Vec<(&'p OwnPod, Change)> {
    let mut changes: Vec<_> = pods.iter().filter_map(|pod| Some((pod, change(pod, serving)?))).collect();
    changes.sort_by_key(|(_, change)| *change != Change::Announce);
    changes
}

/// Returns the change that the pod needs.
pub(super) fn change(pod: &OwnPod, serving: &Serving) -> Option<Change> {
    let plaintext_alone = serving.plaintext_alone.contains(&pod.cgroup);
    if pod.is_enrolled && !plaintext_alone {
        let is_announced = pod.is_redirected && pod.is_marked;
        return (serving.tunnelled.contains(&pod.cgroup) && !is_announced).then_some(Change::Announce);
    }
    match (pod.is_marked, pod.is_redirected) {
        (true, true) => Some(Change::Withdraw),
        (true, false) => Some(Change::Unmark),
        (false, _) => None,
    }
}
