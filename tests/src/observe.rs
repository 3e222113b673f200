//! Metrics, status and log of an agent.

use anyhow::{Context, Result};
use serde_json::Value;
use tacit_topology::{Agent, until};

/// Returns the sum of all samples of `name` (as exposed, with its suffix) that have all of `labels`.
///
/// # Errors
/// Fails if the value of a matching sample is not a whole number.
pub fn sum(metrics: &str, name: &str, labels: &[(&str, &str)]) -> Result<u64> {
    let wanted: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
    let mut total = 0;
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (sample, value) = line.rsplit_once(' ').with_context(|| format!("metrics line {line:?}"))?;
        let (found, with) = sample.split_once('{').unwrap_or((sample, ""));
        if found == name && wanted.iter().all(|label| with.contains(label.as_str())) {
            total += value.parse::<u64>().with_context(|| format!("metrics line {line:?}"))?;
        }
    }
    Ok(total)
}

/// Returns the [`sum`] over the current metrics of `agent`.
///
/// # Errors
/// Fails if it does not answer.
pub fn metric(agent: &Agent, name: &str, labels: &[(&str, &str)]) -> Result<u64> {
    sum(&agent.metrics()?, name, labels)
}

/// Returns the number of connections that `agent` rejected for `reason`.
///
/// # Errors
/// Fails if it does not answer.
pub fn refused(agent: &Agent, reason: &str) -> Result<u64> {
    metric(agent, "tacit_connections_refused_total", &[("reason", reason)])
}

/// Returns the lines of `agent`'s metrics that count rejected connections, for error messages.
///
/// # Errors
/// Fails if it does not answer.
pub fn refusals(agent: &Agent) -> Result<Vec<String>> {
    let metrics = agent.metrics()?;
    let lines = metrics.lines().filter(|line| line.starts_with("tacit_connections_refused_total"));
    Ok(lines.map(str::to_owned).collect())
}

/// Waits until the log of `agent` has all of `texts`, and returns it. A thread of the agent writes lines a moment after what
/// they tell is visible elsewhere.
///
/// # Errors
/// Fails if the wait times out; the message has the log.
pub fn wait_log(agent: &Agent, texts: &[&str]) -> Result<String> {
    let what = format!("node {}: {texts:?} in the log", agent.node());
    let log = until(&what, || {
        let log = agent.log()?;
        Ok(texts.iter().all(|text| log.contains(text)).then_some(log))
    });
    log.with_context(|| agent.log().unwrap_or_default())
}

/// Waits until `agent` has counted more than `before` rejections for `reason` and logged one whose line has `who`.
///
/// # Errors
/// Fails if the wait times out; the message has the rejections that were counted and logged.
pub fn wait_refused(agent: &Agent, reason: &str, before: u64, who: &str) -> Result<()> {
    let what = format!("node {}: a rejection of {who} for {reason} counted and logged", agent.node());
    let shown = until(&what, || {
        let counted = refused(agent, reason)? > before;
        let log = agent.log()?;
        let of_reason = |line: &&str| line.contains("connection refused") && line.contains(reason);
        let logged = log.lines().filter(of_reason).any(|line| line.contains(who));
        Ok((counted && logged).then_some(()))
    });
    shown.with_context(|| {
        let counted = refusals(agent).unwrap_or_default();
        let log = agent.log().unwrap_or_default();
        let logged: Vec<_> = log.lines().filter(|line| line.contains("refused")).collect();
        format!("rejections counted: {counted:#?}\nlogged: {logged:#?}")
    })
}

/// Returns the output of `tacit status -o json`.
///
/// # Errors
/// Fails if the command fails or its output is not JSON.
pub fn status(agent: &Agent) -> Result<Value> {
    serde_json::from_str(&agent.status()?).context("parse the status as JSON")
}

/// Waits until `condition` returns `Some` for the status, and returns its value.
///
/// # Errors
/// Fails if the wait times out; the message has the last status.
pub fn wait_status<T>(agent: &Agent, what: &str, condition: impl Fn(&Value) -> Option<T>) -> Result<T> {
    let what = format!("status of node {}: {what}", agent.node());
    let mut last = Value::Null;
    let found = until(&what, || {
        last = status(agent)?;
        Ok(condition(&last))
    });
    found.with_context(|| format!("last status: {last:#}"))
}

/// Waits until all pods of the agent's node have this mode.
///
/// # Errors
/// Fails if the wait times out; the message has the last status.
pub fn wait_modes(agent: &Agent, mode: &str) -> Result<()> {
    wait_status(agent, mode, |status| {
        status["pods"].as_array()?.iter().all(|pod| pod["mode"] == mode).then_some(())
    })
}

/// Waits until all pods of the agent's node are enrolled.
///
/// # Errors
/// Fails if the wait times out; the message has the last status.
pub fn wait_enrolled(agent: &Agent) -> Result<()> {
    wait_status(agent, "all pods enrolled", |status| {
        let pods = status["pods"].as_array()?;
        (status["state"] == "ready" && pods.iter().all(|pod| pod["state"] == "enrolled")).then_some(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_chosen_by_name_and_labels() {
        let text = "# TYPE flows counter\nflows_total{a=\"1\",b=\"x\"} 3\nflows_total{a=\"2\",b=\"x\"} 4\nflows 9\n# EOF\n";
        assert_eq!(sum(text, "flows_total", &[]).expect("numbers"), 7);
        assert_eq!(sum(text, "flows_total", &[("a", "2"), ("b", "x")]).expect("numbers"), 4);
        assert_eq!(sum(text, "flows", &[]).expect("numbers"), 9);
        assert_eq!(sum(text, "flows_total", &[("a", "3")]).expect("numbers"), 0);
    }
}
