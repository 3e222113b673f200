//! One worker thread and two, in turn with each other and with direct traffic. Two must never be the slower.

use anyhow::{Context as _, Result};

use crate::{
    cases,
    figures::{DIRECT, Figure, TACIT},
    idle_wait::Patience,
    programs::Programs,
    rounds::{NamedTestbed, Plan, one_case},
    testbed::Testbed,
};

const CASES: [&str; 4] = ["throughput-x1", "throughput-x8", "echo-64B-x64", "connect-x16"];
/// Names of the columns while both are measured.
const NUMBERS: [(&str, &str); 2] = [("1 worker", "workers: 1\n"), ("2 workers", "workers: 2\n")];

/// Runs it.
pub(super) fn run(programs: &Programs, plan: Plan) -> Result<Vec<Figure>> {
    let mut columns = vec![NamedTestbed { name: DIRECT, testbed: Testbed::direct("wdirect", programs)? }];
    for ((name, extra), tag) in NUMBERS.into_iter().zip(["wone", "wtwo"]) {
        columns.push(NamedTestbed { name, testbed: Testbed::tacit(tag, programs, extra)? });
    }
    let mut patience = Patience::new(plan.patience);
    let mut rows = Vec::new();
    for name in CASES {
        let case = cases::named(name).with_context(|| format!("no case {name}"))?;
        let used: Vec<&NamedTestbed> = columns.iter().collect();
        let measured = one_case(programs, &case, plan, &used, &mut patience)?;
        // Its first line is the one that tells which number is faster.
        let row = measured.into_iter().next().with_context(|| format!("nothing of {name}"))?;
        rows.extend(NUMBERS.iter().enumerate().map(|(at, (number, _))| of_number(&row, number, at + 1)));
    }
    columns.into_iter().try_for_each(|column| column.testbed.close())?;
    Ok(rows)
}

/// The line of one number of workers, as if it had been measured alone.
fn of_number(row: &Figure, number: &str, count: usize) -> Figure {
    let mut own = row.clone();
    own.name = format!("workers-{count}-{}", row.name);
    own.case = "workers".to_owned();
    own.what = format!("{}, {number}", row.what);
    own.columns.retain(|column| column.name == DIRECT || column.name == number);
    own.columns.iter_mut().filter(|column| column.name == number).for_each(|column| column.name = TACIT);
    own
}
