//! The features that a kernel lacks for the agent, in words that tell what to do. Pure.

use std::fmt;

use super::{Presence, ProbeFinding, Release, Remedy};

/// `EX_CONFIG` of sysexits(3): starting again changes nothing, so supervisors should not.
const EX_CONFIG: u8 = 78;

/// Features that the agent cannot do without are missing. Shown as one line for each, with what to do.
#[derive(Debug, Clone)]
pub struct Unsupported {
    /// The running kernel's release.
    pub kernel: String,
    /// The missing features, at least one.
    pub missing: Vec<ProbeFinding>,
}

impl Unsupported {
    /// Returns the exit code of the process: 78.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        EX_CONFIG
    }
}

impl std::error::Error for Unsupported {}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {} cannot run the agent; missing:", self.kernel)?;
        for finding in &self.missing {
            if let Presence::Absent(why) = &finding.presence {
                let advice = advice(finding, why, Release::parse(&self.kernel));
                write!(f, "\n  {} ({}): {advice}", finding.feature, finding.needed_for)?;
            }
        }
        for (why, features) in untried(&self.missing) {
            write!(f, "\n  could not be tried ({why}): {}", features.join(", "))?;
        }
        write!(f, "\n`tacit doctor` shows every feature; nothing was attached or pinned")
    }
}

fn advice(finding: &ProbeFinding, why: &str, running: Option<Release>) -> String {
    let since = finding.since;
    match finding.remedy {
        Remedy::Node(todo) => format!("{why}; {todo}"),
        Remedy::Kernel(_) if running.is_none_or(|running| running < since) => {
            format!("in Linux since {since}; boot Linux {} or newer", since.max(Release::MINIMUM))
        }
        Remedy::Kernel(option) => format!(
            "in Linux since {since}, but this kernel says: {why}; boot one that is built with {option}"
        ),
    }
}

/// Features that could not be tried, grouped by reason: usually all of them for one.
fn untried(missing: &[ProbeFinding]) -> Vec<(&str, Vec<&'static str>)> {
    let mut groups: Vec<(&str, Vec<&'static str>)> = Vec::new();
    for finding in missing {
        let Presence::Unknown(why) = &finding.presence else { continue };
        match groups.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, features)) => features.push(finding.feature),
            None => groups.push((why, vec![finding.feature])),
        }
    }
    groups
}
