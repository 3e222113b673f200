//! rustfmt and clippy over the whole workspace, each with the compiler that a crate is built with.

use anyhow::{Context as _, Result};
use xtask_support::{
    command, ebpf,
    setup::toolchain::require_component,
    workspace::{Profile, Workspace},
};

use crate::fuzz;

/// The treatment of files with a wrong format.
#[derive(Clone, Copy)]
pub(crate) enum Format {
    Write,
    Check,
}

/// Formats all crates, the kernel side included.
pub(crate) fn format(workspace: &Workspace, how: Format) -> Result<()> {
    let mut cargo = workspace.cargo("fmt");
    cargo.arg("--all");
    if matches!(how, Format::Check) {
        cargo.arg("--check");
    }
    command::run(&mut cargo)
        .context("`cargo xtask fmt` formats; without rustfmt: rustup component add rustfmt")
}

/// Lints both sides; warnings are errors.
pub(crate) fn clippy(workspace: &Workspace) -> Result<()> {
    host(workspace)?;
    ebpf::clippy(workspace)
}

/// Lints everything that runs in user space, tests included.
pub(crate) fn host(workspace: &Workspace) -> Result<()> {
    require_component("clippy")?;
    let mut cargo = workspace.cargo("clippy");
    cargo
        .args(["--workspace", "--exclude", ebpf::PACKAGE, "--all-targets"])
        // Build scripts and procedural macros are those of the build then.
        .args(["--profile", Profile::Fast.name(), "--target-dir"])
        .arg(workspace.target());
    command::run(cargo.args(["--", "-Dwarnings"]))?;
    fuzz_lock(workspace)
}

/// The fuzz targets are no members of the workspace, so nothing else notices when the agent's dependencies change.
fn fuzz_lock(workspace: &Workspace) -> Result<()> {
    let manifest = fuzz::folder(workspace).join("Cargo.toml");
    let mut cargo = workspace.cargo("tree");
    cargo.args(["--locked", "--depth", "0", "--manifest-path"]).arg(&manifest);
    command::run(&mut cargo).with_context(|| {
        format!("to renew the lock file: cargo update -w --manifest-path {}", manifest.display())
    })
}
