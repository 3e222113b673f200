//! Go programs of other projects. Each small module below `tests/kube/parts` pins one project with a `tool` line for each
//! program; its programs are built once and kept in the cache.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{command::line, progress::note, workspace::Workspace};

const PARTS: &str = "tests/kube/parts";
/// Time between two notes about a build.
const NOTE_INTERVAL: Duration = Duration::from_secs(30);
/// Lines of a failed build's errors that are shown: those of one broken package.
const SHOWN_ERRORS: usize = 40;

/// The way in which programs are built.
#[derive(Hash)]
pub(super) enum Build {
    /// Without C. The linker sets string variables, each written `package.name=value`.
    PureGo(Vec<String>),
    /// With C, and these build tags.
    WithC(&'static str),
}

/// A module that pins a project.
pub(super) struct GoModule {
    name: &'static str,
    folder: PathBuf,
    cache: PathBuf,
    /// The text of go.mod.
    requirements: String,
}

impl GoModule {
    /// Reads `tests/kube/parts/<name>`.
    pub(super) fn open(workspace: &Workspace, name: &'static str) -> Result<Self> {
        let folder = workspace.root().join(PARTS).join(name);
        let file = folder.join("go.mod");
        let requirements =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(Self { name, folder, cache: workspace.cache().to_owned(), requirements })
    }

    /// Returns the version of a required module, with its `v`.
    pub(super) fn version(&self, module: &str) -> Result<&str> {
        version(&self.requirements, module)
            .with_context(|| format!("{}/go.mod requires no {module}", self.folder.display()))
    }

    /// Returns the folder of the module's programs, built if the cache does not have them.
    pub(super) fn programs(&self, build: &Build) -> Result<PathBuf> {
        let home = self.cache.join(format!("{}-{:016x}", self.name, self.key(build)?));
        if home.is_dir() {
            return Ok(home);
        }
        note(&format!("building {}; it is kept in the cache", self.name));
        let work = self.cache.join(format!(".{}-{}", self.name, std::process::id()));
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        let built = self.build(build, &work);
        // Renamed as a whole: a folder in the cache is complete.
        let kept = built.and_then(|()| {
            fs::rename(&work, &home).with_context(|| format!("cannot create {}", home.display()))
        });
        if kept.is_err() {
            let _ = fs::remove_dir_all(&work);
        }
        kept.map(|()| home)
    }

    /// A hash of what the programs are built from. A toolchain with another hash function builds once more.
    fn key(&self, build: &Build) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        self.requirements.hash(&mut hasher);
        fs::read(self.folder.join("go.sum")).context("a module without go.sum")?.hash(&mut hasher);
        build.hash(&mut hasher);
        Ok(hasher.finish())
    }

    fn build(&self, build: &Build, folder: &Path) -> Result<()> {
        let (cgo, tags, stamps) = match build {
            Build::PureGo(stamps) => ("0", "", stamps.as_slice()),
            Build::WithC(tags) => ("1", *tags, &[][..]),
        };
        let flags = stamps.iter().fold("-s -w".to_owned(), |flags, stamp| flags + " -X " + stamp);
        let mut go = Command::new("nice");
        go.args(["-n", "10", "go", "build", "-v", "-trimpath", "-tags", tags, "-ldflags", &flags, "-o"]);
        go.arg(folder).arg("tool").current_dir(&self.folder).stdin(Stdio::null()).stderr(Stdio::piped());
        go.env("CGO_ENABLED", cgo).env("GOTOOLCHAIN", "local").env("GOWORK", "off");
        let name = line(&go);
        let mut child = go.spawn().with_context(|| format!("cannot start {name}"))?;
        let errors = child.stderr.take().map(|pipe| self.follow(pipe)).unwrap_or_default();
        let status = child.wait().with_context(|| format!("cannot wait for {name}"))?;
        ensure!(
            status.success(),
            "cannot build {}; Go 1.26.8 or later is needed on PATH ({status}): {name}\n{}",
            self.name,
            errors.join("\n")
        );
        Ok(())
    }

    /// Notes how far a build is, and returns what it wrote that is no name of a package.
    fn follow(&self, output: impl std::io::Read) -> Vec<String> {
        let (mut errors, mut packages, mut noted) = (Vec::new(), 0_usize, Instant::now());
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if !is_package(&line) {
                errors.push(line);
                continue;
            }
            packages += 1;
            if noted.elapsed() >= NOTE_INTERVAL {
                note(&format!("{}: {packages} packages, {line}", self.name));
                noted = Instant::now();
            }
        }
        errors.truncate(SHOWN_ERRORS);
        errors
    }
}

/// Returns true if a line of `go build -v` names a package.
fn is_package(line: &str) -> bool {
    !line.is_empty() && !line.starts_with('#') && !line.contains([' ', ':'])
}

fn version<'a>(requirements: &'a str, module: &str) -> Option<&'a str> {
    requirements.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split(' ');
        words.next().filter(|name| *name == module)?;
        words.next().filter(|version| version.starts_with('v'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_that_of_the_required_module() {
        let text = "module tacit/etcd\n\nrequire go.etcd.io/etcd/server/v3 v3.6.16\n\nrequire (\n\tgo.etcd.io/etcd/api/v3 \
                    v3.6.1 // indirect\n)\nreplace (\n\tk8s.io/api => k8s.io/api v0.37.2\n)\n";
        assert_eq!(version(text, "go.etcd.io/etcd/server/v3"), Some("v3.6.16"));
        assert_eq!(version(text, "go.etcd.io/etcd/api/v3"), Some("v3.6.1"));
        assert_eq!(version(text, "k8s.io/api"), None);
        assert_eq!(version(text, "go.etcd.io/etcd"), None);
    }

    #[test]
    fn errors_are_told_from_names_of_packages() {
        assert!(is_package("k8s.io/kubernetes/cmd/kubelet"));
        for error in ["# k8s.io/api", "a/b.go:3:1: undefined: c", "go: downloading a v1", ""] {
            assert!(!is_package(error), "{error}");
        }
    }
}
