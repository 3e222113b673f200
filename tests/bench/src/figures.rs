//! Medians, ratios and what stands in one line of the table.

use serde_json::{Value, json};

use super::{
    cases::{Better, Case, Metric},
    idle_wait,
    load::{Done, Work},
    usage::Cpu,
};

/// Names of the columns in results.
pub(super) const DIRECT: &str = "direct";
pub(super) const TACIT: &str = "tacit";
pub(super) const RIVAL: &str = "rival";

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

/// One figure of one case.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    /// Unique among the results.
    pub(super) name: String,
    /// The case it belongs to.
    pub(super) case: String,
    pub(super) what: String,
    pub(super) unit: &'static str,
    pub(super) better: Better,
    pub(super) columns: Vec<Column>,
    /// The unit that CPU time is divided by.
    pub(super) cpu_unit: &'static str,
    /// Further facts, for `--json`.
    pub(super) extra: Vec<(String, Value)>,
    /// True for the first line of its case, the one that shows CPU and memory.
    pub(super) leads: bool,
}

/// One column of it.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) name: &'static str,
    /// Of all rounds, in their order.
    pub(super) rounds: Vec<f64>,
    pub(super) median: f64,
    pub(super) cpu: [Cpu; 2],
    /// In bytes.
    pub(super) rss: [f64; 2],
    /// Part of the machine that others used, 0 to 1.
    pub(super) noise: f64,
}

impl Figure {
    /// The lines of a case from its samples by column.
    pub(super) fn of(case: &Case, columns: &[(&'static str, &[Sample])]) -> Vec<Self> {
        let metrics = case.metrics();
        let line = |(at, metric): (usize, &Metric)| {
            let (name, what) = case.labels(metric);
            Self {
                name,
                case: case.name.clone(),
                what,
                unit: metric.unit,
                better: metric.better,
                columns: columns.iter().map(|(name, samples)| Column::of(name, samples, metric)).collect(),
                cpu_unit: columns.iter().find_map(|(_, samples)| samples.first()).map_or("", cpu_unit),
                extra: Vec::new(),
                leads: at == 0,
            }
        };
        metrics.iter().enumerate().map(line).collect()
    }

    /// A figure of Tacit alone, which was measured once.
    pub(super) fn alone(
        case: &str,
        name: &str,
        what: String,
        (unit, better): (&'static str, Better),
        value: f64,
    ) -> Self {
        Self {
            name: format!("{case}-{name}"),
            case: case.to_owned(),
            what,
            unit,
            better,
            columns: vec![Column {
                name: TACIT,
                rounds: vec![value],
                median: value,
                cpu: [Cpu::default(); 2],
                rss: [0.0; 2],
                noise: 0.0,
            }],
            cpu_unit: "",
            extra: Vec::new(),
            leads: false,
        }
    }

    pub(super) fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// A column's median to the one of `direct`.
    pub(super) fn ratio(&self, name: &str) -> Option<f64> {
        let (own, direct) = (self.column(name)?.median, self.column(DIRECT)?.median);
        (direct > 0.0).then(|| own / direct)
    }

    /// Returns true if other processes kept the machine busy in one of its columns. Such a line is not reliable.
    pub(super) fn is_noisy(&self) -> bool {
        self.columns.iter().any(|column| column.noise > idle_wait::LIMIT)
    }

    /// For who waits.
    pub(super) fn line(&self) -> String {
        let columns: Vec<String> =
            self.columns.iter().map(|column| format!("{} {:.4}", column.name, column.median)).collect();
        let ratio = self.ratio(TACIT).map_or(String::new(), |ratio| format!(", ratio {ratio:.3}"));
        let noisy = if self.is_noisy() { " (others kept the machine busy)" } else { "" };
        format!("  {}: {} {}{ratio}{noisy}", self.name, columns.join(", "), self.unit)
    }

    /// One object of `--json`.
    pub(super) fn json(&self) -> Value {
        let median = |name: &str| self.column(name).map(|column| column.median);
        let mut object = json!({
            "case": self.name,
            "group": self.case,
            "leads": self.leads,
            "what": self.what,
            "unit": self.unit,
            "better": match self.better { Better::Higher => "higher", Better::Lower => "lower" },
            "direct": median(DIRECT),
            "tacit": median(TACIT),
            "ratio": self.ratio(TACIT),
            "cpu_unit": self.cpu_unit,
            "cpu_a": null,
            "cpu_b": null,
            "rss_a": null,
            "rss_b": null,
        });
        for column in &self.columns {
            let name = column.name;
            object[format!("{name}_rounds")] = json!(column.rounds);
            object[format!("{name}_noise")] = json!(column.noise);
            if name == DIRECT {
                continue;
            }
            if name == RIVAL {
                object[RIVAL] = json!(column.median);
                object["rival_ratio"] = json!(self.ratio(RIVAL));
            }
            let prefix = if name == TACIT { String::new() } else { format!("{name}_") };
            if self.cpu_unit.is_empty() {
                continue;
            }
            for (node, at) in [("a", 0), ("b", 1)] {
                object[format!("{prefix}cpu_{node}")] = json!(column.cpu[at].total());
                object[format!("{prefix}cpu_{node}_user")] = json!(column.cpu[at].user);
                object[format!("{prefix}cpu_{node}_system")] = json!(column.cpu[at].system);
                object[format!("{prefix}rss_{node}")] = json!(column.rss[at]);
            }
        }
        for (name, value) in &self.extra {
            object[name] = value.clone();
        }
        object
    }
}

impl Column {
    fn of(name: &'static str, samples: &[Sample], metric: &Metric) -> Self {
        let of = |get: &dyn Fn(&Sample) -> f64| median(&samples.iter().map(get).collect::<Vec<_>>());
        let figure = |sample: &Sample| sample.figure(metric.name);
        let cpu = |node: usize| Cpu { user: of(&|s| s.cpu[node].user), system: of(&|s| s.cpu[node].system) };
        Self {
            name,
            rounds: samples.iter().map(figure).collect(),
            median: of(&figure),
            cpu: [cpu(0), cpu(1)],
            rss: [of(&|s| s.rss[0]), of(&|s| s.rss[1])],
            noise: of(&|s| s.noise),
        }
    }
}

impl Sample {
    fn figure(&self, name: &str) -> f64 {
        self.done.figures.iter().find(|(known, _)| *known == name).map_or(f64::NAN, |(_, value)| *value)
    }
}

fn cpu_unit(sample: &Sample) -> &'static str {
    match sample.done.work {
        Work::Bytes(_) => "s/GiB",
        Work::Requests(_) => "us/request",
    }
}

/// The middle value, or the mean of the two middle ones; not a number without values.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (count, middle) if count % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_round_does_not_move_the_median() {
        assert_eq!(median(&[5.0, 4.9, 0.1]), 4.9);
        assert_eq!(median(&[1.0, 2.0, 3.0, 100.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
