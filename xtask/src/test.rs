//! `cargo xtask test`: every check and every test, and one line at the end that counts them.
//!
//! Three kinds of suites:
//! - checks (rules, format, lints): a failed one counts as one failure, a passed one as nothing;
//! - unit tests of all crates, run as the caller;
//! - tests that make network namespaces (packages below `tests/`), run as root. Each of them is
//!   `#[ignore = "needs root"]`, so that where they cannot run they are reported as skipped.
//!
//! A check that fails does not stop the tests; a build that fails does, since there is nothing to test then.

mod stream;

use std::{
    ffi::{OsStr, OsString},
    fs,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{
    command::{self, succeeds, tacit_environment},
    ebpf,
    privilege::{as_root, is_root},
    progress::{self, Progress, Style},
    report::Report,
    setup::{self, Programs},
    workspace::{Profile, Workspace},
};

use crate::{lint, program, tidy};

/// Packages whose tests need namespaces, cgroups and BPF.
const PRIVILEGED: [&str; 2] = ["tacit-tests", "tacit-topology"];

/// The package that runs tests of whole nodes on other kernels.
const VIRTUAL_MACHINES: &str = "tacit-vm";

/// Kernels that it boots: the oldest supported one that Debian has, and the newest.
const KERNELS: [&str; 2] = ["6.1", "newest"];

/// The package whose unit tests load programs into the kernel. Its other unit tests are in the same program.
const KERNEL: &str = "tacit-kernel";

/// What to run.
#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Run only tests whose name contains one of these
    filters: Vec<String>,
    /// Leave out rules, format, lints and other kernels
    #[arg(long)]
    quick: bool,
    /// Run the attack suite alone, and say what became of each attack
    #[arg(long)]
    attack: bool,
    /// With --attack: as JSON
    #[arg(long, requires = "attack")]
    json: bool,
    /// Leave out what needs root; those tests are reported as skipped
    #[arg(long)]
    unprivileged: bool,
}

/// How far the tests that need root can go.
enum Privileged {
    Run,
    /// With the reason.
    Skip(String),
}

/// Runs everything; no success when anything failed or nothing ran. The count is the last line that is printed.
pub(crate) fn run(workspace: &Workspace, options: &Options, commands: &[String]) -> ExitCode {
    if options.attack {
        return attack(workspace, options.json);
    }
    let steps = if options.quick { 6 } else { 11 };
    let mut session =
        Session { workspace, options, progress: Progress::new(steps), report: Report::default() };
    session.all(commands);
    conclude(session.report)
}

/// The loop of a developer: rules, format, lints and unit tests, without root and without other programs.
pub(crate) fn check(workspace: &Workspace, commands: &[String]) -> ExitCode {
    let options = Options { unprivileged: true, ..Options::default() };
    let mut session =
        Session { workspace, options: &options, progress: Progress::new(5), report: Report::default() };
    session.inner_loop(commands);
    conclude(session.report)
}

fn conclude(mut report: Report) -> ExitCode {
    let verdict = report.verdict();
    if let Err(problem) = &verdict {
        report.note(problem.to_string());
    }
    print!("{}", report.table(Style::of_stdout()));
    println!("{}", report.summary());
    if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The attack suite alone; its own words, and its own exit code.
fn attack(workspace: &Workspace, json: bool) -> ExitCode {
    let run = || -> Result<()> {
        setup::ensure_all(workspace)?;
        ebpf::build(workspace)?;
        workspace.build(Profile::Fast, &["tacit", "tacit-attack"])?;
        let agent = workspace.agent(Profile::Fast);
        let mut arguments = vec![OsStr::new("doctor"), OsStr::new("--attack")];
        if json {
            arguments.extend([OsStr::new("-o"), OsStr::new("json")]);
        }
        let why = "for the attacks, which make network namespaces, cgroups and BPF programs";
        let status = as_root(why, &[], &agent, &arguments)?.status().context("start the agent's program")?;
        ensure!(status.success(), "the attack suite: {status}");
        Ok(())
    };
    progress::exit_code(run())
}

struct Session<'a> {
    workspace: &'a Workspace,
    options: &'a Options,
    progress: Progress,
    report: Report,
}

