//! bpf-linker, built once per version and LLVM into the cache.
//!
//! It must use the LLVM major version of the compiler that writes the bitcode. The compiler's package brings the
//! shared library; a folder with one symlink is all that the linker's build wants besides, so no LLVM development
//! package (some 90 MB) is installed.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{command, progress::note, workspace::Workspace};

const VERSION: &str = "0.13.0";

/// The linker for this LLVM, from the cache or built into it.
pub(super) fn ensure(workspace: &Workspace, llvm: u32) -> Result<PathBuf> {
    let home = workspace.cache().join(format!("bpf-linker-{VERSION}-llvm{llvm}"));
    let linker = home.join("bin/bpf-linker");
    if linker.exists() {
        return Ok(linker);
    }
    note(&format!(
        "building bpf-linker {VERSION} for LLVM {llvm} into {} (about a minute, once)",
        home.display()
    ));
    // Built beside its place and moved there when complete: an interrupted build must not look like a linker.
    let partial = workspace.cache().join(format!(".bpf-linker-{}", std::process::id()));
    let built = install(workspace, llvm, &partial).and_then(|()| {
        let _ = fs::remove_dir_all(partial.join("build"));
        match fs::rename(&partial, &home) {
            // Another setup was quicker; its linker is as good.
            Err(_) if linker.exists() => Ok(()),
            moved => moved.with_context(|| format!("cannot create {}", home.display())),
        }
    });
    let _ = fs::remove_dir_all(&partial);
    built.map(|()| linker)
}

fn install(workspace: &Workspace, llvm: u32, prefix: &Path) -> Result<()> {
    let library = shared_library(llvm)?;
    let shim = prefix.join("llvm");
    fs::create_dir_all(shim.join("lib")).with_context(|| format!("cannot create {}", shim.display()))?;
    symlink(&library, shim.join("lib/libLLVM.so")).context("cannot link the LLVM library into the cache")?;
    let mut cargo = workspace.cargo("install");
    cargo
        .args(["bpf-linker", "--version", VERSION, "--locked", "--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"))
        .arg("--root")
        .arg(prefix)
        .env("LLVM_PREFIX", &shim)
        .env("CARGO_TARGET_DIR", prefix.join("build"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        cargo.env_remove(name);
    }
    command::run(&mut cargo).context("bpf-linker could not be built")
}

fn shared_library(llvm: u32) -> Result<PathBuf> {
    let folders =
        fs::read_dir("/usr/lib").context("cannot read /usr/lib")?.flatten().map(|entry| entry.path());
    let multiarch = folders.filter(|path| path.to_string_lossy().contains("-linux-gnu"));
    let mut places: Vec<PathBuf> = multiarch.collect();
    places.extend([PathBuf::from("/usr/lib64"), PathBuf::from("/usr/lib")]);
    let names = [format!("libLLVM-{llvm}.so"), format!("libLLVM.so.{llvm}.1"), format!("libLLVM.so.{llvm}")];
    places
        .iter()
        .flat_map(|place| names.iter().map(move |name| place.join(name)))
        .find(|file| file.exists())
        .with_context(|| format!("no {} in /usr/lib: install the package libllvm{llvm}", names[0]))
}
