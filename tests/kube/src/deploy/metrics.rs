//! Names of metrics: those that the agent exposes, and those that dashboards and alerts ask for.

use std::collections::BTreeSet;

/// The names that the declarations in `agent/src/telemetry/metrics.rs` give on the wire: the unit, then `_total` for
/// counters, `_info` for information, and the three series of a histogram.
pub(super) fn declared(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for declaration in source.split(": Metric = Metric {").skip(1) {
        let body = declaration.split("};").next().unwrap_or_default();
        let field = |name: &str| {
            body.lines().find_map(|line| line.trim().strip_prefix(name)?.trim().strip_suffix(','))
        };
        let Some(mut name) = field("name:").map(|text| text.trim_matches('"').to_owned()) else { continue };
        let unit = field("unit:").and_then(|unit| unit.strip_prefix("Some(Unit::")?.strip_suffix(')'));
        if let Some(unit) = unit {
            name += &format!("_{}", unit.to_lowercase());
        }
        match field("kind:") {
            Some("MetricType::Counter") => name += "_total",
            Some("MetricType::Info") => name += "_info",
            Some("MetricType::Histogram") => {
                names.extend(["_bucket", "_count"].map(|series| format!("{name}{series}")));
                name += "_sum";
            }
            _ => {}
        }
        names.insert(name);
    }
    names
}

/// The names of Tacit's metrics in a text: a dashboard, rules.
pub(super) fn asked_for(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let ours = words.filter(|word| ["tacit_", "istio_"].iter().any(|prefix| word.starts_with(prefix)));
    ours.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "static A: Metric = Metric {\n    name: \"tacit_a\",\n    unit: Some(Unit::Bytes),\n    \
        kind: MetricType::Counter,\n    labels: &[],\n};\nstatic B: Metric = Metric {\n    name: \"tacit_b\",\n    \
        unit: None,\n    kind: MetricType::Gauge,\n};\nstatic C: Metric = Metric {\n    name: \"tacit_c\",\n    \
        unit: None,\n    kind: MetricType::Info,\n};\nstatic D: Metric = Metric {\n    name: \"tacit_d\",\n    \
        unit: None,\n    kind: MetricType::Histogram,\n};\n";

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn names_get_the_suffixes_of_the_format() {
        let histogram = ["tacit_d_bucket", "tacit_d_count", "tacit_d_sum"];
        let others = ["tacit_a_bytes_total", "tacit_b", "tacit_c_info"];
        assert_eq!(declared(SOURCE), set(&[others, histogram].concat()));
    }

    #[test]
    fn names_are_found_in_expressions() {
        let text = "sum(rate(tacit_a_bytes_total{x=\"y\"}[5m])) by (reason) > on() tacit_b";
        assert_eq!(asked_for(text), set(&["tacit_a_bytes_total", "tacit_b"]));
    }
}