impl Session<'_> {
    /// `None` when what follows cannot be run.
    fn all(&mut self, commands: &[String]) -> Option<()> {
        let (workspace, unprivileged) = (self.workspace, self.options.unprivileged);
        // First, since sudo may ask for a password: not after minutes of building.
        let (programs, privileged) = self.check("what is needed", || {
            let programs = setup::ensure_all(workspace)?;
            Ok((programs, ability(unprivileged)?))
        })?;
        if !self.options.quick {
            self.check("rules of the repository", || tidy::run(workspace, commands));
            self.check("format", || lint::format(workspace, lint::Format::Check));
        }
        self.check("kernel side", || ebpf::build(workspace))?;
        if !self.options.quick {
            self.check("lints", || lint::host(workspace));
            self.check("lints of the kernel side", || ebpf::clippy(workspace));
        }
        self.check("agent and attack suite", || workspace.build(Profile::Fast, &["tacit", "tacit-attack"]))?;
        self.unit_tests();
        self.kernel_tests(&privileged);
        self.privileged_tests(&programs, &privileged);
        self.other_kernels();
        Some(())
    }

    /// `None` when what follows cannot be run.
    fn inner_loop(&mut self, commands: &[String]) -> Option<()> {
        let workspace = self.workspace;
        self.check("rules of the repository", || tidy::run(workspace, commands));
        self.check("format", || lint::format(workspace, lint::Format::Check));
        self.check("kernel side", || ebpf::build(workspace))?;
        self.check("lints", || lint::host(workspace));
        let mut cargo = self.cargo_test();
        // Tests of whole nodes need root; building them takes longer than all others run.
        cargo.args(["--workspace", "--exclude", ebpf::PACKAGE, "--lib", "--bins", "--test", "properties"]);
        self.run_tests("unit tests", cargo, &[]);
        Some(())
    }

    /// A step that passes or fails as a whole.
    fn check<T>(&mut self, name: &str, run: impl FnOnce() -> Result<T>) -> Option<T> {
        let begin = Instant::now();
        let outcome = self.progress.step(name, run);
        self.report.part(name, begin.elapsed());
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                progress::error(&error);
                self.report.failed_check(name);
                None
            }
        }
    }

    fn unit_tests(&mut self) {
        let mut cargo = self.cargo_test();
        cargo.args(["--workspace", "--exclude", ebpf::PACKAGE]);
        for package in PRIVILEGED {
            cargo.args(["--exclude", package]);
        }
        cargo.args(["--exclude", KERNEL]);
        self.run_tests("unit tests", cargo, &[]);
    }

    /// Unit tests of which some need root.
    fn kernel_tests(&mut self, privileged: &Privileged) {
        let mut cargo = self.cargo_test();
        cargo.args(["--package", KERNEL]);
        match privileged {
            Privileged::Skip(_) => self.run_tests("unit tests of tacit-kernel (without root)", cargo, &[]),
            Privileged::Run => {
                through_sudo(&mut cargo, &tacit_environment());
                self.run_tests("unit tests of tacit-kernel (as root)", cargo, &["--include-ignored"]);
            }
        }
    }

    fn privileged_tests(&mut self, programs: &Programs, privileged: &Privileged) {
        let mut cargo = self.cargo_test();
        for package in PRIVILEGED {
            cargo.args(["--package", package]);
        }
        let agent = self.workspace.agent(Profile::Fast);
        let mut environment = tacit_environment();
        environment.push(("TACIT_BIN".into(), agent.into_os_string()));
        environment.push(("TACIT_NGINX".into(), programs.nginx.clone().into_os_string()));
        cargo.envs(environment.iter().cloned());
        match privileged {
            Privileged::Skip(why) => {
                self.report.note(format!("tests that need root were skipped: {why}"));
                self.run_tests("tests of whole nodes (without root)", cargo, &[]);
            }
            Privileged::Run => {
                through_sudo(&mut cargo, &environment);
                // They share the machine's cgroups and bpffs, and measure what crosses a wire: one at a time.
                self.run_tests(
                    "tests of whole nodes (as root)",
                    cargo,
                    &["--include-ignored", "--test-threads=1"],
                );
            }
        }
    }

    /// The tests of whole nodes once more, in virtual machines; root is not needed for them.
    fn other_kernels(&mut self) {
        if self.options.quick || !self.options.filters.is_empty() {
            return self
                .report
                .note(format!("not run on kernels {}: see `cargo xtask vm`", KERNELS.join(", ")));
        }
        if !has_kernels() {
            return self.report.note("not run on other kernels: that needs Debian on x86_64".to_owned());
        }
        let (workspace, report) = (self.workspace, &mut self.report);
        let name = format!("tests of whole nodes on kernels {}", KERNELS.join(", "));
        let begin = Instant::now();
        let outcome = self.progress.step(&name, || on_kernels(workspace, report));
        self.report.part(&name, begin.elapsed());
        if let Err(error) = outcome {
            progress::error(&error);
            self.report.failed_check(&name);
        }
    }

    fn cargo_test(&self) -> Command {
        let mut cargo = self.workspace.cargo("test");
        cargo.args(["--no-fail-fast", "--profile", Profile::Fast.name(), "--target-dir"]);
        cargo.arg(self.workspace.target());
        cargo
    }

    fn run_tests(&mut self, name: &str, mut cargo: Command, harness: &[&str]) {
        let color = if Style::of_stdout() == Style::Terminal { "--color=always" } else { "--color=never" };
        cargo.args([color, "--"]).args(harness).arg(color).args(&self.options.filters);
        let report = &mut self.report;
        report.begin();
        let run = || {
            let status = stream::run(&mut cargo, |line| report.line(line))?;
            ensure!(status.success(), "cargo test: {status}");
            Ok(())
        };
        let begin = Instant::now();
        let outcome = self.progress.step(name, run);
        self.report.end(name, outcome.is_ok());
        self.report.part(name, begin.elapsed());
        if let Err(error) = outcome {
            progress::error(&error);
        }
    }
}

