//! The agent's answers to the CNI plugin: a pod may start once this agent covers it.
//!
//! An agent covers a pod if its programs are in force, its directory has exactly this pod, and the kernel has an entry for the pod's
//! cgroup: that of its mode, or that it is not enrolled. The kubelet makes the cgroup before it asks for the sandbox.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tacit_core::directory::{Directory, Protocol, Workload};
use tacit_kernel::{Kernel, cgroup};
use tacit_sources::reload::Watched;
use tokio::{net::UnixListener, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    app::{node_state, state::State},
    telemetry::{
        admin::{SandboxQuery, bind_replacing, serve_sandboxes},
        status::AgentState,
    },
};

/// Name of the socket, in the agent's folder below `statePath`.
const SOCKET: &str = "sandboxes.sock";
/// Pause before another try to listen.
const RETRY: Duration = Duration::from_secs(5);

/// The state that the answers depend on.
pub(super) struct Sandboxes {
    pub(super) kernel: Arc<Kernel>,
    /// The cgroup that holds all pods.
    pub(super) pods_cgroup: PathBuf,
    pub(super) directory: Arc<Watched<Directory>>,
    pub(super) node: Arc<str>,
    pub(super) state: State,
    /// Cancelled when a task that the agent cannot do without has failed.
    pub(super) failed: CancellationToken,
}

/// Returns the path of the socket.
pub(super) fn socket(state_path: &Path) -> PathBuf {
    node_state::folder(state_path).join(SOCKET)
}

/// Only root reaches what is in the agent's folder.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    node_state::make_private(socket.parent().unwrap_or(Path::new("/")))?;
    bind_replacing(socket)
}

impl Sandboxes {
    /// Answers at `socket`, instead of an agent that did so before.
    pub(super) async fn serve(self, socket: PathBuf) {
        let source = Arc::new(move |query: &SandboxQuery<'_>| self.answer(query));
        loop {
            match bind(&socket) {
                Ok(listener) => return serve_sandboxes(listener, source).await,
                Err(error) => {
                    tracing::error!(
                        socket = %socket.display(), %error,
                        "cannot answer the CNI plugin, so no new pod starts on this node"
                    );
                }
            }
            sleep(RETRY).await;
        }
    }

    fn answer(&self, query: &SandboxQuery<'_>) -> Result<(), String> {
        if self.failed.is_cancelled() {
            return Err("a task of the agent has failed, and the agent ends".to_owned());
        }
        match self.state.current() {
            AgentState::Ready => {}
            state => return Err(format!("the agent is {state}")),
        }
        let SandboxQuery { namespace, name, uid } = query;
        let directory = self.directory.current();
        let Some(workload) = directory.holder_named(&self.node, namespace, name) else {
            return Err(format!("the directory has no pod {namespace}/{name} on this node yet"));
        };
        if !is_same(workload, *uid) {
            return Err(format!("the directory has another pod {namespace}/{name}"));
        }
        let path = self.pods_cgroup.join(&workload.cgroup);
        let Some(cgroup) = cgroup::id_at(&path) else {
            return Err(format!("the pod has no cgroup {} yet", path.display()));
        };
        if is_covered(workload, self.kernel.maps.is_exempt(cgroup)) {
            Ok(())
        } else {
            Err(format!("the kernel does not treat pod {namespace}/{name} as the directory has it yet"))
        }
    }
}

/// Returns true if the kernel's entry of the pod's cgroup is the right one. A cgroup can have been left alone because no source
/// named it for long.
fn is_covered(workload: &Workload, is_exempt: Option<bool>) -> bool {
    is_exempt == Some(workload.protocol != Protocol::Tacit)
}

/// Returns true if the workload is the pod with this UID. The kubelet names the cgroup of a pod by its UID.
fn is_same(workload: &Workload, uid: Option<&str>) -> bool {
    uid.is_none_or(|uid| workload.pod_uid().as_deref() == Some(uid))
}

#[cfg(test)]
mod tests {
    use tacit_core::spiffe::TrustDomain;

    use super::*;

    fn pod(cgroup: &str, tunnel: &str) -> Arc<Workload> {
        let text = format!(
            "workloads: [{{name: web, namespace: shop, serviceAccount: web, addresses: [10.77.0.2], node: a, \
             cgroup: \"{cgroup}\", tunnel: {tunnel}}}]"
        );
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let directory = Directory::parse(&text, Path::new("directory.yaml"), &domain).expect("valid");
        Arc::clone(directory.named("shop", "web").expect("there"))
    }

    #[test]
    fn a_pod_is_known_by_its_uid() {
        let uid = "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b";
        let slice = uid.replace('-', "_");
        for cgroup in [
            format!("pod{uid}"),
            format!("burstable/pod{uid}"),
            format!("kubepods-pod{slice}.slice"),
            format!("kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"),
        ] {
            let pod = pod(&cgroup, "tacit");
            assert!(is_same(&pod, Some(uid)) && is_same(&pod, None), "{cgroup}");
            for other in ["", "0b4c1d9e", &uid[1..], &slice, "1b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b"] {
                assert!(!is_same(&pod, Some(other)), "{cgroup} {other}");
            }
        }
        assert!(!is_same(&pod("web", "tacit"), Some(uid)));
    }

    #[test]
    fn the_kernels_entry_has_to_be_that_of_the_directory() {
        for (tunnel, is_exempt, expected) in [
            ("tacit", None, false),
            ("tacit", Some(true), false),
            ("tacit", Some(false), true),
            ("none", None, false),
            ("none", Some(true), true),
            ("none", Some(false), false),
        ] {
            assert_eq!(is_covered(&pod("web", tunnel), is_exempt), expected, "{tunnel} {is_exempt:?}");
        }
    }
}
