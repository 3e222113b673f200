//! `cargo xtask image`: builds the programs and makes the container image of them.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use xtask_support::{
    ebpf,
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
    /// Write the archive here [default: target/image/tacit.tar]
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    output: Option<PathBuf>,
    /// Write the files into this folder instead of an archive, for a Containerfile's COPY
    #[arg(long, value_name = "FOLDER")]
    root: Option<PathBuf>,
}

fn main() -> ExitCode {
    progress::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    let mut progress = Progress::new(4);
    progress.step("what is needed", || setup::ensure_ebpf(&workspace).map(drop))?;
    progress.step("kernel side", || ebpf::build(&workspace).map(drop))?;
    progress.step("agent, attack suite and CNI plugin (release)", || {
        workspace.build(Profile::Release, &["tacit", "tacit-attack"])?;
        workspace.build_cni(Profile::Release)
    })?;
    if let Some(root) = &options.root {
        return progress.step("files", || xtask_image::write_files(&workspace, root));
    }
    let (name, output) = (options.name.as_deref(), options.output.as_deref());
    let image = progress.step("image", || xtask_image::make(&workspace, name, output))?;
    println!("{}\n{} {}", image.archive.display(), image.name, image.digest);
    Ok(())
}
