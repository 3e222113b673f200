//! `cargo xtask image`: builds the programs and makes the container image of them.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, ValueEnum};
use xtask_support::{
    ebpf,
    platform::Platform,
    progress::{self, Progress},
    setup,
    workspace::{Profile, Workspace},
};

/// Make the container image, without a daemon
#[derive(Parser)]
#[command(name = "cargo xtask image", bin_name = "cargo xtask image")]
struct Options {
    /// Name and tag of the image [default: localhost/tacit:<version>]
    #[arg(long, value_name = "NAME:TAG")]
    name: Option<String>,
    /// Write the archive here [default: target/image/tacit.tar, with --arch target/aarch64-unknown-linux-gnu/image/tacit.tar]
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    output: Option<PathBuf>,
    /// Build for this architecture [default: that of this machine]
    #[arg(long, value_name = "NAME")]
    arch: Option<Architecture>,
    /// Write the files into this folder instead of an archive, for a Containerfile's COPY
    #[arg(long, value_name = "FOLDER")]
    root: Option<PathBuf>,
}

/// An architecture that can be built for on another machine.
#[derive(Clone, Copy, ValueEnum)]
enum Architecture {
    /// aarch64
    Arm64,
}

fn main() -> ExitCode {
    progress::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    let mut progress = Progress::new(4);
    let platform = progress.step("what is needed", || {
        setup::ensure_ebpf(&workspace)?;
        options.arch.map_or(Ok(Platform::Own), |Architecture::Arm64| Platform::arm64(&workspace))
    })?;
    progress.step("kernel side", || ebpf::build(&workspace).map(drop))?;
    progress.step("agent, attack suite and CNI plugin (release)", || {
        workspace.build_for(&platform, Profile::Release, &["tacit", "tacit-attack"])?;
        workspace.build_cni_for(&platform, Profile::Release)
    })?;
    if let Some(root) = &options.root {
        return progress.step("files", || xtask_image::write_files(&workspace, &platform, root));
    }
    let (name, output) = (options.name.as_deref(), options.output.as_deref());
    let image = progress.step("image", || xtask_image::make(&workspace, &platform, name, output))?;
    println!("{}\n{} {}", image.archive.display(), image.name, image.digest);
    Ok(())
}
