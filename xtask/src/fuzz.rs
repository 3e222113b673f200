//! `cargo xtask fuzz`: the fuzz targets for real, with cargo-fuzz. `cargo xtask test` replays their committed corpus.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{command, progress::note, workspace::Workspace};

const VERSION: &str = "0.13.2";
const TARGETS: [&str; 5] = ["frames", "records", "policy", "directory", "config"];

/// The targets and the duration of fuzzing.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Targets: frames, records, policy, directory, config; all of them when none is named
    targets: Vec<String>,
    /// Duration of each target
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    seconds: u32,
}

/// The command. New inputs stay in a folder of the cache; a failing one is written to `tests/fuzz/artifacts`.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let all: Vec<String> = TARGETS.map(str::to_owned).to_vec();
    let chosen = if options.targets.is_empty() { &all } else { &options.targets };
    for target in chosen {
        ensure!(TARGETS.contains(&target.as_str()), "no target {target:?}: there are {}", TARGETS.join(", "));
    }
    let cargo_fuzz = ensure_cargo_fuzz(workspace)?;
    let folder = folder(workspace);
    for target in chosen {
        let found = workspace.cache().join("fuzz").join(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
        let mut cargo = std::process::Command::new(&cargo_fuzz);
        // The sanitizer's flags are not stable; the compiler is.
        cargo.env("RUSTC_BOOTSTRAP", "1").current_dir(workspace.root());
        cargo.args(["fuzz", "run", "--fuzz-dir"]).arg(&folder).arg("--target-dir");
        cargo.arg(workspace.target().join("fuzz")).arg(target).arg(&found);
        cargo.arg(folder.join("corpus").join(target));
        cargo.arg("--").arg(format!("-max_total_time={}", options.seconds)).arg("-max_len=4096");
        command::run(&mut cargo).with_context(|| format!("target {target}"))?;
    }
    Ok(())
}

/// The package of the targets.
pub(crate) fn folder(workspace: &Workspace) -> PathBuf {
    workspace.root().join("tests/fuzz")
}

/// cargo-fuzz from the cache, or built into it.
fn ensure_cargo_fuzz(workspace: &Workspace) -> Result<PathBuf> {
    let home = workspace.cache().join(format!("cargo-fuzz-{VERSION}"));
    let program = home.join("bin/cargo-fuzz");
    if program.exists() {
        return Ok(program);
    }
    note(&format!("building cargo-fuzz {VERSION} into {} (about a minute, once)", home.display()));
    let mut cargo = workspace.cargo("install");
    cargo.args(["cargo-fuzz", "--version", VERSION, "--locked", "--root"]).arg(&home);
    command::run(&mut cargo)?;
    Ok(program)
}
