//! Commands run to their end with the reason of a failure, and children that do not outlive their handle.

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

/// Runs `command` to its end and returns what it printed on stdout.
///
/// # Errors
/// When it cannot be started or does not succeed; the message has the command and its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    run_with_input(command, "")
}

/// As [`run`], with `input` on stdin.
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading its input tells why by its status.
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
    /// Known once its end was waited for; its id may be another process's then.
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = format!("{command:?}");
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { child, name, status: None })
    }

    /// Takes its end of the child's stdin, where that is a pipe.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Takes its end of the child's stdout, where that is a pipe.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Takes its end of the child's stderr, where that is a pipe.
    pub fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Its process id; wrappers used here `exec`, so it is the id of the program itself.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, `None` while it runs.
    ///
    /// # Errors
    /// When the kernel cannot say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("wait for {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after [`HANG`](crate::HANG).
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        until(&what, || self.ended())
    }

    /// Sends a signal. One that has ended and was not waited for keeps its id, so no stranger can be hit.
    ///
    /// # Errors
    /// When the signal cannot be sent, as to one whose end was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        if self.status.is_some() {
            bail!("{} has ended", self.name);
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
