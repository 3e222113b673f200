//! The plugin as a runtime calls it, with an agent that gives the answers of a test.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tacit_testing::Scratch;

use super::*;

const POD: &str =
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=1f;K8S_POD_UID=7-a";
const OK: &str = "HTTP/1.1 200 OK\r\n\r\n";
const NOT_YET: &str = "HTTP/1.1 503 Service Unavailable\r\n\r\nit starts\n";

fn result() -> Value {
    json!({"cniVersion": "1.0.0", "interfaces": [{"name": "eth0"}], "ips": [{"address": "10.1.0.2/24"}]})
}

fn configuration(socket: &Path, more: &[(&str, Value)]) -> String {
    let mut text = json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "tacit-cni", "socket": socket, "timeoutSeconds": 5, "prevResult": result()
    });
    for (name, value) in more {
        text[*name] = value.clone();
    }
    text.to_string()
}

/// An agent that gives these answers, and returns the first line of each question.
fn agent(socket: PathBuf, answers: Vec<&'static str>) -> JoinHandle<Vec<String>> {
    let listener = UnixListener::bind(socket).expect("bound");
    let serve = move |answer: &str| {
        let (mut stream, _) = listener.accept().expect("a question");
        let mut question = Vec::new();
        while !question.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a question");
            question.extend(byte);
        }
        stream.write_all(answer.as_bytes()).expect("sent");
        String::from_utf8(question).expect("text").lines().next().unwrap_or_default().to_owned()
    };
    thread::spawn(move || answers.into_iter().map(serve).collect())
}

fn failure(done: Result<String, Failure>) -> Value {
    serde_json::from_str(&done.expect_err("a failure").json("{\"cniVersion\": \"0.4.0\"}")).expect("JSON")
}

#[test]
fn a_pod_passes_when_the_agent_covers_it_with_the_result_of_the_others() {
    let folder = Scratch::new();
    let socket = folder.path().join("socket");
    let agent = agent(socket.clone(), vec![NOT_YET, NOT_YET, OK]);
    let printed = run("ADD", POD, &configuration(&socket, &[])).expect("covered");
    assert_eq!(serde_json::from_str::<Value>(&printed).expect("JSON"), result());
    let questions = agent.join().expect("no panic");
    assert_eq!(questions, vec!["GET /sandbox?namespace=shop&name=web-0&uid=7-a HTTP/1.1"; 3]);
}

#[test]
fn without_an_agent_or_its_consent_a_pod_does_not_pass() {
    let folder = Scratch::new();
    let socket = folder.path().join("socket");
    let second = &[("timeoutSeconds", json!(1))];
    let begun = Instant::now();
    let absent = failure(run("ADD", POD, &configuration(&socket, second)));
    assert!(begun.elapsed() > Duration::from_millis(900), "it has waited");
    assert_eq!((&absent["code"], &absent["cniVersion"]), (&json!(11), &json!("0.4.0")));
    let text = absent["msg"].as_str().expect("text");
    assert!(text.contains("shop/web-0") && text.contains("no agent answers at /"), "{text}");

    let _agent = agent(socket.clone(), vec![NOT_YET; 100]);
    let refused = failure(run("ADD", POD, &configuration(&socket, second)));
    assert!(
        refused["msg"].as_str().is_some_and(|text| text.ends_with("of its node: it starts")),
        "{refused}"
    );
}

#[test]
fn an_agent_that_accepts_or_answers_nothing_is_waited_for_within_the_limit() {
    let folder = Scratch::new();
    let socket = folder.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("bound");
    let text = configuration(&socket, &[("timeoutSeconds", json!(1))]);
    let begun = Instant::now();
    // More than the backlog of the listener.
    let call = |text: String| thread::spawn(move || run("ADD", POD, &text));
    let calls: Vec<_> = (0..200).map(|_| call(text.clone())).collect();
    for call in calls {
        assert_eq!(failure(call.join().expect("no panic"))["code"], 11);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn what_is_not_a_pod_or_is_exempt_does_not_wait() {
    let none = configuration(Path::new("/nobody"), &[("exemptNamespaces", json!(["kube-system"]))]);
    for arguments in ["", "IgnoreUnknown=1", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns"] {
        assert!(run("ADD", arguments, &none).is_ok(), "{arguments}");
    }
}

#[test]
fn a_pod_that_is_not_named_exactly_does_not_pass() {
    let text = configuration(Path::new("/nobody"), &[("exemptNamespaces", json!(["kube-system"]))]);
    for arguments in [
        "K8S_POD_NAMESPACE=shop",
        "K8S_POD_NAME=web",
        "K8S_POD_UID=7",
        "K8S_POD_NAMESPACE=;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=shop&x;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web HTTP",
    ] {
        assert_eq!(failure(run("ADD", arguments, &text))["code"], 4, "{arguments}");
    }
}

#[test]
fn everything_but_add_works_without_an_agent() {
    for command in ["DEL", "CHECK", "GC", "STATUS"] {
        assert_eq!(run(command, POD, "").as_deref(), Ok(""), "{command}");
    }
    let versions: Value = serde_json::from_str(&run("VERSION", "", "{}").expect("versions")).expect("JSON");
    assert!(versions["supportedVersions"].as_array().is_some_and(|all| all.contains(&json!("1.0.0"))));
    assert_eq!(failure(run("", POD, ""))["code"], 4);
}

#[test]
fn a_wrong_configuration_is_refused_by_field() {
    let good: Value = serde_json::from_str(&configuration(Path::new("/nobody"), &[])).expect("JSON");
    for (field, value) in [
        ("socket", Value::Null),
        ("socket", json!("relative")),
        ("timeoutSeconds", json!("20")),
        ("timeoutSeconds", json!(-1)),
        ("exemptNamespaces", json!("kube-system")),
        ("exemptNamespaces", json!([1])),
        ("prevResult", Value::Null),
    ] {
        let mut wrong = good.clone();
        wrong[field] = value;
        let refused = failure(run("ADD", POD, &wrong.to_string()));
        assert_eq!(refused["code"], 7, "{field}");
        assert!(refused["msg"].as_str().is_some_and(|text| text.contains(field)), "{refused}");
    }
    assert_eq!(failure(run("ADD", POD, "no JSON"))["code"], 7);
}
