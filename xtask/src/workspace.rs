//! Where things are: the repository, cargo's target folder, the cache that outlives both.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::command;

/// The folders all commands work in.
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
    cache: PathBuf,
}

impl Workspace {
    /// Reads cargo's and the user's environment; nothing is created yet.
    pub(crate) fn find() -> Result<Self> {
        // cargo sets the variable on `cargo run`; a process started through sudo has only the compiled-in value.
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root =
            Path::new(&manifest).parent().context("xtask stands in a folder of the workspace")?.to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Ok(Self { root, target, cache: cache_folder()? })
    }

    /// The repository's top folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// cargo's target folder: `$CARGO_TARGET_DIR` or `target`.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Tools that are slow to make: `$TACIT_CACHE`, `$XDG_CACHE_HOME/tacit` or `~/.cache/tacit`.
    pub(crate) fn cache(&self) -> &Path {
        &self.cache
    }

    /// The built kernel side. It does not follow `$CARGO_TARGET_DIR`: the agent's build script looks for it here.
    pub(crate) fn object(&self) -> PathBuf {
        self.root.join("target/ebpf/tacit-ebpf.o")
    }

    /// The agent's release binary.
    pub(crate) fn agent(&self) -> PathBuf {
        self.target.join("release/tacit")
    }

    /// The attack suite's release binary: beside the agent's, where the agent looks for it.
    pub(crate) fn attack(&self) -> PathBuf {
        self.target.join("release/tacit-attack")
    }

    /// The load generator's release binary.
    pub(crate) fn load_generator(&self) -> PathBuf {
        self.target.join("release/tacit-load")
    }

    /// cargo, started in the repository with its target folder stated.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.arg(subcommand).current_dir(&self.root);
        cargo
    }

    /// Builds the agent in release mode; the kernel side must be there.
    pub(crate) fn build_agent(&self) -> Result<()> {
        self.build_release(&["tacit"])
    }

    /// Builds the agent and the attack suite in release mode; the kernel side must be there.
    pub(crate) fn build_agent_and_attack(&self) -> Result<()> {
        self.build_release(&["tacit", "tacit-attack"])
    }

    fn build_release(&self, packages: &[&str]) -> Result<()> {
        let mut cargo = self.cargo("build");
        cargo.arg("--release").args(packages.iter().flat_map(|package| ["--package", package]));
        command::run(cargo.arg("--target-dir").arg(&self.target))
    }

    /// Builds the load generator in release mode.
    pub(crate) fn build_load_generator(&self) -> Result<()> {
        let mut cargo = self.cargo("build");
        cargo.args(["--release", "--package", "tacit-tests", "--bin", "tacit-load", "--target-dir"]);
        command::run(cargo.arg(&self.target))
    }
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(cache) = set("TACIT_CACHE") {
        return std::path::absolute(cache).context("TACIT_CACHE is no usable path");
    }
    // The XDG specification says that a relative value is to be ignored.
    if let Some(cache) = set("XDG_CACHE_HOME").filter(|path| path.is_absolute()) {
        return Ok(cache.join("tacit"));
    }
    let home = set("HOME").context("HOME is not set: set TACIT_CACHE to a folder for the built tools")?;
    Ok(home.join(".cache/tacit"))
}
