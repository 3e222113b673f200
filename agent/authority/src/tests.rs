//! Tests of complete authorities on loopback, with TLS, gRPC and a simulated Kubernetes API.

mod api;
mod bench;
mod connections;
mod reconciler;
mod roots;

use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::json;
use tacit_core::spiffe::SpiffeId;
use tacit_grpc::{Channel, Code, KeepAlive, Settings};
use tacit_identity::{
    issuer::Issuer,
    istio::{CallError, IstioError, Skew, api::CertificateRequest},
    manager::Identities,
};
use tacit_testing::Scratch;

use crate::config::{Agents, BundleTarget, Config, Rate, RootStorage};
use bench::{Agent, Running, cluster, code, config, ready, started, until};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn an_agent_gets_certificates_for_its_own_node_and_no_other() {
    let (api, running, agent) = started(HOUR).await;
    let credentials = agent.issue("web").await.expect("issued");
    assert_eq!(credentials.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    let life = credentials.not_after.duration_since(credentials.not_before).expect("valid");
    assert_eq!(life, HOUR + Duration::from_secs(60), "clamped to the longest, backdated");
    assert_eq!(agent.issuer.contact().skew, Some(Skew::None));
    bench::accepts(&credentials, &credentials).expect("verifies");

    assert_eq!(agent.refused("db").await, Code::PermissionDenied, "on node b alone");
    assert_eq!(agent.refused("nobody").await, Code::PermissionDenied);
    api.add_pod("shop", "db-2", "db", "a");
    agent.issue("db").await.expect("issued, once a pod of it is here");

    let own = SpiffeId::parse("spiffe://cluster.local/ns/tacit-system/sa/tacit-agent").expect("valid");
    agent.issuer.issue(&own).await.expect("issued: the agent's own pod is on its node");
    let status = (running.status)();
    assert_eq!((status.issued, running.refused("not_on_node"), status.unready()), (3, 2, None));
}

#[tokio::test]
async fn a_service_account_whose_pods_have_all_ended_gets_no_certificate() {
    let (api, _running, agent) = started(HOUR).await;
    for phase in ["Succeeded", "Failed"] {
        api.add_pod_in(phase, "shop", "job-1", "job", "a");
        assert_eq!(agent.refused("job").await, Code::PermissionDenied, "{phase}");
    }
    api.add_pod("shop", "job-1", "job", "a");
    agent.issue("job").await.expect("issued while its pod runs");
}

#[tokio::test]
async fn a_pod_is_found_behind_pages_of_others_and_no_more_than_a_page_is_sent() {
    let (api, _running, agent) = started(HOUR).await;
    for number in 0..120 {
        api.add_pod_in("Succeeded", "shop", &format!("ended-{number}"), "job", "a");
    }
    api.add_pod("shop", "running", "job", "a");
    agent.issue("job").await.expect("issued");
    assert_eq!(api.content().pods_sent, 1, "pods that have ended are not sent");
    for number in 0..120 {
        api.add_pod("shop", &format!("ended-{number}"), "job", "a");
    }
    agent.issue("job").await.expect("issued");
    assert!(api.content().pods_sent <= 1 + 50);
}

#[tokio::test]
async fn a_static_pod_has_an_identity_in_configured_namespaces_alone() {
    let api = cluster().await;
    let mut config = config(HOUR);
    let Agents::Kubernetes { static_pods, .. } = &mut config.agents else { panic!("not of Kubernetes") };
    static_pods.push("kube-system".to_owned());
    let running = Running::start(config, Some(&api)).await;
    let agent = Agent::new(running.address, "a");
    ready(&api, &running).await;
    agent.mount(&api);
    let id = |namespace: &str, account: &str| {
        SpiffeId::parse(&format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")).expect("valid")
    };
    let refused = async |id: &SpiffeId| code(agent.issuer.issue(id).await.map(drop));
    let default = id("kube-system", "default");
    assert_eq!(refused(&default).await, Code::PermissionDenied, "there is no pod");
    api.add_static_pod("kube-system", "proxy-b", "b");
    assert_eq!(refused(&default).await, Code::PermissionDenied, "on node b alone");
    api.add_static_pod("kube-system", "proxy-a", "a");
    let issued = agent.issuer.issue(&default).await.expect("issued");
    assert_eq!(issued.identity, default);
    assert_eq!(
        refused(&id("kube-system", "admin")).await,
        Code::PermissionDenied,
        "no other service account"
    );

    // The kubelet of node a makes a mirror pod in a namespace that no operator allowed.
    api.add_static_pod("shop", "forged-a", "a");
    let shop = id("shop", "default");
    assert_eq!(refused(&shop).await, Code::PermissionDenied);
    assert_eq!((running.refused("static_pod"), running.refused("not_on_node")), (1, 3));
    api.add_pod("shop", "plain", "default", "a");
    agent.issuer.issue(&shop).await.expect("issued for a pod that the API server gave its service account");
}

#[tokio::test]
async fn an_agent_learns_why_a_static_pod_has_no_certificate() {
    let (api, _running, agent) = started(HOUR).await;
    api.add_static_pod("shop", "static-a", "a");
    let default = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/default").expect("valid");
    let (_files, issuer) = agent.into_parts();
    let identities = Identities::start(Issuer::Istio(issuer));
    let problem = || identities.ready(&default).err().map(|error| error.to_string()).unwrap_or_default();
    until("a refusal", || problem().contains("namespace shop is not in staticPods.namespaces")).await;
    api.add_pod("shop", "plain", "default", "a");
    until("a certificate", || identities.ready(&default).is_ok()).await;
}

#[tokio::test]
async fn another_service_at_the_address_is_called_with_the_same_credentials() {
    let (_api, _running, agent) = started(HOUR).await;
    let (io, metadata) = agent.issuer.dial().await.expect("connected");
    assert!(metadata["authorization"].is_sensitive());
    let settings = Settings {
        origin: "https://authority".to_owned(),
        message_max_bytes: 64 * 1024,
        keep_alive: KeepAlive::Off,
    };
    let channel = Channel::open(io, settings).await.expect("HTTP/2");
    let code = async |path| {
        let answer =
            channel.unary::<_, CertificateRequest>(path, &metadata, &CertificateRequest::default()).await;
        answer.outcome.expect_err("refused").status().expect("a status").code
    };
    assert_eq!(
        code("/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources").await,
        Code::Unimplemented
    );
    assert_eq!(code(tacit_identity::istio::api::PATH).await, Code::InvalidArgument, "the token is accepted");
    agent.send_token("another");
    let (_, later) = agent.issuer.dial().await.expect("connected");
    assert_ne!(later["authorization"], metadata["authorization"], "read for each connection");
}

#[tokio::test]
async fn only_a_valid_token_of_an_agent_is_accepted() {
    let (api, _running, agent) = started(HOUR).await;
    let good = api.content().tokens["a"].clone();
    let variants = [
        ("expired", json!({"authenticated": false, "error": "token has expired"}), Code::Unauthenticated),
        (
            "audience",
            json!({"authenticated": false, "error": "token audiences invalid"}),
            Code::Unauthenticated,
        ),
    ];
    for (token, review, expected) in variants {
        api.content().tokens.insert(token.to_owned(), review);
        agent.send_token(token);
        assert_eq!(agent.refused("web").await, expected, "{token}");
    }
    for (token, pointer, value, expected) in [
        ("other audience", "/audiences", json!(["kubernetes"]), Code::Unauthenticated),
        ("a workload", "/user/username", json!("system:serviceaccount:shop:web"), Code::PermissionDenied),
        ("no pod", "/user/extra", json!({}), Code::PermissionDenied),
    ] {
        let mut review = good.clone();
        *review.pointer_mut(pointer).expect("there") = value;
        api.content().tokens.insert(token.to_owned(), review);
        agent.send_token(token);
        assert_eq!(agent.refused("web").await, expected, "{token}");
    }
    agent.send_token("unknown");
    assert_eq!(agent.refused("web").await, Code::Unauthenticated);
    agent.send_token("a\n");
    agent.issue("web").await.expect("the token file is read again for each call");
    agent.send_token("");
    assert!(matches!(agent.issue("web").await, Err(IstioError::Content { what: "tokenFile", .. })));
}

#[tokio::test]
async fn a_certificate_request_must_be_for_exactly_what_is_asked() {
    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
    const OTHER: &str = "spiffe://other.local/ns/shop/sa/web";
    let (_api, _running, agent) = started(HOUR).await;
    let csr = |uris: &[&str]| {
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            uris.iter().map(|uri| SanType::URI((*uri).try_into().expect("ascii"))).collect();
        let key = KeyPair::generate().expect("a key");
        params.serialize_request(&key).expect("a request")
    };
    let pem = |uris: &[&str]| csr(uris).pem().expect("PEM");
    let forged = {
        let mut der = csr(&[WEB]).der().to_vec();
        *der.last_mut().expect("not empty") ^= 1;
        pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der))
    };
    for (what, csr, asked, expected) in [
        ("two names", pem(&[WEB, WEB]), WEB, Code::InvalidArgument),
        ("no name", pem(&[]), WEB, Code::InvalidArgument),
        ("another trust domain", pem(&[OTHER]), OTHER, Code::PermissionDenied),
        ("another identity", pem(&[WEB]), "spiffe://cluster.local/ns/shop/sa/db", Code::PermissionDenied),
        ("a forged signature", forged, WEB, Code::InvalidArgument),
        ("no request", "invalid".to_owned(), WEB, Code::InvalidArgument),
    ] {
        let message = CertificateRequest::for_identity(asked, csr, 60);
        assert_eq!(code(agent.issuer.ask(&message).await.map(drop)), expected, "{what}");
    }
    let message = CertificateRequest::for_identity(WEB, pem(&[WEB]), 60);
    let exchange = agent.issuer.ask(&message).await.expect("the same request without the fault is granted");
    assert_eq!(exchange.answer.cert_chain.len(), 3, "leaf, intermediate, root");
}

