//! The documents of operators, held against schemas, sources and each other.
//!
//! | document | names in backticks |
//! |---|---|
//! | `configuration.md` | every field of the three schemas, in the section of its file, with its default |
//! | `policy.md` | every field of the two policy definitions |
//! | `troubleshooting.md` | every reason that the kernel, an agent or an authority counts, every exception with its hooks |
//! | `security-model.md` | tests and attacks that exist |
//!
//! Metrics and the targets of relative links exist, and the README stays short.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tacit_abi::{EXCEPTIONS, REASONS};
use tacit_core::{refusal::RefusalReason, shares::SHARES};
use xtask_support::workspace::Workspace;

use super::{chart::files, metrics, read_objects};

const README: &str = "README.md";
const DOCUMENTS: &str = "deploy/docs";
const SCHEMAS: [&str; 3] =
    ["deploy/config.schema.json", "deploy/directory.schema.json", "deploy/authority.schema.json"];
const DEFINITIONS: &str = "deploy/crds";
/// Folders whose sources have labels that no table lists: the reasons of the authority, and values of other labels.
const LABELS: [&str; 1] = ["agent"];
/// Names of files and folders below them without: tests, and the user side of the kernel programs.
const NO_LABELS: [&str; 5] = ["tests", "tests.rs", "testing.rs", "examples", "kernel"];
/// Folders whose sources have tests.
const TESTS: [&str; 3] = ["agent", "ebpf", "tests"];
const ATTACKS: &str = "tests/attack";

/// Bytes.
const README_MAX: usize = 10 * 1024;

fn root() -> PathBuf {
    Workspace::find().expect("workspace").root().to_owned()
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn document(name: &str) -> String {
    text(&format!("{DOCUMENTS}/{name}"))
}

/// All files with this extension below a folder, without build outputs.
fn below(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let (folders, plain): (Vec<_>, Vec<_>) =
        files(folder).unwrap_or_default().into_iter().partition(|path| path.is_dir());
    let is_ours = |path: &PathBuf| !path.ends_with("target") && !path.ends_with(".git");
    let inside = folders.into_iter().filter(is_ours).flat_map(|path| below(&path, extension));
    let is_wanted = |path: &PathBuf| path.extension().is_some_and(|found| found == extension);
    plain.into_iter().filter(is_wanted).chain(inside).collect()
}

fn sources_of(folders: &[&str], without: &[&str]) -> Vec<String> {
    let root = root();
    let paths = folders.iter().flat_map(|folder| below(&root.join(folder), "rs"));
    let is_wanted = |path: &PathBuf| {
        let mut parts = path.strip_prefix(&root).expect("below the root").iter();
        parts.all(|part| !without.iter().any(|name| part == *name))
    };
    paths.filter(is_wanted).map(|path| fs::read_to_string(path).expect("text")).collect()
}

/// Returns the text in backticks, outside blocks of code.
fn quoted(text: &str) -> Vec<&str> {
    let outside = text.split("```").step_by(2);
    outside.flat_map(|part| part.lines().flat_map(|line| line.split('`').skip(1).step_by(2))).collect()
}

/// The words of what stands in backticks: `a.b[].c` has three.
fn words(text: &str) -> BTreeSet<&str> {
    quoted(text).into_iter().flat_map(|quote| quote.split(|c: char| !c.is_ascii_alphanumeric())).collect()
}

#[test]
fn every_field_of_the_configuration_is_explained_with_its_default() {
    let document = document("configuration.md");
    for file in SCHEMAS {
        let schema: Value = serde_json::from_str(&text(file)).expect("JSON");
        let section = section(&document, schema["title"].as_str().expect("a title"));
        let rows: Vec<(BTreeSet<&str>, &str)> = section
            .lines()
            .filter_map(|line| Some((words(line.strip_prefix("| ")?.split(" | ").next()?), line)))
            .collect();
        let mut found = 0;
        for (field, property) in properties(&schema) {
            let mut named = rows.iter().filter(|(fields, _)| fields.contains(field.as_str())).peekable();
            assert!(named.peek().is_some(), "{file}: {field} has no row in configuration.md");
            let default = match &property["default"] {
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                _ => String::new(),
            };
            assert!(
                named.any(|(_, row)| row.contains(&default)),
                "{file}: {field}: default {default} is missing"
            );
            found += 1;
        }
        assert!(found > 5, "{file}: {found} fields");
    }
}

/// The part below a heading of the second level.
fn section<'a>(document: &'a str, title: &str) -> &'a str {
    let heading = format!("\n## {title}\n");
    let (_, rest) = document.split_once(&heading).unwrap_or_else(|| panic!("no section {title}"));
    rest.split("\n## ").next().unwrap_or_default()
}

