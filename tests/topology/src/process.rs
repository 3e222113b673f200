//! Commands that run to their end and report a failure with its stderr, and children that die with their handle.

use crate::wait::until;
use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    io::Write,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
};

/// Runs `command` to its end and returns its stdout.
///
/// # Errors
/// Fails if the command cannot be started or exits with an error; the message has the command and its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    run_with_input(command, "")
}

/// Runs `command` like [`run`], with `input` on stdin.
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that exits without reading its input reports the reason by its status.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {name}"))?;
    if !output.status.success() {
        let input = if input.is_empty() { String::new() } else { format!("\ninput:\n{input}") };
        bail!("{name}: {}\n{}{input}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A child process that is killed and reaped when its handle is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    /// Set once the process was reaped. The kernel may then reuse its id.
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = format!("{command:?}");
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { child, name, status: None })
    }

    /// Takes this side of the child's stdin, if it is a pipe.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Takes this side of the child's stdout, if it is a pipe.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Takes this side of the child's stderr, if it is a pipe.
    pub fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Returns the process id. Wrappers used here `exec`, so it is the id of the program itself.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the exit status; `None` while the process runs.
    ///
    /// # Errors
    /// Fails if `waitpid` fails.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.status = self.child.try_wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(self.status)
    }

    /// Waits until the process exits.
    ///
    /// # Errors
    /// Fails if the process still runs after [`HANG`](crate::HANG).
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        until(&what, || self.ended())
    }

    /// Sends a signal. An exited process keeps its id until it is reaped, so the signal cannot hit another process.
    ///
    /// # Errors
    /// Fails if the signal cannot be sent or the process was reaped.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        if self.status.is_some() {
            bail!("{} has exited", self.name);
        }
        kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
