//! `cargo xtask demo`: two nodes, real programs in pods, and what the wire carried, with Tacit and without.
//!
//! Everything is fetched and built as the caller; then the scenario runs as root, through sudo when needed.

mod scenario;
mod servers;
mod traffic;
mod verdict;

use std::{
    env,
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use xtask_support::{
    command::{self, tacit_environment},
    ebpf,
    privilege::{as_root, is_root},
    progress::Progress,
    setup,
    workspace::{Profile, Workspace},
};

/// The output of the demo.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// End with one JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Everything is built: run the scenario. The demo starts itself so, as root
    #[arg(long, hide = true)]
    prepared: bool,
}

/// The inputs of the scenario.
pub(crate) struct Prepared {
    /// The agent's binary.
    pub(crate) agent: PathBuf,
    /// nginx, which may not be on `PATH`.
    pub(crate) nginx: PathBuf,
    /// True for a result in JSON.
    pub(crate) json: bool,
}

/// Builds what is missing and shows it.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    if !options.prepared {
        prepare(workspace)?;
        if !is_root()? {
            return as_root_again(workspace, options);
        }
    }
    let programs = setup::ensure_programs(workspace)?;
    scenario::run(&Prepared {
        agent: workspace.agent(Profile::Fast),
        nginx: programs.nginx,
        json: options.json,
    })
}

fn prepare(workspace: &Workspace) -> Result<()> {
    let mut progress = Progress::new(3);
    progress.step("what is needed", || setup::ensure_all(workspace))?;
    progress.step("kernel side", || ebpf::build(workspace))?;
    progress.step("agent", || workspace.build(Profile::Fast, &["tacit"]))
}

fn as_root_again(workspace: &Workspace, options: &Options) -> Result<()> {
    let program = env::current_exe().context("cannot tell which program this is")?;
    let mut environment: Vec<(OsString, OsString)> = tacit_environment();
    // Root has another home and so another cache.
    environment.retain(|(name, _)| name != "TACIT_CACHE");
    environment.push(("TACIT_CACHE".into(), workspace.cache().into()));
    environment.push(("CARGO_TARGET_DIR".into(), workspace.target().into()));
    let mut arguments = vec![OsStr::new("demo"), OsStr::new("--prepared")];
    if options.json {
        arguments.push(OsStr::new("--json"));
    }
    let why = "to make network namespaces, cgroups and BPF programs; all of it is removed at the end";
    command::run(&mut as_root(why, &environment, program, &arguments)?)
}
