//! `cargo xtask image`: the container image, made without a daemon and without root.
//!
//! The image holds the release binaries of the agent and of its attack suite (`tacit doctor --attack`) and the shared
//! libraries that their loader names, and nothing else: no shell, no package manager, no certificates (Tacit trusts the mesh's own root only). The archive is an OCI layout and a
//! docker archive in one file, so that `ctr images import`, `docker load`, `podman load` and `skopeo copy oci-archive:`
//! all take it.
//!
//! Promises: the same binary and libraries give the same bytes, and so the same digest, whoever builds and whenever.

mod archive;
mod layout;
mod libraries;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{
    ebpf,
    progress::Progress,
    setup,
    workspace::{Profile, Workspace},
};

use archive::Entry;
use layout::Description;

/// Path of the agent in the image.
const PROGRAM: &str = "usr/bin/tacit";
/// Path of the attack suite in the image: beside the agent, which starts it.
const ATTACK: &str = "usr/bin/tacit-attack";
/// What the manifests in `deploy/` ask for.
pub(crate) const NAME: &str = "localhost/tacit";

/// What to make.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Name and tag of the image [default: localhost/tacit:<version>]
    #[arg(long, value_name = "NAME:TAG")]
    name: Option<String>,
    /// Write the archive here [default: target/image/tacit.tar]
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    output: Option<PathBuf>,
    /// Write the files into this folder instead of an archive, for a Containerfile's COPY
    #[arg(long, value_name = "FOLDER")]
    root: Option<PathBuf>,
}

/// A finished image.
pub(crate) struct Image {
    /// The archive.
    pub(crate) archive: PathBuf,
    /// Name and tag.
    pub(crate) name: String,
    /// Digest of the manifest, `sha256:..`.
    pub(crate) digest: String,
}

/// The command.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut progress = Progress::new(4);
    progress.step("what is needed", || setup::ensure_ebpf(workspace).map(drop))?;
    progress.step("kernel side", || ebpf::build(workspace).map(drop))?;
    progress.step("agent and attack suite (release)", || {
        workspace.build(Profile::Release, &["tacit", "tacit-attack"])
    })?;
    if let Some(root) = &options.root {
        return progress.step("files", || write_files(&contents(&programs(workspace))?, root));
    }
    let image =
        progress.step("image", || make(workspace, options.name.as_deref(), options.output.as_deref()))?;
    println!("{}\n{} {}", image.archive.display(), image.name, image.digest);
    Ok(())
}

/// Makes the archive of the release binaries, which must be there.
pub(crate) fn make(workspace: &Workspace, name: Option<&str>, output: Option<&Path>) -> Result<Image> {
    let name = name.map_or_else(default_name, str::to_owned);
    let archive = output.map_or_else(|| workspace.target().join("image/tacit.tar"), Path::to_owned);
    let entries = contents(&programs(workspace))?;
    let description = Description { name: &name, entrypoint: &[PROGRAM], version: version() };
    let digest = write(&archive, &description, &entries)?;
    Ok(Image { archive, name, digest })
}

/// Makes the archive of an image with one program that needs no libraries. `entrypoint` begins with its place there.
pub(crate) fn single(name: &str, program: &Path, entrypoint: &[&str], archive: &Path) -> Result<()> {
    let place = entrypoint.first().context("an image without an entrypoint")?;
    let entries = [Entry::program(place, program)?];
    write(archive, &Description { name, entrypoint, version: version() }, &entries).map(drop)
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
pub(crate) fn default_name() -> String {
    format!("{NAME}:{}", version())
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// The release binaries, by their paths in the image.
fn programs(workspace: &Workspace) -> [(&'static str, PathBuf); 2] {
    [(PROGRAM, workspace.agent(Profile::Release)), (ATTACK, workspace.attack(Profile::Release))]
}

/// Everything in the image: the programs, and each library at the place where the loader looks for it.
fn contents(programs: &[(&str, PathBuf)]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (place, program) in programs {
        entries.push(Entry::program(place, program)?);
        for library in libraries::of(program)? {
            let place = library.strip_prefix("/").context("a library without an absolute path")?;
            let place = place.to_str().context("a library whose path is no text")?;
            entries.push(Entry::program(place, &library)?);
        }
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    // Both programs need the C library.
    entries.dedup_by(|a, b| a.path == b.path);
    Ok(entries)
}

fn write_files(entries: &[Entry], root: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    ensure!(
        fs::read_dir(root).map_or(true, |mut found| found.next().is_none()),
        "{} is not empty: name a new folder",
        root.display()
    );
    for entry in entries {
        let file = root.join(&entry.path);
        let failed = || format!("cannot write {}", file.display());
        fs::create_dir_all(file.parent().unwrap_or(root)).with_context(failed)?;
        fs::write(&file, &entry.bytes).with_context(failed)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(archive::PROGRAM_MODE)).with_context(failed)?;
    }
    Ok(())
}
