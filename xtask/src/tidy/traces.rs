//! Nothing of the machine that builds: no path of it, no package registry it happens to use, nothing it compiled.

use std::{env, path::Path};

use super::{Finding, source::Source};

/// Path beginnings that only exist for one person or one machine. In two parts, since this file is checked as well.
const MACHINE_PATHS: [&str; 3] = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

/// Registries of packages. The machine's configuration chooses the registry or mirror that serves packages.
const REGISTRIES: [&str; 9] = [
    concat!("crates", ".io"),
    concat!("deb.debian", ".org"),
    concat!("security.debian", ".org"),
    concat!("archive.ubuntu", ".com"),
    concat!("static.rust-lang", ".org"),
    concat!("proxy.golang", ".org"),
    concat!("registry.npmjs", ".org"),
    concat!("pypi", ".org"),
    concat!("sh.rust", "up.rs"),
];

/// Built or packed things; they are made from source instead.
const BUILT: [&str; 14] =
    ["o", "a", "so", "rlib", "rmeta", "bc", "elf", "exe", "deb", "gz", "xz", "zst", "zip", "pcap"];

/// Not text, but drawn by hand.
const PICTURES: [&str; 3] = ["png", "jpg", "webp"];

/// Paths of the machine this runs on.
pub(super) struct Machine {
    paths: Vec<String>,
}

impl Machine {
    /// The repository's place and the user's home.
    pub(super) fn this(root: &Path) -> Self {
        let home = env::var("HOME").unwrap_or_default();
        let known = [root.to_string_lossy().into_owned(), home];
        // A short path such as "/" or "/x" would be found everywhere.
        Self { paths: known.into_iter().filter(|path| path.len() > 3).collect() }
    }
}

pub(super) fn check(source: &Source, machine: &Machine) -> Vec<Finding> {
    let mut findings: Vec<Finding> = built(source).into_iter().collect();
    // cargo writes the lock file, with the name of the registry's index in it.
    if source.path.ends_with("Cargo.lock") {
        return findings;
    }
    for (line, text) in source.numbered() {
        let paths =
            machine.paths.iter().map(String::as_str).chain(MACHINE_PATHS).find(|path| has_path(text, path));
        findings.extend(
            paths.map(|path| Finding::error(source, line, format!("`{path}` is a path of one machine"))),
        );
        let registry = REGISTRIES.iter().find(|host| text.contains(*host));
        let problem =
            |host| format!("`{host}`: which registry serves packages is the machine's configuration");
        findings.extend(registry.map(|host| Finding::error(source, line, problem(host))));
    }
    findings
}

/// Returns true if the text contains the path itself: not as the end of another path (`docs/home/x`), and not as the
/// beginning of a longer name.
fn has_path(text: &str, path: &str) -> bool {
    let is_before = |c: char| c.is_alphanumeric() || "._-}/".contains(c);
    let is_after = |c: char| c.is_alphanumeric() || "_-".contains(c);
    text.match_indices(path).any(|(at, _)| {
        !text[..at].ends_with(is_before)
            && (path.ends_with('/') || !text[at + path.len()..].starts_with(is_after))
    })
}

/// Inputs of the fuzz targets: any bytes, found by a machine.
const CORPUS: &str = "tests/fuzz/corpus/";

fn built(source: &Source) -> Option<Finding> {
    let extension = source.path.rsplit_once('.').map_or("", |(_, extension)| extension);
    let is_input = source.path.starts_with(CORPUS);
    let binary = source.text.is_none() && !PICTURES.contains(&extension) && !is_input;
    (binary || BUILT.contains(&extension))
        .then(|| Finding::error(source, 0, "a binary: commit what it is made from"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &[u8]) -> usize {
        let machine = Machine { paths: vec!["/srv/builder/tacit".to_owned()] };
        check(&Source::new(path, text.to_vec()), &machine).len()
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        for path in MACHINE_PATHS {
            assert_eq!(problems("README.md", format!("see {path}x").as_bytes()), 1, "{path}");
            assert_eq!(problems("README.md", format!("see docs{path}x").as_bytes()), 0, "{path}");
        }
        assert_eq!(problems("agent/src/a.rs", b"open(\"/srv/builder/tacit/x\")"), 1);
        assert_eq!(problems("README.md", b"/run/tacit/agent.sock /sys/fs/cgroup ~/.cache/tacit"), 0);
    }

    #[test]
    fn registries_are_not_named() {
        assert_eq!(problems("xtask/src/a.rs", format!("https://{}/x", REGISTRIES[1]).as_bytes()), 1);
        assert_eq!(problems("Cargo.lock", format!("registry+{}", REGISTRIES[0]).as_bytes()), 0);
        assert_eq!(problems("README.md", b"cargo install, apt-get install"), 0);
    }

    #[test]
    fn binaries_are_not_committed() {
        assert_eq!(problems("ebpf/tacit-ebpf.o", b"text"), 1);
        assert_eq!(problems("deploy/blob", b"\x7fELF\0\0"), 1);
        assert_eq!(problems("deploy/dashboard.png", b"\x89PNG\0"), 0);
        assert_eq!(problems("deploy/README.md", b"text"), 0);
    }
}
