//! Both servers, for real: a TCP listener on loopback and a Unix socket in a directory of its own.

use std::{
    net::SocketAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use tacit_authority::status::{AuthorityStatus, Readiness};
use tacit_core::policy::explain::{ExplainError, Explanation};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
};

use super::*;
use crate::telemetry::status::{AgentState, tests::sample};

#[tokio::test]
async fn metrics_are_served_with_their_content_type() {
    let answer = get(metrics_server(sample).await, "GET /metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let content_type = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(answer.contains(content_type), "{answer}");
    assert!(answer.contains("\ntacit_pods_enrolled 1\n") && answer.ends_with("# EOF\n"), "{answer}");
}

#[tokio::test]
async fn readiness_follows_the_status_and_says_why() {
    let ready = get(metrics_server(sample).await, "GET /healthz/ready").await;
    assert!(ready.starts_with("HTTP/1.1 200 "), "{ready}");
    let draining = || Status { state: AgentState::Draining, ..sample() };
    let draining = get(metrics_server(draining).await, "GET /healthz/ready").await;
    assert!(draining.starts_with("HTTP/1.1 503 ") && draining.ends_with("agent is draining\n"), "{draining}");
}

#[tokio::test]
async fn an_authority_has_metrics_and_readiness() {
    let status = |readiness| AuthorityStatus {
        readiness,
        issued: 3,
        refused: Vec::new(),
        upkeep_failing: false,
        root_not_after: None,
        intermediate_not_after: None,
        roots: 1,
    };
    let ready = authority_server(status(Readiness::Ready)).await;
    let metrics = get(ready, "GET /metrics").await;
    assert!(metrics.contains("\ntacit_authority_certificates_issued_total 3\n"), "{metrics}");
    assert!(get(ready, "GET /healthz/ready").await.contains("200 OK"));
    let unready = authority_server(status(Readiness::NoRoot(None))).await;
    assert!(get(unready, "GET /healthz/ready").await.contains("503"));
}

#[tokio::test]
async fn an_agent_that_is_not_ready_is_alive_all_the_same() {
    let draining = || Status { state: AgentState::Draining, ..sample() };
    let alive = get(metrics_server(draining).await, "GET /healthz/live").await;
    assert!(alive.starts_with("HTTP/1.1 200 ") && alive.ends_with("alive\n"), "{alive}");
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = metrics_server(sample).await;
    assert!(get(server, "GET /status").await.starts_with("HTTP/1.1 404 "));
    let refused = get(server, "POST /metrics").await;
    assert!(refused.starts_with("HTTP/1.1 405 ") && refused.contains("allow: GET\r\n"), "{refused}");
}

#[tokio::test]
async fn the_health_port_has_readiness_alone_and_gives_no_reason() {
    let ready = health_server(true).await;
    let (head, body) = split(get(ready, "GET /healthz/ready").await);
    assert!(head.starts_with("HTTP/1.1 200 ") && body == "ready\n", "{head}\n{body}");
    let (head, body) = split(get(health_server(false).await, "GET /healthz/ready").await);
    assert!(head.starts_with("HTTP/1.1 503 ") && body == "not ready\n", "{head}\n{body}");
    for path in ["/", "/metrics", "/status", "/healthz/live", "/healthz/ready/", "/policy/explain"] {
        assert!(get(ready, &format!("GET {path}")).await.starts_with("HTTP/1.1 404 "), "{path}");
    }
    for method in ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT"] {
        let answer = get(ready, &format!("{method} /healthz/ready")).await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    }
}

#[tokio::test]
async fn silent_clients_keep_no_probe_waiting() {
    let server = health_server(true).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(server).await.expect("listening"));
    }
    // The silent ones would be cut off after that time only.
    let answer = time::timeout(HEADERS_MAX, get(server, "GET /healthz/ready")).await.expect("served at once");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn silent_clients_of_the_same_address_keep_no_request_waiting() {
    let telemetry = Telemetry::new();
    let server = metrics_server_of(sample, telemetry.clone()).await;
    let bounds = telemetry.admin_connections().bounds;
    let mut silent = Vec::new();
    for _ in 0..2 * bounds.total {
        silent.push(TcpStream::connect(server).await.expect("listening"));
    }
    // The silent ones would be cut off after that time only.
    let answer = time::timeout(HEADERS_MAX, get(server, "GET /healthz/ready")).await.expect("served at once");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let usage = telemetry.admin_connections();
    assert!(usage.refused > bounds.total && usage.used <= bounds.each, "{usage:?}");
    let mut end = [0; 1];
    let first = time::timeout(HEADERS_MAX, silent[0].read(&mut end)).await.expect("gave way");
    assert!(matches!(first, Ok(0) | Err(_)), "{first:?}");
}

