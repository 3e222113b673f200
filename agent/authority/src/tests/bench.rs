//! Test setup: an authority and an agent's issuer on loopback, with real TLS and gRPC.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use rustls::pki_types::{CertificateDer, UnixTime};
use serde_json::{Value, json};
use tacit_core::spiffe::{SpiffeId, TrustDomain};
use tacit_grpc::Code;
use tacit_identity::{
    credentials::Credentials,
    istio::{CallError, IstioConfig, IstioError, IstioIssuer},
};
use tacit_testing::Scratch;
use tokio::time::sleep;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use webpki::{EndEntityCert, KeyUsage};

use super::api::Api;
use crate::{
    Authority, StatusSource,
    config::{Agents, BundleTarget, Config, Lifetimes, Rate, RootStorage},
};

pub(super) const SECRET: &str = "/api/v1/namespaces/tacit-system/secrets/tacit-root";
pub(super) const CONFIG_MAP: &str = "/api/v1/namespaces/tacit-system/configmaps/tacit-roots";
pub(super) const NAME: &str = "tacit-authority.tacit-system.svc";

/// An authority that stops when dropped.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    pub(super) status: StatusSource,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Running {
    pub(super) async fn start(config: Config, api: Option<&Api>) -> Self {
        let authority = Authority::start(config, api.map(|api| api.client.clone())).await.expect("starts");
        let address = authority.listener.local_addr().expect("bound");
        let status = authority.status();
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(authority.serve(stop.clone())));
        Self { address, status, stop, task }
    }

    /// Returns the number of requests refused for this reason.
    pub(super) fn refused(&self, reason: &str) -> u64 {
        let refused = (self.status)().refused;
        refused.iter().find(|(known, _)| *known == reason).map_or(0, |(_, count)| *count)
    }

    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("ends in good order");
    }
}

/// Returns the configuration of an authority in Kubernetes, on any port.
pub(super) fn config(leaf: Duration) -> Config {
    Config {
        trust_domain: TrustDomain::parse("cluster.local").expect("valid"),
        listen: "127.0.0.1:0".parse().expect("valid"),
        names: vec![NAME.to_owned()],
        metrics: "127.0.0.1:0".parse().expect("valid"),
        root: RootStorage::Secret { namespace: "tacit-system".to_owned(), name: "tacit-root".to_owned() },
        bundle: BundleTarget::ConfigMap {
            namespace: "tacit-system".to_owned(),
            name: "tacit-roots".to_owned(),
            key: "root-cert.pem".to_owned(),
        },
        agents: Agents::Kubernetes {
            service_accounts: vec![("tacit-system".to_owned(), "tacit-agent".to_owned())],
            audience: "tacit-authority".to_owned(),
            static_pods: Vec::new(),
        },
        lifetimes: Lifetimes { root: leaf * 1000, intermediate: leaf * 2, leaf },
        rate: Rate { per_second: 1000, burst: 1000 },
    }
}

/// An agent's files and issuer.
pub(super) struct Agent {
    files: Scratch,
    pub(super) issuer: IstioIssuer,
}

impl Agent {
    pub(super) fn new(address: SocketAddr, token: &str) -> Self {
        let files = Scratch::new();
        let (root_file, token_file) = (files.path().join("roots.pem"), files.path().join("token"));
        std::fs::write(&token_file, token).expect("written");
        let issuer = IstioIssuer::new(IstioConfig {
            address: address.to_string(),
            server_name: NAME.to_owned(),
            root_file,
            token_file,
            cluster_id: None,
            lifetime: Duration::from_secs(24 * 3600),
        });
        Self { files, issuer }
    }

    /// Returns the parts. Dropping the first removes the files.
    pub(super) fn into_parts(self) -> (Scratch, IstioIssuer) {
        (self.files, self.issuer)
    }

    pub(super) fn root_file(&self) -> PathBuf {
        self.files.path().join("roots.pem")
    }

