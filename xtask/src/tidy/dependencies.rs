//! Who may depend on what inside the agent. The same rules stand in words in `agent/src/lib.rs`.
//!
//! Unit tests are exempt: they may drive a pure module with whatever they like.

use super::{Finding, scan, source::Source};

/// Crates that only some modules may use.
struct Reserved {
    crates: &'static [&'static str],
    /// Module prefixes below `agent/src/`.
    allowed: &'static [&'static str],
    why: &'static str,
}

const RESERVED: [Reserved; 3] = [
    Reserved {
        crates: &["aya", "aya_log", "aya_obj", "libc"],
        allowed: &["kernel"],
        why: "only `kernel` talks to the kernel's interfaces",
    },
    Reserved {
        crates: &["rustls", "webpki", "tokio_rustls"],
        allowed: &["tunnel/tls", "tunnel/verify", "tunnel/session", "tunnel/record", "identity", "authority"],
        why: "TLS is the business of the tunnel's TLS files, `identity` and `authority`",
    },
    Reserved {
        crates: &["kube", "k8s_openapi"],
        allowed: &["kubernetes", "directory/kubernetes", "policy/kubernetes", "identity", "authority"],
        why: "the Kubernetes API is the business of `kubernetes`, the sources and `authority`",
    },
];

/// Modules that decide and nothing else; `x` means the file x.rs and the folder x/.
const PURE: [&str; 10] = [
    "policy",
    "yaml",
    "tunnel/frame",
    "tunnel/pool",
    "identity/renewal",
    "identity/istio/api",
    "identity/istio/skew",
    "authority/request",
    "authority/rotation",
    "authority/bucket",
];

/// What drives a pure module: `kubernetes` of `policy` is no part of it.
const DRIVERS: [&str; 1] = ["policy/kubernetes"];

/// Pure files whose folder is not.
const PURE_FILES: [&str; 11] = [
    "directory.rs",
    "directory/range.rs",
    "directory/ranges.rs",
    "directory/service.rs",
    "directory/sharded.rs",
    "directory/kubernetes/cgroup.rs",
    "directory/kubernetes/store.rs",
    "directory/kubernetes/store/detection.rs",
    "directory/kubernetes/store/services.rs",
    "policy/kubernetes/document.rs",
    "policy/kubernetes/store.rs",
];

const IMPURE: [&str; 4] = ["tokio", "tracing", "std::time::Instant::now", "std::time::SystemTime::now"];

/// Modules that never import each other, and the one that nobody but `main` imports.
const STRANGERS: [(&str, &str); 2] = [("outbound", "inbound"), ("inbound", "outbound")];
const TOP: &str = "app";

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let paths = scan::paths(source.product_lines());
    let mut findings = Vec::new();
    for (line, path) in &paths {
        if let Some(module) = source.path.strip_prefix("agent/src/") {
            let problems = [reserved(module, path), impure(module, path), stranger(module, path)];
            findings
                .extend(problems.into_iter().flatten().map(|problem| Finding::error(source, *line, problem)));
        }
        if let Some(problem) = imports_top(&source.path, path) {
            findings.push(Finding::error(source, *line, problem));
        }
    }
    findings
}

fn reserved(module: &str, path: &str) -> Option<String> {
    let root = path.split("::").next()?;
    let rule = RESERVED.iter().find(|rule| rule.crates.contains(&root))?;
    let allowed = rule.allowed.iter().any(|prefix| is_in(module, prefix));
    (!allowed).then(|| format!("`{path}`: {}", rule.why))
}

fn impure(module: &str, path: &str) -> Option<String> {
    let is_of = |modules: &[&str]| modules.iter().any(|prefix| is_in(module, prefix));
    let pure = is_of(&PURE) && !is_of(&DRIVERS) || PURE_FILES.contains(&module);
    // `Instant::now()` and `std::time::Instant::now()` are the same thing.
    let used = IMPURE.iter().find(|used| {
        path.starts_with(*used) && is_boundary(&path[used.len()..])
            || used
                .strip_prefix("std::time::")
                .is_some_and(|short| path == short || path.ends_with(&format!("::{short}")))
    });
    let used = used.filter(|_| pure)?;
    Some(format!("`{used}` in a pure module: take what it gives as an argument and let the caller log"))
}

