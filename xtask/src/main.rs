//! `cargo xtask <command>`: everything that is done with this repository, as code.
//!
//! Promises: each command fetches what it lacks through `setup`, says what it does while it does it, and fails with
//! a message that names the next action. Whatever needs root is announced before it runs (`privilege`). Little is compiled
//! for it: `bench`, `interop`, `kube`, `vm` and `image` are programs of other packages (`program`), which are built when they are asked
//! for, and what they share with it is in `xtask-support`.
#![forbid(unsafe_code)]

mod arm64;
mod demo;
mod fuzz;
mod lint;
mod program;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory as _, Parser, Subcommand};
use xtask_support::{
    ebpf,
    progress::{self, Progress},
    setup,
    workspace::{Profile, Workspace},
};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Build, check and show Tacit")]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building, testing and the demo need (a no-op when all is there)
    Setup,
    /// Build the kernel side into target/ebpf/tacit-ebpf.o
    BuildEbpf {
        /// Lint it instead of building it
        #[arg(long)]
        clippy: bool,
    },
    /// Build the kernel side, then the agent in release mode
    Build,
    /// Format everything
    Fmt {
        /// Only say whether something is not formatted
        #[arg(long)]
        check: bool,
    },
    /// Lint everything; warnings are errors
    Clippy,
    /// Check the rules of the repository
    Tidy,
    /// Run what takes no root and under a minute: rules, format, lints, unit tests
    Check,
    /// Run every check and every test
    Test(test::Options),
    /// Build for arm64 and run the unit tests, on another machine under emulation
    Arm64,
    /// Run the tests of whole nodes inside virtual machines with other kernels
    #[command(disable_help_flag = true)]
    Vm(program::Arguments),
    /// Make the container image, without a daemon
    #[command(disable_help_flag = true)]
    Image(program::Arguments),
    /// Install Tacit on a real cluster of two nodes, and try what it promises
    #[command(disable_help_flag = true)]
    Kube(program::Arguments),
    /// Run the fuzz targets
    Fuzz(fuzz::Options),
    /// Show two pods talking through Tacit, and what the wire carried
    Demo(demo::Options),
    /// Measure what Tacit costs: the same load directly and through it, in turn
    #[command(disable_help_flag = true)]
    Bench(program::Arguments),
    /// Try Tacit with a real ztunnel, in both directions
    #[command(disable_help_flag = true)]
    Interop(program::Arguments),
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(code) => code,
        Err(error) => {
            progress::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let done = match task {
        Task::Setup => setup::run(&workspace),
        Task::BuildEbpf { clippy: false } => ebpf::build(&workspace).map(|_| ()),
        Task::BuildEbpf { clippy: true } => ebpf::clippy(&workspace),
        Task::Build => build(&workspace),
        Task::Fmt { check: false } => lint::format(&workspace, lint::Format::Write),
        Task::Fmt { check: true } => lint::format(&workspace, lint::Format::Check),
        Task::Clippy => lint::clippy(&workspace),
        Task::Tidy => tidy::run(&workspace, &commands()),
        Task::Check => return Ok(test::check(&workspace, &commands())),
        Task::Test(options) => return Ok(test::run(&workspace, &options, &commands())),
        Task::Arm64 => return Ok(arm64::run(&workspace)),
        Task::Vm(arguments) => return program::run(&workspace, "tacit-vm", &arguments),
        Task::Image(arguments) => return program::run(&workspace, "xtask-image", &arguments),
        Task::Kube(arguments) => return program::run(&workspace, "tacit-kube", &arguments),
        Task::Fuzz(options) => fuzz::run(&workspace, &options),
        Task::Demo(options) => demo::run(&workspace, &options),
        Task::Bench(arguments) => return program::run(&workspace, "tacit-bench", &arguments),
        Task::Interop(arguments) => return program::run(&workspace, "tacit-interop", &arguments),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// The names of all commands, so that documentation can be held to them.
fn commands() -> Vec<String> {
    Args::command().get_subcommands().map(|command| command.get_name().to_owned()).collect()
}

fn build(workspace: &Workspace) -> Result<()> {
    let mut progress = Progress::new(2);
    progress.step("kernel side", || ebpf::build(workspace))?;
    progress.step("agent (release)", || workspace.build(Profile::Release, &["tacit"]))?;
    eprintln!("{}", workspace.agent(Profile::Release).display());
    Ok(())
}
