//! `cargo xtask tidy`: the rules of this repository, as code.
//!
//! Each rule is a function from one file (or all of them) to findings and is tested on examples it accepts and
//! examples it refuses. Rules read lines, not syntax trees: `scan` separates code from comments and literals, which
//! is all they need, and a rule that can be fooled on purpose is still one that nobody breaks by accident.
//!
//! | module | rules |
//! |---|---|
//! | `dependencies` | which crate may depend on what; which modules are pure; which never import each other |
//! | `safety` | `unsafe` in its places and explained; lints silenced with a reason; no sleeping tests |
//! | `shape` | `//!` first, names, lengths, folders, nothing left for later |
//! | `traces` | nothing of the building machine: paths, registries, binaries |
//! | `manifests` | licences; commands that the documentation mentions exist |

mod dependencies;
mod manifests;
mod safety;
mod scan;
mod shape;
mod source;
mod traces;

use std::fmt;

use anyhow::{Result, bail};
use xtask_support::{
    progress::{Style, Tone},
    workspace::Workspace,
};

use source::Source;

/// One place that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    path: String,
    /// 1-based; 0 when the whole file is meant.
    line: usize,
    severity: Severity,
    problem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Severity {
    Warning,
    Error,
}

impl Finding {
    fn error(source: &Source, line: usize, problem: impl Into<String>) -> Self {
        Self { path: source.path.clone(), line, severity: Severity::Error, problem: problem.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.problem),
            line => write!(f, "{}:{line}: {}", self.path, self.problem),
        }
    }
}

/// Checks the whole repository; `commands` are the names `cargo xtask` knows.
pub(crate) fn run(workspace: &Workspace, commands: &[String]) -> Result<()> {
    let sources = source::all(workspace.root())?;
    let machine = traces::Machine::this(workspace.root());
    let mut findings = shape::folders(&sources);
    for source in &sources {
        findings.extend(check(source, &machine, commands));
    }
    let style = Style::of_stderr();
    for finding in &findings {
        let (tone, word) = match finding.severity {
            Severity::Error => (Tone::Bad, "error"),
            Severity::Warning => (Tone::Warning, "warning"),
        };
        eprintln!("{}: {finding}", style.paint(tone, word));
    }
    match findings.iter().filter(|finding| finding.severity == Severity::Error).count() {
        0 => {
            eprintln!("{} {} files", style.paint(Tone::Good, "tidy:"), sources.len());
            Ok(())
        }
        errors => bail!("{errors} breaches of the repository's rules"),
    }
}

fn check(source: &Source, machine: &traces::Machine, commands: &[String]) -> Vec<Finding> {
    let mut findings = traces::check(source, machine);
    findings.extend(shape::check(source));
    findings.extend(manifests::check(source, commands));
    findings.extend(dependencies::manifest(source));
    if source.is_rust() {
        findings.extend(dependencies::check(source));
        findings.extend(safety::check(source));
    }
    findings
}
