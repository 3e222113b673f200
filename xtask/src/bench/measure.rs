//! Cases in all columns, in turn, round after round.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    cases::Case,
    ground::{Ground, Programs},
    load::{Done, Work},
    result::Measured,
    usage::{self, Cpu},
};
use crate::progress::{note, seconds};

/// How often and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) rounds: usize,
    pub(super) seconds: u64,
}

/// One run of one case in one column.
pub(super) struct Sample {
    pub(super) done: Done,
    /// Of the proxies on node a and node b, per GiB or request: seconds per GiB, microseconds per request.
    pub(super) cpu: [Cpu; 2],
    /// Of the proxies after the run, in bytes.
    pub(super) rss: [f64; 2],
    /// Part of the machine's CPU that others used meanwhile, 0 to 1.
    pub(super) noise: f64,
}

/// What a column is called in results.
pub(super) const DIRECT: &str = "direct";
pub(super) const TACIT: &str = "tacit";

/// A named ground.
struct Column {
    name: &'static str,
    ground: Ground,
}

/// Measures the cases.
pub(super) fn run(programs: &Programs, cases: &[Case], plan: Plan) -> Result<Vec<Measured>> {
    tacit_topology::cleanup_stale()?;
    note("making two topologies: direct, and with Tacit");
    let columns = [
        Column { name: DIRECT, ground: Ground::direct("direct", programs)? },
        Column { name: TACIT, ground: Ground::tacit("bench", programs, "")? },
    ];
    let ticks = usage::ticks_per_second()?;
    let begin = Instant::now();
    let mut measured = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        note(&format!("[{}/{}] {}: {}", number + 1, cases.len(), case.name, case.what));
        let mut samples: Vec<Vec<Sample>> = columns.iter().map(|_| Vec::new()).collect();
        for round in 0..plan.rounds {
            for (column, samples) in columns.iter().zip(&mut samples) {
                let sample = sample(&column.ground, programs, case, plan.seconds, ticks)
                    .with_context(|| format!("case {}, {}, round {}", case.name, column.name, round + 1))?;
                samples.push(sample);
            }
        }
        let names = columns.iter().map(|column| column.name);
        let rows =
            Measured::of(case, &names.zip(&samples).map(|(n, s)| (n, s.as_slice())).collect::<Vec<_>>());
        rows.iter().for_each(|row| note(&row.line()));
        measured.extend(rows);
    }
    note(&format!("measured in {}", seconds(begin.elapsed())));
    columns.into_iter().try_for_each(|column| column.ground.close())?;
    Ok(measured)
}

fn sample(ground: &Ground, programs: &Programs, case: &Case, seconds: u64, ticks: f64) -> Result<Sample> {
    let proxies = ground.proxies();
    let cpu =
        || -> Result<[Cpu; 2]> { Ok([usage::cpu(&proxies[0], ticks)?, usage::cpu(&proxies[1], ticks)?]) };
    let (before, machine_before, own_before) = (cpu()?, usage::machine(ticks)?, own(ground)?);
    let begin = Instant::now();
    let done = case.run(ground, programs, seconds)?;
    let elapsed = begin.elapsed();
    let (after, machine_after, own_after) = (cpu()?, usage::machine(ticks)?, own(ground)?);
    let each = match done.work {
        Work::Bytes(bytes) => f64::from(1 << 30) / bytes,
        Work::Requests(requests) => 1e6 / requests,
    };
    let busy = machine_after.busy + machine_after.stolen - machine_before.busy - machine_before.stolen;
    let others = (busy - (own_after - own_before).as_secs_f64()).max(0.0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Sample {
        done,
        cpu: [0, 1].map(|node| (after[node] - before[node]).scaled(each)),
        rss: [usage::rss(&proxies[0])?, usage::rss(&proxies[1])?],
        noise: others / (elapsed.as_secs_f64() * cores as f64),
    })
}

/// CPU time of everything in the ground: load, servers, proxies.
fn own(ground: &Ground) -> Result<Duration> {
    let topology = ground.topology();
    let pods = topology.node("a")?.pods_cgroup();
    let root = pods.ancestors().nth(2).context("the pods' cgroup has no place")?;
    let groups = [topology.prefix().to_owned(), format!("{}-host", topology.prefix())];
    groups.iter().filter(|group| root.join(group).exists()).try_fold(Duration::ZERO, |sum, group| {
        let file = root.join(group).join("cpu.stat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        let used = used.with_context(|| format!("{} has no usage_usec", file.display()))?;
        Ok(sum + Duration::from_micros(used.parse().with_context(|| format!("usage_usec {used:?}"))?))
    })
}
