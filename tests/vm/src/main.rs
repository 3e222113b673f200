//! `cargo xtask vm`: the tests of whole nodes, inside virtual machines that run other kernels.
//!
//! The very test programs that run on the host run here; nothing is forked. The machine is emulated, so tests that move
//! much data divide their sizes by [`SCALE`]. A kernel that is too old is booted as well: there the agent must refuse to
//! start with exit code 78, say what is missing, and leave nothing behind.

#![forbid(unsafe_code)]

mod initramfs;
mod jobs;
mod kernels;
mod machine;
mod outcome;
mod pair;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use xtask_support::{
    ebpf,
    progress::{self, Progress, Style},
    report::Report,
    setup,
    test_programs::{self, TestProgram},
    workspace::{Profile, Workspace},
};

use initramfs::Initramfs;
use jobs::Job;
use kernels::{Expected, Kernel, MATRIX, Unpacked};
use machine::Machine;
use outcome::{Outcome, json, table};

/// Divisor for the sizes of large tests: an emulated machine is some twenty times slower.
const SCALE: u32 = 20;
const REFUSAL: &str = include_str!("refusal.sh");

/// Run the tests of whole nodes inside virtual machines with other kernels
#[derive(Parser)]
#[command(name = "cargo xtask vm", bin_name = "cargo xtask vm")]
struct Options {
    /// Kernels: 5.10, 6.1, 6.12, newest; all of them when none is named
    kernels: Vec<String>,
    /// Boot this kernel and give a prompt in it
    #[arg(long, value_name = "KERNEL")]
    shell: Option<String>,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    test: Option<String>,
    /// Run only the test with two machines, of the first and the last kernel named
    #[arg(long)]
    two_nodes: bool,
    /// Go on with the next kernel after one has failed
    #[arg(long)]
    keep_going: bool,
    /// Write the table to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Be a part of `cargo xtask test`: write the counts to this file instead of a table. A failed test is no error then
    #[arg(long, value_name = "FILE", hide = true, conflicts_with_all = ["shell", "test", "two_nodes", "json"])]
    report: Option<PathBuf>,
}

/// The files of a guest.
struct Payload {
    agent: PathBuf,
    attack: PathBuf,
    peer: PathBuf,
    suites: Vec<(String, PathBuf)>,
}

fn main() -> ExitCode {
    progress::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let workspace = &Workspace::find()?;
    if let Some(file) = &options.report {
        return in_test(workspace, &options.kernels, file);
    }
    if let Some(label) = &options.shell {
        return shell(workspace, label);
    }
    let chosen = choose(&options.kernels)?;
    let (payload, unpacked) = prepare(workspace, &chosen)?;
    let machines: Vec<_> = chosen.into_iter().zip(&unpacked).collect();
    let mut outcomes = Vec::new();
    if !options.two_nodes {
        let (all, filter) = (jobs::whole(&machines, &payload), options.test.as_deref());
        outcomes = jobs::run(all, &payload, filter, !options.keep_going, &mut Report::default())?;
    }
    if options.test.is_none() && outcomes.iter().all(|o| o.failed == 0 || options.keep_going) {
        outcomes.extend(two_nodes(&machines, &payload, &mut Report::default())?);
    }
    println!("{}", table(&outcomes, Style::of_stdout()));
    if let Some(file) = &options.json {
        fs::write(file, json(&outcomes)).with_context(|| format!("cannot write {}", file.display()))?;
    }
    ensure!(outcomes.iter().any(|o| o.passed > 0), "no test ran");
    let failed: u64 = outcomes.iter().map(|o| o.failed).sum();
    ensure!(failed == 0, "{failed} failed");
    Ok(())
}

