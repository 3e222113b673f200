//! A command's output, shown as it comes and read line by line at the same time.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result};
use xtask_support::command;

/// Runs to the end; each line goes to standard output and to `read`.
///
/// Both of the command's streams go through one pipe: cargo names a suite on standard error and the suite's result
/// comes on standard output, so their order matters.
pub(crate) fn run(command: &mut Command, mut read: impl FnMut(&str)) -> Result<ExitStatus> {
    let failed = || format!("cannot start {}", command::line(command));
    let (output, input) = io::pipe().with_context(failed)?;
    let second = input.try_clone().with_context(failed)?;
    let spawned = command.stdin(Stdio::null()).stdout(input).stderr(second).spawn();
    // The command holds the pipe's writing ends; the reader sees the end only when nobody does.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = spawned.with_context(|| format!("cannot start {}", command::line(command)))?;
    copy(BufReader::new(output), &mut read).context("cannot read the output of the tests")?;
    child.wait().context("cannot wait for the tests")
}

fn copy(mut output: BufReader<io::PipeReader>, read: &mut impl FnMut(&str)) -> io::Result<()> {
    let (mut line, mut shown) = (Vec::new(), io::stdout().lock());
    while output.read_until(b'\n', &mut line)? > 0 {
        shown.write_all(&line)?;
        shown.flush()?;
        read(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
    Ok(())
}
