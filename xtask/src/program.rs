//! Programs of this repository that a command starts. They are packages of their own, so that `cargo xtask setup` compiles
//! none of what they need.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use xtask_support::{
    command, ebpf,
    workspace::{Profile, Workspace},
};

/// The arguments of the program, `--help` included.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Options and arguments: see `--help` of the command itself
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds a package's program and runs it; its exit code is the command's. The program has the package's name.
pub(crate) fn run(workspace: &Workspace, package: &str, arguments: &Arguments) -> Result<ExitCode> {
    let mut command = command(workspace, package)?;
    let status = command.args(&arguments.arguments).status().with_context(|| format!("start {package}"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Builds a package's program and returns the command that runs it.
pub(crate) fn command(workspace: &Workspace, package: &str) -> Result<Command> {
    let mut cargo = workspace.cargo("build");
    // As `cargo xtask` itself is built. With the features of the whole workspace nothing is compiled twice.
    cargo.args(["--quiet", "--profile", Profile::Fast.name(), "--bin", package]);
    cargo.args(["--workspace", "--exclude", ebpf::PACKAGE, "--target-dir"]).arg(workspace.target());
    command::run(&mut cargo)?;
    Ok(Command::new(workspace.program(Profile::Fast, package)))
}
