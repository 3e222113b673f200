//! One worker thread and two, in turn with each other and with direct traffic. Two must never be the slower.

use anyhow::{Context as _, Result};

use crate::{
    cases,
    ground::{Ground, Programs},
    measure::{self, Column, DIRECT, Plan, TACIT},
    quiet::Patience,
    result::Measured,
};

const CASES: [&str; 4] = ["throughput-x1", "throughput-x8", "echo-64B-x64", "connect-x16"];
/// Names of the columns while both are measured.
const NUMBERS: [(&str, &str); 2] = [("1 worker", "workers: 1\n"), ("2 workers", "workers: 2\n")];

/// Runs it.
pub(super) fn run(programs: &Programs, plan: Plan) -> Result<Vec<Measured>> {
    let mut columns = vec![Column { name: DIRECT, ground: Ground::direct("wdirect", programs)? }];
    for ((name, extra), tag) in NUMBERS.into_iter().zip(["wone", "wtwo"]) {
        columns.push(Column { name, ground: Ground::tacit(tag, programs, extra)? });
    }
    let mut patience = Patience::new(plan.patience);
    let mut rows = Vec::new();
    for name in CASES {
        let case = cases::named(name).with_context(|| format!("no case {name}"))?;
        let used: Vec<&Column> = columns.iter().collect();
        let measured = measure::one_case(programs, &case, plan, &used, &mut patience)?;
        // Its first line is the one that tells which number is faster.
        let row = measured.into_iter().next().with_context(|| format!("nothing of {name}"))?;
        rows.extend(NUMBERS.iter().enumerate().map(|(at, (number, _))| of_number(&row, number, at + 1)));
    }
    columns.into_iter().try_for_each(|column| column.ground.close())?;
    Ok(rows)
}

/// The line of one number of workers, as if it had been measured alone.
fn of_number(row: &Measured, number: &str, count: usize) -> Measured {
    let mut own = row.clone();
    own.name = format!("workers-{count}-{}", row.name);
    own.case = "workers".to_owned();
    own.what = format!("{}, {number}", row.what);
    own.columns.retain(|column| column.name == DIRECT || column.name == number);
    own.columns.iter_mut().filter(|column| column.name == number).for_each(|column| column.name = TACIT);
    own
}
