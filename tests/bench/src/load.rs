//! Load generators: started in a pod, run to their end, and what they printed as figures.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tacit_topology::{Pod, run};

use super::cpu_pinning::{self, End};

/// The result of one run of a load generator.
pub(super) struct Done {
    /// Figures by what they are.
    pub(super) figures: Vec<(&'static str, f64)>,
    pub(super) work: Work,
}

impl Done {
    /// An error when a request failed: the rate of those that did not is none that a user would see.
    pub(super) fn without_failures(self) -> Result<Self> {
        let failed = self.figures.iter().find(|(name, value)| *name == "failed" && *value > 0.0);
        ensure!(
            failed.is_none(),
            "{:.2} % of the requests failed",
            failed.map_or(0.0, |(_, percent)| *percent)
        );
        Ok(self)
    }
}

/// The work that CPU time is divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Work {
    Bytes(f64),
    Requests(f64),
}

/// The side that sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Reverse,
}

/// iperf3 with parallel streams. Gives `rate` in Gbit/s.
pub(super) fn iperf(
    from: &Pod,
    to: SocketAddr,
    streams: u16,
    direction: Direction,
    seconds: u64,
) -> Result<Done> {
    let mut command = from.command("iperf3");
    command.args(["--json", "--client", &to.ip().to_string(), "--port", &to.port().to_string()]);
    command.args(["--time", &seconds.to_string(), "--parallel", &streams.to_string()]);
    if direction == Direction::Reverse {
        command.arg("--reverse");
    }
    // What it prints on a failure is JSON on stdout, so the exit code says little; the text says it all.
    let output = command.stdin(std::process::Stdio::null()).output().context("start iperf3")?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_iperf(&text).with_context(|| format!("iperf3 to {to}: {}", text.trim()))
}

fn parse_iperf(text: &str) -> Result<Done> {
    let value: Value = serde_json::from_str(text).context("no JSON")?;
    // What arrived, not what was handed to a socket.
    let received = &value["end"]["sum_received"];
    let field = |name: &str| received[name].as_f64().with_context(|| format!("no {name} in it"));
    let (rate, bytes) = (field("bits_per_second")?, field("bytes")?);
    ensure!(bytes > 0.0, "nothing arrived");
    Ok(Done { figures: vec![("rate", rate / 1e9)], work: Work::Bytes(bytes) })
}

/// The reuse of an HTTP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Alive,
    Close,
}

/// wrk, one thread, with as many connections. Gives `rate` in requests/s and `p50`, `p99` in microseconds.
pub(super) fn wrk(from: &Pod, to: SocketAddr, connections: u16, keep: Keep, seconds: u64) -> Result<Done> {
    let mut command = from.command("wrk");
    command.args(["--latency", "--threads", "1", "--connections", &connections.to_string()]);
    command.args(["--duration", &format!("{seconds}s")]);
    if keep == Keep::Close {
        command.args(["--header", "Connection: close"]);
    }
    let text = run(command.arg(format!("http://{to}/")))?;
    parse_wrk(&text).with_context(|| format!("wrk printed:\n{text}"))
}

fn parse_wrk(text: &str) -> Result<Done> {
    for bad in ["Socket errors:", "Non-2xx"] {
        let found = text.lines().find(|line| line.trim_start().starts_with(bad));
        ensure!(found.is_none(), "{}", found.unwrap_or_default().trim());
    }
    let after = |name: &str| {
        let found = text.lines().find_map(|line| line.trim_start().strip_prefix(name));
        found.map(str::trim).with_context(|| format!("no line {name}"))
    };
    let rate = after("Requests/sec:")?.parse::<f64>().context("requests/sec")?;
    let (p50, p99) = (microseconds(after("50%")?)?, microseconds(after("99%")?)?);
    let requests = text.lines().find_map(|line| line.trim_start().split_once(" requests in "));
    let requests =
        requests.context("no number of requests")?.0.parse::<f64>().context("number of requests")?;
    ensure!(requests > 0.0, "no request was answered");
    let figures = vec![("rate", rate), ("p50", p50), ("p99", p99)];
    Ok(Done { figures, work: Work::Requests(requests) })
}

/// `1.23ms` as wrk writes times.
fn microseconds(text: &str) -> Result<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];
    let found = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)));
    let (number, factor) = found.with_context(|| format!("time {text:?}"))?;
    Ok(number.parse::<f64>().with_context(|| format!("time {text:?}"))? * factor)
}

/// `tacit-load refused`. Gives the figures of [`requests`].
pub(super) fn refusals(
    from: &Pod,
    program: &Path,
    to: SocketAddr,
    (clients, seconds): (u16, u64),
) -> Result<Done> {
    load(from, program, clients, &["refused", &to.to_string(), &clients.to_string(), &seconds.to_string()])
}

/// `tacit-load sparse`, one request after each pause. Gives the figures of [`requests`].
pub(super) fn sparse(
    from: &Pod,
    program: &Path,
    to: SocketAddr,
    (pause_ms, bytes, seconds): (u32, u32, u64),
) -> Result<Done> {
    let (to, size) = (to.to_string(), [pause_ms.to_string(), bytes.to_string(), seconds.to_string()]);
    load(from, program, 1, &["sparse", &to, &size[0], &size[1], &size[2]])
}

