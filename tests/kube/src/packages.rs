//! The programs of a cluster: Kubernetes 1.20 built from Debian's source package with Debian's Go, and etcd, containerd,
//! runc and the CNI plugins as Debian packages have them. Nothing is installed; all of it stands in the cache.
//!
//! 1.20 is what Debian has. It is the oldest server that the manifests are meant for; newer ones are not tested here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{
    command::run,
    debian::{Apt, Packages},
    progress::note,
    workspace::Workspace,
};

const SUITES: [&str; 2] = ["bookworm", "bookworm-security"];
const SOURCE: &str = "kubernetes";
const BUILD: &str = include_str!("build.sh");

/// Go and what replaces a vendored package that Go 1.18 and later crash in; and what is used as it is.
const PACKAGES: [&str; 8] = [
    "golang-1.19-go",
    "golang-1.19-src",
    "golang-github-modern-go-reflect2-dev",
    "containerd",
    "runc",
    "containernetworking-plugins",
    "etcd-server",
    "busybox-static",
];

/// Programs that packages have, by their place there.
const PROGRAMS: [&str; 6] = [
    "usr/bin/containerd",
    "usr/bin/containerd-shim-runc-v2",
    "usr/bin/ctr",
    "usr/bin/etcd",
    "usr/sbin/runc",
    "bin/busybox",
];
const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// Folders with everything a cluster runs.
pub(super) struct Programs {
    /// Kubernetes, etcd, containerd, runc, busybox.
    pub(super) bin: PathBuf,
    /// CNI plugins.
    pub(super) cni: PathBuf,
}

impl Programs {
    fn of(folder: &Path) -> Self {
        Self { bin: folder.join("bin"), cni: folder.join("cni") }
    }
}

/// Fetches and builds what is not in the cache: some 150 MB, and 5 to 15 minutes on two cores.
pub(super) fn ensure(workspace: &Workspace) -> Result<Programs> {
    // Cached programs are used as they are. Remove the cache for a newer version.
    if let Some(found) = cached(workspace.cache()) {
        return Ok(Programs::of(&found));
    }
    fs::create_dir_all(workspace.cache()).context("cannot create the cache")?;
    let work = workspace.cache().join(format!(".kubernetes-{}", std::process::id()));
    let made = make(workspace.cache(), &work);
    // Go marks what it unpacks as read-only for nobody; a plain removal does.
    let _ = fs::remove_dir_all(&work);
    made.map(|folder| Programs::of(&folder))
}

fn cached(cache: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(cache).ok()?.flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("kubernetes-"));
    named.map(|entry| entry.path()).filter(|folder| folder.join("bin/kubelet").is_file()).max()
}

fn make(cache: &Path, work: &Path) -> Result<PathBuf> {
    note("fetching Kubernetes' source and packages from Debian's archive");
    let debs = work.join("debs");
    let root = work.join("root");
    let tree = work.join("gopath/src/k8s.io/kubernetes");
    for folder in [&debs, &root, &tree] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let apt = Apt::new(&work.join("apt"), Packages::BinaryAndSource, &SUITES)?;
    let get = |arguments: &[&str]| {
        let mut get = apt.command("apt-get");
        run(get.arg("-qq").args(arguments).current_dir(&debs).stdin(Stdio::null()).stdout(Stdio::null()))
    };
    get(&["update"])?;
    get(&[&["download"], PACKAGES.as_slice()].concat())?;
    get(&["source", "--download-only", SOURCE])?;
    for deb in found(&debs, "_amd64.deb")?.iter().chain(&found(&debs, "_all.deb")?) {
        run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&root))?;
    }
    let description = only(&debs, ".dsc")?;
    let version =
        version(&fs::read_to_string(&description)?).context("a source package without a version")?;
    unpack_source(&debs, &root, &tree)?;
    let folder = work.join("kubernetes");
    note(&format!("building Kubernetes {version}; it is kept in the cache"));
    run(Command::new("bash").args(["-c", BUILD, "build"]).arg(work).arg(folder.join("bin")))?;
    gather(&root, &folder)?;
    let home = cache.join(format!("kubernetes-{version}"));
    fs::rename(&folder, &home).with_context(|| format!("cannot create {}", home.display()))?;
    Ok(home)
}

/// The upstream source, Debian's patches, and the newer reflect2.
fn unpack_source(debs: &Path, root: &Path, tree: &Path) -> Result<()> {
    let unpack = |archive: PathBuf, strip: &str| {
        run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(tree).arg(strip))
    };
    unpack(only(debs, ".orig.tar.gz")?, "--strip-components=1")?;
    unpack(only(debs, ".debian.tar.xz")?, "--strip-components=0")?;
    let series =
        fs::read_to_string(tree.join("debian/patches/series")).context("Debian's list of patches")?;
    for patch in series.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let file = fs::File::open(tree.join("debian/patches").join(patch))?;
        run(Command::new("patch").args(["-p1", "-s"]).current_dir(tree).stdin(file))
            .with_context(|| format!("Debian's patch {patch}"))?;
    }
    let reflect = "src/github.com/modern-go/reflect2";
    let (newer, vendored) =
        (root.join("usr/share/gocode").join(reflect), tree.join("vendor/github.com/modern-go/reflect2"));
    let is_code = |file: &Path| file.extension().is_some_and(|e| e == "go" || e == "s");
    for old in files(&vendored)?.into_iter().filter(|file| is_code(file)) {
        fs::remove_file(old)?;
    }
    for new in files(&newer)?.into_iter().filter(|file| is_code(file)) {
        let name = new.file_name().context("a file without a name")?;
        if !name.to_string_lossy().ends_with("_test.go") {
            fs::copy(&new, vendored.join(name))?;
        }
    }
    Ok(())
}

fn gather(root: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder.join("cni"))?;
    let plugins = PLUGINS.map(|plugin| (format!("usr/lib/cni/{plugin}"), "cni"));
    let programs = PROGRAMS.map(|program| (program.to_owned(), "bin"));
    for (from, to) in plugins.into_iter().chain(programs) {
        let from = root.join(from);
        let name = from.file_name().context("a program without a name")?.to_owned();
        fs::copy(&from, folder.join(to).join(name)).with_context(|| format!("no {}", from.display()))?;
    }
    Ok(())
}

fn version(description: &str) -> Option<String> {
    description.lines().find_map(|line| line.strip_prefix("Version: ")).map(str::to_owned)
}

fn only(folder: &Path, suffix: &str) -> Result<PathBuf> {
    let mut all = found(folder, suffix)?;
    ensure!(all.len() == 1, "{} files *{suffix} were downloaded, not 1", all.len());
    all.pop().context("one file")
}

fn found(folder: &Path, suffix: &str) -> Result<Vec<PathBuf>> {
    Ok(files(folder)?.into_iter().filter(|file| file.to_string_lossy().ends_with(suffix)).collect())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_source_packages() {
        let description = "Format: 3.0 (quilt)\nSource: kubernetes\nVersion: 1.20.5+really1.20.2-1.1\n";
        assert_eq!(version(description).as_deref(), Some("1.20.5+really1.20.2-1.1"));
    }
}
