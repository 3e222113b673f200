//! The kernel side: compiled for the BPF target, linked by bpf-linker, put where the agent's build script finds it.
//!
//! The crate is built with another compiler than the host's (see `setup::toolchain`), so its build lives in its own
//! target folder and knows nothing of the caller's flags and wrappers.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    command,
    progress::note,
    setup::{
        self, EbpfTools,
        toolchain::{TARGET, Toolchain},
    },
    workspace::Workspace,
};

/// The crate; it is excluded wherever host code is meant.
pub const PACKAGE: &str = "tacit-ebpf";

/// Variables of a rustup proxy or a developer for host builds, which would break this one.
const FOREIGN_ENVIRONMENT: [&str; 5] =
    ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "LD_LIBRARY_PATH", "CARGO_INCREMENTAL"];

/// Builds the object and returns its path. An object with the same content is left alone, so that cargo does not
/// rebuild the agent that embeds it.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let tools = setup::ensure_ebpf(workspace)?;
    note(&format!("kernel side with {}", tools.toolchain));
    command::run(&mut cargo(workspace, &tools, "build"))?;
    let built = build_folder(workspace).join(TARGET).join("release").join(PACKAGE);
    let object = workspace.object();
    copy_when_different(&built, &object)?;
    Ok(object)
}

/// Lints the crate with the clippy that belongs to its compiler; warnings are errors.
pub fn clippy(workspace: &Workspace) -> Result<()> {
    let tools = setup::ensure_ebpf(workspace)?;
    let mut cargo = cargo(workspace, &tools, "clippy");
    command::run(cargo.args(["--", "-Dwarnings"]))
}

fn build_folder(workspace: &Workspace) -> PathBuf {
    workspace.target().join("ebpf-build")
}

fn cargo(workspace: &Workspace, tools: &EbpfTools, subcommand: &str) -> Command {
    let mut cargo = match &tools.toolchain {
        Toolchain::Distribution { rustc, .. } => distribution_cargo(workspace, rustc, subcommand),
        Toolchain::Rustup { name } => rustup_cargo(name, subcommand),
    };
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", tools.linker.display()),
    ];
    cargo
        .current_dir(workspace.root())
        .args(["--package", PACKAGE, "--release", "--target", TARGET, "--target-dir"])
        .arg(build_folder(workspace))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    for name in FOREIGN_ENVIRONMENT {
        cargo.env_remove(name);
    }
    cargo
}

fn distribution_cargo(workspace: &Workspace, rustc: &Path, subcommand: &str) -> Command {
    let mut cargo = if subcommand == "clippy" {
        // cargo-clippy runs the clippy-driver next to itself, and that one must belong to this rustc.
        let mut clippy = Command::new(rustc.with_file_name("cargo-clippy"));
        clippy.arg("clippy");
        clippy
    } else {
        workspace.cargo(subcommand)
    };
    cargo.env("RUSTC", rustc);
    // Both use feature(asm_experimental_arch). Naming them keeps every other crate's probing for nightly off.
    cargo.env("RUSTC_BOOTSTRAP", "aya_ebpf,tacit_ebpf");
    cargo
}

fn rustup_cargo(toolchain: &str, subcommand: &str) -> Command {
    let mut cargo = Command::new("rustup");
    cargo.args(["run", toolchain, "cargo", subcommand, "-Zbuild-std=core"]);
    for name in ["RUSTC", "CARGO", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(name);
    }
    cargo
}

fn copy_when_different(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cargo left no object at {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let folder = to.parent().context("the object's path has a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}
