//! The pods that the tests look at: a server, a client in its namespace, and a stranger who is never enrolled.
//!
//! ```text
//! node1: shop/client, outside/stranger  ── wire ──  node2: shop/web
//! ```

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::cluster::{BUSYBOX, Cluster};

/// In every request and every answer: found on the wire when either goes in clear.
pub(super) const MARKER: &str = "tacit-marker-4f1d7c";
/// The namespace that is enrolled, and one that is not.
pub(super) const SHOP: &str = "shop";
pub(super) const OUTSIDE: &str = "outside";
/// The server's port.
pub(super) const PORT: u16 = 8080;

/// Creates the namespaces and pods, and waits until all are ready.
pub(super) fn start(cluster: &Cluster) -> Result<()> {
    let serve = format!("mkdir /www; echo {MARKER} >/www/index.html; exec httpd -f -p {PORT} -h /www");
    let mut web = pod(SHOP, "web", "node2", &serve);
    web["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"port": PORT, "path": "/"}, "periodSeconds": 1, "failureThreshold": 2});
    cluster.apply(&[namespace(SHOP), namespace(OUTSIDE)])?;
    // A pod is not admitted before the namespace's account is there.
    cluster.eventually("service accounts", |cluster| {
        [SHOP, OUTSIDE].iter().try_for_each(|namespace| {
            cluster.kubectl(&["-n", namespace, "get", "serviceaccount", "default"]).map(drop)
        })
    })?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": SHOP},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": PORT}]},
    });
    let client = pod(SHOP, "client", "node1", "sleep infinity");
    let stranger = pod(OUTSIDE, "stranger", "node1", "sleep infinity");
    cluster.apply(&[web, client, stranger, service])?;
    ready(cluster, SHOP, &["pod/web", "pod/client"])?;
    ready(cluster, OUTSIDE, &["pod/stranger"])
}

/// Waits until the pods are ready.
pub(super) fn ready(cluster: &Cluster, namespace: &str, pods: &[&str]) -> Result<()> {
    let wait = ["-n", namespace, "wait", "--for=condition=Ready", "--timeout=120s"];
    cluster.kubectl(&[wait.as_slice(), pods].concat()).map(drop)
}

pub(super) fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// A pod that runs a script, of the namespace's default service account.
pub(super) fn pod(namespace: &str, name: &str, node: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": BUSYBOX, "imagePullPolicy": "Never",
                "command": ["/bin/busybox", "sh", "-c", script],
            }],
        },
    })
}

/// A service account, and a pod of it that has its name.
pub(super) fn with_account(namespace: &str, name: &str, node: &str, script: &str) -> [Value; 2] {
    let mut pod = pod(namespace, name, node, script);
    pod["spec"]["serviceAccountName"] = json!(name);
    [
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}),
        pod,
    ]
}

/// A job that asks the server, again for as long as its sandbox is not served yet: a STRICT pod waits, it does not leak.
pub(super) fn job(namespace: &str, name: &str, node: &str, web: &str) -> Value {
    let ask = format!("{} | timeout 2 nc {web} {PORT} | grep -q {MARKER}", request());
    let script = format!("n=0; until {ask}; do n=$((n+1)); [ $n -lt 50 ] || exit 1; sleep 0.1; done");
    let mut template = pod(namespace, name, node, &script);
    template["spec"]["restartPolicy"] = json!("Never");
    json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": namespace},
        "spec": {"backoffLimit": 0, "template": {"spec": template["spec"]}},
    })
}

/// A pod's address.
pub(super) fn address(cluster: &Cluster, namespace: &str, pod: &str) -> Result<String> {
    let found = cluster.kubectl(&["-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.podIP}"])?;
    ensure!(!found.is_empty(), "{namespace}/{pod} has no address");
    Ok(found)
}

/// A command that prints what is asked of a web server. The marker is in it too: a server that takes no plaintext answers
/// none, and a client that leaks would not be seen.
pub(super) fn request() -> String {
    format!("printf 'GET /?{MARKER} HTTP/1.0\\r\\n\\r\\n'")
}

/// Sends an HTTP request from a pod and returns the answer, which must come within some seconds. It does not use wget:
/// a static program of the C library cannot resolve names of services without its modules.
pub(super) fn get(cluster: &Cluster, namespace: &str, pod: &str, address: &str, port: u16) -> Result<String> {
    let script = format!("{} | timeout 5 nc -w 3 {address} {port}", request());
    exec(cluster, namespace, pod, &script)
}

/// Returns the output of a script in a pod.
pub(super) fn exec(cluster: &Cluster, namespace: &str, pod: &str, script: &str) -> Result<String> {
    cluster.kubectl(&["-n", namespace, "exec", pod, "--", "/bin/busybox", "sh", "-c", script])
}

/// Has pods deleted, and does not wait.
pub(super) fn end(cluster: &Cluster, namespace: &str, pods: &[&str]) -> Result<()> {
    cluster.kubectl(&[&["-n", namespace, "delete", "pods", "--wait=false"], pods].concat()).map(drop)
}

/// Deletes pods, and waits until they are gone.
pub(super) fn delete(cluster: &Cluster, namespace: &str, pods: &[&str]) -> Result<()> {
    cluster.kubectl(&[&["-n", namespace, "delete", "pods", "--timeout=60s"], pods].concat()).map(drop)
}

/// The client's, or the stranger's, request to the server's own address.
pub(super) fn get_web(cluster: &Cluster, namespace: &str, pod: &str) -> Result<()> {
    let web = address(cluster, SHOP, "web")?;
    let answer = get(cluster, namespace, pod, &web, PORT)?;
    ensure!(answer.contains(MARKER), "the server answered {answer:?}");
    Ok(())
}
