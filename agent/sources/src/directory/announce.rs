//! Announces to istiod the pods of this node that take HBONE, by the annotation that istio-cni writes for the pods of a ztunnel.
//! Without it every ztunnel sends plaintext to the pod.
//!
//! ```text
//! store ── pods of this node and their annotations ──┐
//!                                                    ├─ plan ──> patches of pods/status, one at a time
//! enrolment ── pods that take tunnels ───────────────┘
//! ```
//! A second annotation, [`MARK`], states that an agent wrote the first one. An annotation without the mark on a pod that is not enrolled
//! belongs to others and stays. An agent that starts again recognizes the annotations of its predecessor by the mark, and agents of other
//! nodes never take a marked pod for one of a ztunnel.
//!
//! Nothing waits for a patch. A failed one is repeated after a pause, for the pod and, unless the pod is the cause, for all.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use kube::{
    Client, Config, Error,
    core::{
        Request,
        params::{Patch, PatchParams},
    },
};
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

mod attempts;
mod plan;
mod store;

use attempts::{Attempts, Next};
pub use plan::Serving;
use plan::{Change, changes};
pub(super) use store::AnnouncedStore;

/// The annotation that istiod reads, with the value [`ENABLED`].
pub(super) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// The value of a pod that takes HBONE.
pub(super) const ENABLED: &str = "enabled";
/// The annotation that states that an agent wrote [`REDIRECTION`].
pub(super) const MARK: &str = "tacit.io/announced";
/// Time after which a patch has failed.
const PATCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two lines of the log about failures.
const LOG_PAUSE: Duration = Duration::from_secs(60);

/// The readers for which the agent announces its pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Announce {
    /// Nobody. The agent writes nothing to the API.
    #[default]
    None,
    /// istiod, for the ztunnels of Istio ambient.
    Ambient,
}

/// A pod of this node as the API has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OwnPod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    /// Empty for a pod with the node's network.
    pub(super) cgroup: PathBuf,
    /// True if the label enrols the pod.
    pub(super) is_enrolled: bool,
    /// True if [`REDIRECTION`] is [`ENABLED`].
    pub(super) is_redirected: bool,
    /// True if the pod has [`MARK`].
    pub(super) is_marked: bool,
}

/// The announcements as the operator sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AnnounceState {
    /// Pods that are announced.
    pub announced: usize,
    /// Pods with an annotation that must be written or removed.
    pub pending: usize,
    /// Patches that the API accepted since the agent started.
    pub patches: u64,
    /// Patches that failed since the agent started.
    pub failures: u64,
    /// The last failure; `None` once no patch is pending.
    pub last_error: Option<String>,
}

/// Writes and removes the annotation. Nothing happens before [`Announcer::run`].
pub struct Announcer {
    client: Client,
    pods: watch::Receiver<Arc<Vec<OwnPod>>>,
}

/// The reason for which a patch failed.
enum Failure {
    /// This pod: it was deleted or replaced, or a policy of the cluster denies the patch.
    Pod(String),
    /// The API or its permissions, so the patches of other pods would fail too.
    Api(String),
}

impl Announcer {
    pub(super) fn new(mut config: Config, pods: watch::Receiver<Arc<Vec<OwnPod>>>) -> Result<Self, Error> {
        // Pauses are those of `attempts`.
        config.default_retry = false;
        Ok(Self { client: Client::try_from(config)?, pods })
    }

