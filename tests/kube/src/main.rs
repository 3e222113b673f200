//! `cargo xtask kube`: a real cluster of two nodes on this machine, Tacit installed on it from `deploy/`, and what a user
//! is promised, tried on it.
//!
//! Each node is a set of namespaces; see `cluster`. Nothing is installed on the machine but tools, no port is opened on
//! it, and everything is gone when the command ends, unless `--keep` is given.

#![forbid(unsafe_code)]

mod address_reuse;
mod authority;
mod checks;
mod cluster;
mod deploy;
mod enrol_latency;
mod enrol_under_load;
mod handover;
mod helm;
mod install;
mod leftovers;
mod load;
mod node;
mod packages;
mod pods;
mod policies;
mod rotation;
mod scenarios;
mod sweep;
mod verdict;
mod wire;

use std::{env, ffi::OsStr, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use xtask_support::{
    command::{self, tacit_environment},
    ebpf,
    privilege::{as_root, is_root},
    progress::{self, Progress, Style, note},
    setup,
    workspace::{Profile, Workspace},
};

use cluster::Cluster;
use node::Lifetime;
use verdict::Verdict;

/// Install Tacit on a real cluster of two nodes, and try what it promises
#[derive(Parser)]
#[command(name = "cargo xtask kube", bin_name = "cargo xtask kube")]
struct Options {
    /// Run only tests whose name contains this, or one of several; those that they build on run too
    #[arg(long, value_name = "NAME")]
    test: Vec<String>,
    /// Leave the cluster running, and print how to reach it
    #[arg(long)]
    keep: bool,
    /// Take down clusters that were kept, and do nothing else
    #[arg(long, conflicts_with_all = ["keep", "test"])]
    down: bool,
    /// Print the names of the tests
    #[arg(long)]
    list: bool,
    /// Everything is built: start the cluster. The command starts itself so, as root
    #[arg(long, hide = true)]
    prepared: bool,
}

fn main() -> ExitCode {
    progress::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    if options.list {
        scenarios::ALL.iter().for_each(|scenario| println!("{:<28} {}", scenario.name, scenario.what));
        return Ok(());
    }
    let workspace = &Workspace::find()?;
    if !options.prepared && !options.down {
        prepare(workspace)?;
    }
    if !is_root()? {
        return as_root_again(workspace, options);
    }
    if options.down {
        return sweep::all();
    }
    sweep::left_behind()?;
    let programs = packages::ensure(workspace)?;
    let lifetime = if options.keep { Lifetime::Kept } else { Lifetime::Run };
    let cluster = Cluster::start(&programs, &xtask_image::make(workspace, None, None)?.archive, lifetime)?;
    let verdict = try_all(workspace, &cluster, &options.test);
    if options.keep {
        println!("as root, with kubectl on PATH:\n  {}\nto end it: cargo xtask kube --down", cluster.reach());
        cluster.keep()?;
    } else {
        drop(cluster);
    }
    println!("{}", verdict.table(Style::of_stdout()));
    verdict.result()
}

fn try_all(workspace: &Workspace, cluster: &Cluster, only: &[String]) -> Verdict {
    let mut verdict = Verdict::default();
    for scenario in scenarios::chosen(only) {
        note(&format!("{}: {}", scenario.name, scenario.what));
        let passed = verdict.run(scenario.name, || scenario.test.on(workspace, cluster));
        if !passed && scenario.is_required {
            break;
        }
    }
    verdict
}

fn prepare(workspace: &Workspace) -> Result<()> {
    let mut progress = Progress::new(5);
    progress.step("what is needed", || setup::ensure_kube(workspace))?;
    progress.step("Kubernetes", || packages::ensure(workspace).map(drop))?;
    progress.step("Helm", || helm::ensure_built(workspace).map(drop))?;
    progress.step("kernel side", || ebpf::build(workspace).map(drop))?;
    progress.step("agent and attack suite (release)", || {
        workspace.build(Profile::Release, &["tacit", "tacit-attack"])?;
        workspace.build_cni(Profile::Release)
    })
}

fn as_root_again(workspace: &Workspace, options: &Options) -> Result<()> {
    let program = env::current_exe().context("cannot tell which program this is")?;
    let mut environment = tacit_environment();
    environment.retain(|(name, _)| name != "TACIT_CACHE");
    environment.push(("TACIT_CACHE".into(), workspace.cache().into()));
    environment.push(("CARGO_TARGET_DIR".into(), workspace.target().into()));
    let mut arguments = vec![OsStr::new("--prepared")];
    let switches = [(options.keep, "--keep"), (options.down, "--down")];
    arguments.extend(switches.iter().filter(|(on, _)| *on).map(|(_, name)| OsStr::new(*name)));
    arguments.extend(options.test.iter().flat_map(|test| [OsStr::new("--test"), OsStr::new(test)]));
    ensure!(!options.list, "a list needs no root");
    let why = "to make namespaces, cgroups and containers; all of it is removed at the end";
    command::run(&mut as_root(why, &environment, program, &arguments)?)
}
