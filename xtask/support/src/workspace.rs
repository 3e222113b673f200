//! Paths: the repository, cargo's target folder, the cache that outlives both.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{command, platform::Platform};

/// With which of cargo's profiles something is built.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// For the demo, the tests and the checks: quick to build, with assertions.
    Fast,
    /// For the image and the bench.
    Release,
}

impl Profile {
    /// Its name in `Cargo.toml`, which is also that of its folder in the target folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Release => "release",
        }
    }
}

/// The folders all commands work in.
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
    cache: PathBuf,
}

impl Workspace {
    /// Reads cargo's and the user's environment; nothing is created yet.
    pub fn find() -> Result<Self> {
        // cargo sets the variable on `cargo run`; a process started through sudo has only the compiled-in value.
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = root_above(Path::new(&manifest))?;
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Ok(Self { root, target, cache: cache_folder()? })
    }

    /// The repository's top folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// cargo's target folder: `$CARGO_TARGET_DIR` or `target`.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Tools that are slow to make: `$TACIT_CACHE`, `$XDG_CACHE_HOME/tacit` or `~/.cache/tacit`.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The built kernel side. It does not follow `$CARGO_TARGET_DIR`: the agent's build script looks for it here.
    pub fn object(&self) -> PathBuf {
        self.root.join("target/ebpf/tacit-ebpf.o")
    }

    /// A built program of the workspace.
    pub fn program(&self, profile: Profile, name: &str) -> PathBuf {
        self.target.join(profile.name()).join(name)
    }

    /// A built program of a platform.
    pub fn program_of(&self, platform: &Platform, profile: Profile, name: &str) -> PathBuf {
        platform.folder(&self.target).join(profile.name()).join(name)
    }

    /// The agent.
    pub fn agent(&self, profile: Profile) -> PathBuf {
        self.program(profile, "tacit")
    }

    /// The attack suite: beside the agent, where the agent looks for it.
    pub fn attack(&self, profile: Profile) -> PathBuf {
        self.program(profile, "tacit-attack")
    }

    /// The CNI plugin: beside the agent, which installs it.
    pub fn cni(&self, profile: Profile) -> PathBuf {
        self.program(profile, "tacit-cni")
    }

    /// cargo, started in the repository with its target folder stated.
    pub fn cargo(&self, subcommand: &str) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.arg(subcommand).current_dir(&self.root);
        cargo
    }

    /// Builds the programs of these packages; the kernel side must be there for the agent's.
    pub fn build(&self, profile: Profile, packages: &[&str]) -> Result<()> {
        self.build_for(&Platform::Own, profile, packages)
    }

    /// As [`Self::build`], for a platform. The programs are in its folder of the target folder.
    pub fn build_for(&self, platform: &Platform, profile: Profile, packages: &[&str]) -> Result<()> {
        let mut cargo = self.cargo("build");
        platform.prepare(&mut cargo);
        cargo.args(["--profile", profile.name(), "--bins", "--target-dir"]).arg(&self.target);
        command::run(cargo.args(packages.iter().flat_map(|package| ["--package", package])))
    }

    /// Builds the CNI plugin. It runs outside the image, on a node whose C library may be another one, so it has its own.
    pub fn build_cni(&self, profile: Profile) -> Result<()> {
        self.build_cni_for(&Platform::Own, profile)
    }

    /// As [`Self::build_cni`], for a platform.
    pub fn build_cni_for(&self, platform: &Platform, profile: Profile) -> Result<()> {
        let mut cargo = self.cargo("rustc");
        platform.prepare(&mut cargo);
        cargo.args(["--profile", profile.name(), "--target-dir"]).arg(&self.target);
        let flags =
            ["--package", "tacit-cni", "--bin", "tacit-cni", "--", "-C", "target-feature=+crt-static"];
        command::run(cargo.args(flags))
    }
}

/// The folder that holds the workspace's lock file, above one of its packages.
fn root_above(package: &Path) -> Result<PathBuf> {
    let root = package.ancestors().find(|folder| folder.join("Cargo.lock").is_file());
    root.map(Path::to_owned).with_context(|| format!("no Cargo.lock above {}", package.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_folder_is_found_from_any_package() {
        let own = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = root_above(own).expect("a workspace");
        assert_eq!(root, own.ancestors().nth(2).expect("xtask/support"));
        assert_eq!(root_above(&root.join("agent")).expect("a workspace"), root);
        assert!(root_above(Path::new("/nowhere")).is_err());
    }
}
