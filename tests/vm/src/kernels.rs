//! Debian's kernels, fetched and unpacked into the cache, never installed.
//!
//! Only the four suites that have these kernels are looked at.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use xtask_support::{
    command::{run, stdout},
    debian::Apt,
    progress::note,
    workspace::Workspace,
};

/// A kernel of the matrix.
pub(super) struct Kernel {
    /// Its name on the command line.
    pub(super) label: &'static str,
    suite: &'static str,
    /// The expected behaviour of the agent on it.
    pub(super) expected: Expected,
}

/// The expected result on a kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// Every test passes.
    Supported,
    /// The agent refuses to start, says why and leaves nothing.
    Refused,
}

/// The matrix, oldest first.
pub(super) const MATRIX: [Kernel; 4] = [
    Kernel { label: "5.10", suite: "bullseye-security", expected: Expected::Refused },
    Kernel { label: "6.1", suite: "bookworm-security", expected: Expected::Supported },
    Kernel { label: "6.12", suite: "trixie-security", expected: Expected::Supported },
    Kernel { label: "newest", suite: "trixie-backports", expected: Expected::Supported },
];

const META: &str = "linux-image-cloud-amd64";

/// An unpacked kernel.
pub(super) struct Unpacked {
    /// Folder with `vmlinuz` and `lib/modules/<release>`.
    pub(super) folder: PathBuf,
    /// `uname -r`.
    pub(super) release: String,
}

/// Fetches what is not in the cache.
pub(super) fn ensure(workspace: &Workspace, kernels: &[&Kernel]) -> Result<Vec<Unpacked>> {
    let home = workspace.cache().join("kernels");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let suites = MATRIX.map(|kernel| kernel.suite);
    let archive = Archive(Apt::new(&home.join("apt"), &suites)?);
    kernels.iter().map(|kernel| archive.kernel(&home, kernel)).collect()
}

/// Debian's archive, asked for kernels.
struct Archive(Apt);

impl Archive {
    fn kernel(&self, home: &Path, kernel: &Kernel) -> Result<Unpacked> {
        // A kernel that is there is used as it is: a newer one comes when the cache is removed.
        if let Some(found) = unpacked(home, kernel.label) {
            return Ok(found);
        }
        note(&format!("fetching Debian's kernel {} ({})", kernel.label, kernel.suite));
        run(self.0.command("apt-get").args(["-qq", "update"]))?;
        let image = self.image(kernel)?;
        let work = home.join(format!(".{}-{}", kernel.label, std::process::id()));
        let result = self.unpack(&work, &image).and_then(|release| {
            let folder = home.join(format!("{}-{release}", kernel.label));
            fs::rename(work.join("kernel"), &folder).context("cannot put the kernel into the cache")?;
            Ok(Unpacked { folder, release })
        });
        let _ = fs::remove_dir_all(&work);
        result
    }

    /// The image that the suite's metapackage depends on.
    fn image(&self, kernel: &Kernel) -> Result<String> {
        let versions =
            stdout(self.0.command("apt-cache").args(["madison", META])).context("apt-cache madison")?;
        let in_suite =
            |line: &&str| line.split('|').nth(2).is_some_and(|s| s.contains(&format!("{}/", kernel.suite)));
        let line = versions.lines().find(in_suite);
        let version = line.and_then(|l| l.split('|').nth(1)).map(str::trim);
        let version = version.with_context(|| format!("the mirror has no {META} in {}", kernel.suite))?;
        let shown = stdout(self.0.command("apt-cache").args(["show", &format!("{META}={version}")]));
        let depends = dependencies(&shown.context("apt-cache show")?);
        let image = depends.into_iter().find(|name| name.starts_with("linux-image-"));
        image.with_context(|| format!("{META} {version} depends on no image"))
    }

    /// Newer images keep kernel and modules in packages of their own.
    fn unpack(&self, work: &Path, image: &str) -> Result<String> {
        let debs = work.join("debs");
        let root = work.join("root");
        fs::create_dir_all(&debs)?;
        fs::create_dir_all(&root)?;
        let shown = stdout(self.0.command("apt-cache").args(["show", image])).context("apt-cache show")?;
        let parts = dependencies(&shown).into_iter().filter(|name| {
            let is_part =
                ["linux-binary-", "linux-modules-", "linux-base-"].iter().any(|p| name.starts_with(p));
            is_part && stdout(self.0.command("apt-cache").args(["show", name])).is_some_and(|s| !s.is_empty())
        });
        run(self.0.command("apt-get").args(["-qq", "download", image]).args(parts).current_dir(&debs))?;
        for deb in fs::read_dir(&debs)?.flatten() {
            run(Command::new("dpkg-deb").arg("-x").arg(deb.path()).arg(&root))?;
        }
        gather(&root, &work.join("kernel"))
    }
}

/// Brings `vmlinuz` and modules, wherever the packages have them, into one layout; returns the release.
fn gather(root: &Path, kernel: &Path) -> Result<String> {
    let homes = [root.join("usr/lib/modules"), root.join("lib/modules")];
    let modules = homes.iter().filter_map(|home| fs::read_dir(home).ok()).flat_map(|d| d.flatten()).next();
    let modules = modules.context("the packages have no modules")?.path();
    let release =
        modules.file_name().and_then(|n| n.to_str()).context("a release that is no text")?.to_owned();
    fs::create_dir_all(kernel.join("lib/modules"))?;
    let images = [modules.join("vmlinuz"), root.join(format!("boot/vmlinuz-{release}"))];
    let Some(image) = images.iter().find(|file| file.is_file()) else {
        bail!("the packages of {release} have no vmlinuz");
    };
    fs::rename(image, kernel.join("vmlinuz"))?;
    fs::rename(&modules, kernel.join("lib/modules").join(&release))?;
    run(Command::new("/sbin/depmod").arg("-b").arg(kernel).arg(&release))?;
    Ok(release)
}

fn unpacked(home: &Path, label: &str) -> Option<Unpacked> {
    let prefix = format!("{label}-");
    let entries = fs::read_dir(home).ok()?.flatten();
    let mut found: Vec<Unpacked> = entries
        .filter_map(|entry| {
            let release = entry.file_name().to_str()?.strip_prefix(&prefix)?.to_owned();
            Some(Unpacked { folder: entry.path(), release })
        })
        .filter(|u| u.folder.join("vmlinuz").is_file())
        .collect();
    found.sort_by(|a, b| a.release.cmp(&b.release));
    found.pop()
}

/// Names in the first `Depends` field of a package's record.
fn dependencies(record: &str) -> Vec<String> {
    let field = record.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let names = field.split(',').filter_map(|entry| entry.split(['(', '|']).next());
    names.map(|name| name.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_without_versions_and_alternatives() {
        let record = "Package: x\nDepends: linux-image-6.1.0-1 (= 1), kmod | busybox, linux-base\n";
        assert_eq!(dependencies(record), ["linux-image-6.1.0-1", "kmod", "linux-base"]);
    }
}
