//! The agent's answers to the CNI plugin: a pod may start once this agent covers it.
//!
//! An agent covers a pod if its programs are in force, it has looked at all pods of the node once, and its directory has exactly this
//! pod, so that the mode of the pod is known before its first process runs. A pod that is not to be enrolled is in the directory
//! too.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tacit_core::directory::{Directory, Workload};
use tacit_sources::reload::Watched;
use tokio::{net::UnixListener, time::sleep};

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

/// What the answers depend on.
pub(super) struct Sandboxes {
    pub(super) directory: Arc<Watched<Directory>>,
    pub(super) node: Arc<str>,
    pub(super) state: State,
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
        match self.state.current() {
            AgentState::Ready => {}
            state => return Err(format!("the agent is {state}")),
        }
        let SandboxQuery { namespace, name, uid } = query;
        match self.directory.current().named(namespace, name) {
            Some(workload) if is_same(workload, &self.node, *uid) => Ok(()),
            Some(_) => Err(format!("the directory has another pod {namespace}/{name}")),
            None => Err(format!("the directory has no pod {namespace}/{name} yet")),
        }
    }
}

/// Returns true if the workload is the pod with this UID, on this node. The kubelet names the cgroup of a pod by its UID.
fn is_same(workload: &Workload, node: &str, uid: Option<&str>) -> bool {
    let cgroup = workload.cgroup.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let cgroup = cgroup.strip_suffix(".slice").unwrap_or(cgroup);
    let of_cgroup = cgroup.rsplit_once("pod").map(|(_, uid)| uid.replace('_', "-"));
    *workload.node == *node && uid.is_none_or(|uid| of_cgroup.as_deref() == Some(uid))
}

#[cfg(test)]
mod tests {
    use tacit_core::spiffe::TrustDomain;

    use super::*;

    fn pod(cgroup: &str) -> Arc<Workload> {
        let text = format!(
            "workloads: [{{name: web, namespace: shop, serviceAccount: web, addresses: [10.77.0.2], node: a, \
             cgroup: \"{cgroup}\"}}]"
        );
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let directory = Directory::parse(&text, Path::new("directory.yaml"), &domain).expect("valid");
        Arc::clone(directory.named("shop", "web").expect("there"))
    }

    #[test]
    fn a_pod_is_known_by_its_uid_and_node() {
        let uid = "0b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b";
        let slice = uid.replace('-', "_");
        for cgroup in [
            format!("pod{uid}"),
            format!("burstable/pod{uid}"),
            format!("kubepods-pod{slice}.slice"),
            format!("kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"),
        ] {
            let pod = pod(&cgroup);
            assert!(is_same(&pod, "a", Some(uid)) && is_same(&pod, "a", None), "{cgroup}");
            assert!(!is_same(&pod, "b", Some(uid)), "another node");
            for other in ["", "0b4c1d9e", &uid[1..], &slice, "1b4c1d9e-6c1f-4a6e-9d8a-2f1f3c5d7e9b"] {
                assert!(!is_same(&pod, "a", Some(other)), "{cgroup} {other}");
            }
        }
        assert!(!is_same(&pod("web"), "a", Some(uid)));
    }
}
