//! The client against a server that does what a test says.

use std::time::{Duration, Instant};

use tacit_core::{
    directory::Directory,
    policy::{Flow, FlowSource, Mode, Policies, PolicyVerdict, decide},
    spiffe::SpiffeId,
};
use tacit_grpc::{Code, Status};

use super::{
    messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE, DeltaDiscoveryRequest, Scope},
    session::ResourceType::{Address, Authorization},
    testing::{Fault, Harness, Stream, broken, own_pod, pod, policy, response, strict, within},
};
use crate::reload::Watched;

const STRICT: &str = "istio-system/istio_converted_static_strict";

/// Answers the first two requests with two pods here, of which one is STRICT.
async fn begin(stream: &mut Stream) -> [DeltaDiscoveryRequest; 2] {
    let asked = [stream.request().await, stream.request().await];
    let pods = vec![pod(1, "a", &[]), pod(2, "a", &[STRICT]), pod(3, "b", &[])];
    stream.exchange(&response(Address, "1", pods, &[])).await;
    stream.exchange(&response(Authorization, "2", vec![strict(STRICT, Scope::WorkloadSelector)], &[])).await;
    asked
}

async fn directory_with(directory: &Watched<Directory>, wanted: impl Fn(&Directory) -> bool) {
    let mut values = directory.subscribe();
    within(values.wait_for(|value| wanted(value))).await.expect("running");
}

async fn policies_with(policies: &Watched<Policies>, wanted: impl Fn(&Policies) -> bool) {
    let mut values = policies.subscribe();
    within(values.wait_for(|value| wanted(value))).await.expect("running");
}

fn mode(policies: &Policies, number: u16) -> Mode {
    policies.modes(&own_pod(number)).default
}

/// Returns true if a source with an identity may connect to a pod here.
fn allows(policies: &Policies, number: u16) -> bool {
    let id = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/client").expect("valid");
    let flow = Flow {
        source: FlowSource::Tunnel(id),
        client: [10, 77, 2, 2].into(),
        destination: ([10, 77, 0, 1], 80).into(),
    };
    let pod = own_pod(number);
    decide(&policies.modes(&pod), &policies.authorization(&pod), &flow) == PolicyVerdict::Allow
}

#[tokio::test]
async fn a_mesh_is_asked_for_read_and_acknowledged() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    assert_eq!(stream.headers["authorization"], "Bearer token");
    let asked = begin(&mut stream).await;
    assert_eq!([&*asked[0].type_url, &*asked[1].type_url], [ADDRESS_TYPE, AUTHORIZATION_TYPE]);
    for request in &asked {
        let node = request.node.as_ref().expect("in the first request");
        assert_eq!((&*node.id, &*node.cluster), ("ztunnel~10.0.0.1~agent.ns~ns.svc.cluster.local", "c"));
        assert!(request.initial_resource_versions.is_empty() && request.resource_names_subscribe.is_empty());
    }
    let (directory, policies) = harness.complete().await;
    let known = directory.current();
    assert_eq!(known.len(), 1, "those here are the API's");
    assert!(known.named("shop", "web-3").is_some());
    let policies = policies.current();
    assert_eq!((mode(&policies, 1), mode(&policies, 2)), (Mode::Permissive, Mode::Strict));
    assert_eq!(mode(&policies, 9), Mode::Strict, "not named");
    assert!(allows(&policies, 1) && allows(&policies, 2) && !allows(&policies, 9));
    assert_eq!(policies.mesh_default(), Mode::Strict, "a pod is STRICT");
    let state = harness.state_with(|state| state.types.iter().all(|of| !of.nonce.is_empty())).await;
    assert_eq!((state.connections, state.rejections), (1, 0));
    let shown: Vec<_> =
        state.types.iter().map(|of| (of.name, of.resources, &*of.version, &*of.nonce)).collect();
    assert_eq!(shown, [("Address", 3, "v1", "1"), ("Authorization", 1, "v2", "2")]);
}

#[tokio::test]
async fn a_wrong_token_is_explained_and_tried_again() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    stream.request().await;
    stream.finish(&Status::new(Code::Unauthenticated, "authentication failure")).await;
    let state = harness.state_with(|state| state.last_error.is_some()).await;
    let error = state.last_error.expect("shown");
    for part in ["UNAUTHENTICATED", "authentication failure", "does not accept the token", "istio-ca"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(state.connected_since, None);
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    harness.complete().await;
    let state = harness.state_with(|state| state.connected_since.is_some()).await;
    assert_eq!(state.last_error, None);
}

