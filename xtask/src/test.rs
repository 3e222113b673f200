//! `cargo xtask test`: every check and every test, and one line at the end that counts them.
//!
//! Three kinds of suites:
//! - checks (rules, format, lints): a failed one counts as one failure, a passed one as nothing;
//! - unit tests of all crates, run as the caller;
//! - tests that make network namespaces (packages below `tests/`), run as root. Each of them is
//!   `#[ignore = "needs root"]`, so that where they cannot run they are reported as skipped.
//!
//! A check that fails does not stop the tests; a build that fails does, since there is nothing to test then.

pub(crate) mod stream;

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::Path,
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
    setup,
    test_programs::{self, TestProgram},
    workspace::{Profile, Workspace},
};

use crate::{lint, program, tidy};

/// Folders of packages whose tests need namespaces, cgroups and BPF.
const PRIVILEGED: [&str; 2] = ["tests", "tests/topology"];

/// The package that runs tests of whole nodes on other kernels.
const VIRTUAL_MACHINES: &str = "tacit-vm";

/// Kernels that it boots: the oldest supported one that Debian has, and the newest.
const KERNELS: [&str; 2] = ["6.1", "newest"];

/// The folder of the package whose unit tests load programs into the kernel. Its other unit tests are in the same program.
const KERNEL: &str = "agent/kernel";

/// The choice of tests.
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

/// The ability to run tests that need root.
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
    let steps = if options.quick { 7 } else { 12 };
    let mut session =
        Session { workspace, options, progress: Progress::new(steps), report: Report::default() };
    session.all(commands);
    conclude(session.report)
}

/// The loop of a developer: rules, format, lints and unit tests, without root and without other programs.
pub(crate) fn check(workspace: &Workspace, commands: &[String]) -> ExitCode {
    let options = Options { unprivileged: true, ..Options::default() };
    let mut session =
        Session { workspace, options: &options, progress: Progress::new(6), report: Report::default() };
    session.inner_loop(commands);
    conclude(session.report)
}

pub(crate) fn conclude(mut report: Report) -> ExitCode {
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
            let programs = setup::ensure_tests(workspace)?.path()?;
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
        self.check("agent, attack suite, CNI plugin", || {
            workspace.build(Profile::Fast, &["tacit", "tacit-attack"])?;
            workspace.build_cni(Profile::Fast)
        })?;
        let tests = self.check("build the tests", || test_programs::build(workspace, &[]))?;
        self.unit_tests(&tests);
        self.kernel_tests(&tests, &privileged);
        self.privileged_tests(&tests, programs, &privileged);
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
        // Tests of whole nodes need root; building them takes longer than all others run.
        let selection = ["--lib", "--bins", "--test", "properties"];
        let tests = self.check("build the tests", || test_programs::build(workspace, &selection))?;
        self.run_tests("unit tests", &chosen(&tests, |_| true), &Start::default());
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

    fn unit_tests(&mut self, tests: &[TestProgram]) {
        let unit = |program: &TestProgram| !is_of(program, &PRIVILEGED) && !is_of(program, &[KERNEL]);
        self.run_tests("unit tests", &chosen(tests, unit), &Start::default());
    }

    /// Unit tests of which some need root.
    fn kernel_tests(&mut self, tests: &[TestProgram], privileged: &Privileged) {
        let tests = chosen(tests, |program| is_of(program, &[KERNEL]));
        match privileged {
            Privileged::Skip(_) => {
                self.run_tests("unit tests of agent/kernel (without root)", &tests, &Start::default());
            }
            Privileged::Run => {
                let start = Start {
                    as_root: true,
                    environment: tacit_environment(),
                    harness: &["--include-ignored"],
                };
                self.run_tests("unit tests of agent/kernel (as root)", &tests, &start);
            }
        }
    }

    fn privileged_tests(&mut self, tests: &[TestProgram], programs: OsString, privileged: &Privileged) {
        let tests = chosen(tests, |program| is_of(program, &PRIVILEGED));
        let agent = self.workspace.agent(Profile::Fast);
        let mut environment = tacit_environment();
        environment.push(("TACIT_BIN".into(), agent.into_os_string()));
        environment.push(("TACIT_PROGRAMS".into(), programs));
        match privileged {
            Privileged::Skip(why) => {
                self.report.note(format!("tests that need root were skipped: {why}"));
                let start = Start { environment, ..Start::default() };
                self.run_tests("tests of whole nodes (without root)", &tests, &start);
            }
            Privileged::Run => {
                // They share the machine's cgroups and bpffs, and measure what crosses a wire: one at a time.
                let harness = &["--include-ignored", "--test-threads=1"];
                let start = Start { as_root: true, environment, harness };
                self.run_tests("tests of whole nodes (as root)", &tests, &start);
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

    fn run_tests(&mut self, name: &str, tests: &[&TestProgram], start: &Start<'_>) {
        let color = if Style::of_stdout() == Style::Terminal { "--color=always" } else { "--color=never" };
        let (workspace, filters, report) = (self.workspace, &self.options.filters, &mut self.report);
        report.begin();
        let run = || {
            let mut failed = 0;
            for test in tests {
                let shown = running(test);
                println!("{shown}");
                report.line(&shown);
                let mut command = start.command(workspace, test)?;
                command.args(start.harness).arg(color).args(filters);
                let status = stream::run(&mut command, |line| report.line(line))?;
                failed += u32::from(!status.success());
            }
            ensure!(failed == 0, "test programs that failed: {failed}");
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

/// The start of test programs.
#[derive(Default)]
struct Start<'a> {
    as_root: bool,
    environment: Vec<(OsString, OsString)>,
    /// Options of the test harness.
    harness: &'a [&'a str],
}

impl Start<'_> {
    /// The program in its package's folder, where `cargo test` starts it too.
    fn command(&self, workspace: &Workspace, test: &TestProgram) -> Result<Command> {
        let mut command = if self.as_root && !is_root()? {
            // sudo passes no environment on.
            let assigned = self.environment.iter().map(|(name, value)| {
                let mut text = name.clone();
                text.push("=");
                text.push(value);
                text
            });
            let mut sudo = Command::new("sudo");
            sudo.arg("env").args(assigned).arg(&test.path);
            sudo
        } else {
            Command::new(&test.path)
        };
        command.envs(self.environment.iter().cloned()).current_dir(workspace.root().join(&test.package));
        Ok(command)
    }
}

/// The line by which cargo announces a test program.
pub(crate) fn running(test: &TestProgram) -> String {
    let what = if test.is_integration() { "" } else { "unittests " };
    format!("     Running {what}{} ({})", test.source.display(), test.path.display())
}

fn chosen(tests: &[TestProgram], is: impl Fn(&TestProgram) -> bool) -> Vec<&TestProgram> {
    tests.iter().filter(|test| is(test)).collect()
}

fn is_of(test: &TestProgram, packages: &[&str]) -> bool {
    packages.iter().any(|package| test.package == Path::new(package))
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

/// Returns the ability of this machine to run the privileged tests.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_announced_as_cargo_does() {
        let test = |source: &str| TestProgram {
            package: "agent/core".into(),
            source: source.into(),
            name: "tacit_core".to_owned(),
            path: "/t/fast/deps/tacit_core-0f3c".into(),
        };
        assert_eq!(
            running(&test("src/lib.rs")),
            "     Running unittests src/lib.rs (/t/fast/deps/tacit_core-0f3c)"
        );
        assert_eq!(
            running(&test("tests/flows.rs")),
            "     Running tests/flows.rs (/t/fast/deps/tacit_core-0f3c)"
        );
    }
}
