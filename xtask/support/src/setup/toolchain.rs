//! The compiler that builds the kernel side, and the components of the host toolchain.
//!
//! First choice: a distribution's rustc that comes with a compiled `core` for the BPF target; nothing unstable is
//! needed then. Second choice: a rustup nightly with the `rust-src` component (`-Zbuild-std=core`) and a bpf-linker
//! on `PATH`. A nightly is never installed or upgraded from here: it belongs to all users of the machine.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt::Apt;
use crate::command::{find_program, stdout};

/// The BPF target of this machine's byte order.
pub const TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// Not through `PATH`: rustup's proxy usually stands before the distribution's compiler.
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";

/// Compiler, `core` for the BPF targets, and the clippy of that compiler.
const PACKAGES: [&str; 3] = ["rustc-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];

/// Set this to the name of a rustup toolchain to have that one used.
const CHOICE: &str = "TACIT_EBPF_TOOLCHAIN";

/// A compiler that can build the kernel side.
#[derive(Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// A rustc whose sysroot has a compiled `core` for the BPF target.
    Distribution {
        /// The compiler.
        rustc: PathBuf,
        /// Its release.
        version: String,
        /// Major version of its LLVM.
        llvm: u32,
    },
    /// A rustup toolchain with `rust-src`.
    Rustup {
        /// As rustup knows it.
        name: String,
    },
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Distribution { rustc, version, llvm } => {
                write!(f, "{} {version} (the distribution's, compiled core, LLVM {llvm})", rustc.display())
            }
            Self::Rustup { name } => write!(f, "rustup toolchain {name} (core built from rust-src)"),
        }
    }
}

/// The compiler to use; installs the distribution's when there is none and the distribution has it.
pub(super) fn ensure(apt: &mut Apt) -> Result<Toolchain> {
    if let Some(found) = detect()? {
        return Ok(found);
    }
    if Apt::is_here() && apt.knows(PACKAGES[1])? {
        apt.install("compiler for the kernel side", &PACKAGES)?;
        return distribution(Path::new(DISTRIBUTION_RUSTC)).with_context(|| {
            format!("{DISTRIBUTION_RUSTC} still has no core for {TARGET}: is another package in its place?")
        });
    }
    bail!(
        "no compiler for {TARGET}. Either install the packages {} (Debian 12 has them), or a dated nightly and its \
         linker:\n  rustup toolchain install nightly-YYYY-MM-DD --profile minimal --component rust-src,clippy\n  \
         cargo install bpf-linker\n  export {CHOICE}=nightly-YYYY-MM-DD",
        PACKAGES.join(" ")
    )
}

fn detect() -> Result<Option<Toolchain>> {
    if let Ok(name) = env::var(CHOICE) {
        return match rustup(&name) {
            Some(found) => Ok(Some(found)),
            None => bail!(
                "{CHOICE}={name}, but that toolchain, its rust-src component or bpf-linker on PATH is missing:\n  \
                 rustup toolchain install {name} --profile minimal --component rust-src,clippy\n  \
                 cargo install bpf-linker"
            ),
        };
    }
    let found = distribution(Path::new(DISTRIBUTION_RUSTC)).filter(has_clippy);
    Ok(found.or_else(|| rustup("nightly")))
}

fn distribution(rustc: &Path) -> Option<Toolchain> {
    // A distribution's compiler has its sysroot where its package is installed; asking it would cost a process.
    let sysroot = rustc.parent()?.parent()?;
    if !sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir() {
        return None;
    }
    let verbose = stdout(Command::new(rustc).arg("-vV").env_remove("LD_LIBRARY_PATH"))?;
    let (version, llvm) = versions(&verbose)?;
    Some(Toolchain::Distribution { rustc: rustc.to_owned(), version, llvm })
}

fn has_clippy(found: &Toolchain) -> bool {
    match found {
        Toolchain::Distribution { rustc, .. } => rustc.with_file_name("clippy-driver").exists(),
        Toolchain::Rustup { .. } => true,
    }
}

/// Release and LLVM major version in the output of `rustc -vV`.
fn versions(verbose: &str) -> Option<(String, u32)> {
    let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let llvm = field("LLVM version:")?.split('.').next()?.parse().ok()?;
    Some((field("release:")?.to_owned(), llvm))
}

fn rustup(name: &str) -> Option<Toolchain> {
    find_program("bpf-linker")?;
    let sysroot = stdout(Command::new("rustup").args(["run", name, "rustc", "--print", "sysroot"]))?;
    let source = Path::new(&sysroot).join("lib/rustlib/src/rust/library/Cargo.lock");
    source.exists().then(|| Toolchain::Rustup { name: name.to_owned() })
}

/// Components of the host's toolchain, each with the program that tells whether it is there.
const COMPONENTS: [(&str, &str); 2] = [("rustfmt", "rustfmt"), ("clippy", "clippy-driver")];

/// The components that are not installed.
pub(super) fn missing_components() -> Vec<&'static str> {
    // cargo tells its own path; components stand next to it. On PATH there may be rustup's proxies, which prove nothing.
    let Some(cargo) = env::var_os("CARGO").map(PathBuf::from) else { return Vec::new() };
    let missing = COMPONENTS.into_iter().filter(|(_, program)| !cargo.with_file_name(program).exists());
    missing.map(|(name, _)| name).collect()
}

/// Returns the command that installs a component.
pub(super) fn remedy(component: &str) -> String {
    format!("{component} is missing: `rustup component add {component}`, or your distribution's package")
}

/// An error with the remedy when the component is not installed.
pub fn require_component(component: &str) -> Result<()> {
    if missing_components().contains(&component) { bail!("{}", remedy(component)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBOSE: &str = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                           release: 1.96.0\nLLVM version: 22.1.8\n";

    #[test]
    fn llvm_major_is_read_from_the_compiler() {
        assert_eq!(versions(VERBOSE), Some(("1.96.0".to_owned(), 22)));
    }

    #[test]
    fn a_compiler_without_llvm_is_refused() {
        assert_eq!(versions("rustc 1.96.0\nrelease: 1.96.0\n"), None);
    }
}
