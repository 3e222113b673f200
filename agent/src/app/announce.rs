//! Announces the pods of this node that take HBONE, while the agent serves them. An agent that ends leaves the announcements: STRICT holds
//! without an agent, and its successor serves the pods.

use std::sync::Arc;

use tacit_core::policy::Mode;
use tacit_sources::directory::{AnnounceState, Announcer, Serving};
use tokio::sync::watch;

use crate::{
    enrol::{Pod, Pods},
    proxy::Proxy,
};

/// Announces pods until a drain. Never returns.
pub(super) async fn announce(
    announcer: Option<Announcer>,
    proxy: Arc<Proxy>,
    state: Option<watch::Sender<AnnounceState>>,
) {
    if let (Some(announcer), Some(state)) = (announcer, state) {
        let serving = || serving(&proxy.pods.load());
        tokio::select! {
            () = announcer.run(serving, &proxy.pods_published, state) => {}
            // The table of pods is not kept any more.
            () = proxy.drain.stop.cancelled() => {}
        }
    }
    std::future::pending().await
}

/// Returns the pods whose listeners accept tunnels, and those that peers reach as plaintext alone.
fn serving(pods: &Pods) -> Serving {
    let cgroup = |pod: &Arc<Pod>| pod.workload.cgroup.clone();
    let tunnelled = pods.pods.iter().filter(|pod| has_tunnel(pod) && !pod.closed.is_cancelled());
    let others = pods.pods.iter().filter(|pod| !has_tunnel(pod)).map(cgroup);
    let left_alone = pods.left_alone.iter().map(|left| left.workload.cgroup.clone());
    Serving {
        tunnelled: tunnelled.map(cgroup).collect(),
        plaintext_alone: others.chain(left_alone).collect(),
    }
}

/// Returns false if peers that ask for a tunnel get 503: rules of the pod rewrite what arrives, and its mode takes plaintext.
fn has_tunnel(pod: &Pod) -> bool {
    let takes_plaintext = || pod.policy().modes.default != Mode::Strict;
    pod.not_tunnelled().is_none() && !(pod.rewrites_arrivals() && takes_plaintext())
}