/// All properties of a JSON schema, at every depth.
fn properties(schema: &Value) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                match (name.as_str(), value) {
                    ("properties", Value::Object(all)) => {
                        found.extend(all.iter().map(|(name, value)| (name.clone(), value)));
                        all.values().for_each(|value| found.extend(properties(value)));
                    }
                    ("if" | "then" | "default" | "examples", _) => {}
                    _ => found.extend(properties(value)),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| found.extend(properties(item))),
        _ => {}
    }
    found
}

#[test]
fn every_field_of_a_policy_is_explained() {
    let document = document("policy.md");
    let explained = words(&document);
    let mut found = 0;
    for file in files(&root().join(DEFINITIONS)).expect("definitions") {
        for definition in read_objects(&file).expect("objects") {
            let schema =
                &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
            for (field, _) in properties(schema) {
                assert!(explained.contains(field.as_str()), "{}: {field}", file.display());
                found += 1;
            }
        }
    }
    assert!(found > 20, "{found} fields");
}

#[test]
fn every_reason_that_is_counted_has_its_line() {
    let document = document("troubleshooting.md");
    let explained: BTreeSet<&str> = quoted(&document).into_iter().collect();
    let others = other_labels();
    // One reason of the authority, and one other label value.
    for known in ["not_on_node", "mutual_tls"] {
        assert!(others.contains(known), "{known} is not found: where are labels written now? {others:?}");
    }
    let of_kernel = REASONS.iter().map(|reason| reason.name);
    let mut all: BTreeSet<&str> = of_agents().chain(of_kernel).collect();
    all.extend(others.iter().map(String::as_str));
    let missing: Vec<&&str> = all.difference(&explained).collect();
    assert!(missing.is_empty(), "troubleshooting.md does not explain {missing:?}");
}

#[test]
fn every_exception_is_explained_with_its_hooks_and_no_other_is() {
    let document = document("troubleshooting.md");
    let rows = section(&document, "Exceptions of the kernel").lines();
    let explained: Vec<(&str, Vec<&str>)> = rows
        .filter_map(|row| row.strip_prefix("| `")?.split_once("` | "))
        .map(|(name, rest)| (name, rest.split(" | ").next().unwrap_or_default().split(", ").collect()))
        .collect();
    let expected: Vec<(&str, Vec<&str>)> = EXCEPTIONS
        .iter()
        .map(|text| (text.name, text.hooks.iter().map(|hook| hook.label()).collect()))
        .collect();
    assert_eq!(explained, expected);
}

#[test]
fn every_reason_of_the_agent_that_is_explained_exists() {
    let document = document("troubleshooting.md");
    let rows = section(&document, "Reasons of the agent").lines().filter_map(|line| line.strip_prefix("| `"));
    let explained: Vec<&str> = rows.filter_map(|row| row.split('`').next()).collect();
    let others = other_labels();
    let unknown: Vec<&&str> = explained
        .iter()
        .filter(|name| !of_agents().any(|reason| reason == **name) && !others.contains(**name))
        .collect();
    assert!(explained.len() >= RefusalReason::ALL.len() && unknown.is_empty(), "{unknown:?} do not exist");
}

#[test]
fn every_share_is_explained() {
    let document = document("troubleshooting.md");
    let section = section(&document, "Shares");
    for share in SHARES {
        assert!(section.contains(&format!("\n| `{}` |", share.resource)), "{} has no row", share.resource);
    }
}

/// The reasons of agents.
fn of_agents() -> impl Iterator<Item = &'static str> {
    RefusalReason::ALL.iter().map(|reason| reason.label())
}