#[tokio::test]
async fn a_silent_client_is_cut_off() {
    let server = metrics_server(sample).await;
    let mut silent = TcpStream::connect(server).await.expect("listening");
    let ended = time::timeout(HEADERS_MAX * 3, silent.read(&mut [0; 1])).await.expect("cut off");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn the_status_comes_through_the_socket() {
    let dir = TestDir::new();
    let path = dir.path("run/agent.sock");
    let listener = bind_operator(&path).expect("bound");
    let (stop, stopped) = oneshot::channel::<()>();
    let explain: ExplainSource = Arc::new(|from, to, port| {
        assert_eq!((from.to_string().as_str(), port), ("fd77::1", 80));
        if to.to_string() == "shop/web" {
            Ok(Explanation { allow: true, paths: Vec::new() })
        } else {
            Err(ExplainError::Unknown(to.to_string()))
        }
    });
    let served =
        tokio::spawn(serve_operator(listener, Arc::new(sample), explain, async { drop(stopped.await) }));
    assert_eq!(fetch_status(&path).await.expect("served"), sample());
    let explanation = fetch_explanation(&path, "fd77::1", "shop/web", "80").await.expect("served");
    assert!(explanation.allow);
    for (to, port, part) in [
        ("shop/db", "80", "no workload shop/db"),
        ("web", "80", "\"web\" is neither"),
        ("shop/a b", "80", "shop/a b has characters"),
        ("shop/web", "0", "\"0\" is no port"),
    ] {
        let error = fetch_explanation(&path, "fd77::1", to, port).await.expect_err(to);
        assert!(error.to_string().contains(part), "{error}");
    }
    drop(stop);
    served.await.expect("stops when told");
    let error = fetch_status(&path).await.expect_err("the agent is gone");
    assert!(matches!(error, FetchError::NotRunning { .. }), "{error}");
}

#[tokio::test]
async fn a_missing_agent_is_told_from_a_missing_permission() {
    let dir = TestDir::new();
    let error = fetch_status(&dir.path("none.sock")).await.expect_err("nobody there");
    assert!(error.to_string().starts_with("no agent is running here"), "{error}");
}

#[tokio::test]
async fn the_socket_is_private_from_its_first_moment_whatever_the_umask() {
    let dir = TestDir::new();
    let path = dir.path("run/agent.sock");
    let _listener = bind_operator(&path).expect("bound");
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(&dir.path("run")), 0o700);
}

#[tokio::test]
async fn only_a_socket_that_nobody_answers_is_replaced() {
    let dir = TestDir::new();
    let path = dir.path("agent.sock");
    let first = bind_operator(&path).expect("bound");
    assert!(matches!(bind_operator(&path), Err(BindError::Running { .. })));
    drop(first);
    assert!(path.exists(), "a closed socket leaves its file behind");
    let second = bind_operator(&path).expect("a stale socket is replaced");
    std::os::unix::net::UnixStream::connect(&path).expect("the new socket listens");
    drop(second);

    let file = dir.path("file");
    std::fs::write(&file, "precious").expect("writable");
    assert!(matches!(bind_operator(&file), Err(BindError::Occupied { .. })));
    let link = dir.path("link");
    symlink(&path, &link).expect("writable");
    assert!(matches!(bind_operator(&link), Err(BindError::Occupied { .. })));
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "precious");
}

#[tokio::test]
async fn a_directory_others_can_write_is_refused() {
    let dir = TestDir::new();
    let open = dir.path("open");
    std::fs::create_dir(&open).expect("writable");
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o1777)).expect("ours");
    let error = bind_operator(&open.join("agent.sock")).expect_err("exposed");
    assert!(matches!(error, BindError::Exposed { mode: 0o1777, .. }), "{error}");
}

async fn metrics_server(status: impl Fn() -> Status + Send + Sync + 'static) -> SocketAddr {
    metrics_server_of(status, Telemetry::new()).await
}

async fn metrics_server_of(
    status: impl Fn() -> Status + Send + Sync + 'static,
    telemetry: Telemetry,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(serve_metrics(listener, Arc::new(status), telemetry, std::future::pending()));
    address
}

async fn health_server(is_ready: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(serve_health(listener, Arc::new(move || is_ready), std::future::pending()));
    address
}

/// Splits an answer into its head and its body.
fn split(answer: String) -> (String, String) {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a whole answer");
    (head.to_owned(), body.to_owned())
}

async fn authority_server(status: AuthorityStatus) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(serve_authority(listener, Arc::new(move || status.clone()), std::future::pending()));
    address
}

async fn get(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("listening");
    let request = format!("{request} HTTP/1.1\r\nHost: agent\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("the server closes after its answer");
    answer
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("exists").permissions().mode() & 0o7777
}

/// A directory that is removed after the test.
struct TestDir(PathBuf);

impl TestDir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tacit-admin-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("the name is new");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