#[tokio::test]
async fn a_broken_connection_is_followed_by_a_list_and_loses_nothing() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    let (directory, policies) = harness.complete().await;
    stream.finish(&Status::new(Code::Unavailable, "shutting down")).await;
    let error = harness.state_with(|state| state.last_error.is_some()).await.last_error;
    assert!(error.as_ref().is_some_and(|error| error.contains("starting or shutting down")), "{error:?}");
    assert!(directory.current().named("shop", "web-3").is_some());
    for mut state in [directory.states(), policies.states()] {
        within(state.wait_for(|state| state.stale_since.is_some())).await.expect("running");
    }
    let mut stream = harness.stream().await;
    for request in [stream.request().await, stream.request().await] {
        assert!(request.initial_resource_versions.is_empty(), "the answer is everything");
    }
    // Meanwhile one is gone, which nobody names, and one is new.
    let now = response(Address, "3", vec![pod(1, "a", &[]), pod(2, "a", &[STRICT]), pod(4, "b", &[])], &[]);
    stream.exchange(&now).await;
    directory_with(&directory, |known| known.named("shop", "web-4").is_some()).await;
    assert!(directory.current().named("shop", "web-3").is_none());
    assert_eq!(mode(&policies.current(), 2), Mode::Strict);
    let state = harness.state_with(|state| state.connected_since.is_some()).await;
    assert_eq!(state.connections, 2);
    // A reset is an end like others.
    stream.reset();
    let mut stream = harness.stream().await;
    assert_eq!(stream.request().await.type_url, ADDRESS_TYPE);
}

#[tokio::test]
async fn an_old_connection_may_end_and_a_failure_to_connect_again_is_one() {
    let mut harness = Harness::start_with(Duration::ZERO);
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    let (directory, _) = harness.complete().await;
    let before = directory.state().refusals;
    harness.state_with(|state| state.connected_since.is_some()).await;
    stream.finish(&Status::new(Code::Ok, "")).await;
    // The next one is refused before it has an answer.
    let mut stream = harness.stream().await;
    assert_eq!((directory.state().stale_since, directory.state().refusals), (None, before));
    stream.request().await;
    stream.finish(&Status::new(Code::Unavailable, "down")).await;
    let mut state = directory.states();
    within(state.wait_for(|state| state.stale_since.is_some())).await.expect("running");
}

#[tokio::test]
async fn half_a_response_is_no_response() {
    let mut harness = Harness::start();
    // Enough for the settings of HTTP/2 and the headers, and for a part of the message.
    for bytes in [400, 700, 1500] {
        harness.set_fault(Fault::CutAfter(bytes));
        let mut stream = harness.faulty_stream(Fault::CutAfter(bytes)).await;
        let (first, _) = (stream.request().await, stream.request().await);
        assert!(first.initial_resource_versions.is_empty(), "nothing was read in half");
        stream.try_send(&response(Address, "1", (0..50).map(|i| pod(i, "b", &[])).collect(), &[])).await;
    }
    harness.set_fault(Fault::None);
    let mut stream = harness.faulty_stream(Fault::None).await;
    assert!(stream.request().await.initial_resource_versions.is_empty(), "nothing was read in half");
    stream.request().await;
    stream.exchange(&response(Address, "1", vec![pod(3, "b", &[])], &[])).await;
    stream.exchange(&response(Authorization, "2", vec![], &[])).await;
    let (directory, _) = harness.complete().await;
    assert_eq!(directory.current().len(), 1);
}

#[tokio::test]
async fn a_slow_server_is_waited_for() {
    let mut harness = Harness::start();
    harness.set_fault(Fault::Narrow(64));
    let mut stream = harness.faulty_stream(Fault::Narrow(64)).await;
    begin(&mut stream).await;
    let (directory, _) = harness.complete().await;
    assert_eq!(directory.current().len(), 1);
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_is_named_and_denies_its_namespace() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    let (_, policies) = harness.complete().await;
    // Again and again: one answer each.
    for attempt in 0..20 {
        let nonce = format!("n{attempt}");
        let both = vec![broken(Authorization, "shop/p"), policy("jobs/q", Scope::Namespace, vec![])];
        let answer = stream.exchange(&response(Authorization, &nonce, both, &[])).await;
        let detail = answer.error_detail.expect("a NACK");
        assert!(detail.message.starts_with("shop/p: no istio.security.Authorization"), "{}", detail.message);
    }
    policies_with(&policies, |policies| !allows(policies, 1)).await;
    assert_eq!(mode(&policies.current(), 1), Mode::Strict);
    let state = harness.state_with(|state| state.rejections == 20).await;
    assert!(state.last_rejection.expect("shown").1.contains("shop/p"));
    // A value is published before its state.
    let is_shown = |line: &String| line.contains("all connections to pods of namespace shop are denied");
    let mut states = policies.states();
    within(states.wait_for(|state| state.unreadable.iter().any(is_shown))).await.expect("running");
    let answer = stream
        .exchange(&response(Authorization, "r", vec![policy("shop/p", Scope::Namespace, vec![])], &[]))
        .await;
    assert_eq!(answer.error_detail, None);
    policies_with(&policies, |policies| allows(policies, 1)).await;
    // In the root namespace everything is denied.
    stream.exchange(&response(Authorization, "s", vec![broken(Authorization, "istio-system/p")], &[])).await;
    policies_with(&policies, |policies| !allows(policies, 1)).await;
    stream.exchange(&response(Authorization, "t", vec![], &["istio-system/p"])).await;
    policies_with(&policies, |policies| allows(policies, 1)).await;
}

