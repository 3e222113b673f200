//! The test programs of the workspace.
//!
//! cargo builds all of them in one command: a command for each package would build dependencies once more, with the features
//! that this package alone asks for. [`build`] then returns where cargo has put the programs, and callers start them.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command, ebpf,
    platform::Platform,
    workspace::{Profile, Workspace},
};

/// A program of tests that cargo has built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestProgram {
    /// The package's folder, relative to the top folder: `agent/core`.
    pub package: PathBuf,
    /// The source file of its `main` or crate root, relative to the package: `src/lib.rs`.
    pub source: PathBuf,
    /// The target's name, as cargo has it in file names: `tacit_core`.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
}

impl TestProgram {
    /// Returns true for a file below the package's `tests` folder, and false for unit tests.
    #[must_use]
    pub fn is_integration(&self) -> bool {
        self.source.starts_with("tests")
    }
}

/// Builds the test programs that `selection` names with cargo's target options (`--lib`, `--test NAME`; empty: all).
///
/// # Errors
/// If cargo fails, or builds no test program.
pub fn build(workspace: &Workspace, selection: &[&str]) -> Result<Vec<TestProgram>> {
    let packages = ["--workspace", "--exclude", ebpf::PACKAGE];
    build_for(workspace, &Platform::Own, &[&packages, selection].concat())
}

/// Builds the test programs of a platform. `selection` names them with cargo's options for packages and targets.
///
/// # Errors
/// As [`build`].
pub fn build_for(workspace: &Workspace, platform: &Platform, selection: &[&str]) -> Result<Vec<TestProgram>> {
    let mut cargo = workspace.cargo("test");
    cargo.args(["--no-run", "--profile", Profile::Fast.name()]);
    cargo.arg("--message-format=json-render-diagnostics").args(selection);
    platform.prepare(&mut cargo);
    cargo.arg("--target-dir").arg(workspace.target());
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot start {}", command::line(&cargo)))?;
    ensure!(output.status.success(), "failed ({}): {}", output.status, command::line(&cargo));
    let messages = String::from_utf8(output.stdout).context("invalid output of cargo: expected UTF-8")?;
    let programs: Vec<TestProgram> =
        messages.lines().filter_map(|message| parse(message, workspace.root())).collect();
    ensure!(!programs.is_empty(), "cargo built no test program: {}", command::line(&cargo));
    Ok(programs)
}

/// The test program of one of cargo's messages. See "External tools" in the Cargo book for their form.
fn parse(message: &str, root: &Path) -> Option<TestProgram> {
    let (_, profile) = message.split_once("\"profile\":{")?;
    let (profile, _) = profile.split_once('}')?;
    if !profile.contains("\"test\":true") {
        return None;
    }
    let path = PathBuf::from(text(message, "executable")?);
    let folder = Path::new(text(message, "manifest_path")?).parent()?;
    let source = Path::new(text(message, "src_path")?).strip_prefix(folder).ok()?.to_owned();
    let (name, _) = path.file_name()?.to_str()?.rsplit_once('-')?;
    let name = name.to_owned();
    Some(TestProgram { package: folder.strip_prefix(root).ok()?.to_owned(), source, name, path })
}

/// The value of a text field, which has no escapes: names and paths of this workspace.
fn text<'a>(message: &'a str, field: &str) -> Option<&'a str> {
    Some(message.split_once(&format!("\"{field}\":\""))?.1.split_once('"')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(test: bool, source: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"path+file:///r/agent/core#tacit-core@0.1.0","manifest_path":"/r/agent/core/Cargo.toml","target":{{"kind":["lib"],"name":"tacit_core","src_path":"/r/agent/core/{source}","test":true}},"profile":{{"opt_level":"1","test":{test}}},"features":[],"executable":"/t/fast/deps/tacit_core-0f3c","fresh":true}}"#
        )
    }

    #[test]
    fn a_test_program_is_read_from_cargos_message() {
        let found = parse(&message(true, "src/lib.rs"), Path::new("/r")).expect("a test program");
        assert_eq!(found.package, Path::new("agent/core"));
        assert_eq!(
            (found.name.as_str(), found.path.as_path()),
            ("tacit_core", Path::new("/t/fast/deps/tacit_core-0f3c"))
        );
        assert!(!found.is_integration());
        assert!(
            parse(&message(true, "tests/properties/main.rs"), Path::new("/r")).expect("one").is_integration()
        );
    }

    #[test]
    fn a_program_without_tests_is_none() {
        assert_eq!(parse(&message(false, "src/main.rs"), Path::new("/r")), None);
        assert_eq!(parse(r#"{"reason":"build-finished","success":true}"#, Path::new("/r")), None);
    }
}
