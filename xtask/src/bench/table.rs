//! Results for people: Markdown that also reads well in a terminal.

use std::fs;

use super::{
    measure::{DIRECT, Plan, TACIT},
    result::{Column, Measured, median},
};
use crate::command::stdout;

/// The table with everything that is needed to judge it.
pub(super) fn render(measured: &[Measured], plan: Plan) -> String {
    let mut rows = vec![
        [
            "case",
            "unit",
            "direct",
            "tacit",
            "ratio",
            "CPU A (user + system)",
            "CPU B (user + system)",
            "RSS A / B, MB",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    rows.extend(measured.iter().map(row));
    format!("{}\n{}", head(measured, plan), markdown(&rows))
}

fn row(measured: &Measured) -> Vec<String> {
    let median = |name: &str| measured.column(name).map_or(String::new(), |column| number(column.median));
    let ratio = measured.ratio(TACIT).map_or(String::new(), |ratio| format!("{ratio:.2}x"));
    let tacit = measured.column(TACIT).filter(|_| measured.leads);
    let cpu = |node: usize| tacit.map_or(String::new(), |column| cpu(column, node, measured.cpu_unit));
    let rss = |column: &Column| format!("{:.0} / {:.0}", column.rss[0] / 1e6, column.rss[1] / 1e6);
    vec![
        measured.what.clone(),
        measured.unit.to_owned(),
        median(DIRECT),
        median(TACIT),
        ratio,
        cpu(0),
        cpu(1),
        tacit.map_or(String::new(), rss),
    ]
}

fn cpu(column: &Column, node: usize, unit: &str) -> String {
    let cpu = column.cpu[node];
    format!("{} ({} + {}) {unit}", number(cpu.total()), number(cpu.user), number(cpu.system))
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn head(measured: &[Measured], plan: Plan) -> String {
    let noise: Vec<f64> = measured.iter().flat_map(|line| &line.columns).map(|column| column.noise).collect();
    let date = stdout(std::process::Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{}, {cores} cores, Linux {}, {}. Two nodes in network namespaces, routed veth; direct is the same layout without\n\
         agents, measured in turn; medians of {} rounds of {} s; CPU is of the agent on the client's node (A) and the\n\
         server's (B). Other work on the machine took {:.0} % of it meanwhile (median).\n",
        cpu_model(),
        kernel.trim(),
        date.unwrap_or_else(|| "date unknown".to_owned()),
        plan.rounds,
        plan.seconds,
        median(&noise) * 100.0,
    )
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name") || line.starts_with("Model"));
    let model = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_owned());
    model.unwrap_or_else(|| "unknown CPU".to_owned())
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
