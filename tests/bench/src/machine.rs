//! The machine that is measured on: CPU, cores, kernel.

use std::{fs, process::Command};

use xtask_support::command::stdout;

/// CPU, kernel and date.
pub(super) fn description() -> String {
    let date = stdout(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let date = date.unwrap_or_else(|| "date unknown".to_owned());
    format!("{}, {} cores, Linux {}, {date}", cpu_model(), cores(), kernel.trim())
}

/// Cores that this process may use.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name") || line.starts_with("Model"));
    let model = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_owned());
    model.unwrap_or_else(|| "unknown CPU".to_owned())
}
