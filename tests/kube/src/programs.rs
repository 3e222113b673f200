//! The programs of a cluster: Kubernetes, etcd, CoreDNS, containerd, runc and the CNI plugins, each built from its Go
//! module, and the machine's busybox. Nothing is installed.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::{command::find_program, workspace::Workspace};

use super::{
    go_module::{Build, GoModule},
    release::Release,
};

const KUBERNETES: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"];
const CONTAINERD: [&str; 3] = ["containerd", "containerd-shim-runc-v2", "ctr"];

/// Origin of the programs of a release.
pub(super) enum Kubernetes {
    /// Built from source.
    Built(&'static Release),
    /// A folder with official programs.
    Folder(PathBuf),
}

/// Programs that are there.
pub(super) struct Programs {
    /// By the names under which a cluster starts them.
    named: Vec<(&'static str, PathBuf)>,
    /// The folder of the CNI plugins.
    cni: PathBuf,
}

/// runc's code before Go's runtime starts is C. Without libseccomp it rejects the seccomp profile of the agent's manifest.
fn runc(workspace: &Workspace) -> Result<PathBuf> {
    GoModule::open(workspace, "runc")?.programs(&Build::WithC("seccomp"))
}

impl Programs {
    /// Builds the programs that are not in the cache.
    pub(super) fn ensure(workspace: &Workspace, kubernetes: &Kubernetes) -> Result<Self> {
        let build = |name| GoModule::open(workspace, name)?.programs(&Build::PureGo(Vec::new()));
        let kubernetes = match kubernetes {
            Kubernetes::Built(release) => release.programs(workspace)?,
            Kubernetes::Folder(folder) => folder.clone(),
        };
        let containerd = build("containerd")?;
        let from = |folder: &Path, name: &'static str| (name, folder.join(name));
        let mut named: Vec<_> = KUBERNETES.map(|name| from(&kubernetes, name)).into();
        named.extend(CONTAINERD.map(|name| from(&containerd, name)));
        named.push(from(&runc(workspace)?, "runc"));
        named.push(from(&build("coredns")?, "coredns"));
        // Go names a program after its package.
        named.push(("etcd", build("etcd")?.join("server")));
        named.push(("busybox", find_program("busybox").context("no busybox on PATH: install a static one")?));
        for (_, program) in &named {
            ensure!(program.is_file(), "there is no {}", program.display());
        }
        Ok(Self { named, cni: build("cni-plugins")? })
    }

    /// Copies the CNI plugins into a folder, which others may add to.
    pub(super) fn copy_plugins(&self, folder: &Path) -> Result<()> {
        let plugins = fs::read_dir(&self.cni);
        for plugin in plugins.with_context(|| format!("cannot read {}", self.cni.display()))? {
            let plugin = plugin?;
            fs::copy(plugin.path(), folder.join(plugin.file_name()))
                .with_context(|| format!("cannot copy {}", plugin.path().display()))?;
        }
        Ok(())
    }

    /// Links the programs in a folder, for a search path of one entry.
    pub(super) fn link(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        for (name, program) in &self.named {
            symlink(program, folder.join(name)).with_context(|| format!("cannot link {name}"))?;
        }
        Ok(())
    }
}