    /// Keeps the annotations of this node's pods until the future is dropped. `serving` returns the pods as enrolment has them, and `changed`
    /// is notified when they may have changed.
    pub async fn run(
        mut self,
        serving: impl Fn() -> Serving,
        changed: &Notify,
        state: watch::Sender<AnnounceState>,
    ) {
        let mut attempts = Attempts::default();
        let mut logged: Option<Instant> = None;
        loop {
            let pods = Arc::clone(&self.pods.borrow_and_update());
            let serving = serving();
            let wanted = changes(&pods, &serving);
            // A set: anybody who may create pods can make thousands of them.
            let uids: HashSet<&str> = wanted.iter().map(|(pod, _)| pod.uid.as_str()).collect();
            attempts.keep(|uid| uids.contains(uid), Instant::now());
            let announced = pods.iter().filter(|pod| pod.is_marked && pod.is_redirected).count();
            state.send_if_modified(|state| {
                let last_error = state.last_error.clone().filter(|_| !wanted.is_empty());
                let now = AnnounceState { announced, pending: wanted.len(), last_error, ..state.clone() };
                let is_new = *state != now;
                *state = now;
                is_new
            });
            let next = attempts.next(wanted.iter().map(|(pod, _)| pod.uid.as_str()), Instant::now());
            let due = match next {
                Next::Now(index) => {
                    if let Some((pod, change)) = wanted.get(index) {
                        let done = self.patch(pod, *change).await;
                        report(pod, *change, &done, &state, &mut logged);
                        attempts.done(&pod.uid, done.as_ref().err(), Instant::now());
                    }
                    continue;
                }
                Next::At(due) => due,
            };
            let pause = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Without a store nothing changes any more.
                news = self.pods.changed() => if news.is_err() { std::future::pending().await },
                () = changed.notified() => {}
                () = pause => {}
            }
        }
    }

    /// Patches the annotations of one pod. The UID keeps the patch from a later pod of the same name.
    async fn patch(&self, pod: &OwnPod, change: Change) -> Result<(), Failure> {
        let annotations = match change {
            Change::Announce => json!({REDIRECTION: ENABLED, MARK: "true"}),
            Change::Withdraw => json!({REDIRECTION: null, MARK: null}),
            Change::Unmark => json!({MARK: null}),
        };
        let patch = json!({"metadata": {"uid": pod.uid, "annotations": annotations}});
        let path = format!("/api/v1/namespaces/{}/pods", pod.namespace);
        let params = PatchParams { field_manager: Some("tacit-agent".to_owned()), ..PatchParams::default() };
        let request =
            Request::new(path).patch_subresource("status", &pod.name, &params, &Patch::Merge(patch));
        let request = request.map_err(|error| Failure::Pod(error.to_string()))?;
        match timeout(PATCH_TIMEOUT, self.client.request::<IgnoredAny>(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(failure(error)),
            Err(_) => Err(Failure::Api(format!("no answer within {PATCH_TIMEOUT:?}"))),
        }
    }
}

fn failure(error: Error) -> Failure {
    match &error {
        // Deleted, replaced, or denied by a policy.
        Error::Api(status) if matches!(status.code, 404 | 409 | 422) => Failure::Pod(error.to_string()),
        Error::Api(status) if status.code == 403 => Failure::Api(format!(
            "{error}; grant `patch` of `pods/status` as deploy/kustomize/ambient does, or set directory.kubernetes.announce to none"
        )),
        _ => Failure::Api(error.to_string()),
    }
}

/// Counts and logs one attempt. Failures are logged at most once in [`LOG_PAUSE`]. All of them are counted.
fn report(
    pod: &OwnPod,
    change: Change,
    done: &Result<(), Failure>,
    state: &watch::Sender<AnnounceState>,
    logged: &mut Option<Instant>,
) {
    let OwnPod { namespace, name, .. } = pod;
    match done {
        Ok(()) => {
            state.send_modify(|state| state.patches += 1);
            match change {
                Change::Announce => tracing::info!(pod = name, namespace, "announced for HBONE"),
                Change::Withdraw | Change::Unmark => {
                    tracing::info!(pod = name, namespace, "no longer announced for HBONE");
                }
            }
        }
        Err(Failure::Pod(error) | Failure::Api(error)) => {
            let text = format!("pod {namespace}/{name}: {error}");
            if logged.is_none_or(|at| at.elapsed() >= LOG_PAUSE) {
                *logged = Some(Instant::now());
                let failures = state.borrow().failures + 1;
                tracing::warn!(
                    failures,
                    "the annotation {REDIRECTION} cannot be {}, which is repeated: {text}",
                    match change {
                        Change::Announce => "written, so ztunnels send plaintext to the pod",
                        Change::Withdraw | Change::Unmark => "removed, so ztunnels do not reach the pod",
                    }
                );
            }
            state.send_modify(|state| {
                state.failures += 1;
                state.last_error = Some(text);
            });
        }
    }
}

#[cfg(test)]
mod tests;
