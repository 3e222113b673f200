//! An address that goes from a pod to a pod of another identity.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{
    checks::{self, is_enrolled},
    cluster::Cluster,
    install::metrics,
    node::Node,
    pods::{self, PORT, SHOP},
};

const FIRST: &str = "first";
const SECOND: &str = "second";
/// For a peer to reach the second once its node does: a connection that was begun before may hang for 5 s.
const KNOWN: Duration = Duration::from_secs(8);
/// Requests of which each must be refused.
const REFUSED: usize = 5;

/// Peers know the second pod by its own identity: as a server, and as a client that policies of the first's do not admit.
pub(super) fn reused(_: &Workspace, cluster: &Cluster) -> Result<String> {
    let [node, far] = cluster.nodes.as_slice() else { bail!("there are two nodes") };
    cluster.apply(&[only_from(FIRST), nothing_to(FIRST)])?;
    start(cluster, FIRST, node)?;
    let address = pods::address(cluster, SHOP, FIRST)?;
    cluster.eventually("the first is admitted", |cluster| asks_web(cluster, FIRST))?;
    // Both policies are in force.
    cluster.eventually("the client is not", |cluster| {
        ensure!(asks_web(cluster, "client").is_err(), "the server answered the client");
        Ok(())
    })?;
    cluster.eventually("the first answers nobody", |cluster| {
        ensure!(answer(cluster, &address).is_err(), "the first answered");
        Ok(())
    })?;
    cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicies", "nothing"])?;
    cluster.eventually("the first answers", |cluster| answers(cluster, &address, FIRST))?;
    cluster.apply(&[nothing_to(FIRST)])?;

    pods::delete(cluster, SHOP, &[FIRST])?;
    make_next(node, &address)?;
    // Else packets go to the first pod's hardware address for up to a minute.
    run(node.command("ip").args(["neighbour", "flush", "to", &address]))?;
    let begin = Instant::now();
    start(cluster, SECOND, node)?;
    let given = pods::address(cluster, SHOP, SECOND)?;
    ensure!(given == address, "the second pod has {given}, not {address} again");
    // The network's part, not Tacit's.
    cluster.eventually("its node reaches it", |_| {
        let url = format!("http://{address}:{PORT}/");
        let page = run(node.command("curl").args(["-fsS", "--max-time", "2", &url]))?;
        ensure!(page.contains(&format!("I am {SECOND}")), "it answered {page:?}");
        Ok(())
    })?;
    let (by_network, reached) = (begin.elapsed(), Instant::now());
    cluster.eventually("the second answers", |cluster| answers(cluster, &address, SECOND))?;
    let took = reached.elapsed();
    ensure!(took <= KNOWN, "the second answered only {took:?} after its node reached it");
    for _ in 0..REFUSED {
        ensure!(asks_web(cluster, SECOND).is_err(), "the first's policy admitted the second");
    }
    let seen = principals(far)?;
    for name in [FIRST, SECOND] {
        ensure!(seen.contains(&principal(name)), "{}: no flow to {name} in:\n{seen}", far.plan.name);
    }
    cluster.apply(&[only_from(SECOND)])?;
    cluster.eventually("the second is admitted", |cluster| asks_web(cluster, SECOND))?;

    cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicies", "only", "nothing"])?;
    pods::delete(cluster, SHOP, &[SECOND])?;
    Ok(format!(
        "{address} again: its node reaches it after {:.1} s, peers {:.1} s later",
        by_network.as_secs_f64(),
        took.as_secs_f64()
    ))
}

fn start(cluster: &Cluster, name: &str, node: &Node) -> Result<()> {
    let serve = format!("mkdir /www; echo 'I am {name}' >/www/index.html; exec httpd -f -p {PORT} -h /www");
    cluster.apply(&pods::with_account(SHOP, name, node.plan.name, &serve))?;
    pods::ready(cluster, SHOP, &[&format!("pod/{name}")])?;
    checks::is(cluster, node.plan.name, name, "enrolled", is_enrolled)
}

/// The next pod of the node gets this address: host-local goes on from the one it gave last.
fn make_next(node: &Node, address: &str) -> Result<()> {
    let (network, host) = address.rsplit_once('.').context("an IPv4 address")?;
    let before = host.parse::<u8>()?.checked_sub(1).context("a pod has the network's own address")?;
    let write = format!("printf {network}.{before} >/var/lib/cni/networks/pods/last_reserved_ip.0");
    run(node.command("sh").args(["-c", &write])).map(drop)
}

fn asks_web(cluster: &Cluster, pod: &str) -> Result<()> {
    pods::get_web(cluster, SHOP, pod)
}

/// Returns the answer to a request of the server from the current holder of the address.
fn answer(cluster: &Cluster, address: &str) -> Result<String> {
    let answer = pods::get(cluster, SHOP, "web", address, PORT)?;
    ensure!(answer.contains("I am "), "the pod answered {answer:?}");
    Ok(answer)
}

fn answers(cluster: &Cluster, address: &str, name: &str) -> Result<()> {
    let answer = answer(cluster, address)?;
    ensure!(answer.contains(&format!("I am {name}")), "the pod answered {answer:?}");
    Ok(())
}

/// Identities that peers of this node's pods have proven, a line for each pair.
fn principals(node: &Node) -> Result<String> {
    let all = metrics(node)?;
    let is_opened = |line: &&str| {
        line.starts_with("istio_tcp_connections_opened_total{reporter=\"source\"")
            && line.contains("connection_security_policy=\"mutual_tls\"")
    };
    Ok(all.lines().filter(is_opened).collect::<Vec<_>>().join("\n"))
}

fn principal(name: &str) -> String {
    format!("destination_principal=\"spiffe://cluster.local/ns/{SHOP}/sa/{name}\"")
}

/// The server takes connections of one service account.
fn only_from(account: &str) -> Value {
    let principal = format!("cluster.local/ns/{SHOP}/sa/{account}");
    policy(
        "only",
        "web",
        &json!({"action": "ALLOW", "rules": [{"from": [{"source": {"principals": [principal]}}]}]}),
    )
}

/// The pods of an app take none.
fn nothing_to(app: &str) -> Value {
    policy("nothing", app, &json!({"action": "DENY", "rules": [{}]}))
}

fn policy(name: &str, app: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["selector"] = json!({"matchLabels": {"app": app}});
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": SHOP}, "spec": spec,
    })
}
