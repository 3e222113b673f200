//! The releases of Kubernetes that can be tested.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use xtask_support::workspace::Workspace;

use super::go_module::{Build, GoModule};

/// A minor release.
#[derive(Clone, Copy, Debug)]
pub(super) struct Release {
    /// Its name on the command line.
    pub(super) name: &'static str,
    /// The module below `tests/kube/parts` that pins its newest patch release.
    module: &'static str,
}

/// All of them; the first is the default.
pub(super) const RELEASES: [&Release; 2] = [
    &Release { name: "1.37", module: "kubernetes-1.37" },
    &Release { name: "1.34", module: "kubernetes-1.34" },
];

impl Release {
    /// Returns the release of a name.
    pub(super) fn named(name: &str) -> Result<&'static Self, String> {
        let known = RELEASES.map(|release| release.name).join(", ");
        let found = RELEASES.into_iter().find(|release| release.name == name);
        found.ok_or_else(|| format!("unknown release {name:?}: expected one of {known}"))
    }

    /// Returns the folder of its programs, built if the cache does not have them.
    pub(super) fn programs(&self, workspace: &Workspace) -> Result<PathBuf> {
        let module = GoModule::open(workspace, self.module)?;
        let version = module.version("k8s.io/kubernetes")?;
        let stamps = stamps(version).with_context(|| format!("unexpected version {version:?}"))?;
        module.programs(&Build::PureGo(stamps))
    }
}

/// The version that programs report. Without it, clients and controllers reject the server.
fn stamps(version: &str) -> Option<Vec<String>> {
    let mut numbers = version.strip_prefix('v')?.split('.');
    let (major, minor) = (numbers.next()?, numbers.next()?);
    let all = ["component-base", "client-go/pkg"].map(|package| {
        let variable = |name: &str, value: &str| format!("k8s.io/{package}/version.{name}={value}");
        [variable("gitVersion", version), variable("gitMajor", major), variable("gitMinor", minor)]
    });
    Some(all.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_release_is_refused_with_the_known_ones() {
        assert_eq!(Release::named("1.37").map(|release| release.module), Ok("kubernetes-1.37"));
        let error = Release::named("1.0").expect_err("no module");
        assert!(error.contains("\"1.0\"") && error.contains("1.37"), "{error}");
    }

    #[test]
    fn programs_report_the_version_of_their_module() {
        let all = stamps("v1.37.2").expect("a version");
        assert!(all.contains(&"k8s.io/component-base/version.gitVersion=v1.37.2".to_owned()), "{all:?}");
        assert!(all.contains(&"k8s.io/client-go/pkg/version.gitMinor=37".to_owned()), "{all:?}");
        assert_eq!(stamps("1.37.2"), None);
    }
}