    /// As the kubelet does with a mounted ConfigMap.
    pub(super) fn mount(&self, api: &Api) {
        let bundle = published(api);
        std::fs::write(self.root_file(), bundle).expect("written");
    }

    pub(super) fn send_token(&self, token: &str) {
        std::fs::write(self.files.path().join("token"), token).expect("written");
    }

    pub(super) async fn issue(&self, account: &str) -> Result<Credentials, IstioError> {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        self.issuer.issue(&SpiffeId::parse(&identity).expect("valid")).await
    }

    /// The code that the authority refuses with.
    pub(super) async fn refused(&self, account: &str) -> Code {
        code(self.issue(account).await.map(drop))
    }
}

/// The code of a refusal.
pub(super) fn code(outcome: Result<(), IstioError>) -> Code {
    match outcome {
        Err(IstioError::Call(CallError::Refused { code, .. })) => code,
        other => panic!("not refused by the authority: {other:?}"),
    }
}

/// An API with an agent on node a (token `a`) and a pod of shop/web there, and of shop/db on node b (token `b`).
pub(super) async fn cluster() -> Api {
    let api = Api::start().await;
    api.add_agent("a", "a");
    api.add_agent("b", "b");
    api.add_pod("shop", "web-1", "web", "a");
    api.add_pod("shop", "db-1", "db", "b");
    api
}

/// An authority, and the agent of node a, ready to issue.
pub(super) async fn started(leaf: Duration) -> (Api, Running, Agent) {
    let api = cluster().await;
    let running = Running::start(config(leaf), Some(&api)).await;
    let agent = Agent::new(running.address, "a");
    ready(&api, &running).await;
    agent.mount(&api);
    (api, running, agent)
}

/// Returns the published bundle, empty if there is none.
pub(super) fn published(api: &Api) -> String {
    api.object(CONFIG_MAP)["data"]["root-cert.pem"].as_str().unwrap_or_default().to_owned()
}

/// Returns a field of the Secret.
pub(super) fn field(api: &Api, name: &str) -> String {
    let secret: k8s_openapi::api::core::v1::Secret =
        serde_json::from_value(api.object(SECRET)).expect("a Secret");
    let bytes = secret.data.unwrap_or_default().remove(name).unwrap_or_default().0;
    String::from_utf8(bytes).expect("text")
}

/// Returns a Secret in cert-manager's layout.
pub(super) fn secret(fields: &[(&str, &str)]) -> Value {
    let data: std::collections::BTreeMap<_, _> = fields
        .iter()
        .map(|(name, text)| (*name, k8s_openapi::ByteString(text.as_bytes().to_vec())))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": "tacit-root", "namespace": "tacit-system"},
        "data": data,
    })
}

/// Verifies `peer` with the roots of `verifier`, as the tunnel does.
pub(super) fn accepts(verifier: &Credentials, peer: &Credentials) -> Result<(), webpki::Error> {
    let now = UnixTime::since_unix_epoch(SystemTime::UNIX_EPOCH.elapsed().expect("after 1970"));
    let chain: &[CertificateDer<'_>] = peer.chain();
    let (algorithms, usage) = (webpki::ALL_VERIFICATION_ALGS, KeyUsage::client_auth());
    let leaf = EndEntityCert::try_from(&chain[0])?;
    leaf.verify_for_usage(algorithms, &verifier.roots.roots, &chain[1..], now, usage, None, None).map(drop)
}

/// Waits until an authority has published a root.
pub(super) async fn ready(api: &Api, running: &Running) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while published(api).is_empty() {
        if Instant::now() > deadline {
            panic!("no root is published: {}", (running.status)().unready().unwrap_or_default());
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for a condition.
pub(super) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the status reports that upkeep fails, or works.
pub(super) async fn upkeep(running: &Running, failing: bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while (running.status)().upkeep_failing != failing {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}