fn stranger(module: &str, path: &str) -> Option<String> {
    let (own, other) = STRANGERS.iter().find(|(own, _)| is_in(module, own))?;
    (crate_member(path) == Some(*other))
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

/// Whether the file belongs to the module: `kernel.rs`, `kernel/maps.rs`.
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

    #[test]
    fn only_the_kernel_module_uses_aya_and_libc() {
        assert_eq!(problems("agent/src/kernel/maps.rs", "use aya::maps::Array;\nlet x = libc::AF_INET;"), 0);
        assert_eq!(problems("agent/src/kernel.rs", "use libc::AF_INET;"), 0);
        assert_eq!(problems("agent/src/relay.rs", "use aya::maps::Array;\nlet x = libc::AF_INET;"), 2);
        assert_eq!(problems("agent/src/kernels.rs", "use {std::io, libc};"), 1);
        assert_eq!(problems("agent/src/relay.rs", "// libc::AF_INET\nlet x = \"libc::AF_INET\";"), 0);
    }

    #[test]
    fn only_tls_files_use_rustls() {
        for allowed in
            ["tunnel/tls.rs", "tunnel/session.rs", "identity.rs", "identity/issuer.rs", "authority/sign.rs"]
        {
            assert_eq!(
                problems(&format!("agent/src/{allowed}"), "use rustls::pki_types::CertificateDer;"),
                0
            );
        }
        assert_eq!(problems("agent/src/inbound.rs", "use rustls::pki_types::CertificateDer;"), 1);
        assert_eq!(problems("agent/src/tunnel/pool.rs", "fn f() { webpki::x(); tokio_rustls::y() }"), 2);
    }

    #[test]
    fn only_sources_and_the_authority_use_the_kubernetes_api() {
        for allowed in [
            "kubernetes/follow.rs",
            "directory/kubernetes.rs",
            "policy/kubernetes/events.rs",
            "authority/review.rs",
        ] {
            assert_eq!(problems(&format!("agent/src/{allowed}"), "use kube::Client;"), 0);
        }
        assert_eq!(problems("agent/src/outbound.rs", "use kube::Client;"), 1);
        assert_eq!(problems("agent/src/directory/kubernetes/store.rs", "use tokio::sync::mpsc;"), 1);
    }

    #[test]
    fn pure_modules_have_no_clock_no_runtime_and_no_log() {
        for pure in [
            "policy.rs",
            "policy/parse.rs",
            "directory.rs",
            "yaml.rs",
            "tunnel/frame.rs",
            "identity/renewal.rs",
        ] {
            let path = format!("agent/src/{pure}");
            assert_eq!(
                problems(&path, "use tokio::sync::watch;\nfn f() { tracing::info!(x); Instant::now() }"),
                3
            );
            assert_eq!(problems(&path, "std::time::SystemTime::now();\ntime::SystemTime::now();"), 2);
            assert_eq!(
                problems(&path, "use std::time::{Instant, SystemTime};\nfn next(now: SystemTime) {}"),
                0
            );
        }
        assert_eq!(problems("agent/src/directory/file.rs", "use tokio::fs;"), 0);
        assert_eq!(problems("agent/src/policy/kubernetes.rs", "use tokio::fs;"), 0);
        assert_eq!(problems("agent/src/policy/kubernetes/store.rs", "use tokio::fs;"), 1);
        assert_eq!(problems("agent/src/relay.rs", "use tokio::io; fn f() { Instant::now() }"), 0);
    }

    #[test]
    fn unit_tests_may_use_what_they_like() {
        assert_eq!(
            problems("agent/src/policy.rs", "fn f() {}\n#[cfg(test)]\nmod tests { use tokio::sync; }"),
            0
        );
    }

    #[test]
    fn the_two_directions_do_not_import_each_other() {
        assert_eq!(problems("agent/src/outbound.rs", "use crate::inbound::Dial;"), 1);
        assert_eq!(
            problems("agent/src/outbound.rs", "use crate::{\n    relay, \n    inbound::Dial, \n};"),
            1
        );
        assert_eq!(problems("agent/src/inbound.rs", "super::outbound::x();"), 1);
        assert_eq!(problems("agent/src/inbound.rs", "use crate::relay::plain;"), 0);
        assert_eq!(problems("agent/src/enrol.rs", "use crate::{inbound, outbound};"), 0);
    }

    #[test]
    fn nobody_but_main_imports_app() {
        assert_eq!(problems("agent/src/main.rs", "use tacit::app;"), 0);
        assert_eq!(problems("agent/src/app/drain.rs", "use super::app::x;"), 0);
        assert_eq!(problems("agent/src/lib.rs", "pub mod app;"), 0);
        assert_eq!(problems("agent/src/enrol.rs", "use crate::app::Agent;"), 1);
        assert_eq!(problems("tests/src/lib.rs", "use tacit::app::run;"), 1);
        assert_eq!(problems("agent/src/relay.rs", "use crate::application::x; use hyper::app::y;"), 0);
    }
}
