//! CPU and memory of processes and of the machine, as /proc tells them.
//!
//! CPU times come in ticks (10 ms on almost all kernels), so a measurement should be seconds long. The sum of user and
//! system time is exact in the kernel; how it is split is sampled. Time spent in interrupts on the way counts for the
//! process that was running then.

use std::{
    fs,
    ops::{Add, Sub},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result};
use xtask_support::command::stdout;

/// CPU time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cpu {
    pub(super) user: f64,
    pub(super) system: f64,
}

impl Cpu {
    pub(super) fn total(self) -> f64 {
        self.user + self.system
    }

    /// Each part times `factor`.
    pub(super) fn scaled(self, factor: f64) -> Self {
        Self { user: self.user * factor, system: self.system * factor }
    }
}

impl Add for Cpu {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { user: self.user + other.user, system: self.system + other.system }
    }
}

impl Sub for Cpu {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { user: self.user - other.user, system: self.system - other.system }
    }
}

/// Clock ticks in a second, in which /proc counts.
fn ticks_per_second() -> Result<f64> {
    static TICKS: OnceLock<Option<f64>> = OnceLock::new();
    let ask = || stdout(Command::new("getconf").arg("CLK_TCK"))?.parse().ok();
    TICKS.get_or_init(ask).context("getconf CLK_TCK gives no number")
}

/// Returns the CPU time of the processes since their start. A process that has ended counts as zero.
pub(super) fn cpu(ids: &[u32]) -> Result<Cpu> {
    let ticks = ticks_per_second()?;
    ids.iter().try_fold(Cpu::default(), |sum, id| {
        let Ok(text) = fs::read_to_string(format!("/proc/{id}/stat")) else { return Ok(sum) };
        Ok(sum + parse_stat(&text, ticks).with_context(|| format!("/proc/{id}/stat: {text:?}"))?)
    })
}

/// Fields 14 and 15 of proc_pid_stat(5). The name, which may hold anything, ends with the last parenthesis.
fn parse_stat(text: &str, ticks: f64) -> Option<Cpu> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut time = || Some(fields.next()?.parse::<f64>().ok()? / ticks);
    Some(Cpu { user: time()?, system: time()? })
}

/// Resident memory of the processes, in bytes.
pub(super) fn rss(ids: &[u32]) -> Result<f64> {
    ids.iter().try_fold(0.0, |sum, id| {
        let Ok(text) = fs::read_to_string(format!("/proc/{id}/status")) else { return Ok(sum) };
        Ok(sum + parse_rss(&text).with_context(|| format!("/proc/{id}/status has no VmRSS"))?)
    })
}

fn parse_rss(status: &str) -> Option<f64> {
    let text = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(text.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
}

/// Returns the busy time of the whole machine since its start, in seconds of one core. It includes the time that other
/// machines on the same host took from it.
pub(super) fn machine_busy() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    parse_busy(&text, ticks_per_second()?).context("/proc/stat has no line `cpu`")
}

/// user, nice, system, irq, softirq and steal of proc_stat(5), without idle and iowait.
fn parse_busy(text: &str, ticks: f64) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let times: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let busy = [0, 1, 2, 5, 6, 7].into_iter().map(|at| times.get(at).copied());
    Some(busy.sum::<Option<f64>>()? / ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let text = "42 (a) R (b c) S 1 42 42 0 -1 4194560 1 0 0 0 250 1300 7 8 20 0 4 0 55 1 2 3";
        assert_eq!(parse_stat(text, 100.0), Some(Cpu { user: 2.5, system: 13.0 }));
        assert_eq!(parse_stat("42 (a) S 1 42", 100.0), None);
    }

    #[test]
    fn resident_memory_is_in_bytes() {
        assert_eq!(parse_rss("Name:\tx\nVmRSS:\t   15360 kB\nThreads:\t2\n"), Some(15_728_640.0));
        assert_eq!(parse_rss("Name:\tkthread\n"), None);
    }

    #[test]
    fn a_machine_is_busy_when_it_is_not_idle() {
        let text = "cpu  100 10 200 5000 50 5 35 70 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(parse_busy(text, 100.0), Some(4.2));
        assert_eq!(parse_busy("cpu  1 2 3\n", 100.0), None);
    }
}
