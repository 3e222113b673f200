//! Rules for manifests and documentation: licences, and commands that exist.

use super::{Finding, source::Source};

/// The kernel side calls helpers that the kernel gives only to GPL-compatible programs.
const KERNEL_LICENSE: &str = "MIT OR GPL-2.0-only";
const LICENSE: &str = "Apache-2.0";

/// Prefix of a command of this crate in documentation; in two parts, since examples in code would count.
const COMMAND: &str = concat!("cargo ", "xtask ");

pub(super) fn check(source: &Source, commands: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if source.path == "Cargo.toml" || source.path.ends_with("/Cargo.toml") {
        findings.extend(license(source));
    }
    if source.path.ends_with(".md") || source.path.starts_with(".ci/") {
        findings.extend(unknown_commands(source, commands));
    }
    findings
}

fn license(source: &Source) -> Option<Finding> {
    let expected = if source.path.starts_with("ebpf/") { KERNEL_LICENSE } else { LICENSE };
    let stated = source.numbered().find_map(|(line, text)| Some((line, stated_license(text)?)));
    match stated {
        Some((_, license)) if license == expected => None,
        Some((line, license)) => {
            Some(Finding::error(source, line, format!("license `{license}`, not `{expected}`")))
        }
        None => Some(Finding::error(source, 0, format!("no license field: `{expected}`"))),
    }
}

/// The licence a manifest's line states; inheriting means the workspace's.
fn stated_license(line: &str) -> Option<&str> {
    let (key, value) = line.split_once('=')?;
    match key.trim() {
        "license" => Some(value.trim().trim_matches('"')),
        "license.workspace" => Some(LICENSE),
        _ => None,
    }
}

fn unknown_commands(source: &Source, commands: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, text) in source.numbered() {
        for rest in text.split(COMMAND).skip(1) {
            let of_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let name = rest.split(|c| !of_name(c)).next().unwrap_or_default();
            // A placeholder such as <command> has no name.
            if !name.is_empty() && !name.starts_with('-') && !commands.iter().any(|command| command == name) {
                findings.push(Finding::error(source, line, format!("`{COMMAND}{name}` does not exist")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        check(&Source::sample(path, text), &["demo".to_owned(), "build-ebpf".to_owned()]).len()
    }

    #[test]
    fn the_kernel_side_has_its_own_licence() {
        assert_eq!(problems("ebpf/Cargo.toml", "license = \"MIT OR GPL-2.0-only\""), 0);
        assert_eq!(problems("ebpf/abi/Cargo.toml", "license.workspace = true"), 1);
        assert_eq!(problems("ebpf/abi/Cargo.toml", "license = \"MIT\""), 1);
    }

    #[test]
    fn everything_else_has_the_workspaces_licence() {
        assert_eq!(problems("agent/Cargo.toml", "license.workspace = true"), 0);
        assert_eq!(problems("Cargo.toml", "license = \"Apache-2.0\""), 0);
        assert_eq!(problems("agent/Cargo.toml", "license = \"MIT OR GPL-2.0-only\""), 1);
        assert_eq!(problems("agent/Cargo.toml", "[package]\nname = \"tacit\""), 1);
    }

    #[test]
    fn documented_commands_exist() {
        assert_eq!(problems("README.md", &format!("`{COMMAND}demo`, {COMMAND}build-ebpf --clippy.")), 0);
        assert_eq!(problems("README.md", &format!("{COMMAND}<command> and {COMMAND}--help")), 0);
        assert_eq!(problems("README.md", &format!("run {COMMAND}dmo")), 1);
        assert_eq!(problems(".ci/run", &format!("exec {COMMAND}nothing")), 1);
    }
}
