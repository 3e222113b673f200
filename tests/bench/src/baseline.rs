//! `--check`: no ratio is worse than the committed one by more than the tolerance.
//!
//! Ratios are compared, never absolute figures; they depend on the number of cores more than on their speed. What seems
//! worse is measured once more and counts only when it is worse again: one bad minute of a shared machine is no regress.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    cases::{self, Better, Case},
    figures::{Figure, TACIT},
    machine,
    rounds::Plan,
};

/// Path of the committed ratios, from the top folder.
pub(super) const FILE: &str = "tests/bench-baseline.json";
/// The measured cases, some two minutes with [`PLAN`].
const CASES: [&str; 11] = [
    "throughput-x1",
    "throughput-x8",
    "throughput-x1-reverse",
    "same-node-x1",
    "echo-64B-x1",
    "echo-64B-x64",
    "connect-x1",
    "connect-x16",
    "refused-x1",
    "http-keepalive",
    "http-close",
];
/// Many short rounds: the median of five is not moved by two bad ones.
pub(super) const PLAN: Plan = Plan { rounds: 5, seconds: 1, patience: Duration::ZERO };
/// For the ratios that are committed.
pub(super) const PLAN_WRITE: Plan = Plan { rounds: 9, seconds: 2, patience: Duration::ZERO };
/// Part of a ratio that it may be worse by, when the file does not say. Above what two runs of one build differ by.
const TOLERANCE: f64 = 0.25;

/// The committed ratios.
pub(super) struct Baseline {
    tolerance: f64,
    cores: usize,
    /// CPU, cores, kernel and date, if the file names them.
    pub(super) machine: Option<String>,
    /// By the name of the line.
    pub(super) ratios: BTreeMap<String, f64>,
}

/// One comparison.
#[derive(Debug, PartialEq)]
pub(super) struct Judged {
    pub(super) name: String,
    /// The case to measure again.
    pub(super) case: String,
    pub(super) committed: f64,
    pub(super) now: f64,
    pub(super) verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Worse,
    Same,
    Better,
}

/// The cases of the check.
pub(super) fn cases() -> Result<Vec<Case>> {
    CASES.iter().map(|name| cases::named(name).with_context(|| format!("no case {name}"))).collect()
}

impl Baseline {
    pub(super) fn read(root: &Path) -> Result<Self> {
        let file = root.join(FILE);
        let text = fs::read_to_string(&file).with_context(|| {
            format!("read {}: commit one, `cargo xtask bench --write-baseline`", file.display())
        })?;
        Self::parse(&text).with_context(|| format!("{}", file.display()))
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("no JSON")?;
        let tolerance = value["tolerance"].as_f64().filter(|part| (0.0..1.0).contains(part));
        let ratios = value["ratios"].as_object().context("no ratios")?;
        let ratio = |(name, value): (&String, &Value)| {
            let value = value.as_f64().filter(|ratio| *ratio > 0.0);
            Ok((name.clone(), value.with_context(|| format!("the ratio of {name} is no positive number"))?))
        };
        let ratios = ratios.iter().map(ratio).collect::<Result<BTreeMap<_, _>>>()?;
        ensure!(!ratios.is_empty(), "no ratios");
        Ok(Self {
            tolerance: tolerance.context("no tolerance from 0 to 1")?,
            cores: value["cores"].as_u64().context("no cores")?.try_into()?,
            machine: value["machine"].as_str().map(str::to_owned),
            ratios,
        })
    }

    /// Returns a warning if the comparison is not reliable.
    pub(super) fn warning(&self) -> Option<String> {
        let cores = machine::cores();
        (cores != self.cores).then(|| {
            format!("the committed ratios are of a machine with {} cores, this one has {cores}", self.cores)
        })
    }

