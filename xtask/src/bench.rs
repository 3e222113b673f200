//! `cargo xtask bench`: what Tacit costs, as ratios to the same load without it.
//!
//! Two topologies of the same layout live side by side: one without agents ("direct"), one with Tacit on both nodes; a
//! third one when another proxy is to be compared. Only one is loaded at a time, in turn (direct, Tacit, direct, Tacit,
//! ..), so that a slow minute of the machine hits all columns alike. Load comes from iperf3, wrk against nginx, and
//! `tacit-load`. Figures are medians over the rounds; absolute ones say as much about the machine as about Tacit, so
//! what is compared and committed are ratios.
//!
//! | module | what it holds |
//! |---|---|
//! | `cases` | what is measured, by name |
//! | `ground` | one column: topology, pods, servers, agents |
//! | `load` | iperf3, wrk, `tacit-load`: started and read |
//! | `usage` | CPU and memory of processes and of the machine |
//! | `measure` | one case in all columns, round after round |
//! | `result` | medians and ratios |
//! | `table` | results for people |

mod cases;
mod ground;
mod load;
mod measure;
mod result;
mod table;
mod usage;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    command::{self, tacit_environment},
    ebpf,
    privilege::{as_root, is_root},
    progress::{Progress, note},
    setup,
    workspace::Workspace,
};
use cases::Case;
use ground::Programs;
use result::Measured;

/// What to measure, and how.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only this case, or all whose names begin so; repeatable
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Name the cases and end
    #[arg(long)]
    list: bool,
    /// How often each case is measured in each column, in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    rounds: u16,
    /// Length of one measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Write the results to FILE: an array with one object for each line of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this agent instead of the one of this repository, which is not built then
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Everything is built: measure. The bench starts itself so, as root
    #[arg(long, hide = true)]
    prepared: bool,
}

/// Builds what is missing, measures, prints the table.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    if options.list {
        print!("{}", cases::list());
        return Ok(());
    }
    let chosen = choose(&options.cases)?;
    if !options.prepared {
        prepare(workspace, options)?;
        if !is_root()? {
            return as_root_again(workspace);
        }
    }
    let programs = Programs {
        nginx: setup::ensure_bench(workspace)?.nginx,
        load: workspace.load_generator(),
        agent: options.agent.clone().unwrap_or_else(|| workspace.agent()),
    };
    let plan = measure::Plan { rounds: options.rounds.into(), seconds: options.seconds.into() };
    let measured = measure::run(&programs, &chosen, plan)?;
    print!("{}", table::render(&measured, plan));
    match &options.json {
        Some(file) => write_json(file, &measured),
        None => Ok(()),
    }
}

/// The cases asked for; those that are measured without being asked when nothing was.
fn choose(names: &[String]) -> Result<Vec<Case>> {
    let all = cases::all();
    if names.is_empty() {
        return Ok(all);
    }
    for name in names {
        ensure!(
            all.iter().any(|case| case.name.starts_with(name.as_str())),
            "no case {name}: see `cargo xtask bench --list`"
        );
    }
    Ok(all.into_iter().filter(|case| names.iter().any(|name| case.name.starts_with(name.as_str()))).collect())
}

fn prepare(workspace: &Workspace, options: &Options) -> Result<()> {
    if let Some(agent) = &options.agent {
        ensure!(agent.is_file(), "no agent at {}", agent.display());
    }
    let mut progress = Progress::new(if options.agent.is_some() { 2 } else { 4 });
    progress.step("what is needed", || {
        setup::ensure_ebpf(workspace)?;
        setup::ensure_bench(workspace)
    })?;
    if options.agent.is_none() {
        progress.step("kernel side", || ebpf::build(workspace))?;
        progress.step("agent (release)", || workspace.build_agent())?;
    }
    progress.step("load generator (release)", || workspace.build_load_generator())
}

fn as_root_again(workspace: &Workspace) -> Result<()> {
    let program = env::current_exe().context("cannot tell which program this is")?;
    let mut environment: Vec<(OsString, OsString)> = tacit_environment();
    // Root has another home and so another cache.
    environment.retain(|(name, _)| name != "TACIT_CACHE");
    environment.push(("TACIT_CACHE".into(), workspace.cache().into()));
    environment.push(("CARGO_TARGET_DIR".into(), workspace.target().into()));
    let mut arguments: Vec<OsString> = env::args_os().skip(1).collect();
    arguments.push("--prepared".into());
    let arguments: Vec<_> = arguments.iter().map(OsString::as_os_str).collect();
    let why = "to make network namespaces, cgroups and BPF programs; all of it is removed at the end";
    command::run(&mut as_root(why, &environment, program, &arguments)?)
}

fn write_json(file: &Path, measured: &[Measured]) -> Result<()> {
    let rows: Vec<Value> = measured.iter().map(Measured::json).collect();
    let text = serde_json::to_string_pretty(&rows)? + "\n";
    fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    note(&format!("written: {}", file.display()));
    if rows.is_empty() { bail!("nothing was measured") } else { Ok(()) }
}
