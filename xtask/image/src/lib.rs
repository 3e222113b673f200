//! Container images, made without a daemon and without root: for `cargo xtask image` and for clusters of tests.
//!
//! The image holds the release binaries of the agent, of its attack suite (`tacit doctor --attack`) and of the CNI plugin, and the
//! shared libraries that their loader names, and nothing else: no shell, no package manager, no certificates (Tacit trusts the mesh's own root only). The archive is an OCI layout and a
//! docker archive in one file, so that `ctr images import`, `docker load`, `podman load` and `skopeo copy oci-archive:`
//! all take it.
//!
//! Promises: the same binary and libraries give the same bytes, and so the same digest, whoever builds and whenever.

#![forbid(unsafe_code)]

mod archive;
mod layout;
mod libraries;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{
    platform::Platform,
    workspace::{Profile, Workspace},
};

use archive::Entry;
use layout::Description;

/// Path of the agent in the image.
const PROGRAM: &str = "usr/bin/tacit";
/// Path of the attack suite in the image: beside the agent, which starts it.
const ATTACK: &str = "usr/bin/tacit-attack";
/// Path of the CNI plugin in the image: beside the agent, which copies it to the node.
const CNI: &str = "usr/bin/tacit-cni";
/// The image name in the manifests of `deploy/`.
const NAME: &str = "localhost/tacit";

/// A finished image.
pub struct Image {
    /// The archive.
    pub archive: PathBuf,
    /// Name and tag.
    pub name: String,
    /// Digest of the manifest, `sha256:..`.
    pub digest: String,
}

/// Makes the archive of the release binaries of a platform, which must be there.
pub fn make(
    workspace: &Workspace,
    platform: &Platform,
    name: Option<&str>,
    output: Option<&Path>,
) -> Result<Image> {
    let name = name.map_or_else(default_name, str::to_owned);
    let archive =
        output.map_or_else(|| platform.folder(workspace.target()).join("image/tacit.tar"), Path::to_owned);
    let entries = contents(platform, &programs(workspace, platform))?;
    let architecture = platform.architecture();
    let description = Description { name: &name, entrypoint: &[PROGRAM], version: version(), architecture };
    let digest = write(&archive, &description, &entries)?;
    Ok(Image { archive, name, digest })
}

/// Makes the archive of an image with one program that needs no libraries. `entrypoint` begins with its place there.
pub fn single(name: &str, program: &Path, entrypoint: &[&str], archive: &Path) -> Result<()> {
    let place = entrypoint.first().context("an image without an entrypoint")?;
    let entries = [Entry::program(place, program)?];
    let architecture = Platform::Own.architecture();
    write(archive, &Description { name, entrypoint, version: version(), architecture }, &entries).map(drop)
}

fn write(archive: &Path, description: &Description<'_>, entries: &[Entry]) -> Result<String> {
    let (bytes, digest) = layout::archive(description, entries)?;
    if let Some(folder) = archive.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(archive, bytes).with_context(|| format!("cannot write {}", archive.display()))?;
    Ok(digest)
}

/// The name that the manifests in `deploy/` use.
pub fn default_name() -> String {
    format!("{NAME}:{}", version())
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// The release binaries, by their paths in the image.
fn programs(workspace: &Workspace, platform: &Platform) -> [(&'static str, PathBuf); 3] {
    let built = |name| workspace.program_of(platform, Profile::Release, name);
    [(PROGRAM, built("tacit")), (ATTACK, built("tacit-attack")), (CNI, built("tacit-cni"))]
}

/// Everything in the image: the programs, and each library at the place where the loader looks for it.
fn contents(platform: &Platform, programs: &[(&str, PathBuf)]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (place, program) in programs {
        entries.push(Entry::program(place, program)?);
        let libraries = libraries::of(platform, program)?;
        // It runs on the node, which may have another C library or none.
        ensure!(
            *place != CNI || libraries.is_empty(),
            "{} needs {libraries:?}: link it statically",
            program.display()
        );
        for library in libraries {
            let place = library.strip_prefix("/").context("a library without an absolute path")?;
            let place = place.to_str().context("a library whose path is no text")?;
            entries.push(Entry::program(place, &platform.file(&library))?);
        }
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    // Both programs need the C library.
    entries.dedup_by(|a, b| a.path == b.path);
    Ok(entries)
}

/// Writes the files of the image into a new or empty folder; the release binaries must be there.
///
/// # Errors
/// When the folder is not empty, or a file cannot be read or written.
pub fn write_files(workspace: &Workspace, platform: &Platform, root: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    ensure!(
        fs::read_dir(root).map_or(true, |mut found| found.next().is_none()),
        "{} is not empty: name a new folder",
        root.display()
    );
    for entry in contents(platform, &programs(workspace, platform))? {
        let file = root.join(&entry.path);
        let failed = || format!("cannot write {}", file.display());
        fs::create_dir_all(file.parent().unwrap_or(root)).with_context(failed)?;
        fs::write(&file, &entry.bytes).with_context(failed)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(archive::PROGRAM_MODE)).with_context(failed)?;
    }
    Ok(())
}
