//! Authentication by the Kubernetes API: TokenReview for callers, and pods for authorization.
//!
//! A pod whose spec names no service account has the one named `default`, but counts only in configured namespaces: a kubelet may
//! create mirror pods for its own node in any namespace (NodeRestriction), and the API server lets them name no service account.
//! All other pods get a service account from the API server at their creation.
//!
//! The node is taken from the reviewed token. Since Kubernetes 1.30 the token has a claim for the node. On older servers it is
//! the node of the pod that the token is bound to, which must still be the same pod.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
    core::v1::Pod,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use tacit_core::{
    error_chain::format_chain,
    spiffe::{SpiffeId, TrustDomain, pod_service_account},
};
use tokio::{sync::Semaphore, time::timeout};

use super::{Caller, RequestRefusal};

/// Maximum concurrent requests to the API server. Further requests wait within their own timeout.
const REQUESTS_MAX: usize = 32;
/// Timeout of a request. An agent gives up after 10 s, and an answer needs two or three requests, or one more for `default`.
const REQUEST_MAX: Duration = Duration::from_secs(3);
/// Pods per page of a list. One matching pod is enough.
const PAGE_PODS_MAX: u32 = 50;

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// The Kubernetes API.
pub(crate) struct Kubernetes {
    client: Client,
    /// Namespace and name.
    service_accounts: Vec<(String, String)>,
    audience: String,
    /// Namespaces in which pods without a service account count.
    static_pods: Vec<String>,
    trust_domain: TrustDomain,
    turns: Semaphore,
}

/// The pods of an identity on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pods {
    /// At least one that counts.
    Found,
    /// None but pods without a service account, which do not count in their namespace.
    StaticAlone,
    None,
}

/// The owner of a valid token.
#[derive(Debug, PartialEq, Eq)]
struct Bearer {
    namespace: String,
    service_account: String,
    pod: String,
    pod_uid: String,
    /// The node, if the token has a claim for it.
    node: Option<String>,
}

impl Kubernetes {
    pub(crate) fn new(
        client: Client,
        service_accounts: Vec<(String, String)>,
        audience: String,
        static_pods: Vec<String>,
        trust_domain: TrustDomain,
    ) -> Self {
        let turns = Semaphore::new(REQUESTS_MAX);
        Self { client, service_accounts, audience, static_pods, trust_domain, turns }
    }

    pub(super) async fn authenticate(&self, token: &str) -> Result<Caller, RequestRefusal> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let reviewed = self.ask("review the token", api.create(&PostParams::default(), &review)).await?;
        let status = reviewed.status.unwrap_or_default();
        let bearer = bearer(&status, &self.audience, &self.service_accounts)?;
        let node = match &bearer.node {
            Some(node) => node.clone(),
            None => {
                let api: Api<Pod> = Api::namespaced(self.client.clone(), &bearer.namespace);
                let pod = self.ask("read the agent's pod", api.get_opt(&bearer.pod)).await?;
                node_of(pod.as_ref(), &bearer)?
            }
        };
        let identity = SpiffeId::new(&self.trust_domain, &bearer.namespace, &bearer.service_account)?;
        Ok(Caller { node, identity: Some(identity) })
    }

    /// Looks for a pod of `identity` on `node` that may run.
    pub(super) async fn pods(&self, node: &str, identity: &SpiffeId) -> Result<Pods, RequestRefusal> {
        let account = identity.service_account();
        if self.has_pod(node, identity, account).await? {
            return Ok(Pods::Found);
        }
        if pod_service_account("") != account || !self.has_pod(node, identity, "").await? {
            return Ok(Pods::None);
        }
        let counts = self.static_pods.iter().any(|namespace| namespace == identity.namespace());
        Ok(if counts { Pods::Found } else { Pods::StaticAlone })
    }

    /// Returns true if `node` has a pod of `identity` that may run and whose spec names the service account `named`. The API server
    /// may send empty pages, so all pages are read. The timeout bounds their number.
    async fn has_pod(&self, node: &str, identity: &SpiffeId, named: &str) -> Result<bool, RequestRefusal> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), identity.namespace());
        let mut page = ListParams::default().fields(&selector(node, named)).limit(PAGE_PODS_MAX);
        let found = self.ask("list pods", async {
            loop {
                let pods = api.list(&page).await?;
                if pods.items.iter().any(|pod| counts(pod, node, identity, named)) {
                    return Ok(true);
                }
                let Some(next) = pods.metadata.continue_.filter(|next| !next.is_empty()) else {
                    return Ok(false);
                };
                page = page.continue_token(&next);
            }
        });
        found.await
    }

    async fn ask<T>(
        &self,
        what: &str,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, RequestRefusal> {
        let turn = async {
            let _turn = self.turns.acquire().await.expect("never closed");
            request.await
        };
        match timeout(REQUEST_MAX, turn).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(e)) => Err(RequestRefusal::Api(format!("cannot {what}: {}", format_chain(&e)))),
            Err(_) => Err(RequestRefusal::Api(format!(
                "cannot {what}: no answer from the API server within {REQUEST_MAX:?}"
            ))),
        }
    }
}