/// `tacit-load echo` or `connect`. Gives `rate` in requests/s, `p50`, `p99`, `p999` in microseconds, and `flat`, the
/// requests of the last seconds to those of the first, when it ran long enough, and `failed` in percent.
pub(super) fn requests(
    from: &Pod,
    program: &Path,
    kind: &str,
    to: SocketAddr,
    (clients, bytes, seconds): (u16, u32, u64),
) -> Result<Done> {
    let (to, size) = (to.to_string(), [clients.to_string(), bytes.to_string(), seconds.to_string()]);
    load(from, program, clients, &[kind, &to, &size[0], &size[1], &size[2]])
}

fn load(from: &Pod, program: &Path, clients: u16, arguments: &[&str]) -> Result<Done> {
    let mut command = match clients {
        1 => cpu_pinning::command(from, program, End::Client)?,
        _ => from.command(program),
    };
    let text = run(command.args(arguments))?;
    parse_requests(&text).with_context(|| format!("tacit-load {}: {}", arguments.join(" "), text.trim()))
}

fn parse_requests(text: &str) -> Result<Done> {
    let value: Value = serde_json::from_str(text).context("no JSON")?;
    let failures = value["failures"].as_object().context("no failures in it")?;
    let names = [("rate", "per_second"), ("p50", "p50_us"), ("p99", "p99_us"), ("p999", "p999_us")];
    let figure = |&(name, key): &(&'static str, &str)| {
        Ok((name, value[key].as_f64().with_context(|| format!("no {key} in it"))?))
    };
    let mut figures = names.iter().map(figure).collect::<Result<Vec<_>>>()?;
    let requests = value["requests"].as_f64().context("no requests in it")?;
    let seconds = value["each_second"].as_array().context("no each_second in it")?;
    let each_second: Vec<f64> = seconds.iter().filter_map(Value::as_f64).collect();
    figures.extend(flatness(&each_second).map(|flat| ("flat", flat)));
    let failed: f64 = failures.values().filter_map(Value::as_f64).fold(0.0, |sum, count| sum + count);
    ensure!(requests > 0.0, "no request was answered");
    figures.push(("failed", failed * 100.0 / (failed + requests)));
    Ok(Done { figures, work: Work::Requests(requests) })
}

/// Requests in the last ten seconds to those in the first ten; `None` when these overlap or the first were none.
fn flatness(each_second: &[f64]) -> Option<f64> {
    const PART: usize = 10;
    let (first, last) = (each_second.first_chunk::<PART>()?, each_second.last_chunk::<PART>()?);
    let first: f64 = first.iter().sum();
    (each_second.len() >= 2 * PART && first > 0.0).then(|| last.iter().sum::<f64>() / first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iperf_counts_what_arrived() {
        let text = r#"{"end": {"sum_sent": {"bytes": 9, "bits_per_second": 9e9},
                               "sum_received": {"bytes": 625000000, "bits_per_second": 5e9}}}"#;
        let done = parse_iperf(text).expect("parsed");
        assert_eq!((done.figures, done.work), (vec![("rate", 5.0)], Work::Bytes(625e6)));
        assert!(parse_iperf(r#"{"error": "unable to connect"}"#).is_err());
    }

    #[test]
    fn a_time_of_wrk_has_a_unit() {
        assert_eq!(microseconds("412.00us").expect("parsed"), 412.0);
        assert_eq!(microseconds("1.25ms").expect("parsed"), 1250.0);
        assert_eq!(microseconds("2.00s").expect("parsed"), 2e6);
        assert!(microseconds("12").is_err());
    }

    #[test]
    fn a_rate_that_falls_is_not_flat() {
        let mut seconds = vec![100.0; 60];
        assert_eq!(flatness(&seconds), Some(1.0));
        seconds[50..].fill(5.0);
        assert_eq!(flatness(&seconds), Some(0.05));
        assert_eq!(flatness(&seconds[..19]), None);
    }

    const WRK: &str = "Running 5s test @ http://10.77.2.2:80/\n  1 threads and 32 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.30ms  200.00us   9.00ms   90.00%\n  \
        Latency Distribution\n     50%    1.25ms\n     75%    1.40ms\n     90%    1.60ms\n     99%    2.10ms\n  \
        114375 requests in 5.00s, 93.05MB read\nRequests/sec:  22875.12\nTransfer/sec:     18.61MB\n";

    #[test]
    fn wrk_is_read_to_the_last_request() {
        let done = parse_wrk(WRK).expect("parsed");
        assert_eq!(done.figures, [("rate", 22875.12), ("p50", 1250.0), ("p99", 2100.0)]);
        assert_eq!(done.work, Work::Requests(114_375.0));
    }

    #[test]
    fn a_failed_request_fails_the_measurement() {
        let errors = format!("{WRK}  Socket errors: connect 0, read 3, write 0, timeout 0\n");
        assert!(parse_wrk(&errors).is_err());
        assert!(parse_wrk(&format!("{WRK}  Non-2xx or 3xx responses: 12\n")).is_err());
        let text = r#"{"requests": 5, "per_second": 1.0, "p50_us": 1.0, "p99_us": 1.0, "p999_us": 1.0,
                       "each_second": [5], "failures": {"TimedOut": 3}}"#;
        let done = parse_requests(text).expect("parsed");
        assert!(done.without_failures().is_err());
        let done = parse_requests(&text.replace("\"TimedOut\": 3", "")).expect("parsed");
        assert!(done.without_failures().is_ok());
    }
}
