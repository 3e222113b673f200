//! The cores on which the two ends of a request run.
//!
//! Left alone, the scheduler puts a client and a server that wait for each other now on one core, now on two, and an echo
//! takes 20 us or 70 us accordingly, for minutes at a time. On two nodes they never share a core. So a single client
//! has the first core and its server the last; many clients, their server, and all proxies go where the scheduler puts
//! them.

use std::{ffi::OsStr, fs, process::Command};

use anyhow::{Context as _, Result};
use tacit_topology::Pod;

/// An end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

/// A command in the pod that runs on the core of its end.
pub(super) fn command(pod: &Pod, program: impl AsRef<OsStr>, end: End) -> Result<Command> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let core = core(&status, end).context("no Cpus_allowed_list in /proc/self/status")?;
    let mut command = pod.command("taskset");
    command.args(["--cpu-list", core]).arg(program);
    Ok(command)
}

/// The first or the last number of a list such as `0-3,8-11`.
fn core(status: &str, end: End) -> Option<&str> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim();
    let mut numbers = list.split([',', '-']);
    match end {
        End::Client => numbers.next(),
        End::Server => numbers.next_back(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_stand_on_the_outermost_cores() {
        let of = |list: &str, end| {
            core(&format!("Name:\tx\nCpus_allowed_list:\t{list}\n"), end).map(str::to_owned)
        };
        assert_eq!(of("0-1", End::Client).as_deref(), Some("0"));
        assert_eq!(of("0-1", End::Server).as_deref(), Some("1"));
        assert_eq!(of("2,4-6,9", End::Client).as_deref(), Some("2"));
        assert_eq!(of("2,4-6,9", End::Server).as_deref(), Some("9"));
        assert_eq!(of("3", End::Server).as_deref(), Some("3"));
    }
}