#[tokio::test]
async fn a_request_that_is_too_long_is_refused_and_counted_once_its_caller_is_known() {
    let (_api, running, agent) = started(HOUR).await;
    let csr = "x".repeat(17 * 1024);
    let message = CertificateRequest::for_identity("spiffe://cluster.local/ns/shop/sa/web", csr, 60);
    agent.send_token("unknown");
    assert_eq!(code(agent.issuer.ask(&message).await.map(drop)), Code::Unauthenticated);
    agent.send_token("a");
    assert_eq!(code(agent.issuer.ask(&message).await.map(drop)), Code::InvalidArgument);
    assert_eq!(running.refused("message"), 1);
}

#[tokio::test]
async fn a_node_beyond_its_rate_is_refused_and_others_are_served() {
    let api = cluster().await;
    let config = Config { rate: Rate { per_second: 1, burst: 3 }, ..config(HOUR) };
    let running = Running::start(config, Some(&api)).await;
    let (a, b) = (Agent::new(running.address, "a"), Agent::new(running.address, "b"));
    ready(&api, &running).await;
    a.mount(&api);
    b.mount(&api);
    let mut refusals = Vec::new();
    for _ in 0..20 {
        refusals.extend(a.issue("web").await.err());
    }
    assert!(!refusals.is_empty(), "20 requests in less than 17 s");
    for refusal in refusals {
        assert_eq!(code(Err(refusal)), Code::ResourceExhausted);
    }
    b.issue("db").await.expect("another node has its own rate");
}

