//! `cargo xtask interop --ztunnel PATH`: pods of Tacit and a pod of a real ztunnel, in both directions.
//!
//! Node b has pods of Tacit. The pod `peer` of node a is served by the ztunnel, which the user names: it runs in the pod's network
//! namespace in its dedicated mode, with a file for its workloads and policies. Its certificates are signed by the
//! root of the mesh. Connections from the pod enter the ztunnel by SOCKS5, because it installs no redirection itself.
//!
//! | module | content |
//! |---|---|
//! | `ztunnel` | the mesh with the ztunnel and its files |
//! | `ca` | the authority of the ztunnel |
//! | `socks` | a client of the pod `peer` |
//! | `cases` | what is tried |

#![forbid(unsafe_code)]

mod ca;
mod cases;
mod socks;
mod ztunnel;

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use xtask_support::{
    command::{self, tacit_environment},
    ebpf,
    privilege::{as_root, is_root},
    progress::{self, Progress},
    setup,
    workspace::{Profile, Workspace},
};

/// Try Tacit with a real ztunnel, in both directions
#[derive(Parser)]
#[command(name = "cargo xtask interop", bin_name = "cargo xtask interop")]
struct Options {
    /// The ztunnel
    #[arg(long, value_name = "PATH")]
    ztunnel: PathBuf,
    /// Only cases whose names contain this text
    #[arg(value_name = "TEXT")]
    only: Option<String>,
    /// Everything is built: try. The command starts itself so, as root
    #[arg(long, hide = true)]
    prepared: bool,
}

fn main() -> ExitCode {
    progress::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let ztunnel = options
        .ztunnel
        .canonicalize()
        .with_context(|| format!("--ztunnel {}: expected a ztunnel", options.ztunnel.display()))?;
    let workspace = &Workspace::find()?;
    if !options.prepared {
        prepare(workspace)?;
        if !is_root()? {
            return as_root_again(workspace);
        }
    }
    run_cases(&ztunnel, options.only.as_deref().unwrap_or_default())
}

fn prepare(workspace: &Workspace) -> Result<()> {
    let mut progress = Progress::new(2);
    progress.step("the kernel side", || {
        setup::ensure_ebpf(workspace)?;
        ebpf::build(workspace).map(drop)
    })?;
    progress.step("the agent and the test programs", || {
        let mut cargo = workspace.cargo("build");
        cargo.args(["--quiet", "--profile", Profile::Fast.name(), "--bins"]);
        cargo.args(["--workspace", "--exclude", ebpf::PACKAGE, "--target-dir"]).arg(workspace.target());
        command::run(&mut cargo)
    })
}

fn as_root_again(workspace: &Workspace) -> Result<()> {
    let program = env::current_exe().context("cannot tell which program this is")?;
    let mut environment: Vec<(OsString, OsString)> = tacit_environment();
    environment.push(("CARGO_TARGET_DIR".into(), workspace.target().into()));
    let arguments: Vec<OsString> = env::args_os().skip(1).chain(["--prepared".into()]).collect();
    let arguments: Vec<_> = arguments.iter().map(OsString::as_os_str).collect();
    let why = "to make network namespaces, cgroups and BPF programs; all of it is removed at the end";
    command::run(&mut as_root(why, &environment, program, &arguments)?)
}

/// Runs the cases and prints a line for each.
fn run_cases(ztunnel: &Path, only: &str) -> Result<()> {
    let chosen: Vec<_> = cases::ALL.iter().filter(|case| case.name.contains(only)).collect();
    ensure!(!chosen.is_empty(), "no case has {only:?} in its name");
    let mut failed = 0;
    for case in &chosen {
        let begun = Instant::now();
        let outcome = (case.run)(ztunnel);
        let seconds = begun.elapsed().as_secs_f64();
        match &outcome {
            Ok(()) => println!("ok      {seconds:6.1} s  {}", case.name),
            Err(error) => {
                failed += 1;
                println!("FAILED  {seconds:6.1} s  {}\n        {error:#}", case.name);
            }
        }
    }
    println!("interop: {} passed, {failed} failed", chosen.len() - failed);
    if failed > 0 {
        bail!("{failed} of {} cases failed", chosen.len());
    }
    Ok(())
}
