//! Capabilities of the running kernel, found by trials and not by its version, because distributions backport features
//! and leave others out.
//!
//! ```text
//! FEATURES (features) --trial--> Presence        tiny programs and maps, loaded and dropped at once (raw, trial)
//!                     --trial--> Presence        one real link on one real socket (cgroup_probe)
//!         all of them: ProbeReport ---> `tacit doctor`
//!         required and not there: Unsupported --> exit code 78 (unsupported)
//! ```
//! Promises: nothing stays loaded, attached or pinned, nobody else's traffic is touched, and a start's share of the
//! trials takes a few milliseconds. What could not be tried counts as missing.

mod cgroup_probe;
mod features;
pub(crate) mod raw;
mod trial;
mod unsupported;

use std::{fmt, io, path::Path};

use features::{FEATURES, Feature};
pub use unsupported::Unsupported;

use crate::host;

/// ENOTSUPP of the kernel, which libc does not know.
const ENOTSUPP: i32 = 524;

/// A kernel's version as far as features care, such as `5.15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u16, pub u16);

impl Release {
    /// The oldest that has everything required; what the documentation promises.
    pub const MINIMUM: Self = Self(5, 15);

    /// From a release string such as `6.1.0-13-amd64`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The result of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It works.
    Present,
    /// It does not; why, as far as the kernel says.
    Absent(String),
    /// It could not be tried; why.
    Unknown(String),
}

impl Presence {
    /// The reason for which it is not known to work; empty when it is.
    #[must_use]
    pub fn problem(&self) -> &str {
        match self {
            Self::Present => "",
            Self::Absent(why) | Self::Unknown(why) => why,
        }
    }

    /// Returns the presence of a feature that the kernel refused with `error`.
    fn refused(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EINVAL | libc::E2BIG | libc::ENOPROTOOPT | libc::EOPNOTSUPP | ENOTSUPP) => {
                Self::Absent(error.to_string())
            }
            Some(libc::EPERM | libc::EACCES) => Self::Unknown(format!("{error}; run as root")),
            _ => Self::Unknown(error.to_string()),
        }
    }
}

/// The consequence of a missing feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The agent does not start.
    Required,
    /// The agent does this instead.
    Fallback(&'static str),
}

/// The way for an operator to get a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// By another kernel: since that release, with that build option.
    Kernel(&'static str),
    /// By setting up the node.
    Node(&'static str),
}

/// One feature and what became of its trial.
#[derive(Debug, Clone)]
pub struct ProbeFinding {
    /// Its name, stable.
    pub feature: &'static str,
    /// The purpose of the feature in Tacit.
    pub needed_for: &'static str,
    /// First release of Linux that has it.
    pub since: Release,
    /// The consequence of its absence.
    pub need: Need,
    /// The remedy for its absence.
    pub remedy: Remedy,
    /// The result of the trial.
    pub presence: Presence,
}

impl ProbeFinding {
    /// Returns true if the agent refuses to start without it.
    #[must_use]
    pub fn stops_the_agent(&self) -> bool {
        self.need == Need::Required && self.presence != Presence::Present
    }

    fn of(feature: &Feature, pin_path: &Path) -> Self {
        Self {
            feature: feature.name,
            needed_for: feature.needed_for,
            since: feature.since,
            need: feature.need,
            remedy: feature.remedy,
            presence: trial::run(&feature.trial, pin_path),
        }
    }
}

/// The findings on one kernel.
#[derive(Debug, Clone)]
pub struct ProbeReport {
    /// The running kernel's release.
    pub kernel: String,
    /// In the order of the table.
    pub findings: Vec<ProbeFinding>,
}

impl ProbeReport {
    /// Can the agent run?
    ///
    /// # Errors
    /// [`Unsupported`] with everything that stands against it.
    pub fn verdict(&self) -> Result<(), Unsupported> {
        let missing: Vec<ProbeFinding> =
            self.findings.iter().filter(|f| f.stops_the_agent()).cloned().collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Unsupported { kernel: self.kernel.clone(), missing })
    }
}

/// Tries every feature. `pin_path`: where the agent would pin.
#[must_use]
pub fn everything(pin_path: &Path) -> ProbeReport {
    run(pin_path, |_| true)
}

/// Tries what the agent cannot run without. To be called before anything is attached or pinned.
///
/// # Errors
/// [`Unsupported`].
pub fn require(pin_path: &Path) -> Result<(), Unsupported> {
    run(pin_path, |feature| feature.need == Need::Required).verdict()
}

/// Can a connect hook choose the error that an application sees?
pub(super) fn has_set_retval() -> bool {
    has(features::SET_RETVAL_IN_SOCK_ADDR)
}

/// Can a connect hook see whether an IPv6 socket accepts v4-mapped addresses?
pub(super) fn has_tcp6_sock() -> bool {
    has(features::TCP6_SOCK_IN_SOCK_ADDR)
}

fn has(name: &str) -> bool {
    run(Path::new("/"), |feature| feature.name == name)
        .findings
        .iter()
        .all(|f| f.presence == Presence::Present)
}

fn run(pin_path: &Path, select: impl Fn(&Feature) -> bool) -> ProbeReport {
    raw::lift_memory_limit();
    let findings = FEATURES.iter().filter(|f| select(f)).map(|f| ProbeFinding::of(f, pin_path)).collect();
    ProbeReport { kernel: host::kernel_release(), findings }
}

#[cfg(test)]
mod tests;
