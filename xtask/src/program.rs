//! Programs of this repository that a command starts. They are packages of their own, so that `cargo xtask setup` compiles
//! none of what they need.

use std::{
    env,
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use xtask_support::workspace::{Profile, Workspace};

/// What the program is given, `--help` included.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Options and arguments: see `--help` of the command itself
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds a package's program and runs it; its exit code is the command's.
pub(crate) fn run(workspace: &Workspace, package: &str, arguments: &Arguments) -> Result<ExitCode> {
    let mut command = command(workspace, package)?;
    let status = command.args(&arguments.arguments).status().context("start cargo")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The command that builds a package's program and runs it. Its arguments are the program's.
pub(crate) fn command(workspace: &Workspace, package: &str) -> Result<Command> {
    let mut cargo = workspace.cargo("run");
    // As `cargo xtask` itself is built: what both need is compiled once.
    cargo.args(["--quiet", "--profile", Profile::Fast.name(), "--package", package]);
    cargo.arg("--manifest-path").arg(workspace.root().join("Cargo.toml"));
    cargo.arg("--target-dir").arg(workspace.target()).arg("--");
    // Files that the arguments name are meant from here.
    cargo.current_dir(env::current_dir().context("the folder that this was started in")?);
    Ok(cargo)
}
