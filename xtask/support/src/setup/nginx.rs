//! nginx without its service: Debian's package would enable and start one, so it is unpacked into the cache instead
//! of being installed, and only the libraries it links to are installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt::Apt;
use crate::{
    command::{self, find_program, stdout, succeeds},
    progress::note,
    workspace::Workspace,
};

/// Packages that have had `/usr/sbin/nginx` in one release or another; the first is a metapackage in older ones.
const PACKAGES: [&str; 3] = ["nginx", "nginx-core", "nginx-light"];

/// The program: the system's when there is one, else from the cache.
pub(super) fn ensure(workspace: &Workspace, apt: &mut Apt) -> Result<PathBuf> {
    if let Some(installed) = find_program("nginx") {
        return Ok(installed);
    }
    if let Some(cached) = cached(workspace.cache()).filter(|nginx| starts(nginx)) {
        return Ok(cached);
    }
    if !Apt::is_here() {
        bail!("install the program nginx; its service is not needed");
    }
    let folder = workspace.cache().join(format!(".nginx-{}", std::process::id()));
    let unpacked = unpack(workspace.cache(), &folder, apt);
    let _ = fs::remove_dir_all(&folder);
    let nginx = unpacked?;
    if !starts(&nginx) {
        bail!("{} does not start: run it to see which library is missing", nginx.display());
    }
    Ok(nginx)
}

fn starts(nginx: &Path) -> bool {
    succeeds(Command::new(nginx).arg("-v"))
}

fn cached(cache: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(cache).ok()?.flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("nginx-"));
    named.map(|entry| entry.path().join("usr/sbin/nginx")).filter(|program| program.exists()).max()
}

fn unpack(cache: &Path, folder: &Path, apt: &mut Apt) -> Result<PathBuf> {
    for package in PACKAGES {
        note(&format!("fetching {package} into the cache (unpacked there, not installed)"));
        let root = folder.join(package);
        fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
        apt.download(package, folder)?;
        let archive = archive_of(folder, package)?;
        command::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&root))?;
        if !root.join("usr/sbin/nginx").exists() {
            continue;
        }
        let field = |name: &str| stdout(Command::new("dpkg-deb").arg("-f").arg(&archive).arg(name));
        let depends = field("Depends").context("dpkg-deb cannot read the package of nginx")?;
        let version = field("Version").context("dpkg-deb cannot read the package of nginx")?;
        install_libraries(apt, &libraries(&depends))?;
        let home = cache.join(format!("nginx-{version}"));
        if !home.exists() {
            fs::rename(&root, &home).with_context(|| format!("cannot create {}", home.display()))?;
        }
        return Ok(home.join("usr/sbin/nginx"));
    }
    bail!("none of the packages {} has /usr/sbin/nginx", PACKAGES.join(", "))
}

fn archive_of(folder: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?.flatten();
    let mut archives = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let found = archives.next().with_context(|| format!("apt-get downloaded no {package}"))?;
    Ok(found.path())
}

fn install_libraries(apt: &mut Apt, libraries: &[&str]) -> Result<()> {
    let installed = |package: &str| {
        let mut query = Command::new("dpkg-query");
        query.args(["-W", "-f", "${db:Status-Status}", package]);
        stdout(&mut query).is_some_and(|status| status.starts_with("installed"))
    };
    let missing: Vec<&str> = libraries.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() { Ok(()) } else { apt.install("libraries of nginx", &missing) }
}

/// The libraries among a package's dependencies: first alternatives, without versions.
fn libraries(depends: &str) -> Vec<&str> {
    let names = depends.split(',').filter_map(|entry| entry.split(['|', '(']).next()).map(str::trim);
    names.filter(|name| name.starts_with("lib") || name.starts_with("zlib")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_libraries_are_installed_never_what_brings_the_service() {
        let depends = "libc6 (>= 2.34), libcrypt1 (>= 1:4.1.0), libpcre2-8-0 (>= 10.22), zlib1g (>= 1:1.1.4), \
                       iproute2, nginx-common (<< 1.22.1-9.1~), libssl3t64 | libssl3";
        assert_eq!(libraries(depends), ["libc6", "libcrypt1", "libpcre2-8-0", "zlib1g", "libssl3t64"]);
    }
}
