//! `cargo xtask setup`: what building, testing and the demo need, installed when absent.
//!
//! Promises: when everything is there it only looks (a few file checks and short processes); no service is ever
//! started or enabled, since only packages without one are installed, and servers are unpacked into the cache instead of
//! being installed; root is asked for one announced command at a time.
//!
//! Debian and its kin are set up automatically. Elsewhere the error names what to install.

mod apt;
mod arm64;
mod linker;
mod programs;
pub mod toolchain;
mod unpacked;

use std::{env, ffi::OsString, fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    platform::CrossTools,
    progress::{Style, Tone, note},
    workspace::Workspace,
};
use apt::Apt;
use toolchain::Toolchain;

/// The tools that build `ebpf`.
pub struct EbpfTools {
    /// The compiler that has a `core` for the BPF target.
    pub toolchain: Toolchain,
    /// A bpf-linker that uses the same LLVM major version as the compiler.
    pub linker: PathBuf,
}

/// The real program that the demo and the bench run in pods, and that is not always on `PATH`.
pub struct Programs {
    /// nginx: the system's, or the one in the cache.
    pub nginx: PathBuf,
}

/// The real programs that tests run in pods, and that are not always on `PATH`: the system's, or those in the cache.
pub struct TestPrograms(Vec<PathBuf>);

impl TestPrograms {
    /// Returns the folders of the programs, as in `PATH`. Programs of one package are in one folder.
    pub fn path(&self) -> Result<OsString> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for program in &self.0 {
            // The system's may be a link to a folder that has its other programs.
            let file = fs::canonicalize(program);
            let file = file.with_context(|| format!("cannot find {}", program.display()))?;
            for file in [program, &file] {
                folders.extend(file.parent().map(PathBuf::from));
            }
        }
        env::join_paths(folders).context("a folder of programs has a colon in its path")
    }
}

/// The command: everything, and a summary of what is used.
pub fn run(workspace: &Workspace) -> Result<()> {
    let ebpf = ensure_ebpf(workspace)?;
    let programs = ensure_test_programs(workspace)?;
    let style = Style::of_stderr();
    eprintln!("{}", style.paint(Tone::Good, "everything is in place"));
    note(&format!("compiler for the kernel side: {}", ebpf.toolchain));
    note(&format!("bpf-linker: {}", ebpf.linker.display()));
    for program in &programs.0 {
        note(&program.display().to_string());
    }
    for missing in toolchain::missing_components() {
        eprintln!("{}", style.paint(Tone::Warning, &toolchain::remedy(missing)));
    }
    Ok(())
}

/// Everything, quietly when nothing is missing.
pub fn ensure_all(workspace: &Workspace) -> Result<Programs> {
    ensure_ebpf(workspace)?;
    ensure_programs(workspace)
}

/// As [`ensure_all`], with all programs of the tests.
pub fn ensure_tests(workspace: &Workspace) -> Result<TestPrograms> {
    ensure_ebpf(workspace)?;
    ensure_test_programs(workspace)
}

/// Compiler and linker of the kernel side.
pub fn ensure_ebpf(workspace: &Workspace) -> Result<EbpfTools> {
    let toolchain = toolchain::ensure(&mut Apt::new())?;
    let linker = match &toolchain {
        Toolchain::Distribution { llvm, .. } => linker::ensure(workspace, *llvm)?,
        // Its LLVM is not a system library; `toolchain::ensure` took this toolchain because the linker is on PATH.
        Toolchain::Rustup { .. } => PathBuf::from("bpf-linker"),
    };
    Ok(EbpfTools { toolchain, linker })
}

/// Everything for virtual machines.
pub fn ensure_vm(workspace: &Workspace) -> Result<()> {
    ensure_ebpf(workspace)?;
    let mut apt = Apt::new();
    programs::ensure(&mut apt)?;
    programs::ensure_vm(&mut apt)
}

/// Everything for a build for arm64 on another machine, and for running it.
pub(crate) fn ensure_arm64(workspace: &Workspace) -> Result<CrossTools> {
    arm64::ensure(workspace)
}

/// Everything for a cluster.
pub fn ensure_kube(workspace: &Workspace) -> Result<()> {
    ensure_ebpf(workspace)?;
    programs::ensure_kube(&mut Apt::new())
}

/// Load generators, beside the programs of the demo.
pub fn ensure_bench(workspace: &Workspace) -> Result<Programs> {
    programs::ensure_bench(&mut Apt::new())?;
    ensure_programs(workspace)
}

/// Programs of the demo.
pub fn ensure_programs(workspace: &Workspace) -> Result<Programs> {
    let mut apt = Apt::new();
    programs::ensure(&mut apt)?;
    Ok(Programs { nginx: unpacked::ensure(&unpacked::NGINX, workspace, &mut apt)? })
}

fn ensure_test_programs(workspace: &Workspace) -> Result<TestPrograms> {
    let mut apt = Apt::new();
    programs::ensure(&mut apt)?;
    programs::ensure_tests(&mut apt)?;
    let servers = [unpacked::NGINX, unpacked::HAPROXY, unpacked::REDIS, unpacked::POSTGRES];
    let found = servers.iter().map(|server| unpacked::ensure(server, workspace, &mut apt));
    Ok(TestPrograms(found.collect::<Result<_>>()?))
}