    /// Compares all committed ratios that belong to the measured cases.
    pub(super) fn judge(&self, measured: &[Figure]) -> Result<Vec<Judged>> {
        let mut judged = Vec::new();
        for row in measured.iter().filter(|row| row.leads) {
            let Some(&committed) = self.ratios.get(&row.name) else {
                bail!("no committed ratio of {}: `cargo xtask bench --write-baseline`", row.name);
            };
            let now = row.ratio(TACIT).with_context(|| format!("{} has no ratio", row.name))?;
            let verdict = compare(committed, now, row.better, self.tolerance);
            let (name, case) = (row.name.clone(), row.case.clone());
            judged.push(Judged { name, case, committed, now, verdict });
        }
        Ok(judged)
    }
}

impl Baseline {
    /// The tolerance as people read it.
    pub(super) fn limit(&self) -> String {
        format!("{:.0} %", self.tolerance * 100.0)
    }
}

impl Judged {
    /// Both ratios.
    pub(super) fn change(&self) -> String {
        format!("{:.3}x direct, committed {:.3}x", self.now, self.committed)
    }
}

fn compare(committed: f64, now: f64, better: Better, tolerance: f64) -> Verdict {
    // As if higher were always better.
    let change = match better {
        Better::Higher => now / committed,
        Better::Lower => committed / now,
    };
    match change {
        better if better > 1.0 / (1.0 - tolerance) => Verdict::Better,
        same if same >= 1.0 - tolerance => Verdict::Same,
        // Also what is no number.
        _ => Verdict::Worse,
    }
}

/// Commits the ratios to the file; a tolerance that stands in it stays.
pub(super) fn write(root: &Path, measured: &[Figure]) -> Result<()> {
    let file = root.join(FILE);
    let tolerance = Baseline::read(root).map_or(TOLERANCE, |old| old.tolerance);
    let mut ratios = serde_json::Map::new();
    for row in measured.iter().filter(|row| row.leads) {
        let ratio = row.ratio(TACIT).with_context(|| format!("{} has no ratio", row.name))?;
        ratios.insert(row.name.clone(), json!((ratio * 1000.0).round() / 1000.0));
    }
    let value = json!({
        "about": "ratios of Tacit to direct traffic, made by `cargo xtask bench --write-baseline`",
        "machine": machine::description(),
        "cores": machine::cores(),
        "tolerance": tolerance,
        "ratios": ratios,
    });
    let text = serde_json::to_string_pretty(&value)? + "\n";
    fs::write(&file, text).with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_is_lower_for_rates_and_higher_for_times() {
        assert_eq!(compare(0.50, 0.38, Better::Higher, 0.2), Verdict::Worse);
        assert_eq!(compare(0.50, 0.41, Better::Higher, 0.2), Verdict::Same);
        assert_eq!(compare(0.50, 0.64, Better::Higher, 0.2), Verdict::Better);
        assert_eq!(compare(1.60, 2.10, Better::Lower, 0.2), Verdict::Worse);
        assert_eq!(compare(1.60, 1.90, Better::Lower, 0.2), Verdict::Same);
        assert_eq!(compare(1.60, 1.20, Better::Lower, 0.2), Verdict::Better);
    }

    #[test]
    fn no_number_is_worse() {
        assert_eq!(compare(0.5, f64::NAN, Better::Higher, 0.2), Verdict::Worse);
    }

    #[test]
    fn a_baseline_without_tolerance_or_ratios_is_refused() {
        let good = r#"{"tolerance": 0.2, "cores": 2, "ratios": {"throughput-x1": 0.5}}"#;
        assert!(Baseline::parse(good).is_ok());
        assert!(Baseline::parse(&good.replace("0.2", "2")).is_err());
        assert!(Baseline::parse(&good.replace("0.5", "\"fast\"")).is_err());
        assert!(Baseline::parse(&good.replace("\"throughput-x1\": 0.5", "")).is_err());
    }

    #[test]
    fn every_case_of_the_check_exists() {
        assert_eq!(cases().expect("all are known").len(), CASES.len());
    }
}
