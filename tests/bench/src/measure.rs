//! All cases that were asked for, one after the other.

use std::time::Instant;

use anyhow::{Result, ensure};
use xtask_support::progress::{Style, Tone, note, seconds};

use super::{
    cases::{Case, Kind},
    figures::{DIRECT, Figure, RIVAL, TACIT},
    idle_wait::Patience,
    programs::Programs,
    rival,
    rounds::{NamedTestbed, Plan, one_case},
    special_cases,
    testbed::Testbed,
};

/// The results of all cases.
pub(super) struct Outcome {
    pub(super) measured: Vec<Figure>,
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
    let shares = |case: &&Case| !matches!(case.kind, Kind::Special(_) | Kind::Churn { .. });
    let (sharing, alone): (Vec<&Case>, Vec<&Case>) = cases.iter().partition(shares);
    if !sharing.is_empty() {
        outcome.in_turn(programs, &sharing, plan, rival)?;
    }
    for case in alone {
        match case.kind {
            Kind::Special(kind) => outcome.take(case, || special_cases::run(kind, programs, plan)),
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
            let works = |column: &&NamedTestbed| match column.name {
                DIRECT => case.works_directly(),
                RIVAL => case.works_with_rival(),
                _ => true,
            };
            let used: Vec<&NamedTestbed> = columns.iter().filter(works).collect();
            let mut patience = Patience::new(self.patience.left());
            self.take(case, || one_case(programs, case, plan, &used, &mut patience));
            self.patience = patience;
        }
        columns.into_iter().try_for_each(|column| column.testbed.close())
    }

    fn take(&mut self, case: &Case, measure: impl FnOnce() -> Result<Vec<Figure>>) {
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

fn columns(programs: &Programs, rival: Option<&str>) -> Result<Vec<NamedTestbed>> {
    note("making the topologies: one direct, one with Tacit");
    let mut columns = vec![
        NamedTestbed { name: DIRECT, testbed: Testbed::direct("direct", programs)? },
        NamedTestbed { name: TACIT, testbed: Testbed::tacit("bench", programs, "")? },
    ];
    if let Some(command) = rival {
        note("making the topology of the rival");
        columns.push(NamedTestbed {
            name: RIVAL,
            testbed: Testbed::rival("rival", programs, &rival::command(command, &programs.load))?,
        });
    }
    Ok(columns)
}
