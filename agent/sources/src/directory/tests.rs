//! Tests against a simulated API server: pages, watches, broken connections, expired versions.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;
use crate::{
    kubernetes::testing::Server,
    reload::{ReloadState, Watched},
};

const NAMESPACES: &str = "/api/v1/namespaces";
const PODS: &str = "/api/v1/pods";
const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NODES: &str = "/api/v1/nodes";
const CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";
const CIDRS_BETA: &str = "/apis/networking.k8s.io/v1beta1/servicecidrs";
const SLICES_BETA: &str = "/apis/discovery.k8s.io/v1beta1/endpointslices";

/// Longer than the pauses between retries in these tests (some seconds).
const DEADLINE: Duration = Duration::from_secs(30);

async fn open_all(server: &Server) -> Watched<Directory> {
    let config = Config::new(format!("http://{}", server.address()).parse().expect("a URL"));
    let local_node = LocalNode {
        node: "a".into(),
        trust_domain: TrustDomain::parse("cluster.local").expect("valid"),
        cgroups: CgroupLayout::of(Path::new("/sys/fs/cgroup/kubepods")),
        ranges: Arc::default(),
    };
    let (opening, announcer) = start(config, &Options::default(), local_node).expect("a client");
    assert!(announcer.is_none(), "nothing is announced by default");
    let opened = timeout(DEADLINE, opening.complete()).await;
    opened.expect("complete before the deadline").expect("followed")
}

async fn until(watched: &Watched<Directory>, what: &str, is: impl FnMut(&Arc<Directory>) -> bool) {
    let mut changes = watched.subscribe();
    let reached = timeout(DEADLINE, changes.wait_for(is)).await;
    reached.unwrap_or_else(|_| panic!("{what}: not before the deadline")).expect("followed");
}

async fn until_state(
    watched: &Watched<Directory>,
    what: &str,
    is: impl Fn(&ReloadState) -> bool,
) -> ReloadState {
    let mut states = watched.states();
    let reached = timeout(DEADLINE, states.wait_for(is)).await;
    reached.unwrap_or_else(|_| panic!("{what}: {:?}", watched.state())).expect("followed").clone()
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": {"app": "web"}},
        "spec": {"nodeName": "b", "serviceAccountName": "web"},
        "status": {"phase": "Running", "qosClass": "BestEffort", "podIPs": [{"ip": ip}]},
    })
}

/// Namespace shop, enrolled, with three pods and a service. A page holds two objects.
fn cluster() -> Server {
    let server = Server::start();
    server.set(NAMESPACES, json!({"metadata": {"name": "shop", "labels": {"tacit.io/enrol": "true"}}}));
    for i in 2..5 {
        server.set(PODS, pod(&format!("web-{i}"), &format!("10.77.2.{i}")));
    }
    server.set(
        SERVICES,
        json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "protocol": "TCP"}]},
        }),
    );
    server
}

fn slice() -> Value {
    json!({
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.77.2.2"], "conditions": {"ready": true}}],
    })
}

fn has(directory: &Directory, address: &str) -> bool {
    directory
        .at(address.parse().expect("an address"))
        .is_some_and(|w| w.protocol == tacit_core::directory::Protocol::Tacit)
}

fn has_endpoint(directory: &Directory) -> bool {
    let service = directory.service_named("shop", "web");
    service.is_some_and(|service| service.ports[0].ipv4.usable().len() == 1)
}

#[tokio::test]
async fn the_directory_is_listed_and_watched() {
    let server = cluster();
    let watched = open_all(&server).await;
    let directory = watched.current();
    assert_eq!((directory.len(), has(&directory, "10.77.2.4")), (3, true), "all pages are there at once");
    assert!(watched.state().file.display().to_string().starts_with("kubernetes http://127.0.0.1:"));
    server.set(PODS, pod("web-9", "10.77.2.9"));
    server.set(SLICES, slice());
    until(&watched, "a new pod and a slice", |d| has(d, "10.77.2.9") && has_endpoint(d)).await;
    server.remove(PODS, "web-9");
    until(&watched, "a pod is gone", |d| !has(d, "10.77.2.9")).await;
    assert_eq!(watched.state().last_error, None);
}

