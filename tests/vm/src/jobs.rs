//! Machines to boot, and the order in which they run: as many at a time as there are cores.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Result, bail};
use xtask_support::report::Report;

use super::{
    Payload,
    kernels::{Kernel, Unpacked},
    one,
    outcome::Outcome,
};

/// Suites that `cargo xtask test` runs on the host only, since they take more than a third of the machines' time: those about user
/// space (TLS, HBONE, certificates, files, shares of the agent, slots, large policies), those about pods with programs, rules or
/// namespaces of their own (`hooks`, `left_alone`, `nested`, `own_rules`, `pods_cgroup`), and `dead_peers`, `kernel_shares`,
/// `node_services`, `reboot`, `services` and `transparency`, which an emulated machine runs slowly. `cargo xtask vm` runs them on other
/// kernels.
const ON_HOST_ONLY: [&str; 21] = [
    "authorization",
    "certificates",
    "dead_peers",
    "hbone",
    "hooks",
    "identity",
    "kernel_shares",
    "left_alone",
    "nested",
    "node_services",
    "own_rules",
    "pods_cgroup",
    "probes",
    "reboot",
    "reload",
    "sandboxes",
    "scale",
    "services",
    "shares",
    "slots",
    "transparency",
];
/// The suite of real programs, which the machines do not have.
const OF_PROGRAMS: &str = "transparency_programs";
/// Suites that take an emulated machine five minutes or more. `cargo xtask test` runs them on the first kernel only, which has the
/// fewest features; the host's kernel has those of the newest.
const ON_FIRST_ONLY: [&str; 3] = ["attack", "handover", "lifecycle"];
/// Those that start agents again and again.
const OF_STARTS: [&str; 2] = ["handover", "lifecycle"];

/// One boot of a kernel with some of the suites.
pub(super) struct Job<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) unpacked: &'a Unpacked,
    pub(super) suites: Vec<&'a (String, PathBuf)>,
}

/// All suites but the one of real programs, on each kernel in one machine.
pub(super) fn whole<'a>(machines: &[(&'a Kernel, &'a Unpacked)], payload: &'a Payload) -> Vec<Job<'a>> {
    let suites = || payload.suites.iter().filter(|(name, _)| name != OF_PROGRAMS).collect();
    machines.iter().map(|&(kernel, unpacked)| Job { kernel, unpacked, suites: suites() }).collect()
}

/// The suites of `cargo xtask test`, the machines with the longest first, and notes on what was left out.
pub(super) fn of_test<'a>(
    machines: &[(&'a Kernel, &'a Unpacked)],
    payload: &'a Payload,
) -> (Vec<Job<'a>>, Vec<String>) {
    let mut jobs = Vec::new();
    for (place, &(kernel, unpacked)) in machines.iter().enumerate() {
        let is_run = |name: &str| {
            name != OF_PROGRAMS
                && !ON_HOST_ONLY.contains(&name)
                && (place == 0 || !ON_FIRST_ONLY.contains(&name))
        };
        // Each long one has a machine of its own, which divides the work into parts of like length. A boot takes some four seconds.
        let (long, short): (Vec<_>, Vec<_>) = payload
            .suites
            .iter()
            .filter(|(name, _)| is_run(name))
            .partition(|(name, _)| ON_FIRST_ONLY.contains(&name.as_str()));
        jobs.extend(long.into_iter().map(|suite| Job { kernel, unpacked, suites: vec![suite] }));
        jobs.push(Job { kernel, unpacked, suites: short });
    }
    // The suites of starts take half as long as the others: they fill what is left.
    jobs.sort_by_key(|job| job.suites.iter().any(|(name, _)| OF_STARTS.contains(&name.as_str())));
    let labels = |machines: &[(&Kernel, &Unpacked)]| {
        machines.iter().map(|(kernel, _)| kernel.label).collect::<Vec<_>>().join(", ")
    };
    let note = |suites: &[&str], kernels: &[(&Kernel, &Unpacked)]| {
        format!(
            "suites {} were not run on kernels {}: see `cargo xtask vm`",
            suites.join(", "),
            labels(kernels)
        )
    };
    let programs = format!("suite {OF_PROGRAMS} runs on the host only: other kernels have no such programs");
    let mut notes = vec![note(&ON_HOST_ONLY, machines), programs];
    if let [_, rest @ ..] = machines
        && !rest.is_empty()
    {
        notes.push(note(&ON_FIRST_ONLY, rest));
    }
    (jobs, notes)
}

/// Runs `jobs`, as many at a time as there are cores: each machine keeps one busy. Their reports are put one behind the other, in the
/// order of `jobs`. With `stops`, no further job begins after one that failed.
pub(super) fn run(
    jobs: Vec<Job<'_>>,
    payload: &Payload,
    filter: Option<&str>,
    stops: bool,
    report: &mut Report,
) -> Result<Vec<Outcome>> {
    let waiting: Mutex<VecDeque<_>> = Mutex::new(jobs.into_iter().enumerate().collect());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let lane = || {
        let mut ended = Vec::new();
        while let Some((place, job)) = next() {
            let mut report = Report::default();
            let outcome = one(&job, payload, filter, &mut report);
            if stops && outcome.as_ref().map_or(true, |outcome| outcome.failed > 0) {
                waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
            ended.push((place, outcome, report));
        }
        ended
    };
    let lanes: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..at_once()).map(|_| scope.spawn(lane)).collect();
        running.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let mut ended = Vec::new();
    for lane in lanes {
        let Ok(lane) = lane else { bail!("a thread that ran a machine has panicked") };
        ended.extend(lane);
    }
    ended.sort_by_key(|(place, ..)| *place);
    let mut outcomes = Vec::new();
    for (_, outcome, told) in ended {
        report.append(told);
        outcomes.push(outcome);
    }
    outcomes.into_iter().collect()
}

fn at_once() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::MATRIX;

    #[test]
    fn every_suite_of_a_test_runs_once_on_a_kernel_or_is_noted() {
        let names = ["attack", "flows", "handover", "lifecycle", "shares", OF_PROGRAMS];
        let suites = names.iter().map(|name| ((*name).to_owned(), PathBuf::new())).collect();
        let none = PathBuf::new;
        let payload = Payload { agent: none(), attack: none(), peer: none(), suites };
        let unpacked = Unpacked { folder: none(), release: String::new() };
        let [first, second, ..] = &MATRIX;
        let machines = [(first, &unpacked), (second, &unpacked)];
        let (jobs, notes) = of_test(&machines, &payload);
        let order: Vec<(&str, Vec<&str>)> = jobs
            .iter()
            .map(|job| (job.kernel.label, job.suites.iter().map(|(name, _)| name.as_str()).collect()))
            .collect();
        let (a, b) = (first.label, second.label);
        let (attack, flows) = (vec!["attack"], vec!["flows"]);
        let starts = [(a, vec!["handover"]), (a, vec!["lifecycle"])];
        let [handover, lifecycle] = starts;
        assert_eq!(order, [(a, attack), (a, flows.clone()), (b, flows), handover, lifecycle]);
        assert!(
            notes[0].contains("shares")
                && notes[1].contains(OF_PROGRAMS)
                && notes[2].contains("attack, handover, lifecycle")
                && notes[2].ends_with(&format!("{b}: see `cargo xtask vm`")),
            "{notes:?}"
        );
        let whole: Vec<&str> =
            whole(&machines, &payload)[0].suites.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(whole, ["attack", "flows", "handover", "lifecycle", "shares"]);
    }
}
