//! Ratios of one result, for the figure of `--plot`: a run, a file of `--json`, or the committed ratios.
//!
//! One line of each case is shown, the one that leads. Lines without a ratio are left out; nothing is computed that the
//! result does not have.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{
    baseline::Baseline,
    cases::{self, Better},
    figures::{DIRECT, RIVAL, TACIT},
    idle_wait,
};

/// The ratios of a result.
#[derive(Debug, PartialEq)]
pub(super) struct Ratios {
    /// CPU, cores, kernel and date, if the result names them.
    pub(super) machine: Option<String>,
    pub(super) bars: Vec<Bar>,
}

/// Ratios of one case.
#[derive(Debug, PartialEq)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) what: String,
    /// Of the figures that the ratio compares.
    pub(super) unit: String,
    pub(super) better: Better,
    pub(super) tacit: f64,
    pub(super) rival: Option<f64>,
}

impl Ratios {
    /// Reads a file of `--json` or the committed ratios.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("invalid JSON")?;
        match value.as_array() {
            Some(rows) => Self::of(rows),
            None => Self::committed(&Baseline::parse(text)?),
        }
    }

    /// Takes the ratios from the objects of `--json`.
    pub(super) fn of(rows: &[Value]) -> Result<Self> {
        let leading = rows.iter().filter(|row| row["leads"] != false && row["ratio"].is_number());
        let bars = leading.map(Bar::of).collect::<Result<Vec<_>>>()?;
        ensure!(!bars.is_empty(), "the result has no ratio to direct traffic: nothing to plot");
        let machine = rows.iter().find_map(|row| row["machine"].as_str()).map(str::to_owned);
        Ok(Self { machine, bars })
    }

    fn committed(baseline: &Baseline) -> Result<Self> {
        let mut bars = Vec::new();
        for case in cases::all() {
            let Some(metric) = case.metrics().first() else { continue };
            let (name, what) = case.labels(metric);
            if let Some(&tacit) = baseline.ratios.get(&name) {
                let (unit, better) = (metric.unit.to_owned(), metric.better);
                bars.push(Bar { name, what, unit, better, tacit, rival: None });
            }
        }
        let unknown = baseline.ratios.keys().find(|name| bars.iter().all(|bar| bar.name != **name));
        ensure!(
            unknown.is_none(),
            "invalid ratio {unknown:?}: expected a case of `cargo xtask bench --list`"
        );
        Ok(Self { machine: baseline.machine.clone(), bars })
    }
}

impl Bar {
    fn of(row: &Value) -> Result<Self> {
        let text = |field: &str| {
            let value = row[field].as_str().map(str::to_owned);
            value.with_context(|| format!("invalid {field} {}: expected a text", row[field]))
        };
        let better = match row["better"].as_str() {
            Some("higher") => Better::Higher,
            Some("lower") => Better::Lower,
            _ => bail!("invalid better {}: expected higher or lower", row["better"]),
        };
        let is_noisy = |column: &str| {
            row[format!("{column}_noise")].as_f64().is_some_and(|part| part > idle_wait::LIMIT)
        };
        let mark = if [DIRECT, TACIT, RIVAL].into_iter().any(is_noisy) { " (~)" } else { "" };
        Ok(Self {
            name: text("case")?,
            what: text("what")? + mark,
            unit: text("unit")?,
            better,
            tacit: row["ratio"].as_f64().context("no ratio")?,
            rival: row["rival_ratio"].as_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = r#"[
        {"case": "connect-x1", "what": "connections", "unit": "connections/s", "better": "higher", "leads": true,
         "ratio": 0.5, "rival_ratio": 0.25, "machine": "a CPU", "tacit_noise": 0.2},
        {"case": "connect-x1-p99", "what": "connections, p99", "unit": "us", "better": "lower", "leads": false, "ratio": 2},
        {"case": "pods-memory", "what": "memory", "unit": "KiB", "better": "lower", "leads": true, "ratio": null}
    ]"#;

    #[test]
    fn a_result_shows_the_leading_line_of_each_case_with_a_ratio() {
        let bar = Bar {
            name: "connect-x1".to_owned(),
            what: "connections (~)".to_owned(),
            unit: "connections/s".to_owned(),
            better: Better::Higher,
            tacit: 0.5,
            rival: Some(0.25),
        };
        let expected = Ratios { machine: Some("a CPU".to_owned()), bars: vec![bar] };
        assert_eq!(Ratios::parse(RESULT).expect("a result"), expected);
    }

    #[test]
    fn committed_ratios_get_the_names_and_units_of_their_cases() {
        let text = r#"{"tolerance": 0.2, "cores": 2, "ratios": {"echo-64B-x1-p50": 0.8}}"#;
        let ratios = Ratios::parse(text).expect("a baseline");
        let bar = &ratios.bars[0];
        assert_eq!((bar.unit.as_str(), bar.better, bar.tacit), ("us", Better::Lower, 0.8));
        assert_eq!(bar.what, "echo 64 B, 1 connection, p50");
        assert_eq!(ratios.machine, None);
    }

    #[test]
    fn results_that_cannot_be_shown_are_refused() {
        for text in
            ["", "[]", r#"[{"ratio": 1}]"#, r#"{"tolerance": 0.2, "cores": 2, "ratios": {"dance": 0.8}}"#]
        {
            assert!(Ratios::parse(text).is_err(), "{text}");
        }
    }
}
