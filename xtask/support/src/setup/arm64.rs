//! The parts of a build for arm64 on another machine.
//!
//! The compiler is the distribution's, since its standard library for arm64 is a package of the same version. The packages are
//! unpacked into the cache, with the C library that the image needs.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{apt::Apt, programs};
use crate::{
    command::{self, stdout},
    platform::{ARM64, ARM64_CC, ARM64_EMULATOR, ARM64_LOADER, CrossTools},
    progress::note,
    workspace::Workspace,
};

/// The distribution's compiler. Rustup's has no standard library for another target unless its user adds one.
const RUSTC: &str = "/usr/bin/rustc";
/// The package of that compiler, and of its standard library.
const COMPILER: &str = "rustc-web";
const STANDARD_LIBRARY: &str = "libstd-rust-web-dev";
/// What programs need to run, with security updates; the cross compiler's own copies lag behind.
const LIBRARIES: [&str; 2] = ["libc6", "libgcc-s1"];

/// Installs the cross compiler and the emulator, and unpacks the target's libraries.
pub(super) fn ensure(workspace: &Workspace) -> Result<CrossTools> {
    let mut apt = Apt::new();
    programs::ensure_arm64(&mut apt)?;
    if !Apt::is_here() {
        bail!(
            "a build for {ARM64} takes the standard library from Debian's packages, and this system has no apt-get"
        );
    }
    if !Path::new(RUSTC).exists() {
        apt.install("compiler for arm64", &[COMPILER])?;
    }
    let version = stdout(Command::new("dpkg-query").args(["-W", "-f", "${Version}", COMPILER]));
    let version = version
        .filter(|version| !version.is_empty())
        .with_context(|| format!("{RUSTC} is not of {COMPILER}"))?;
    let root = workspace.cache().join(format!("arm64-{}", version.replace([':', '~'], "-")));
    if !root.exists() {
        let folder = workspace.cache().join(format!(".arm64-{}", std::process::id()));
        let unpacked = unpack(&mut apt, &version, &folder);
        let moved = unpacked.and_then(|from| {
            fs::rename(from, &root).with_context(|| format!("cannot create {}", root.display()))
        });
        let _ = fs::remove_dir_all(&folder);
        moved?;
    }
    let loader = root.join(ARM64_LOADER);
    ensure!(loader.exists(), "{} is missing: remove {} and try again", loader.display(), root.display());
    Ok(CrossTools { rustc: RUSTC.into(), root })
}

/// Unpacks the packages below `folder`; returns the root of their files.
fn unpack(apt: &mut Apt, version: &str, folder: &Path) -> Result<PathBuf> {
    note(&format!(
        "fetching libraries for arm64 into the cache (unpacked there, not installed): {STANDARD_LIBRARY}"
    ));
    let root = folder.join("root");
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    let standard_library = format!("{STANDARD_LIBRARY}:arm64={version}");
    let libraries = LIBRARIES.map(|package| format!("{package}:arm64"));
    apt.download_foreign("arm64", libraries.iter().chain([&standard_library]), folder)?;
    let archives =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?.flatten();
    for archive in
        archives.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "deb"))
    {
        command::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&root))?;
    }
    // Newer releases have `lib` in `usr` alone, and the link in another package.
    let lib = root.join("lib");
    if !lib.exists() {
        symlink("usr/lib", &lib).with_context(|| format!("cannot create {}", lib.display()))?;
    }
    let standard_library = root.join("usr/lib/rustlib").join(ARM64).join("lib");
    ensure!(
        standard_library.is_dir(),
        "the package {STANDARD_LIBRARY} has no {}",
        standard_library.display()
    );
    Ok(root)
}

/// Programs of a cross build, and their packages.
pub(super) const PROGRAMS: [(&str, &str); 2] = [
    // With the C library's headers and static archive, which the CNI plugin is linked to.
    (ARM64_CC, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
    (ARM64_EMULATOR, "qemu-user-static"),
];