#[tokio::test]
async fn pods_without_a_node_and_ended_pods_are_not_asked_for() {
    let server = cluster();
    let _watched = open_all(&server).await;
    server.watches(PODS, 1).await;
    let selected =
        "fieldSelector=spec.nodeName%21%3D%2Cstatus.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed";
    let queries = server.queries(PODS);
    // Two pages and a watch.
    assert!(queries.len() >= 3 && queries.iter().all(|query| query.contains(selected)), "{queries:?}");
    assert!(server.queries(SERVICES).iter().all(|query| !query.contains("fieldSelector")));
}

#[tokio::test]
async fn an_old_server_serves_v1beta1_slices() {
    let server = cluster();
    server.without(SLICES);
    server.set(SLICES_BETA, slice());
    let watched = open_all(&server).await;
    assert!(has_endpoint(&watched.current()));
    until_state(&watched, "no error is left", |state| state.last_error.is_none()).await;
}

#[tokio::test]
async fn a_broken_watch_resumes() {
    let server = cluster();
    let watched = open_all(&server).await;
    server.watches(PODS, 1).await;
    let lists = server.lists(PODS);
    for i in 10..15 {
        server.break_connections();
        server.set(PODS, pod(&format!("web-{i}"), &format!("10.77.2.{i}")));
        until(&watched, "a pod made while away", |d| has(d, &format!("10.77.2.{i}"))).await;
    }
    assert_eq!(server.lists(PODS), lists, "watched on, not listed again");
    assert_eq!(watched.current().len(), 8);
}

#[tokio::test]
async fn a_version_that_is_too_old_is_replaced_by_a_list_without_a_gap() {
    let server = cluster();
    let watched = open_all(&server).await;
    server.watches(PODS, 1).await;
    let lists = server.lists(PODS);
    server.go_down();
    server.break_connections();
    server.remove(PODS, "web-2");
    server.set(PODS, pod("web-8", "10.77.2.8"));
    server.forget_history();
    server.come_up();
    let mut least = usize::MAX;
    until(&watched, "the state of the list", |d| {
        least = least.min(d.len());
        has(d, "10.77.2.8") && !has(d, "10.77.2.2")
    })
    .await;
    assert!(server.lists(PODS) > lists, "410 is answered by a list");
    assert_eq!((least, watched.current().len()), (3, 3), "never fewer than there are");
}

#[tokio::test]
async fn the_last_state_stays_while_the_api_fails_and_its_age_is_reported() {
    let server = cluster();
    let watched = open_all(&server).await;
    server.watches(PODS, 1).await;
    assert_eq!(watched.state().stale_since, None);
    let before = SystemTime::now();
    server.go_down();
    server.break_connections();
    let state = until_state(&watched, "stale", |state| state.stale_since.is_some()).await;
    assert!(
        state.stale_since >= Some(before) && state.refusals > 0 && state.last_error.is_some(),
        "{state:?}"
    );
    assert!(has(&watched.current(), "10.77.2.3"));
    server.come_up();
    server.set(PODS, pod("web-7", "10.77.2.7"));
    until(&watched, "watched again", |d| has(d, "10.77.2.7")).await;
    until_state(&watched, "fresh", |state| state.stale_since.is_none() && state.last_error.is_none()).await;
}