/// Returns the bearer if the review accepts the token for `audience` and the user is one of `accounts`.
fn bearer(
    status: &TokenReviewStatus,
    audience: &str,
    accounts: &[(String, String)],
) -> Result<Bearer, RequestRefusal> {
    if let Some(error) = status.error.as_ref().filter(|error| !error.is_empty()) {
        return Err(RequestRefusal::Token(error.clone()));
    }
    if status.authenticated != Some(true) {
        return Err(RequestRefusal::Token("the API server did not authenticate it".to_owned()));
    }
    // Authenticators without support for audiences return none. Such tokens are refused.
    if !status.audiences.as_ref().is_some_and(|for_these| for_these.iter().any(|it| it == audience)) {
        return Err(RequestRefusal::Audience(audience.to_owned()));
    }
    let user = status.user.clone().unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let is = |(namespace, account): (&str, &str)| {
        accounts.iter().any(|(known_in, known)| known_in == namespace && known == account)
    };
    let Some((namespace, account)) = account.filter(|account| is(*account)) else {
        return Err(RequestRefusal::NotAnAgent(name));
    };
    let extra = user.extra.unwrap_or_default();
    let pod = single(&extra, POD_NAME).ok_or_else(|| no_node("it is not bound to a pod"))?;
    let pod_uid = single(&extra, POD_UID).ok_or_else(|| no_node("it has no claim for its pod's UID"))?;
    Ok(Bearer {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        pod,
        pod_uid,
        node: single(&extra, NODE_NAME),
    })
}

/// Returns a claim that has exactly one value.
fn single(extra: &BTreeMap<String, Vec<String>>, claim: &str) -> Option<String> {
    match extra.get(claim)?.as_slice() {
        [one] if !one.is_empty() => Some(one.clone()),
        _ => None,
    }
}

fn no_node(why: &str) -> RequestRefusal {
    RequestRefusal::NoNode(why.to_owned())
}

/// Returns the node of the pod that the token is bound to.
fn node_of(pod: Option<&Pod>, bearer: &Bearer) -> Result<String, RequestRefusal> {
    let pod = pod.ok_or_else(|| no_node("its pod is gone"))?;
    if pod.metadata.uid.as_deref() != Some(&bearer.pod_uid) {
        return Err(no_node("its pod was replaced by another one of the same name"));
    }
    let spec = pod
        .spec
        .as_ref()
        .filter(|spec| spec.service_account_name.as_deref() == Some(&bearer.service_account));
    let spec = spec.ok_or_else(|| no_node("its pod has another service account"))?;
    let node = spec.node_name.clone().filter(|node| !node.is_empty());
    node.ok_or_else(|| no_node("its pod is on no node"))
}

/// Selects the pods on `node` that name the service account `named` and have not ended. Ended pods of Jobs would fill the pages.
fn selector(node: &str, named: &str) -> String {
    format!(
        "spec.nodeName={node},spec.serviceAccountName={named},status.phase!=Succeeded,status.phase!=Failed"
    )
}

/// Returns true if the pod is of `identity`, names the service account `named`, is on `node`, and has not ended. The selection by
/// the API server is checked again.
fn counts(pod: &Pod, node: &str, identity: &SpiffeId, named: &str) -> bool {
    let namespace = pod.metadata.namespace.as_deref() == Some(identity.namespace());
    let spec = pod.spec.as_ref().is_some_and(|spec| {
        let names = spec.service_account_name.as_deref().unwrap_or_default();
        spec.node_name.as_deref() == Some(node)
            && names == named
            && pod_service_account(names) == identity.service_account()
    });
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    namespace && spec && matches!(phase, Some("Pending" | "Running" | "Unknown"))
}

#[cfg(test)]
mod tests;
