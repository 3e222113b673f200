//! Results for people: Markdown that also reads well in a terminal.

use super::{
    figures::{Column, DIRECT, Figure, RIVAL, TACIT, median},
    machine,
    rounds::Plan,
};

/// The table with everything that is needed to judge it. Markdown.
pub(super) fn render(measured: &[Figure], plan: Plan) -> String {
    let rival = measured.iter().any(|line| line.column(RIVAL).is_some());
    let mut head = vec!["case", "unit", "direct", "tacit", "ratio"];
    head.extend(["CPU A (user + system)", "CPU B (user + system)", "RSS A / B, MB"]);
    if rival {
        head.extend(["rival", "rival's ratio", "rival's CPU A", "rival's CPU B", "rival's RSS A / B"]);
    }
    let mut rows = vec![head.into_iter().map(str::to_owned).collect()];
    rows.extend(measured.iter().map(|line| row(line, rival)));
    format!("{}\n{}", method(measured, plan), markdown(&rows))
}

fn row(measured: &Figure, rival: bool) -> Vec<String> {
    let median = |name: &str| measured.column(name).map_or(String::new(), |column| number(column.median));
    let ratio = |name: &str| measured.ratio(name).map_or(String::new(), |ratio| format!("{ratio:.2}x"));
    let what = if measured.is_noisy() { format!("{} (~)", measured.what) } else { measured.what.clone() };
    let costs = |name: &str| -> [String; 3] {
        let Some(column) = measured.column(name).filter(|_| measured.leads) else {
            return Default::default();
        };
        let rss = format!("{:.0} / {:.0}", column.rss[0] / 1e6, column.rss[1] / 1e6);
        [cpu(column, 0, measured.cpu_unit), cpu(column, 1, measured.cpu_unit), rss]
    };
    let mut cells = vec![what, measured.unit.to_owned(), median(DIRECT), median(TACIT), ratio(TACIT)];
    cells.extend(costs(TACIT));
    if rival {
        cells.extend([median(RIVAL), ratio(RIVAL)]);
        cells.extend(costs(RIVAL));
    }
    cells
}

fn cpu(column: &Column, node: usize, unit: &str) -> String {
    let cpu = column.cpu[node];
    format!("{} ({} + {}) {unit}", number(cpu.total()), number(cpu.user), number(cpu.system))
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "-".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn method(measured: &[Figure], plan: Plan) -> String {
    let columns = measured.iter().filter(|line| line.leads).flat_map(|line| &line.columns);
    let noise: Vec<f64> = columns.map(|column| column.noise).collect();
    let rounds = if plan.rounds == 1 { "one round".to_owned() } else { format!("{} rounds", plan.rounds) };
    let noise = match noise.as_slice() {
        [] => String::new(),
        noise => {
            format!(
                "\nOther work took {:.0} % of the machine meanwhile (median); above 10 % a line is marked (~).",
                median(noise) * 100.0
            )
        }
    };
    format!(
        "{}.\nTwo nodes in network namespaces on one machine, routed veth. Direct is the same layout without agents, \
         measured in turn;\nmedians of {rounds} of {} s. CPU and memory are those of the agent on the clients' node (A) \
         and on the servers' (B).{noise}\n",
        machine::description(),
        plan.seconds,
    )
}

/// The rows, the first of them the head, with columns of equal width.
fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|at| width(at).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(at, (cell, &width))| match at {
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().enumerate().map(|(at, &width)| match at {
        0 | 1 => "-".repeat(width),
        _ => format!("{}:", "-".repeat(width.saturating_sub(1))),
    });
    let rule = format!("| {} |\n", rule.collect::<Vec<_>>().join(" | "));
    let mut lines = rows.iter().map(line);
    lines.next().unwrap_or_default() + &rule + &lines.collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_of_a_column_have_one_width() {
        let rows = [vec!["case", "unit", "x"], vec!["echo", "us", "1234"]];
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect();
        assert_eq!(
            markdown(&rows),
            "| case | unit |    x |\n| ---- | ---- | ---: |\n| echo | us   | 1234 |\n"
        );
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.567, 5.678, 56.78, 567.8, 56780.0].map(number),
            ["0.57", "5.68", "56.8", "568", "56780"]
        );
    }
}
