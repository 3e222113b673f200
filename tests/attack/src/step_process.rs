//! A step as the driver sees it: a process inside a pod that is started, waited for, told to go on, and heard to its end.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::{Pod, Process};

use crate::{judge::Outcome, step, world::World};

/// A step from start to end.
pub(crate) fn simple(
    world: &World,
    pod: &Pod,
    step: &str,
    target: SocketAddr,
    marker: &str,
    extra: &[&str],
) -> Result<Outcome> {
    Step::start(command(world, pod, step, target, marker, extra))?.end()
}

/// The command that runs a step in a pod.
pub(crate) fn command(
    world: &World,
    pod: &Pod,
    step: &str,
    target: SocketAddr,
    marker: &str,
    extra: &[&str],
) -> Command {
    let mut command = pod.command(&world.programs.own);
    command.args(["step", step, &target.to_string(), marker]).args(extra);
    patient(world, command)
}

/// A step that knows how long to wait.
pub(crate) fn patient(world: &World, mut command: Command) -> Command {
    command.env(step::PATIENCE, world.patience.as_millis().to_string());
    command
}

/// A running step.
pub(crate) struct Step {
    process: Process,
    stdin: Option<ChildStdin>,
    lines: io::Lines<BufReader<ChildStdout>>,
    first: Option<String>,
}

impl Step {
    /// Starts it; it goes on when it is told to.
    pub(crate) fn start(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::piped())
    }

    /// Starts it with another standard input than the driver's word.
    pub(crate) fn start_with(mut command: Command, stdin: Stdio) -> Result<Self> {
        let mut process = Process::spawn(command.stdin(stdin).stdout(Stdio::piped()))?;
        let stdin = process.take_stdin();
        let lines = BufReader::new(process.take_stdout().context("stdout")?).lines();
        Ok(Self { process, stdin, lines, first: None })
    }

    /// Waits until the step waits; one that has ended instead has said why.
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        if self.first.is_some() {
            return Ok(());
        }
        match self.lines.next().transpose()? {
            Some(line) if line == "waiting" => Ok(()),
            other => {
                self.first = other;
                Ok(())
            }
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Tells the step to go on, and waits until it waits again.
    pub(crate) fn proceed(&mut self) -> Result<()> {
        if let Some(stdin) = &mut self.stdin {
            // One that has ended has said why.
            let _ = stdin.write_all(b"next\n");
        }
        self.wait_ready()
    }

    pub(crate) fn go(&mut self) {
        if let Some(mut stdin) = self.stdin.take() {
            // One that has ended has said why.
            let _ = stdin.write_all(b"go\n");
        }
    }

    /// Returns the step's result.
    pub(crate) fn end(mut self) -> Result<Outcome> {
        let told = match self.first.take() {
            Some(line) => line,
            None => self.lines.next().transpose()?.unwrap_or_default(),
        };
        let status = self.process.wait()?;
        if !status.success() {
            bail!("the step ended with {status}: {told}");
        }
        match told.split_once(": ") {
            Some(("absent", why)) => Ok(Outcome { absent: Some(why.to_owned()), ..Outcome::default() }),
            _ => Ok(Outcome { told, ..Outcome::default() }),
        }
    }
}
