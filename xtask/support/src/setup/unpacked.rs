//! Servers without their services: Debian's packages would enable and start one, so they are unpacked into the cache instead
//! of being installed, and only the libraries that they link to are installed.

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

/// A server, and how releases of Debian divide it into packages.
pub(super) struct Server {
    program: &'static str,
    /// The option that prints the version.
    version: &'static str,
    /// One entry for each way. The first one that has the program is used.
    ways: &'static [Way],
}

/// Packages that are unpacked together, and the folder of the program in them.
struct Way {
    packages: &'static [&'static str],
    folder: &'static str,
}

/// `nginx` is a metapackage in older releases.
pub(super) const NGINX: Server = Server {
    program: "nginx",
    version: "-v",
    ways: &[
        Way { packages: &["nginx"], folder: "usr/sbin" },
        Way { packages: &["nginx-core"], folder: "usr/sbin" },
        Way { packages: &["nginx-light"], folder: "usr/sbin" },
    ],
};

pub(super) const HAPROXY: Server =
    Server { program: "haproxy", version: "-v", ways: &[Way { packages: &["haproxy"], folder: "usr/sbin" }] };

/// The server is a link to a program of the tools.
pub(super) const REDIS: Server = Server {
    program: "redis-server",
    version: "--version",
    ways: &[Way { packages: &["redis-server", "redis-tools"], folder: "usr/bin" }],
};

/// With psql and pgbench. The packages of a release are named after the version that it has.
pub(super) const POSTGRES: Server = Server {
    program: "postgres",
    version: "--version",
    ways: &[
        Way { packages: &["postgresql-15", "postgresql-client-15"], folder: "usr/lib/postgresql/15/bin" },
        Way { packages: &["postgresql-17", "postgresql-client-17"], folder: "usr/lib/postgresql/17/bin" },
        Way { packages: &["postgresql-18", "postgresql-client-18"], folder: "usr/lib/postgresql/18/bin" },
    ],
};

/// Libraries of plug-ins that are not used: LLVM, for PostgreSQL's compiler, has 110 MB.
const UNUSED_LIBRARIES: [&str; 1] = ["libllvm"];

/// The program: the system's when there is one, else from the cache.
pub(super) fn ensure(server: &Server, workspace: &Workspace, apt: &mut Apt) -> Result<PathBuf> {
    let name = server.program;
    if let Some(installed) = find_program(name) {
        return Ok(installed);
    }
    if let Some(cached) = server.cached(workspace.cache()).filter(|program| server.starts(program)) {
        return Ok(cached);
    }
    if !Apt::is_here() {
        bail!("install the program {name}; its service is not needed");
    }
    let folder = workspace.cache().join(format!(".{name}-{}", std::process::id()));
    let unpacked = server.unpack(workspace.cache(), &folder, apt);
    let _ = fs::remove_dir_all(&folder);
    let program = unpacked?;
    if !server.starts(&program) {
        bail!("{} does not start: run it to see which library is missing", program.display());
    }
    Ok(program)
}

impl Server {
    fn starts(&self, program: &Path) -> bool {
        succeeds(Command::new(program).arg(self.version))
    }

    fn cached(&self, cache: &Path) -> Option<PathBuf> {
        let prefix = format!("{}-", self.program);
        let entries = fs::read_dir(cache).ok()?.flatten();
        let roots = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        let programs = roots.flat_map(|root| {
            self.ways.iter().map(move |way| root.path().join(way.folder).join(self.program))
        });
        programs.filter(|program| program.exists()).max()
    }

    fn unpack(&self, cache: &Path, folder: &Path, apt: &mut Apt) -> Result<PathBuf> {
        for way in self.ways {
            // A release may not have the packages of another one. One that is the only way is fetched whatever apt knows.
            if self.ways.len() > 1 && !apt.knows(way.packages[0])? {
                continue;
            }
            let root = folder.join(way.packages[0]);
            let (depends, version) = fetch(way.packages, folder, &root, apt)?;
            if !root.join(way.folder).join(self.program).exists() {
                continue;
            }
            install_libraries(self.program, apt, &libraries(&depends))?;
            // Folders of PATH have no colon, which ends an epoch.
            let version = version.rsplit(':').next().unwrap_or(&version);
            let home = cache.join(format!("{}-{version}", self.program));
            if !home.exists() {
                fs::rename(&root, &home).with_context(|| format!("cannot create {}", home.display()))?;
            }
            return Ok(home.join(way.folder).join(self.program));
        }
        let packages: Vec<&str> = self.ways.iter().map(|way| way.packages[0]).collect();
        bail!("none of the packages {} has {}", packages.join(", "), self.program)
    }
}

/// Unpacks the packages into `root`. Returns what all of them depend on, and the version of the first.
fn fetch(packages: &[&str], folder: &Path, root: &Path, apt: &mut Apt) -> Result<(String, String)> {
    note(&format!("fetching {} into the cache (unpacked there, not installed)", packages.join(" ")));
    fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    let (mut depends, mut version) = (Vec::new(), None);
    for package in packages {
        apt.download(package, folder)?;
        let archive = archive_of(folder, package)?;
        command::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(root))?;
        let field = |name: &str| {
            let value = stdout(Command::new("dpkg-deb").arg("-f").arg(&archive).arg(name));
            value.with_context(|| format!("dpkg-deb cannot read the package {package}"))
        };
        depends.push(field("Depends")?);
        version.get_or_insert(field("Version")?);
    }
    Ok((depends.join(", "), version.context("no packages")?))
}

fn archive_of(folder: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?.flatten();
    let mut archives = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let found = archives.next().with_context(|| format!("apt-get downloaded no {package}"))?;
    Ok(found.path())
}

fn install_libraries(program: &str, apt: &mut Apt, libraries: &[&str]) -> Result<()> {
    let installed = |package: &str| {
        let mut query = Command::new("dpkg-query");
        query.args(["-W", "-f", "${db:Status-Status}", package]);
        stdout(&mut query).is_some_and(|status| status.starts_with("installed"))
    };
    let missing: Vec<&str> = libraries.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() { Ok(()) } else { apt.install(&format!("libraries of {program}"), &missing) }
}

/// The libraries among a package's dependencies: first alternatives, without versions.
fn libraries(depends: &str) -> Vec<&str> {
    let names = depends.split(',').filter_map(|entry| entry.split(['|', '(']).next()).map(str::trim);
    let is_used = |name: &&str| !UNUSED_LIBRARIES.iter().any(|unused| name.starts_with(unused));
    names.filter(|name| name.starts_with("lib") || name.starts_with("zlib")).filter(is_used).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_libraries_are_installed_never_what_brings_the_service() {
        let depends = "libc6 (>= 2.34), libcrypt1 (>= 1:4.1.0), libpcre2-8-0 (>= 10.22), zlib1g (>= 1:1.1.4), \
                       iproute2, nginx-common (<< 1.22.1-9.1~), libssl3t64 | libssl3, libllvm14";
        assert_eq!(libraries(depends), ["libc6", "libcrypt1", "libpcre2-8-0", "zlib1g", "libssl3t64"]);
    }
}
