//! One case in all columns, in turn, round after round.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    cases::Case,
    figures::{Figure, Sample},
    idle_wait::Patience,
    load::Work,
    machine,
    programs::Programs,
    testbed::Testbed,
    usage::{self, Cpu},
};

/// The number and length of measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) rounds: usize,
    /// Of one run.
    pub(super) seconds: u64,
    /// For a quiet machine, over all cases.
    pub(super) patience: Duration,
}

/// A testbed and the name of its column.
pub(super) struct NamedTestbed {
    pub(super) name: &'static str,
    pub(super) testbed: Testbed,
}

/// All rounds of one case.
pub(super) fn one_case(
    programs: &Programs,
    case: &Case,
    plan: Plan,
    columns: &[&NamedTestbed],
    patience: &mut Patience,
) -> Result<Vec<Figure>> {
    let (rounds, length) = case.fixed.unwrap_or((plan.rounds, plan.seconds));
    let mut samples: Vec<Vec<Sample>> = columns.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for (column, samples) in columns.iter().zip(&mut samples) {
            let sample = loop {
                patience.wait()?;
                let begin = Instant::now();
                let sample = sample(&column.testbed, programs, case, length)
                    .with_context(|| format!("case {}, {}, round {}", case.name, column.name, round + 1))?;
                if !patience.again(sample.noise, begin.elapsed()) {
                    break sample;
                }
            };
            samples.push(sample);
        }
    }
    let names = columns.iter().map(|column| column.name);
    Ok(Figure::of(case, &names.zip(samples.iter().map(Vec::as_slice)).collect::<Vec<_>>()))
}

fn sample(testbed: &Testbed, programs: &Programs, case: &Case, length: u64) -> Result<Sample> {
    let proxies = testbed.proxies()?;
    let cpu = || -> Result<[Cpu; 2]> { Ok([usage::cpu(&proxies[0])?, usage::cpu(&proxies[1])?]) };
    let (before, busy_before, own_before) = (cpu()?, usage::machine_busy()?, testbed_time(testbed)?);
    let begin = Instant::now();
    let done = case.run(testbed, programs, length)?;
    let elapsed = begin.elapsed();
    let (after, busy_after, own_after) = (cpu()?, usage::machine_busy()?, testbed_time(testbed)?);
    let each = match done.work {
        Work::Bytes(bytes) => f64::from(1 << 30) / bytes,
        Work::Requests(requests) => 1e6 / requests,
    };
    let others = (busy_after - busy_before - (own_after - own_before).as_secs_f64()).max(0.0);
    let cores = machine::cores();
    Ok(Sample {
        done,
        cpu: [0, 1].map(|node| (after[node] - before[node]).scaled(each)),
        rss: [usage::rss(&proxies[0])?, usage::rss(&proxies[1])?],
        noise: others / (elapsed.as_secs_f64() * cores as f64),
    })
}

/// CPU time of everything in the testbed: load, servers, proxies.
fn testbed_time(testbed: &Testbed) -> Result<Duration> {
    testbed.cgroups()?.iter().filter(|group| group.exists()).try_fold(Duration::ZERO, |sum, group| {
        let file = group.join("cpu.stat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        let used = used.with_context(|| format!("{} has no usage_usec", file.display()))?;
        Ok(sum + Duration::from_micros(used.parse().with_context(|| format!("usage_usec {used:?}"))?))
    })
}
