//! The programs at the pods' cgroup, and whether the kernel runs them.

use std::{fs::File, io, os::fd::AsFd as _, path::Path};

use super::Programs;
use crate::{cgroup, hooks, link};

/// Programs at the pods' cgroup, in the order in which they are attached. The hooks that return names come before those that capture.
/// Each has the number of its hook in `enum bpf_attach_type`.
pub(super) const CGROUP_PROGRAMS: [(&str, u32); 9] = [
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("getsockname4", 31),
    ("getsockname6", 32),
    ("established", 3),
    ("guard_egress", 1),
    ("guard_ingress", 0),
    ("connect4", 10),
    ("connect6", 11),
];

impl Programs {
    /// Returns true if all programs at the pods' cgroup were attached before this agent, so that nothing passed them.
    #[must_use]
    pub fn were_attached(&self) -> bool {
        self.were_attached
    }

    /// Returns the programs at the pods' cgroup that the kernel does not run for sockets of processes in `cgroup`. This is the kernel's
    /// own list, of the programs in force in that cgroup.
    ///
    /// # Errors
    /// The kernel's.
    pub fn missing_in(&self, cgroup: &Path) -> io::Result<Vec<&'static str>> {
        let folder = File::open(cgroup)?;
        let mut missing = Vec::new();
        for (name, hook) in CGROUP_PROGRAMS {
            let own = link::info(link::open_pin(&self.pins.link(name))?.as_fd())?.program_id;
            if !hooks::query(&folder, hook)?.contains(&own) {
                missing.push(name);
            }
        }
        Ok(missing)
    }

    /// Returns true if the programs are attached to the cgroup that is at `pods` now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn are_attached_to(&self, pods: &Path) -> io::Result<bool> {
        if cgroup::id_at(pods) != Some(self.pods_cgroup) {
            return Ok(false);
        }
        for (name, _) in CGROUP_PROGRAMS {
            if link::info(link::open_pin(&self.pins.link(name))?.as_fd())?.target() != self.pods_cgroup {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
