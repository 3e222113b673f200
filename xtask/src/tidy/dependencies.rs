//! Rules of dependency between and inside the agent's crates that neither cargo nor clippy checks.
//!
//! cargo keeps a crate from using what its manifest does not list, so the rules for crates look at manifests. The rules for
//! modules look at paths in the sources. Unit tests are exempt: they may drive a pure module with anything.

use super::{Finding, scan, source::Source};

/// Dependencies that only some crates may list.
struct Reserved {
    dependencies: &'static [&'static str],
    /// Folders of the crates that may.
    allowed: &'static [&'static str],
    why: &'static str,
}

const RESERVED: [Reserved; 4] = [
    Reserved {
        dependencies: &["aya", "aya-log", "aya-obj", "libc"],
        allowed: &["agent/kernel"],
        why: "only `tacit-kernel` uses the interfaces of the kernel",
    },
    Reserved {
        dependencies: &["rustls", "rustls-webpki", "tokio-rustls", "aws-lc-rs"],
        allowed: &["agent/tunnel", "agent/identity", "agent/authority"],
        why: "only the tunnel, `tacit-identity` and `tacit-authority` use TLS",
    },
    Reserved {
        dependencies: &["h2"],
        allowed: &["agent/grpc", "agent/tunnel"],
        why: "only `tacit-grpc` and the tunnel use streams of HTTP/2",
    },
    Reserved {
        dependencies: &["kube", "k8s-openapi"],
        allowed: &["agent/sources", "agent/authority"],
        why: "only `tacit-sources` and `tacit-authority` use the Kubernetes API",
    },
];

/// The crate of pure decisions, and all that it may depend on.
const CORE: &str = "agent/core";
const CORE_DEPENDENCIES: [&str; 5] = ["tacit-abi", "ipnet", "saphyr-parser", "serde", "thiserror"];

/// Pure modules of other crates; `x` means the file x.rs and the folder x/.
const PURE: [&str; 19] = [
    "agent/src/enrol/plan",
    "agent/src/enrol/pod_policy",
    "agent/grpc/src/frame",
    "agent/grpc/src/status",
    "agent/identity/src/istio/api",
    "agent/identity/src/istio/skew",
    "agent/identity/src/spire/api",
    "agent/identity/src/spire/bundles",
    "agent/identity/src/spire/svids",
    "agent/authority/src/request",
    "agent/authority/src/rotation",
    "agent/authority/src/rate_limit",
    "agent/sources/src/directory/cgroup",
    "agent/sources/src/directory/store",
    "agent/sources/src/istiod/address",
    "agent/sources/src/istiod/authorization",
    "agent/sources/src/istiod/session",
    "agent/sources/src/policy/document",
    "agent/sources/src/policy/store",
];

/// Inputs that a pure module takes as arguments, and effects that its caller has.
const IMPURE: [&str; 13] = [
    "tokio",
    "tracing",
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::UdpSocket",
    "std::os::unix::net",
    "std::os::fd",
];

/// Modules that never import each other, and the one that nobody but `main` imports.
const STRANGERS: [(&str, &str); 2] = [("outbound", "inbound"), ("inbound", "outbound")];
const PROXY: &str = "proxy";
const TOP: &str = "app";

/// Checks a Rust source.
pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, path) in scan::paths(source.product_lines()) {
        let module = source.path.strip_prefix("agent/src/");
        let problems = [
            impure(&source.path, &path),
            module.and_then(|module| stranger(module, &path)),
            imports_top(&source.path, &path),
        ];
        findings.extend(problems.into_iter().flatten().map(|problem| Finding::error(source, line, problem)));
    }
    findings
}