#[tokio::test]
async fn certificates_stay_in_use_while_the_authority_is_down() {
    let leaf = Duration::from_secs(8);
    let (api, running, agent) = started(leaf).await;
    let web = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").expect("valid");
    let address = running.address;
    let (_files, issuer) = agent.into_parts();
    let identities = Identities::start(Issuer::Istio(issuer));
    until("a certificate", || identities.ready(&web).is_ok()).await;
    let first = identities.current(&web).expect("there");

    running.stop().await;
    until("renewal fails", || identities.certificates()[0].renewal_failures > 0).await;
    let state = identities.certificates().remove(0);
    assert!(state.last_error.is_some_and(|error| error.contains("cannot connect")));
    assert_eq!(identities.current(&web).expect("still in use").serial, first.serial);

    let back = Config { listen: address, ..config(leaf) };
    let _running = Running::start(back, Some(&api)).await;
    until("a new certificate", || identities.current(&web).expect("never a gap").serial != first.serial)
        .await;
    assert_eq!(identities.certificates()[0].renewal_failures, 0);
}

#[tokio::test]
async fn an_authority_that_is_not_of_the_root_file_gets_no_token() {
    let (_api, _running, agent) = started(HOUR).await;
    let stranger = rcgen::generate_simple_self_signed(["stranger".to_owned()]).expect("made");
    std::fs::write(agent.root_file(), stranger.cert.pem()).expect("written");
    assert!(matches!(agent.issue("web").await, Err(IstioError::Call(CallError::Tls { .. }))));
    std::fs::write(agent.root_file(), "invalid").expect("written");
    assert!(matches!(agent.issue("web").await, Err(IstioError::Content { what: "rootFile", .. })));
}

