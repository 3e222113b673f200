//! Harness of the attack suite, `tacit-attack` as `tacit doctor --attack` starts it. Each attack and address family is a
//! test: verdict `held` passes, `absent here` is ignored, any other verdict fails.
//!
//! The harness is custom because the suite builds its two meshes once and runs the attacks in order. It has the options
//! of the usual harness: `--include-ignored` runs the suite, which needs root, and a word filters by name. All names
//! begin with `attack::`, so a word with another beginning selects no test here.

use std::{
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tacit_tests::agent_program;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words = arguments.iter().filter(|argument| !argument.starts_with('-'));
    let filter = words.next();
    if filter.is_some_and(|word| !word.starts_with("attack")) {
        println!("running 0 tests");
        return result(Instant::now(), 0, 0, 0);
    }
    let is_run = arguments.iter().any(|argument| argument == "--include-ignored" || argument == "--ignored");
    if arguments.iter().any(|argument| argument == "--list") {
        println!("attacks: test\n\n1 test, 0 benchmarks");
        return ExitCode::SUCCESS;
    }
    if !is_run {
        println!("running 1 test\ntest attacks ... ignored, needs root");
        return result(Instant::now(), 0, 0, 1);
    }
    let begin = Instant::now();
    match attacks(filter) {
        Ok(results) => report(begin, &results),
        Err(error) => {
            println!("{error:#}\ntest attacks ... FAILED");
            result(begin, 0, 1, 0)
        }
    }
}

/// Runs the attacks whose name contains `filter` and returns their results.
fn attacks(filter: Option<&String>) -> Result<Vec<Value>> {
    let mut tacit = Command::new(agent_program()?);
    tacit.args(["doctor", "--attack", "-o", "json"]).stdout(Stdio::piped());
    if let Some(part) = filter.and_then(|filter| only(filter)) {
        tacit.args(["--only", &part]);
    }
    let output = tacit.spawn().context("start tacit")?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let parsed: Value =
        serde_json::from_str(&text).with_context(|| format!("{}: {text:?}", output.status))?;
    let results = parsed.as_array().context("an array")?;
    ensure!(!results.is_empty(), "no attack was run");
    let all_held = results.iter().all(|one| matches!(one["verdict"].as_str(), Some("held" | "absent here")));
    ensure!(all_held == output.status.success(), "{} contradicts the verdicts", output.status);
    Ok(results
        .iter()
        .filter(|one| filter.is_none_or(|part| name(one).contains(part.as_str())))
        .cloned()
        .collect())
}

/// Returns the part of a filter that the suite can select by: the group and the name, without the family.
fn only(filter: &str) -> Option<String> {
    let mut parts = filter.strip_prefix("attack::")?.splitn(3, "::");
    let group = parts.next()?;
    Some(parts.next().map_or_else(|| group.to_owned(), |name| format!("{group}::{name}")))
}

fn name(one: &Value) -> String {
    let text = |field: &str| one[field].as_str().unwrap_or("?").to_owned();
    format!("attack::{}::{}::{}", text("group"), text("attack"), text("family"))
}

fn report(begin: Instant, results: &[Value]) -> ExitCode {
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    println!("running {} tests", results.len());
    for one in results {
        let detail = one["detail"].as_str().unwrap_or_default();
        match one["verdict"].as_str() {
            Some("held") => {
                passed += 1;
                println!("test {} ... ok", name(one));
            }
            Some("absent here") => {
                ignored += 1;
                println!("test {} ... ignored, absent here: {detail}", name(one));
            }
            other => {
                failed += 1;
                println!("{}: {detail}", other.unwrap_or("no verdict"));
                println!("test {} ... FAILED", name(one));
            }
        }
    }
    result(begin, passed, failed, ignored)
}

fn result(begin: Instant, passed: u64, failed: u64, ignored: u64) -> ExitCode {
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out; \
         finished in {:.2}s\n",
        begin.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
