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
//! | `testbed`, `servers` | one column: topology, pods, servers, agents |
//! | `programs` | what is started in it |
//! | `rival` | another proxy in a column of its own |
//! | `cpu_pinning` | which cores the ends of a request run on |
//! | `load` | iperf3, wrk, `tacit-load`: started and read |
//! | `usage` | CPU and memory of processes and of the machine |
//! | `machine` | CPU, cores and kernel |
//! | `measure` | all cases that were asked for |
//! | `rounds` | one case in all columns, round after round |
//! | `idle_wait` | waiting for a machine that others use as well |
//! | `special_cases` | idle flows, worker threads, many pods, BPF programs: measured in topologies of their own |
//! | `figures` | medians and ratios |
//! | `baseline` | `--check`: ratios against the committed ones |
//! | `results_table` | the figures for people |
//! | `ratios`, `plot` | `--plot`: ratios of a result as SVG |

#![forbid(unsafe_code)]

mod baseline;
mod cases;
mod cpu_pinning;
mod figures;
mod idle_wait;
mod load;
mod machine;
mod measure;
mod plot;
mod programs;
mod ratios;
mod results_table;
mod rival;
mod rounds;
mod servers;
mod special_cases;
mod testbed;
mod usage;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use serde_json::Value;
use xtask_support::{
    command::{self, tacit_environment},
    ebpf,
    privilege::{as_root, is_root},
    progress::{self, Progress, Style, Tone, note},
    setup,
    workspace::{Profile, Workspace},
};

use baseline::{Baseline, Judged, Verdict};
use cases::Case;
use figures::Figure;
use programs::Programs;
use ratios::Ratios;
use rounds::Plan;

/// The default number and length of measurements.
const PLAN: Plan = Plan { rounds: 3, seconds: 5, patience: Duration::ZERO };

/// Measure what Tacit costs: the same load directly and through it, in turn
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", after_help = rival::HELP)]
struct Options {
    /// Only this case, or all whose names begin so when none is named so; repeatable
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Name the cases and end
    #[arg(long)]
    list: bool,
    /// Number of measurements of each case in each column, in turn [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=99))]
    rounds: Option<u16>,
    /// Length of one measurement [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: Option<u16>,
    /// Seconds that may be spent, over the whole run, on waiting for a quiet machine and on measuring again what others
    /// disturbed
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    patience: u32,
    /// Write the results to FILE: an array with one object for each line of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the ratios to FILE as SVG: a bar for each case
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Measure nothing: plot this file of --json, or the committed ratios when no file is named
    #[arg(
        long,
        value_name = "RESULT",
        num_args = 0..=1,
        requires = "plot",
        conflicts_with_all = ["cases", "list", "rounds", "seconds", "json", "agent", "rival", "check", "write_baseline"]
    )]
    from: Option<Option<PathBuf>>,
    /// Measure this agent instead of the one of this repository, which is not built then
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// A third column: this command puts another proxy in the way, see below
    #[arg(long, value_name = "CMD")]
    rival: Option<String>,
    /// Measure a few cases, compare their ratios with the committed ones, and fail when one is worse
    #[arg(long, conflicts_with_all = ["cases", "rival", "write_baseline"])]
    check: bool,
    /// Measure the cases of --check and write their ratios to tests/bench-baseline.json
    #[arg(long, conflicts_with_all = ["cases", "rival"])]
    write_baseline: bool,
    /// Everything is built: measure. The bench starts itself so, as root
    #[arg(long, hide = true)]
    prepared: bool,
}

fn main() -> ExitCode {
    progress::exit_code(run(&Options::parse()))
}

/// Builds what is missing, measures, prints the table.
fn run(options: &Options) -> Result<()> {
    if options.list {
        print!("{}", cases::list());
        return Ok(());
    }
    let workspace = &Workspace::find()?;
    if let (Some(file), Some(from)) = (&options.plot, &options.from) {
        return plot_file(file, &from.clone().unwrap_or_else(|| workspace.root().join(baseline::FILE)));
    }
    let (chosen, plan) = options.chosen()?;
    // Before minutes of measuring.
    let committed = if options.check { Some(Baseline::read(workspace.root())?) } else { None };
    if !options.prepared {
        prepare(workspace, options)?;
        if !is_root()? {
            return as_root_again(workspace);
        }
    }
    let programs = Programs {
        nginx: setup::ensure_bench(workspace)?.nginx,
        load: workspace.program(Profile::Release, "tacit-load"),
        agent: options.agent.clone().unwrap_or_else(|| workspace.agent(Profile::Release)),
    };
    let outcome = measure::run(&programs, &chosen, plan, options.rival.as_deref())?;
    let measured = &outcome.measured;
    print!("{}", results_table::render(measured, plan));
    if let Some(file) = &options.json {
        write_json(file, measured)?;
    }
    if let Some(file) = &options.plot {
        write_plot(file, &Ratios::of(&rows(measured))?)?;
    }
    outcome.complete()?;
    if options.write_baseline {
        let noisy = measured.iter().filter(|row| row.leads && row.is_noisy()).count();
        ensure!(noisy == 0, "{noisy} lines were disturbed by others: nothing is written; try --patience 600");
        baseline::write(workspace.root(), measured)?;
        note(&format!("written: {}", baseline::FILE));
        plot_file(&workspace.root().join(plot::FILE), &workspace.root().join(baseline::FILE))?;
    }
    committed.map_or(Ok(()), |committed| check(&committed, measured, &programs, plan))
}