#[tokio::test]
async fn nothing_is_in_use_before_everything_is_listed() {
    let server = cluster();
    server.without(SERVICES);
    let config = Config::new(format!("http://{}", server.address()).parse().expect("a URL"));
    let local_node = LocalNode {
        node: "a".into(),
        trust_domain: TrustDomain::parse("cluster.local").expect("valid"),
        cgroups: CgroupLayout::Cgroupfs,
        ranges: Arc::default(),
    };
    let (opening, _) = start(config, &Options::default(), local_node).expect("a client");
    let opening = opening.complete();
    let mut opening = std::pin::pin!(opening);
    let pods_known = async {
        server.watches(PODS, 1).await;
        server.lists_failed(SERVICES, 2).await;
    };
    tokio::select! {
        opened = &mut opening => panic!("open without services: {:?}", opened.map(|watched| watched.current())),
        () = pods_known => {}
    }
    server.with(SERVICES);
    let watched = timeout(DEADLINE, opening).await.expect("before the deadline").expect("followed");
    assert!(watched.current().service_named("shop", "web").is_some());
}

fn node(name: &str, cidr: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}})
}

fn service_cidr(cidr: &str) -> Value {
    json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": [cidr]}})
}

fn ranges(directory: &Directory) -> String {
    directory.ranges().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn ranges_are_complete_at_the_start_and_follow_the_cluster() {
    let server = cluster();
    // More objects than a page holds.
    for i in 0..4 {
        server.set(NODES, node(&format!("n{i}"), &format!("10.77.{i}.0/24")));
    }
    server.set(CIDRS, service_cidr("10.96.0.0/12"));
    let watched = open_all(&server).await;
    assert_eq!(ranges(&watched.current()), "10.77.0.0/22 10.96.0.0/12");
    server.watches(NODES, 1).await;
    server.set(NODES, node("n9", "10.79.0.0/24"));
    until(&watched, "a new node", |d| ranges(d) == "10.77.0.0/22 10.79.0.0/24 10.96.0.0/12").await;
    server.remove(NODES, "n9");
    server.set(NODES, node("n8", "0.0.0.0/0"));
    let state =
        until_state(&watched, "invalid ranges are reported", |state| !state.unreadable.is_empty()).await;
    assert!(state.unreadable[0].starts_with("Node n8: spec.podCIDRs[0]: \"0.0.0.0/0\": "), "{state:?}");
    until(&watched, "the node's range is gone", |d| ranges(d) == "10.77.0.0/22 10.96.0.0/12").await;
}

#[tokio::test]
async fn a_server_without_service_cidrs_causes_no_error() {
    let server = cluster();
    server.without(CIDRS);
    server.without(CIDRS_BETA);
    server.set(SLICES, slice());
    let watched = open_all(&server).await;
    let state = watched.state();
    assert_eq!((state.last_error, state.refusals, state.stale_since), (None, 0, None));
    // Each pod and service is covered by its address.
    assert_eq!(ranges(&watched.current()), "10.77.2.2/31 10.77.2.4/32 10.96.0.1/32");
}

#[tokio::test]
async fn an_older_server_serves_v1beta1_service_cidrs() {
    let server = cluster();
    server.without(CIDRS);
    server.set(CIDRS_BETA, service_cidr("10.96.0.0/12"));
    let watched = open_all(&server).await;
    assert!(ranges(&watched.current()).ends_with("10.96.0.0/12"));
    server.watches(CIDRS_BETA, 1).await;
    server.set(CIDRS_BETA, service_cidr("10.112.0.0/12"));
    until(&watched, "one more range", |d| ranges(d).ends_with("10.96.0.0/11")).await;
}

#[tokio::test]
async fn nothing_is_in_use_before_ranges_are_known() {
    for path in [NODES, CIDRS] {
        let server = cluster();
        server.set(NODES, node("n1", "10.77.0.0/16"));
        server.set(CIDRS, service_cidr("10.96.0.0/12"));
        server.fail_only(Some(path));
        let mut opening = std::pin::pin!(open_all(&server));
        tokio::select! {
            opened = &mut opening => panic!("open without {path}: {}", ranges(&opened.current())),
            () = async { server.watches(PODS, 1).await; server.lists_failed(path, 2).await } => {}
        }
        server.fail_only(None);
        assert_eq!(ranges(&opening.await.current()), "10.77.0.0/16 10.96.0.0/12", "{path}");
    }
}
