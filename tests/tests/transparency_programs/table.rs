//! Lines of the table, and the comparison of a run without Tacit with one with it.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use nix::sys::signal::Signal;
use tacit_tests::{Mesh, fresh_port};
use tacit_topology::{Process, until};

use crate::stage::{self, Scene};

/// Ports that belong to one line.
const PORTS: u16 = 4;
/// Lines that run at a time in each mesh. Many of them wait for a limit.
const AT_A_TIME: usize = 4;

/// One line: a program with its options, an event, and what the program then shows.
pub(crate) struct Line {
    /// With its options.
    program: String,
    event: &'static str,
    run: Run,
    /// A part of what it shows without Tacit. Without it, a program that fails for another reason would be equal in both runs.
    shows: &'static str,
    meant: Option<Meant>,
}

enum Run {
    /// A command in pod `client`; see [`Scene::fill`] for the names in braces.
    Command(Vec<&'static str>),
    Scene(fn(&Scene<'_>) -> Result<String>),
}

/// A difference that is meant.
struct Meant {
    /// A part of what the program shows with Tacit.
    shows: &'static str,
    reason: &'static str,
}

impl Line {
    /// A line of one command in pod `client`.
    pub(crate) fn command(event: &'static str, shows: &'static str, words: &'static [&'static str]) -> Self {
        Self { program: words.join(" "), event, run: Run::Command(words.to_vec()), shows, meant: None }
    }

    /// A line of a Python script with its arguments.
    pub(crate) fn python(
        event: &'static str,
        shows: &'static str,
        script: &'static str,
        words: &'static [&'static str],
    ) -> Self {
        let program = format!("python3 {}", words.join(" "));
        let words = [&["python3", "-c", script], words].concat();
        Self { program, event, run: Run::Command(words), shows, meant: None }
    }

    /// A line that needs more than a command.
    pub(crate) fn scene(
        program: &'static str,
        event: &'static str,
        shows: &'static str,
        run: fn(&Scene<'_>) -> Result<String>,
    ) -> Self {
        Self { program: program.to_owned(), event, run: Run::Scene(run), shows, meant: None }
    }

    /// With Tacit the program shows something else.
    pub(crate) fn but(self, shows: &'static str, reason: &'static str) -> Self {
        Self { meant: Some(Meant { shows, reason }), ..self }
    }

    fn run(&self, scene: &Scene<'_>) -> Result<String> {
        match &self.run {
            Run::Command(words) => scene.shown("client", words),
            Run::Scene(run) => run(scene),
        }
    }

    /// Prints a line that is as it should be, and returns the others.
    fn report(&self, without: &Ran, with: &Ran) -> Option<String> {
        let name = format!("{} | {}", self.program.escape_debug(), self.event);
        let problem = self.judge(&without.shown, &with.shown);
        if problem.is_none() {
            let kind = self.meant.as_ref().map_or("same", |_| "meant");
            let shown = with.shown.as_deref().unwrap_or_default().escape_debug();
            println!(
                "{kind} | {name} | {shown} | {} ms, {} ms",
                without.took.as_millis(),
                with.took.as_millis()
            );
        }
        problem.map(|problem| format!("{name}: {problem}"))
    }

    /// Returns what is wrong with the outputs of both runs.
    fn judge(&self, without: &Result<String>, with: &Result<String>) -> Option<String> {
        let (without, with) = match (without, with) {
            (Ok(without), Ok(with)) => (without, with),
            (without, with) => return Some(format!("without Tacit: {without:?}\n   with Tacit: {with:?}")),
        };
        let problem = match &self.meant {
            _ if !without.contains(self.shows) => format!("without Tacit it does not show {:?}", self.shows),
            None if without == with => return None,
            None => "it shows something else with Tacit".to_owned(),
            Some(meant) if without == with => format!("the difference is gone: {}", meant.reason),
            Some(meant) if with.contains(meant.shows) => return None,
            Some(meant) => format!("with Tacit it does not show {:?}", meant.shows),
        };
        Some(format!("{problem}\nwithout Tacit: {without:?}\n   with Tacit: {with:?}"))
    }
}

/// A line in one mesh.
struct Ran {
    shown: Result<String>,
    took: Duration,
}

/// Runs all lines in both meshes at a time, with servers that `servers` starts in each. Fails with all lines that differ.
pub(crate) fn compare(lines: &[Line], servers: fn(&Scene<'_>) -> Result<Vec<Process>>) -> Result<()> {
    let common = ports();
    let lines: Vec<(&Line, u16)> = lines.iter().map(|line| (line, ports())).collect();
    let run = |mesh: &'static Mesh| -> Result<Vec<Ran>> {
        let mut servers = servers(&Scene::new(mesh, common)?)?;
        let ran = run_all(mesh, &lines);
        servers.iter_mut().try_for_each(stop)?;
        ran
    };
    let meshes = [stage::without_tacit()?, stage::with_tacit()?];
    let [without, with] = thread::scope(|scope| {
        let threads = meshes.map(|mesh| scope.spawn(move || run(mesh)));
        threads.map(|thread| thread.join().map_err(|_| anyhow!("the run of a mesh has panicked")))
    });
    let (without, with) = (without??, with??);
    let judged = lines.iter().zip(without.iter().zip(&with));
    let problems: Vec<String> =
        judged.filter_map(|((line, _), (without, with))| line.report(without, with)).collect();
    ensure!(problems.is_empty(), "{} of {} lines:\n{}", problems.len(), lines.len(), problems.join("\n\n"));
    Ok(())
}

/// Time after which a server that has not ended gets another signal.
const IGNORED: Duration = Duration::from_secs(5);

/// Ends a server as an operator does. PostgreSQL leaves shared memory behind when it is killed, and waits for its clients at SIGTERM. Others
/// ignore SIGINT if the tests were started in the background of a shell.
fn stop(server: &mut Process) -> Result<()> {
    server.signal(Signal::SIGINT)?;
    let asked = Instant::now();
    let mut is_asked_again = false;
    until("the end of a server", || {
        if server.ended()?.is_some() {
            return Ok(Some(()));
        }
        if !is_asked_again && asked.elapsed() >= IGNORED {
            server.signal(Signal::SIGTERM)?;
            is_asked_again = true;
        }
        Ok(None)
    })
}

/// Runs lines in one mesh, [`AT_A_TIME`] at a time.
fn run_all(mesh: &Mesh, lines: &[(&Line, u16)]) -> Result<Vec<Ran>> {
    let next = AtomicUsize::new(0);
    let lane = || {
        let mut ended = Vec::new();
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some((line, ports)) = lines.get(place) else { return ended };
            let begin = Instant::now();
            let shown = Scene::new(mesh, *ports).and_then(|scene| line.run(&scene));
            ended.push((place, Ran { shown, took: begin.elapsed() }));
        }
    };
    let ended: Vec<_> = thread::scope(|scope| {
        let lanes: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let mut all = Vec::new();
    for lane in ended {
        all.extend(lane.map_err(|_| anyhow!("a line has panicked"))?);
    }
    all.sort_by_key(|(place, _)| *place);
    Ok(all.into_iter().map(|(_, ran)| ran).collect())
}

/// Returns the first of the ports of a line, which are the same in both runs.
fn ports() -> u16 {
    let ports: Vec<u16> = (0..PORTS).map(|_| fresh_port()).collect();
    ports[0]
}