/// The part of `cargo xtask test`: failures are counted in the report that is written to `file`.
///
/// # Errors
/// Fails if a machine could not be booted. The file has the counts from before all the same.
fn in_test(workspace: &Workspace, kernels: &[String], file: &Path) -> Result<()> {
    let mut report = Report::default();
    let outcome = boot_all(workspace, kernels, &mut report);
    fs::write(file, report.to_text()).with_context(|| format!("cannot write {}", file.display()))?;
    outcome
}

fn boot_all(workspace: &Workspace, kernels: &[String], report: &mut Report) -> Result<()> {
    let chosen = choose(kernels)?;
    let (payload, unpacked) = prepare(workspace, &chosen)?;
    let machines: Vec<_> = chosen.into_iter().zip(&unpacked).collect();
    let (all, notes) = jobs::of_test(&machines, &payload);
    notes.into_iter().for_each(|note| report.note(note));
    jobs::run(all, &payload, None, false, report)?;
    two_nodes(&machines, &payload, report).map(drop)
}

/// Two machines with the first and the last supported kernel; nothing when there are no two.
fn two_nodes(
    machines: &[(&Kernel, &Unpacked)],
    payload: &Payload,
    report: &mut Report,
) -> Result<Option<Outcome>> {
    let supported: Vec<_> = machines.iter().filter(|(k, _)| k.expected == Expected::Supported).collect();
    let [first, .., last] = supported.as_slice() else { return Ok(None) };
    pair::run([**first, **last], payload, report).map(Some)
}

fn choose(labels: &[String]) -> Result<Vec<&'static Kernel>> {
    if labels.is_empty() {
        return Ok(MATRIX.iter().collect());
    }
    labels.iter().map(|label| find(label)).collect()
}

fn find(label: &str) -> Result<&'static Kernel> {
    let known: Vec<&str> = MATRIX.iter().map(|k| k.label).collect();
    let found = MATRIX.iter().find(|k| k.label == label);
    found.with_context(|| format!("no kernel {label:?}: there are {}", known.join(", ")))
}

fn prepare(workspace: &Workspace, chosen: &[&Kernel]) -> Result<(Payload, Vec<Unpacked>)> {
    let mut progress = Progress::new(4);
    progress.step("what virtual machines need", || setup::ensure_vm(workspace))?;
    let unpacked = progress.step("kernels", || kernels::ensure(workspace, chosen))?;
    progress.step("agent and attack suite", || {
        ebpf::build(workspace)?;
        workspace.build(Profile::Fast, &["tacit", "tacit-attack"])
    })?;
    let payload = progress.step("tests", || payload(workspace))?;
    Ok((payload, unpacked))
}

/// The tests of whole nodes, with the programs that they start.
fn payload(workspace: &Workspace) -> Result<Payload> {
    let of_nodes = |test: &TestProgram| test.package == Path::new("tests") && test.is_integration();
    let tests = test_programs::build(workspace, &[])?.into_iter().filter(of_nodes);
    let suites: Vec<(String, PathBuf)> = tests.map(|test| (test.name, test.path)).collect();
    ensure!(!suites.is_empty(), "cargo built no tests of whole nodes");
    let peer = workspace.program(Profile::Fast, "tacit-peer");
    Ok(Payload {
        agent: workspace.agent(Profile::Fast),
        attack: workspace.attack(Profile::Fast),
        peer,
        suites,
    })
}

/// Boots once and counts the results of the suites.
fn one(job: &Job<'_>, payload: &Payload, filter: Option<&str>, report: &mut Report) -> Result<Outcome> {
    let &Job { kernel, unpacked, .. } = job;
    let begin = Instant::now();
    let work = Work::new(kernel.label)?;
    let image = image(job, payload, filter, &work.0)?;
    let (mut boot, before) = ("?".to_owned(), report.totals());
    report.begin();
    let guest =
        Machine { kernel: &unpacked.folder.join("vmlinuz"), initramfs: &image, work: &work.0, wire: None };
    let ended = watched(&guest, kernel.label, report, &mut boot);
    let note = match (&ended, kernel.expected) {
        (Err(error), _) => format!("{error:#}"),
        (Ok(0), Expected::Refused) => "refused as intended".to_owned(),
        (Ok(_), _) => String::new(),
    };
    report.end(&format!("kernel {}", kernel.label), matches!(ended, Ok(0)));
    let label = kernel.label.to_owned();
    let release = unpacked.release.clone();
    Ok(Outcome {
        label,
        release,
        boot,
        note,
        took: begin.elapsed(),
        ..Outcome::counted(before, report.totals())
    })
}