impl Options {
    /// Returns the chosen cases and the plan of measurements.
    fn chosen(&self) -> Result<(Vec<Case>, Plan)> {
        let (cases, usual) = match (self.check, self.write_baseline) {
            (true, _) => (baseline::cases()?, baseline::PLAN),
            (_, true) => (baseline::cases()?, baseline::PLAN_WRITE),
            _ => (choose(&self.cases)?, PLAN),
        };
        let plan = Plan {
            rounds: self.rounds.map_or(usual.rounds, usize::from),
            seconds: self.seconds.map_or(usual.seconds, u64::from),
            patience: Duration::from_secs(self.patience.into()),
        };
        Ok((cases, plan))
    }
}

/// Fails when a ratio is worse than the committed one, twice.
fn check(committed: &Baseline, measured: &[Figure], programs: &Programs, plan: Plan) -> Result<()> {
    if let Some(warning) = committed.warning() {
        note(&warning);
    }
    let first = committed.judge(measured)?;
    let is_worse = |judged: &&Judged| judged.verdict == Verdict::Worse;
    let suspects: Vec<&Judged> = first.iter().filter(is_worse).collect();
    let mut worse = Vec::new();
    if !suspects.is_empty() {
        let names: Vec<&str> = suspects.iter().map(|judged| judged.name.as_str()).collect();
        note(&format!("once more, since worse than committed: {}", names.join(", ")));
        let again = suspects.iter().filter_map(|judged| cases::named(&judged.case)).collect::<Vec<_>>();
        let outcome = measure::run(programs, &again, plan, None)?;
        outcome.complete()?;
        let measured = outcome.measured;
        if measured.iter().any(Figure::is_noisy) {
            note("others keep the machine busy: what follows says little; check again when it is quiet");
        }
        worse = committed.judge(&measured)?;
        worse.retain(|judged| judged.verdict == Verdict::Worse);
    }
    for judged in first.iter().filter(|judged| judged.verdict == Verdict::Better) {
        note(&format!("{} is better than committed: {}", judged.name, judged.change()));
    }
    for judged in &worse {
        let text = format!("{} is worse than committed: {}", judged.name, judged.change());
        eprintln!("{}", Style::of_stderr().paint(Tone::Bad, &text));
    }
    ensure!(worse.is_empty(), "{} of {} ratios are worse than committed, twice", worse.len(), first.len());
    println!(
        "bench --check: {} ratios, none worse than committed by more than {}",
        first.len(),
        committed.limit()
    );
    Ok(())
}

/// The cases asked for, all when none was.
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
    let is_exact = |name: &str| all.iter().any(|case| case.name == name);
    let is_meant =
        |case: &Case, name: &str| case.name == name || !is_exact(name) && case.name.starts_with(name);
    Ok(all.iter().filter(|case| names.iter().any(|name| is_meant(case, name))).cloned().collect())
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
        progress.step("agent (release)", || workspace.build(Profile::Release, &["tacit"]))?;
    }
    progress.step("load generator (release)", || workspace.build(Profile::Release, &["tacit-tests"]))
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

fn write_json(file: &Path, measured: &[Figure]) -> Result<()> {
    let rows = rows(measured);
    let text = serde_json::to_string_pretty(&rows)? + "\n";
    fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    note(&format!("written: {}", file.display()));
    if rows.is_empty() { bail!("nothing was measured") } else { Ok(()) }
}

/// The objects of `--json`, each with the machine that it was measured on.
fn rows(measured: &[Figure]) -> Vec<Value> {
    let machine = machine::description();
    let row = |figure: &Figure| {
        let mut row = figure.json();
        row["machine"] = machine.as_str().into();
        row
    };
    measured.iter().map(row).collect()
}

/// Plots a result that was written before.
fn plot_file(file: &Path, result: &Path) -> Result<()> {
    let text = fs::read_to_string(result).with_context(|| format!("read {}", result.display()))?;
    write_plot(file, &Ratios::parse(&text).with_context(|| format!("{}", result.display()))?)
}

fn write_plot(file: &Path, ratios: &Ratios) -> Result<()> {
    fs::write(file, plot::svg(ratios)).with_context(|| format!("write {}", file.display()))?;
    note(&format!("written: {}", file.display()));
    Ok(())
}