#[tokio::test]
async fn an_authority_works_without_kubernetes() {
    let files = Scratch::new();
    let standalone = standalone(&files);
    let running = Running::start(standalone.clone(), None).await;
    let agent = Agent::new(running.address, "secret");
    until("the bundle is published", || files.path().join("roots.pem").exists()).await;
    mount(&files, &agent);
    let first = agent.issue("web").await.expect("issued");
    assert_eq!(agent.refused("db").await, Code::PermissionDenied);
    running.stop().await;

    let again = Running::start(standalone, None).await;
    let agent = Agent::new(again.address, "secret");
    mount(&files, &agent);
    until_issued(&agent).await;
    let second = agent.issue("web").await.expect("issued");
    bench::accepts(&first, &second).expect("the root outlives the process");
    bench::accepts(&second, &first).expect("the root outlives the process");
}

#[tokio::test]
async fn the_last_version_of_an_invalid_file_stays_in_use_and_is_reported() {
    let files = Scratch::new();
    let running = Running::start(standalone(&files), None).await;
    let agent = Agent::new(running.address, "secret");
    until("the bundle is published", || files.path().join("roots.pem").exists()).await;
    mount(&files, &agent);
    for name in ["agents.yaml", "directory.yaml"] {
        bench::upkeep(&running, false, name).await;
        let path = files.path().join(name);
        let good = std::fs::read_to_string(&path).expect("written before");
        std::fs::write(&path, "invalid").expect("written");
        bench::upkeep(&running, true, name).await;
        agent.issue("web").await.expect("the last good version is in use");
        std::fs::write(&path, good).expect("written");
    }
    bench::upkeep(&running, false, "both files are good again").await;
}

/// Returns the configuration of an authority without Kubernetes. `files` holds an agent on node a (token `secret`), a pod of
/// shop/web on node a, and a pod of shop/db on node b.
fn standalone(files: &Scratch) -> Config {
    let path = |name: &str| files.path().join(name);
    let hash = crate::root::hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, b"secret").as_ref());
    let tokens = format!("agents: [{{node: a, tokenSha256: \"{hash}\"}}]\n");
    std::fs::write(path("agents.yaml"), tokens).expect("written");
    let workload = |name: &str, node: &str, last: u8| {
        format!(
            "  - {{name: {name}, namespace: shop, serviceAccount: {name}, addresses: [10.77.1.{last}], node: {node}}}\n"
        )
    };
    let directory = format!("workloads:\n{}{}", workload("web", "a", 2), workload("db", "b", 3));
    std::fs::write(path("directory.yaml"), directory).expect("written");
    Config {
        root: RootStorage::Directory(path("root")),
        bundle: BundleTarget::File(path("roots.pem")),
        agents: Agents::Standalone { tokens: path("agents.yaml"), directory: path("directory.yaml") },
        ..config(HOUR)
    }
}

fn mount(files: &Scratch, agent: &Agent) {
    std::fs::copy(files.path().join("roots.pem"), agent.root_file()).expect("copied");
}

/// Retries until the authority has read its root and shows a certificate.
async fn until_issued(agent: &Agent) {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while let Err(error) = agent.issue("web").await {
        assert!(std::time::Instant::now() < deadline, "not in time: {error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
