//! Root, when it is needed: asked for one command at a time, with the reason and the command line printed before.
//!
//! Promises that nothing runs as root without having been shown. When there is no sudo, the error is the command to
//! run by hand.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::MetadataExt as _,
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{self, find_program},
    progress::note,
};

/// Returns true if this process already is root. The owner of /proc/self is the process's effective user.
pub fn is_root() -> Result<bool> {
    let owner = fs::metadata("/proc/self").context("/proc is not mounted")?.uid();
    Ok(owner == 0)
}

/// A command that runs as root: as it is for root, through sudo for everybody else, who is told `why` first.
///
/// `environment` is passed explicitly, since sudo drops the caller's.
pub fn as_root(
    why: &str,
    environment: &[(OsString, OsString)],
    program: impl AsRef<OsStr>,
    arguments: &[&OsStr],
) -> Result<Command> {
    if is_root()? {
        let mut plain = Command::new(program);
        plain.args(arguments).envs(environment.iter().cloned());
        return Ok(plain);
    }
    let mut elevated = Command::new("sudo");
    if !environment.is_empty() {
        elevated.arg("env");
        for (name, value) in environment {
            let mut assignment = name.clone();
            assignment.push("=");
            assignment.push(value);
            elevated.arg(assignment);
        }
    }
    elevated.arg(program).args(arguments);
    let shown = command::line(&elevated);
    if find_program("sudo").is_none() {
        let by_hand = shown.trim_start_matches("sudo ");
        bail!(
            "root is needed {why} and there is no sudo: run this as root, then this command again\n  {by_hand}"
        );
    }
    note(&format!("root is needed {why}:"));
    note(&format!("  {shown}"));
    Ok(elevated)
}
