//! Output of `tacit doctor`, the capabilities of the kernel: a table for people, JSON for programs. Pure.

use std::fmt::Write as _;

use serde_json::{Value, json};
use tacit_kernel::{
    HookProgram,
    probe::{Need, Presence, ProbeFinding, ProbeReport},
};

use super::table::{Cell, Colour, Style, Table};

/// The report as a table, and a line for each feature that is not there. `at_root` are the programs at the connect hooks of the node's
/// root cgroup, of others than Tacit. They run for pods too.
#[must_use]
pub fn render(report: &ProbeReport, at_root: &[HookProgram], colour: bool) -> String {
    let colour = if colour { Colour::On } else { Colour::Off };
    let mut table = Table::new(["FEATURE", "NEEDED FOR", "PRESENT", "SINCE", "FALLBACK"]);
    for finding in &report.findings {
        table.row([
            finding.feature.into(),
            finding.needed_for.into(),
            presence(finding),
            finding.since.into(),
            fallback(finding).unwrap_or("none").into(),
        ]);
    }
    let mut out = summary(report, colour);
    table.write(&mut out, colour);
    for finding in report.findings.iter().filter(|f| f.presence != Presence::Present) {
        let line = format!("{}: {}", finding.feature, finding.presence.problem());
        let mark = if finding.stops_the_agent() { "!" } else { "-" };
        let _ = writeln!(out, "{mark} {}", style(finding).paint(&line, colour));
    }
    for HookProgram { hook, id, name } in at_root {
        let line = format!(
            "{hook}: program {name:?} (id {id}) of others runs after Tacit's, which is at a cgroup below"
        );
        let _ = writeln!(out, "- {}", Style::Caution.paint(&line, colour));
    }
    out
}

/// The report as JSON. Fields are added, never renamed; `present` is null for what could not be tried.
#[must_use]
pub fn json(report: &ProbeReport, at_root: &[HookProgram]) -> Value {
    let features: Vec<Value> = report.findings.iter().map(feature).collect();
    let programs: Vec<Value> = at_root.iter().map(hook_program).collect();
    let supported = report.verdict().is_ok();
    json!({ "kernel": report.kernel, "supported": supported, "features": features, "connect_hooks": programs })
}

fn hook_program(program: &HookProgram) -> Value {
    let HookProgram { hook, id, name } = program;
    json!({ "hook": hook, "id": id, "name": name })
}

fn feature(finding: &ProbeFinding) -> Value {
    let present = match finding.presence {
        Presence::Present => Some(true),
        Presence::Absent(_) => Some(false),
        Presence::Unknown(_) => None,
    };
    json!({
        "feature": finding.feature,
        "needed_for": finding.needed_for,
        "required": finding.need == Need::Required,
        "present": present,
        "problem": finding.presence.problem(),
        "since": finding.since.to_string(),
        "fallback": fallback(finding),
    })
}

fn summary(report: &ProbeReport, colour: Colour) -> String {
    let (word, style) = match report.verdict() {
        Ok(()) => ("can run the agent", Style::Good),
        Err(_) => ("cannot run the agent", Style::Bad),
    };
    let kernel = Style::Plain.paint(&report.kernel, colour);
    format!("kernel {kernel} {}\n", style.paint(word, colour))
}

fn presence(finding: &ProbeFinding) -> Cell {
    let word = match finding.presence {
        Presence::Present => "yes",
        Presence::Absent(_) => "no",
        Presence::Unknown(_) => "unknown",
    };
    Cell::styled(word, style(finding))
}

fn style(finding: &ProbeFinding) -> Style {
    match finding.presence {
        Presence::Present => Style::Good,
        _ if finding.stops_the_agent() => Style::Bad,
        _ => Style::Caution,
    }
}

fn fallback(finding: &ProbeFinding) -> Option<&'static str> {
    match finding.need {
        Need::Required => None,
        Need::Fallback(fallback) => Some(fallback),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tacit_kernel::probe::{Release, Remedy};

    #[test]
    fn the_table_tells_what_is_there_and_what_is_done_without() {
        insta::with_settings!({ omit_expression => true }, {
            insta::assert_snapshot!("table", render(&report(), &at_root(), false));
        });
        assert!(render(&report(), &[], true).contains("\u{1b}[31mno\u{1b}[0m"));
    }

    #[test]
    fn json_keeps_absent_apart_from_untried() {
        let value = serde_json::to_string_pretty(&json(&report(), &at_root())).expect("serialisable");
        insta::with_settings!({ omit_expression => true }, { insta::assert_snapshot!("json", value) });
    }

    fn at_root() -> [HookProgram; 1] {
        [HookProgram { hook: "connect4", id: 12, name: "cil_sock4_conne".to_owned() }]
    }

    fn report() -> ProbeReport {
        let finding = |feature, since, need, presence| ProbeFinding {
            feature,
            needed_for: "work",
            since,
            need,
            remedy: Remedy::Kernel("CONFIG_X"),
            presence,
        };
        ProbeReport {
            kernel: "5.10.0".to_owned(),
            findings: vec![
                finding("sk_lookup", Release(5, 9), Need::Required, Presence::Present),
                finding("cookie", Release(5, 15), Need::Required, Presence::Absent("not there".to_owned())),
                finding(
                    "tcx",
                    Release(6, 6),
                    Need::Fallback("clsact"),
                    Presence::Unknown("not tried".to_owned()),
                ),
            ],
        }
    }
}