/// Are there kernels to be had? They are Debian's, for x86_64.
fn has_kernels() -> bool {
    cfg!(target_arch = "x86_64") && succeeds(Command::new("apt-get").arg("--version"))
}

/// Boots the kernels; failures of tests are counted in the report.
fn on_kernels(workspace: &Workspace, report: &mut Report) -> Result<()> {
    let counts = workspace.target().join("vm-report");
    if counts.exists() {
        fs::remove_file(&counts).with_context(|| format!("cannot remove {}", counts.display()))?;
    }
    let mut machines = program::command(workspace, VIRTUAL_MACHINES)?;
    let ran = command::run(machines.arg("--report").arg(&counts).args(KERNELS));
    // One that ended early has counted what it ran.
    if let Ok(text) = fs::read_to_string(&counts) {
        report.append(Report::parse(&text)?);
    }
    ran
}

/// Whether this machine lets us make what the privileged tests are made of.
fn ability(unprivileged: bool) -> Result<Privileged> {
    if unprivileged {
        return Ok(Privileged::Skip("--unprivileged".to_owned()));
    }
    let isolate = ["--net", "--mount", "true"].map(OsStr::new);
    let why = "for the tests, which make network namespaces, cgroups and BPF programs";
    let mut probe = match as_root(why, &[], "unshare", &isolate) {
        Ok(probe) => probe,
        Err(error) => return Ok(Privileged::Skip(error.to_string())),
    };
    // sudo asks on the terminal itself, so silence on the standard streams hides no prompt.
    if !succeeds(&mut probe) {
        return Ok(Privileged::Skip(
            "not allowed to make a network namespace (`unshare --net --mount true`)".to_owned(),
        ));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    if !mounts.lines().any(|mount| mount.split(' ').nth(2) == Some("cgroup2")) {
        return Ok(Privileged::Skip("no cgroup v2 hierarchy is mounted".to_owned()));
    }
    Ok(Privileged::Run)
}

/// cargo builds as the caller; only the finished test programs are started through sudo, where that is needed.
fn through_sudo(cargo: &mut Command, environment: &[(OsString, OsString)]) {
    if !is_root().unwrap_or(false) {
        cargo.arg("--config").arg(sudo_runner(environment));
    }
}

/// cargo's setting that starts every test program through sudo with the environment stated.
fn sudo_runner(environment: &[(OsString, OsString)]) -> String {
    let assignments =
        environment.iter().map(|(name, value)| format!("{}={}", name.display(), value.display()));
    let words = ["sudo", "env"].map(str::to_owned).into_iter().chain(assignments);
    let quoted: Vec<String> = words.map(|word| format!("{word:?}")).collect();
    format!("target.'cfg(all())'.runner=[{}]", quoted.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_started_through_sudo_with_their_environment() {
        let runner = sudo_runner(&[("TACIT_BIN".into(), "/a b/tacit".into())]);
        assert_eq!(runner, "target.'cfg(all())'.runner=[\"sudo\",\"env\",\"TACIT_BIN=/a b/tacit\"]");
    }
}
