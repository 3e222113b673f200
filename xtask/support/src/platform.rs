//! The platform that programs are built for: this machine's, or arm64 from another machine.
//!
//! A cross build needs a compiled standard library for the target, a linker, and to run anything the target's C library and an
//! emulator. The standard library and the C library are taken from Debian's packages for arm64, which are unpacked into the cache:
//! no other architecture is added to the system's package manager.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{command, setup, workspace::Workspace};

/// Rust's name of the target.
pub const ARM64: &str = "aarch64-unknown-linux-gnu";
/// The linker, and the compiler of the C parts.
pub(crate) const ARM64_CC: &str = "aarch64-linux-gnu-gcc";
/// Comes with the linker.
const ARM64_READELF: &str = "aarch64-linux-gnu-readelf";
/// QEMU's user emulation.
pub(crate) const ARM64_EMULATOR: &str = "qemu-aarch64-static";
/// The loader, which is also what lists the libraries of a program.
pub(crate) const ARM64_LOADER: &str = "lib/ld-linux-aarch64.so.1";

/// The platform of a build.
#[derive(Debug)]
pub enum Platform {
    /// This machine's.
    Own,
    /// arm64, from another machine.
    Arm64(CrossTools),
}

/// The parts of a cross build.
#[derive(Debug)]
pub struct CrossTools {
    /// A compiler that has the target's standard library in `root`.
    pub(crate) rustc: PathBuf,
    /// `usr` in it is the compiler's sysroot for the target. It also has the target's C library.
    pub(crate) root: PathBuf,
}

impl Platform {
    /// arm64: this machine's platform if it is one, else with the parts of a cross build, which are fetched if they are missing.
    ///
    /// # Errors
    /// When a part is missing and cannot be had.
    pub fn arm64(workspace: &Workspace) -> Result<Self> {
        if cfg!(target_arch = "aarch64") {
            return Ok(Self::Own);
        }
        setup::ensure_arm64(workspace).map(Self::Arm64)
    }

    /// Go's name of the architecture, which is that of image specifications.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        match (self, std::env::consts::ARCH) {
            (Self::Arm64(_), _) | (Self::Own, "aarch64") => "arm64",
            (Self::Own, "x86_64") => "amd64",
            (Self::Own, other) => other,
        }
    }

    /// Has cargo build for this platform.
    pub fn prepare(&self, cargo: &mut Command) {
        let Self::Arm64(tools) = self else { return };
        let sysroot = tools.root.join("usr");
        cargo
            .args(["--target", ARM64])
            .env("RUSTC", &tools.rustc)
            .env("CC_aarch64_unknown_linux_gnu", ARM64_CC)
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", ARM64_CC)
            // Only for the target: what runs while building needs the compiler's own sysroot.
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
                format!("--sysroot={}", sysroot.display()),
            );
        // These would be taken instead.
        for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
            cargo.env_remove(name);
        }
    }

    /// The folder of what is built, in the target folder.
    #[must_use]
    pub fn folder(&self, target: &Path) -> PathBuf {
        match self {
            Self::Own => target.to_owned(),
            Self::Arm64(_) => target.join(ARM64),
        }
    }

    /// The command that runs a program of this platform here.
    #[must_use]
    pub fn start(&self, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Own => Command::new(program),
            Self::Arm64(tools) => tools.emulate(program),
        }
    }

    /// Returns true if [`Self::start`] emulates.
    #[must_use]
    pub fn is_emulated(&self) -> bool {
        matches!(self, Self::Arm64(_))
    }

    /// The output of `ldd` for a program.
    ///
    /// # Errors
    /// When the loader cannot be started.
    pub fn libraries_of(&self, program: &Path) -> Result<String> {
        let mut list = match self {
            Self::Own => Command::new("ldd"),
            // Unlike ldd, the loader does not ask whether it is the program's.
            Self::Arm64(_) if !has_loader(program)? => return Ok("statically linked".to_owned()),
            Self::Arm64(tools) => {
                let mut loader = tools.emulate(tools.root.join(ARM64_LOADER));
                loader.arg("--list");
                loader
            }
        };
        let listing = list.arg(program).output();
        let listing = listing.with_context(|| format!("cannot start {}", command::line(&list)))?;
        Ok([listing.stdout, listing.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat())
    }

    /// The file on this machine of a path of the platform.
    #[must_use]
    pub fn file(&self, path: &Path) -> PathBuf {
        match self {
            Self::Own => path.to_owned(),
            Self::Arm64(tools) => tools.root.join(path.strip_prefix("/").unwrap_or(path)),
        }
    }
}

fn has_loader(program: &Path) -> Result<bool> {
    let mut readelf = Command::new(ARM64_READELF);
    let segments = command::stdout(readelf.args(["--program-headers", "--wide"]).arg(program));
    let segments = segments.with_context(|| format!("{ARM64_READELF} cannot read {}", program.display()))?;
    Ok(segments.contains("INTERP"))
}

impl CrossTools {
    /// The program under the emulator, which looks for libraries in the unpacked packages first.
    fn emulate(&self, program: impl AsRef<OsStr>) -> Command {
        let mut emulator = Command::new(ARM64_EMULATOR);
        emulator.arg("-L").arg(&self.root).arg(program.as_ref());
        emulator
    }
}
