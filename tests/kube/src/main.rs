//! `cargo xtask kube`: a real cluster of two nodes on this machine, Tacit installed on it from `deploy/`, and what a user
//! is promised, tried on it.
//!
//! Each node is a set of namespaces; see `cluster`. Nothing is installed on the machine but tools, no port is opened on
//! it, and everything is gone when the command ends, unless `--keep` is given.

#![forbid(unsafe_code)]

mod address_reuse;
mod announce;
mod authority;
mod cgroup;
mod checks;
mod cluster;
mod deploy;
mod dns;
mod enrol_latency;
mod enrol_under_load;
mod go_module;
mod handover;
mod helm;
mod install;
mod leftovers;
mod load;
mod mesh_strict;
mod node;
mod node_config;
mod pods;
mod policies;
mod programs;
mod release;
mod rotation;
mod runtime;
mod scenarios;
mod sweep;
mod verdict;
mod wire;

use std::{env, ffi::OsStr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use xtask_support::{
    command::{self, tacit_environment},
    ebpf,
    platform::Platform,
    privilege::{as_root, is_root},
    progress::{self, Progress, Style, note},
    setup,
    workspace::{Profile, Workspace},
};

use cluster::Cluster;
use node::Lifetime;
use programs::{Kubernetes, Programs};
use release::{RELEASES, Release};
use verdict::Verdict;

/// Install Tacit on a real cluster of two nodes, and try what it promises
#[derive(Parser)]
#[command(name = "cargo xtask kube", bin_name = "cargo xtask kube")]
struct Options {
    /// Run only tests whose name contains this, or one of several; those that they build on run too
    #[arg(long, value_name = "NAME")]
    test: Vec<String>,
    /// Release of Kubernetes, built from source and kept in the cache
    #[arg(long, value_parser = Release::named, default_value = RELEASES[0].name)]
    release: &'static Release,
    /// Folder with kube-apiserver and the other programs of a release, used instead of building one
    #[arg(long, value_name = "DIR")]
    kubernetes: Option<PathBuf>,
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
    if let Some(name) = runtime::called_as() {
        return progress::exit_code(runtime::run(&name));
    }
    progress::exit_code(run(&Options::parse()))
}

impl Options {
    fn kubernetes(&self) -> Result<Kubernetes> {
        let Some(folder) = &self.kubernetes else { return Ok(Kubernetes::Built(self.release)) };
        let found = folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))?;
        Ok(Kubernetes::Folder(found))
    }
}

fn run(options: &Options) -> Result<()> {
    if options.list {
        scenarios::ALL.iter().for_each(|scenario| println!("{:<28} {}", scenario.name, scenario.what));
        return Ok(());
    }
    let workspace = &Workspace::find()?;
    if !options.prepared && !options.down {
        prepare(workspace, options)?;
    }
    if !is_root()? {
        return as_root_again(workspace, options);
    }
    if options.down {
        return sweep::all();
    }
    sweep::left_behind()?;
    let programs = Programs::ensure(workspace, &options.kubernetes()?)?;
    let lifetime = if options.keep { Lifetime::Kept } else { Lifetime::Run };
    let cluster = Cluster::start(
        &programs,
        &xtask_image::make(workspace, &Platform::Own, None, None)?.archive,
        lifetime,
    )?;
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

fn prepare(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut progress = Progress::new(5);
    progress.step("what is needed", || setup::ensure_kube(workspace))?;
    let kubernetes = options.kubernetes()?;
    progress.step("Kubernetes", || Programs::ensure(workspace, &kubernetes).map(drop))?;
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
    let mut arguments = ["--prepared", "--release", options.release.name].map(OsStr::new).to_vec();
    if let Some(folder) = &options.kubernetes {
        arguments.extend([OsStr::new("--kubernetes"), folder.as_os_str()]);
    }
    let switches = [(options.keep, "--keep"), (options.down, "--down")];
    arguments.extend(switches.iter().filter(|(on, _)| *on).map(|(_, name)| OsStr::new(*name)));
    arguments.extend(options.test.iter().flat_map(|test| [OsStr::new("--test"), OsStr::new(test)]));
    ensure!(!options.list, "a list needs no root");
    let why = "to make namespaces, cgroups and containers; all of it is removed at the end";
    command::run(&mut as_root(why, &environment, program, &arguments)?)
}