/// Checks the manifest of a crate of the agent.
pub(super) fn manifest(source: &Source) -> Vec<Finding> {
    let Some(folder) = source.path.strip_suffix("/Cargo.toml").filter(|folder| is_agent(folder)) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for (line, name) in dependencies(source) {
        let reserved = RESERVED.iter().find(|rule| rule.dependencies.contains(&name));
        let reserved = reserved.filter(|rule| !rule.allowed.contains(&folder));
        findings.extend(reserved.map(|rule| Finding::error(source, line, format!("`{name}`: {}", rule.why))));
        if folder == CORE && !CORE_DEPENDENCIES.contains(&name) {
            let problem = format!("`{name}` in the crate of pure decisions: use it in the caller");
            findings.push(Finding::error(source, line, problem));
        }
    }
    findings
}

fn is_agent(folder: &str) -> bool {
    folder == "agent" || folder.starts_with("agent/")
}

/// The names below `[dependencies]`.
fn dependencies(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    let mut inside = false;
    source.numbered().filter_map(move |(line, text)| {
        if text.starts_with('[') {
            inside = text.trim() == "[dependencies]";
            return None;
        }
        let name = text.split(['=', '.']).next()?.trim();
        (inside && !name.is_empty() && !name.starts_with('#')).then_some((line, name))
    })
}

fn impure(file: &str, path: &str) -> Option<String> {
    let pure = file.starts_with("agent/core/src/") || PURE.iter().any(|module| is_in(file, module));
    let pure = pure && !file.ends_with("/tests.rs") && !file.contains("/tests/");
    // `Instant::now()` and `std::time::Instant::now()` are the same thing.
    let used = IMPURE.iter().filter(|_| pure).find(|used| {
        path.starts_with(*used) && is_boundary(&path[used.len()..])
            || used
                .strip_prefix("std::time::")
                .is_some_and(|short| path == short || path.ends_with(&format!("::{short}")))
    })?;
    Some(format!("`{used}` in a pure module: take the value as an argument, and leave effects to the caller"))
}

fn stranger(module: &str, path: &str) -> Option<String> {
    let module = module.strip_prefix(PROXY)?.strip_prefix('/')?;
    let (own, other) = STRANGERS.iter().find(|(own, _)| is_in(module, own))?;
    let rest = path.strip_prefix("crate::proxy::").or_else(|| path.strip_prefix("super::"))?;
    (rest.split("::").next() == Some(*other))
        .then(|| format!("`{path}`: {own} and {other} are two directions that share no code of their own"))
}

fn imports_top(file: &str, path: &str) -> Option<String> {
    let inside = file.starts_with("agent/src/") && crate_member(path) == Some(TOP);
    let outside = path.strip_prefix("tacit::").and_then(|rest| rest.split("::").next()) == Some(TOP);
    let allowed =
        file == "agent/src/main.rs" || file.strip_prefix("agent/src/").is_some_and(|own| is_in(own, TOP));
    ((inside || outside) && !allowed)
        .then(|| format!("`{path}`: only main imports {TOP}, which imports everything"))
}

/// `x` for `crate::x::..` and `super::x::..`.
fn crate_member(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("crate::").or_else(|| path.strip_prefix("super::"))?;
    rest.split("::").next()
}

/// Returns true if the file belongs to the module: `store.rs`, `store/services.rs`.
fn is_in(file: &str, module: &str) -> bool {
    file.strip_prefix(module).is_some_and(|rest| rest.starts_with('/') || rest == ".rs")
}