#[tokio::test]
async fn an_address_that_cannot_be_read_stays_as_it_was() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    let (directory, _) = harness.complete().await;
    let mixed = vec![broken(Address, "c//Pod/shop/web-3"), pod(4, "b", &[])];
    let answer = stream.exchange(&response(Address, "3", mixed, &[])).await;
    assert!(answer.error_detail.expect("a NACK").message.contains("c//Pod/shop/web-3"));
    directory_with(&directory, |known| known.named("shop", "web-4").is_some()).await;
    assert!(directory.current().named("shop", "web-3").is_some());
    // Twice in one response, and removed and added in one.
    let twice = vec![pod(4, "a", &[]), pod(4, "b", &[]), pod(5, "b", &[])];
    stream.exchange(&response(Address, "4", twice, &["c//Pod/shop/web-4", "c//Pod/shop/web-3"])).await;
    directory_with(&directory, |known| known.named("shop", "web-5").is_some()).await;
    assert_eq!(directory.current().len(), 2, "web-4 and web-5");
    let mut other = response(Address, "5", vec![], &[]);
    other.type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned();
    assert!(
        stream.exchange(&other).await.error_detail.expect("a NACK").message.contains("was not asked for")
    );
}

#[tokio::test]
async fn a_policy_may_come_after_the_workload_that_lists_it() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    let (_, policies) = harness.complete().await;
    stream.exchange(&response(Address, "3", vec![pod(1, "a", &["shop/late"])], &[])).await;
    stream
        .exchange(&response(Authorization, "4", vec![strict("shop/late", Scope::WorkloadSelector)], &[]))
        .await;
    policies_with(&policies, |policies| mode(policies, 1) == Mode::Strict).await;
    assert!(allows(&policies.current(), 1), "its list and its policy are one change");
    // One that never comes denies everything, once istiod is quiet.
    stream.exchange(&response(Address, "5", vec![pod(1, "a", &["shop/never"])], &[])).await;
    policies_with(&policies, |policies| !allows(policies, 1)).await;
    stream.exchange(&response(Address, "6", vec![pod(1, "a", &[])], &[])).await;
    policies_with(&policies, |policies| allows(policies, 1) && mode(policies, 1) == Mode::Permissive).await;
}

#[tokio::test]
async fn a_list_settles_without_a_connection() {
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    begin(&mut stream).await;
    let (_, policies) = harness.complete().await;
    stream.exchange(&response(Address, "3", vec![pod(1, "a", &["shop/never"])], &[])).await;
    stream.reset();
    // Nobody answers the next connection.
    policies_with(&policies, |policies| !allows(policies, 1)).await;
}

/// Prints what ten thousand workloads cost. It fails only if they are not all there.
#[tokio::test]
async fn ten_thousand_workloads_are_one_response() {
    const COUNT: u16 = 10_000;
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default().to_owned();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0)
    };
    let mut harness = Harness::start();
    let mut stream = harness.stream().await;
    let _ = (stream.request().await, stream.request().await);
    let all = response(Address, "1", (0..COUNT).map(|i| pod(i, "b", &[STRICT])).collect(), &[]);
    let bytes = prost::Message::encoded_len(&all);
    let (before, begin) = (resident(), Instant::now());
    stream.exchange(&all).await;
    stream.exchange(&response(Authorization, "2", vec![strict(STRICT, Scope::WorkloadSelector)], &[])).await;
    let (directory, policies) = harness.complete().await;
    assert_eq!(directory.current().len(), usize::from(COUNT));
    assert_eq!(policies.current().mesh_default(), Mode::Strict);
    println!(
        "{COUNT} workloads: {bytes} bytes, complete after {:?}, {} KiB more resident",
        begin.elapsed(),
        resident().saturating_sub(before)
    );
    let begin = Instant::now();
    stream.exchange(&response(Address, "3", vec![pod(COUNT, "b", &[])], &[])).await;
    directory_with(&directory, |known| known.len() > usize::from(COUNT)).await;
    println!("one more: {:?}", begin.elapsed());
}