/// Boots once. Prints the guest's console and adds its results to the report. `boot` receives the time to the first process.
fn watched(guest: &Machine<'_>, label: &str, report: &mut Report, boot: &mut String) -> Result<i32> {
    guest.run(|line| {
        println!("{label:>6} | {line}");
        report.line(line);
        if let Some(told) = line.strip_prefix("vm: booted ").and_then(|rest| rest.split_once(" in ")) {
            told.1.clone_into(boot);
        }
    })
}

fn image(job: &Job<'_>, payload: &Payload, filter: Option<&str>, work: &Path) -> Result<PathBuf> {
    let &Job { kernel, unpacked, ref suites } = job;
    let root = Initramfs::new(work, unpacked)?;
    root.stripped(&payload.agent, "t/tacit")?;
    match kernel.expected {
        Expected::Refused => root.text("payload/run", &REFUSAL.replace("@LABEL@", kernel.label))?,
        Expected::Supported => {
            root.stripped(&payload.attack, "t/tacit-attack")?;
            root.stripped(&payload.peer, "t/tacit-peer")?;
            for (name, program) in suites {
                root.stripped(program, &format!("t/deps/{name}"))?;
            }
            root.text("payload/run", &script(kernel.label, suites, filter)?)?;
        }
    }
    let image = work.join("initramfs");
    root.pack(&image)?;
    Ok(image)
}

/// Runs every suite, each announced as cargo does, so that the same report reads it.
fn script(label: &str, suites: &[&(String, PathBuf)], filter: Option<&str>) -> Result<String> {
    let filter = filter.unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    ensure!(filter.chars().all(plain), "{filter:?} is no part of a test's name");
    let mut text = format!("export TACIT_BIN=/t/tacit TACIT_TEST_SCALE={SCALE}\nfailed=0\n");
    for (name, _) in suites {
        text += &format!(
            "echo 'Running {name} ({label}:{name}-0)'\n/t/deps/{name} --include-ignored --test-threads=1 {filter} 2>&1 || failed=1\n"
        );
    }
    Ok(text + "exit $failed\n")
}

fn shell(workspace: &Workspace, label: &str) -> Result<()> {
    let kernel = find(label)?;
    let (payload, unpacked) = prepare(workspace, &[kernel])?;
    let Some(unpacked) = unpacked.first() else { bail!("no kernel {label}") };
    let work = Work::new(label)?;
    let root = Initramfs::new(&work.0, unpacked)?;
    root.stripped(&payload.agent, "usr/bin/tacit")?;
    root.text("payload/shell", "")?;
    let image = work.0.join("initramfs");
    root.pack(&image)?;
    Machine { kernel: &unpacked.folder.join("vmlinuz"), initramfs: &image, work: &work.0, wire: None }.shell()
}

/// A folder that is removed again.
struct Work(PathBuf);

impl Work {
    fn new(label: &str) -> Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Relaxed);
        let folder = env::temp_dir().join(format!("tacit-vm-{label}-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_cannot_become_a_command() {
        assert!(script("6.1", &[], Some("x; poweroff")).is_err());
        assert!(script("6.1", &[], Some("with_tacit::ipv4")).is_ok());
    }

    #[test]
    fn an_unknown_kernel_is_refused_with_those_that_there_are() {
        let error = choose(&["2.6".to_owned()]).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("5.10, 6.1, 6.12, newest"), "{error}");
    }
}
