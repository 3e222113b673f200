//! apt-get, used sparingly: package lists are fetched once at most, and only after something was not found.

use std::{
    ffi::OsStr,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{
    command::{self, find_program, stdout, succeeds},
    privilege::as_root,
    progress::note,
};

/// The apt of this machine, and the state of its lists.
pub(super) struct Apt {
    fresh: Freshness,
}

#[derive(PartialEq, Eq)]
enum Freshness {
    Unknown,
    Updated,
}

impl Apt {
    pub(super) fn new() -> Self {
        Self { fresh: Freshness::Unknown }
    }

    /// Returns true if this system has apt.
    pub(super) fn is_here() -> bool {
        find_program("apt-get").is_some()
    }

    /// Returns true if apt can install the package. Updates the lists once if it is unknown.
    pub(super) fn knows(&mut self, package: &str) -> Result<bool> {
        let known = || succeeds(Command::new("apt-cache").args(["show", package]));
        Ok(known() || (self.update()? == Freshness::Updated && known()))
    }

    /// Installs the packages without recommended ones.
    pub(super) fn install(&mut self, why: &str, packages: &[&str]) -> Result<()> {
        note(&format!("installing {} ({why})", packages.join(" ")));
        let mut install = Self::get("to install packages", &install_arguments(packages))?;
        let first = command::run(install.stdout(Stdio::null()));
        if first.is_ok() || self.fresh == Freshness::Updated {
            return first;
        }
        note("that failed; once more with fresh package lists");
        self.update()?;
        command::run(&mut Self::get("to install packages", &install_arguments(packages))?)
    }

    /// Downloads a package into `folder` without installing it; needs no root.
    pub(super) fn download(&mut self, package: &str, folder: &Path) -> Result<()> {
        let download = || {
            let mut apt = Command::new("apt-get");
            // Root's downloads would be handed to a user that cannot write into the cache; apt warns about it.
            apt.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(folder);
            command::run(apt.stdout(Stdio::null()).stdin(Stdio::null()))
        };
        let first = download();
        if first.is_ok() || self.fresh == Freshness::Updated {
            return first;
        }
        note("that failed; once more with fresh package lists");
        self.update()?;
        download().with_context(|| format!("apt-get cannot download {package}"))
    }

    /// Downloads packages of another architecture into `folder`. The system's package manager is not told of that architecture.
    pub(super) fn download_foreign<'a>(
        &mut self,
        architecture: &str,
        packages: impl IntoIterator<Item = &'a String>,
        folder: &Path,
    ) -> Result<()> {
        let own = stdout(Command::new("dpkg").arg("--print-architecture")).context("dpkg does not start")?;
        let known = [own.as_str(), architecture].map(|name| format!("APT::Architectures::={name}"));
        let options: Vec<&str> = known.iter().flat_map(|option| ["-o", option]).collect();
        note("fetching package lists");
        let update = [&options[..], &["update", "-q"]].concat();
        command::run(Self::get("to fetch package lists", &update)?.stdout(Stdio::null()))?;
        let mut apt = Command::new("apt-get");
        apt.args(options).args(["-q", "-o", "APT::Sandbox::User=root", "download"]).args(packages);
        command::run(apt.current_dir(folder).stdout(Stdio::null()).stdin(Stdio::null()))
    }

    fn update(&mut self) -> Result<Freshness> {
        if self.fresh == Freshness::Updated {
            return Ok(Freshness::Unknown);
        }
        note("fetching package lists");
        command::run(Self::get("to fetch package lists", &["update", "-q"])?.stdout(Stdio::null()))?;
        self.fresh = Freshness::Updated;
        Ok(Freshness::Updated)
    }

    fn get(why: &str, arguments: &[&str]) -> Result<Command> {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        as_root(why, &[("DEBIAN_FRONTEND".into(), "noninteractive".into())], "apt-get", &arguments)
    }
}

fn install_arguments<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    [&["install", "-y", "-q", "--no-install-recommends"], packages].concat()
}
