//! Cases in all columns, in turn, round after round.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::progress::{Style, Tone, note, seconds};

use super::{
    cases::{Case, Kind},
    ground::{Ground, Programs},
    load::{Done, Work},
    own,
    quiet::Patience,
    result::Measured,
    rival, table,
    usage::{self, Cpu},
};

/// How often and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) rounds: usize,
    /// Of one run.
    pub(super) seconds: u64,
    /// For a quiet machine, over all cases.
    pub(super) patience: Duration,
}

/// One run of one case in one column.
pub(super) struct Sample {
    pub(super) done: Done,
    /// Of the proxies on node a and node b: seconds per GiB, or microseconds per request.
    pub(super) cpu: [Cpu; 2],
    /// Of the proxies after the run, in bytes.
    pub(super) rss: [f64; 2],
    /// Part of the machine's CPU that others used meanwhile, 0 to 1.
    pub(super) noise: f64,
}

/// What a column is called in results.
pub(super) const DIRECT: &str = "direct";
pub(super) const TACIT: &str = "tacit";
pub(super) const RIVAL: &str = "rival";

/// A named ground.
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) ground: Ground,
}

/// What came of all cases.
pub(super) struct Outcome {
    pub(super) measured: Vec<Measured>,
    /// Names of the cases that could not be measured to their end.
    pub(super) failed: Vec<String>,
    patience: Patience,
}

/// Measures the cases; `rival` is the command of a third column. A case that fails is told and left out.
pub(super) fn run(programs: &Programs, cases: &[Case], plan: Plan, rival: Option<&str>) -> Result<Outcome> {
    tacit_topology::cleanup_stale()?;
    let begin = Instant::now();
    let mut outcome =
        Outcome { measured: Vec::new(), failed: Vec::new(), patience: Patience::new(plan.patience) };
    let shares = |case: &&Case| !matches!(case.kind, Kind::Own(_) | Kind::Churn { .. });
    let (sharing, alone): (Vec<&Case>, Vec<&Case>) = cases.iter().partition(shares);
    if !sharing.is_empty() {
        outcome.in_turn(programs, &sharing, plan, rival)?;
    }
    for case in alone {
        match case.kind {
            Kind::Own(kind) => outcome.take(case, || own::run(kind, programs, plan)),
            // Its ports in TIME_WAIT would be in the way of what comes after it.
            _ => outcome.in_turn(programs, &[case], plan, rival)?,
        }
    }
    note(&format!("measured in {}", seconds(begin.elapsed())));
    Ok(outcome)
}

impl Outcome {
    /// Cases one after the other in the same topologies.
    fn in_turn(
        &mut self,
        programs: &Programs,
        cases: &[&Case],
        plan: Plan,
        rival: Option<&str>,
    ) -> Result<()> {
        let columns = columns(programs, rival)?;
        for case in cases {
            let works = |column: &&Column| case.works_directly() || column.name != DIRECT;
            let used: Vec<&Column> = columns.iter().filter(works).collect();
            let mut patience = Patience::new(self.patience.left());
            self.take(case, || one_case(programs, case, plan, &used, &mut patience));
            self.patience = patience;
        }
        columns.into_iter().try_for_each(|column| column.ground.close())
    }

    fn take(&mut self, case: &Case, measure: impl FnOnce() -> Result<Vec<Measured>>) {
        note(&format!("{}: {}", case.name, case.what));
        match measure() {
            Ok(rows) => {
                rows.iter().for_each(|row| note(&row.line()));
                self.measured.extend(rows);
            }
            Err(error) => {
                let text = format!("case {} failed: {error:#}", case.name);
                eprintln!("{}", Style::of_stderr().paint(Tone::Bad, &text));
                self.failed.push(case.name.clone());
            }
        }
    }

    /// An error when something is missing.
    pub(super) fn complete(&self) -> Result<()> {
        ensure!(self.failed.is_empty(), "these cases failed: {}", self.failed.join(", "));
        Ok(())
    }
}

fn columns(programs: &Programs, rival: Option<&str>) -> Result<Vec<Column>> {
    note("making the topologies: one direct, one with Tacit");
    let mut columns = vec![
        Column { name: DIRECT, ground: Ground::direct("direct", programs)? },
        Column { name: TACIT, ground: Ground::tacit("bench", programs, "")? },
    ];
    if let Some(command) = rival {
        note("making the topology of the rival");
        columns.push(Column {
            name: RIVAL,
            ground: Ground::rival("rival", programs, &rival::command(command, &programs.load))?,
        });
    }
    Ok(columns)
}

/// All rounds of one case.
pub(super) fn one_case(
    programs: &Programs,
    case: &Case,
    plan: Plan,
    columns: &[&Column],
    patience: &mut Patience,
) -> Result<Vec<Measured>> {
    let (rounds, length) = case.fixed.unwrap_or((plan.rounds, plan.seconds));
    let mut samples: Vec<Vec<Sample>> = columns.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for (column, samples) in columns.iter().zip(&mut samples) {
            let sample = loop {
                patience.wait()?;
                let begin = Instant::now();
                let sample = sample(&column.ground, programs, case, length)
                    .with_context(|| format!("case {}, {}, round {}", case.name, column.name, round + 1))?;
                if !patience.again(sample.noise, begin.elapsed()) {
                    break sample;
                }
            };
            samples.push(sample);
        }
    }
    let names = columns.iter().map(|column| column.name);
    Ok(Measured::of(case, &names.zip(samples.iter().map(Vec::as_slice)).collect::<Vec<_>>()))
}

fn sample(ground: &Ground, programs: &Programs, case: &Case, length: u64) -> Result<Sample> {
    let proxies = ground.proxies()?;
    let cpu = || -> Result<[Cpu; 2]> { Ok([usage::cpu(&proxies[0])?, usage::cpu(&proxies[1])?]) };
    let (before, busy_before, own_before) = (cpu()?, usage::machine_busy()?, own_time(ground)?);
    let begin = Instant::now();
    let done = case.run(ground, programs, length)?;
    let elapsed = begin.elapsed();
    let (after, busy_after, own_after) = (cpu()?, usage::machine_busy()?, own_time(ground)?);
    let each = match done.work {
        Work::Bytes(bytes) => f64::from(1 << 30) / bytes,
        Work::Requests(requests) => 1e6 / requests,
    };
    let others = (busy_after - busy_before - (own_after - own_before).as_secs_f64()).max(0.0);
    let cores = table::cores();
    Ok(Sample {
        done,
        cpu: [0, 1].map(|node| (after[node] - before[node]).scaled(each)),
        rss: [usage::rss(&proxies[0])?, usage::rss(&proxies[1])?],
        noise: others / (elapsed.as_secs_f64() * cores as f64),
    })
}

/// CPU time of everything in the ground: load, servers, proxies.
fn own_time(ground: &Ground) -> Result<Duration> {
    ground.cgroups()?.iter().filter(|group| group.exists()).try_fold(Duration::ZERO, |sum, group| {
        let file = group.join("cpu.stat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        let used = used.with_context(|| format!("{} has no usage_usec", file.display()))?;
        Ok(sum + Duration::from_micros(used.parse().with_context(|| format!("usage_usec {used:?}"))?))
    })
}