/// The reasons of the authority, and the values of other labels.
fn other_labels() -> BTreeSet<String> {
    sources_of(&LABELS, &NO_LABELS).iter().flat_map(|source| labels(source)).collect()
}

/// The labels in a source file: arms of functions named `label` or `reason`.
fn labels(source: &str) -> BTreeSet<String> {
    let product = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let mut found = BTreeSet::new();
    let mut function: Option<usize> = None;
    for line in product.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if ["fn label(", "fn reason("].iter().any(|name| trimmed.contains(name)) {
            function = Some(indent);
        }
        if function == Some(indent) && trimmed == "}" {
            function = None;
        }
        if let (Some(_), Some((_, value))) = (function, trimmed.split_once("=> ")) {
            found.extend(literal(value));
        }
    }
    found
}

/// The label that a text begins with, in quotes.
fn literal(text: &str) -> Option<String> {
    let (label, _) = text.strip_prefix('"')?.split_once('"')?;
    let is_label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    (!label.is_empty() && label.chars().all(is_label)).then(|| label.to_owned())
}

#[test]
fn labels_are_found_where_they_are_written() {
    let source = "impl X {\n    fn label(&self) -> &'static str {\n        match self {\n            \
        Self::A => \"arm\",\n            Self::B(_) => \"other_arm\",\n        }\n    }\n    \
        fn other(&self) {\n        match self { A => \"not_this\" }\n    }\n}\n\
        #[cfg(test)]\nmod tests {\n    fn label(self) {\n        A => \"nor_this\",\n    }\n}\n";
    let found = labels(source);
    assert_eq!(found, ["arm", "other_arm"].map(str::to_owned).into());
}

#[test]
fn the_security_model_names_tests_and_attacks_that_exist() {
    let document = document("security-model.md");
    let tests = sources_of(&TESTS, &[]).concat();
    let attacks = sources_of(&[ATTACKS], &[]).concat();
    let (mut found, mut attacked) = (0, 0);
    for quote in quoted(&document) {
        let is_test = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if quote.matches('_').count() >= 3 && quote.chars().all(is_test) {
            assert!(tests.contains(&format!("fn {quote}(")), "there is no test {quote}");
            found += 1;
        }
        if let Some(attack) = quote.strip_prefix("attack::") {
            let (group, name) = attack.split_once("::").unwrap_or((attack, ""));
            for part in [group, name].into_iter().filter(|part| !part.is_empty()) {
                assert!(attacks.contains(&format!("\"{part}\"")), "there is no attack {quote}");
            }
            attacked += 1;
        }
    }
    assert!(found > 20 && attacked > 5, "{found} tests, {attacked} attacks");
}

#[test]
fn documents_name_metrics_that_exist() {
    let declared: BTreeSet<String> =
        sources_of(&["agent"], &[]).iter().flat_map(|source| metrics::declared(source)).collect();
    for file in files(&root().join(DOCUMENTS)).expect("documents") {
        let named = metrics::asked_for(&fs::read_to_string(&file).expect("text"));
        let unknown: Vec<&String> = named.difference(&declared).collect();
        assert!(unknown.is_empty(), "{}: {unknown:?} do not exist", file.display());
    }
}

#[test]
fn links_lead_to_files_and_headings_that_exist() {
    let documents = below(&root(), "md");
    assert!(documents.len() > 10, "{documents:?}");
    for path in documents {
        let document = fs::read_to_string(&path).expect("text");
        for link in document.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().expect("a folder").join(file),
            };
            assert!(target.exists(), "{}: {link} leads nowhere", path.display());
            if !heading.is_empty() {
                let headings = anchors(&fs::read_to_string(&target).expect("text"));
                assert!(headings.contains(heading), "{}: {link}: no such heading", path.display());
            }
        }
    }
}

/// The anchors of a document's headings, as forges make them.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn the_readme_is_short_and_names_the_command_that_continuous_integration_runs() {
    let readme = text(README);
    assert!(readme.len() <= README_MAX, "{} bytes", readme.len());
    let command = "cargo xtask test";
    assert!(readme.contains(command) && text(".ci/run").contains(command));
}