fn is_boundary(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with("::")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        check(&Source::sample(path, text)).len()
    }

    fn manifest_problems(folder: &str, dependencies: &[&str]) -> usize {
        let lines: String =
            dependencies.iter().map(|name| format!("{name} = {{ workspace = true }}\n")).collect();
        let text = format!(
            "[package]\nname = \"libc\"\n\n[dependencies]\n{lines}\n[dev-dependencies]\nrustls = \"1\"\n"
        );
        manifest(&Source::sample(&format!("{folder}/Cargo.toml"), &text)).len()
    }

    #[test]
    fn reserved_dependencies_are_listed_by_their_crates_alone() {
        assert_eq!(manifest_problems("agent/kernel", &["aya", "aya-log", "libc", "tokio"]), 0);
        assert_eq!(manifest_problems("agent", &["libc", "kube", "tokio"]), 2);
        assert_eq!(manifest_problems("agent/tunnel", &["rustls", "aws-lc-rs"]), 0);
        assert_eq!(manifest_problems("agent/sources", &["kube", "k8s-openapi", "rustls"]), 1);
        assert_eq!(manifest_problems("agent/grpc", &["h2", "rustls", "prost"]), 1);
        assert_eq!(manifest_problems("agent/identity", &["h2"]), 1);
        assert_eq!(manifest_problems("xtask", &["libc"]), 0);
    }

    #[test]
    fn the_crate_of_pure_decisions_depends_on_nothing_that_acts() {
        assert_eq!(manifest_problems("agent/core", &CORE_DEPENDENCIES), 0);
        assert_eq!(manifest_problems("agent/core", &["tokio", "tracing", "nix", "libc"]), 5);
    }

    #[test]
    fn pure_modules_have_no_clock_no_runtime_no_log_and_no_files() {
        for pure in [
            "agent/core/src/policy.rs",
            "agent/core/src/wire/frame.rs",
            "agent/authority/src/rotation.rs",
            "agent/sources/src/directory/store/services.rs",
        ] {
            let text = "use tokio::sync::watch;\nfn f() { tracing::info!(x); Instant::now() }";
            assert_eq!(problems(pure, text), 3);
            assert_eq!(problems(pure, "std::time::SystemTime::now();\ntime::SystemTime::now();"), 2);
            assert_eq!(problems(pure, "use std::{fs::File, net::{IpAddr, TcpStream}};"), 2);
            assert_eq!(
                problems(pure, "use std::time::{Instant, SystemTime};\nfn next(now: SystemTime) {}"),
                0
            );
        }
        assert_eq!(problems("agent/sources/src/directory.rs", "use tokio::fs;"), 0);
        assert_eq!(problems("agent/tunnel/src/relay.rs", "use tokio::io; fn f() { Instant::now() }"), 0);
    }

    #[test]
    fn unit_tests_may_use_anything() {
        assert_eq!(
            problems("agent/core/src/policy.rs", "fn f() {}\n#[cfg(test)]\nmod tests { use tokio::sync; }"),
            0
        );
        assert_eq!(problems("agent/core/src/policy/tests.rs", "use std::fs;"), 0);
        assert_eq!(problems("agent/sources/src/directory/store/tests/ranges.rs", "use std::fs;"), 0);
    }

    #[test]
    fn the_two_directions_do_not_import_each_other() {
        assert_eq!(problems("agent/src/proxy/outbound.rs", "use crate::proxy::inbound::Dial;"), 1);
        assert_eq!(
            problems(
                "agent/src/proxy/outbound.rs",
                "use crate::proxy::{\n    drain,\n    inbound::Dial,\n};"
            ),
            1
        );
        assert_eq!(problems("agent/src/proxy/inbound.rs", "super::outbound::x();"), 1);
        assert_eq!(problems("agent/src/proxy/inbound.rs", "use crate::proxy::authorize::Changes;"), 0);
        assert_eq!(problems("agent/src/app.rs", "use crate::proxy::{inbound, outbound};"), 0);
    }

    #[test]
    fn nobody_but_main_imports_app() {
        assert_eq!(problems("agent/src/main.rs", "use tacit::app;"), 0);
        assert_eq!(problems("agent/src/app/drain.rs", "use super::app::x;"), 0);
        assert_eq!(problems("agent/src/lib.rs", "pub mod app;"), 0);
        assert_eq!(problems("agent/src/enrol.rs", "use crate::app::Agent;"), 1);
        assert_eq!(problems("tests/src/lib.rs", "use tacit::app::run;"), 1);
        assert_eq!(problems("agent/src/proxy.rs", "use crate::application::x; use hyper::app::y;"), 0);
    }
}
