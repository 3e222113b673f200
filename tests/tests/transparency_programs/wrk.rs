//! Lines of wrk: load without a failed request.

use anyhow::Result;

use crate::{stage::Scene, table::Line};

pub(crate) fn lines() -> Vec<Line> {
    vec![
        Line::scene("wrk -c 16", "keep-alive", "no errors", |scene| load(scene, &[], "http://{far4}:{web}/")),
        Line::scene("wrk -c 16, Connection: close", "a connection for each request", "no errors", |scene| {
            load(scene, &["-H", "Connection: close"], "http://{far4}:{web}/")
        }),
        Line::scene("wrk -c 16", "keep-alive over IPv6", "no errors", |scene| {
            load(scene, &[], "http://[{far6}]:{web}/")
        }),
        Line::scene("wrk -c 16, Connection: close", "a pod of the same node", "no errors", |scene| {
            load(scene, &["-H", "Connection: close"], "http://{near4}:{web}/")
        }),
        Line::scene("wrk -c 16", "answers of 4 MiB", "no errors", |scene| {
            load(scene, &[], "http://{far4}:{web}/big")
        }),
        Line::command(
            "a closed port",
            "Connection refused",
            &["wrk", "-t", "1", "-c", "1", "-d", "1", "http://{far4}:{closed}/"],
        ),
    ]
}

/// Runs wrk for a second. Returns its errors.
fn load(scene: &Scene<'_>, options: &[&str], url: &str) -> Result<String> {
    let words = [&["wrk", "-t", "1", "-c", "16", "-d", "1", "--timeout", "60"], options, &[url]].concat();
    let text = scene.shown("client", &words)?;
    let errors: Vec<&str> =
        text.lines().filter(|line| line.contains("Socket errors") || line.contains("Non-2xx")).collect();
    let ended = text.lines().next().unwrap_or_default();
    // A rate of nothing is no success.
    let rate = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"))
        .map_or("no rate", |rate| if rate.trim().starts_with("0.00") { "no requests" } else { "requests" });
    Ok(format!(
        "{ended}, {rate}, {}",
        if errors.is_empty() { "no errors".to_owned() } else { errors.join(" ") }
    ))
}
