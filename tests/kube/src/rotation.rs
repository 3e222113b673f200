//! The root is replaced while pods talk.

use std::{fs, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{
    authority::roots,
    checks::{both_are, encrypted, is_enrolled, rolled_out},
    cluster::Cluster,
    install::status,
    load::{self, ECHO, Ends, Held, Stream},
    pods::{self, MARKER, SHOP},
    wire,
};
use crate::deploy::{self, NAMESPACE, name_of};

/// Certificates live so long here: a root is replaced in two and a half such times, and agents renew at half of it.
const LEAF_SECONDS: i64 = 30;
const HELD: usize = 4;
const STREAM: usize = 20;
/// Port where agents accept connections of other nodes.
const TUNNEL: u16 = 15008;

pub(super) fn rotated(workspace: &Workspace, cluster: &Cluster) -> Result<String> {
    shorten_lives(workspace, cluster)?;
    start(cluster)?;
    load::answered(cluster, SHOP, "caller", STREAM)?;
    held(cluster)?;
    let old = roots(cluster)?;
    leads_to(cluster, &old).context("before")?;

    let (since, begin) = (load::now()?, Instant::now());
    let ask = format!("tacit.io/rotate-root=at-{}", since.as_millis());
    cluster.kubectl(&["-n", NAMESPACE, "annotate", "secret", "tacit-root", &ask, "--overwrite"])?;
    cluster.eventually("both roots are trusted", |cluster| {
        let now = roots(cluster)?;
        ensure!(now.matches("BEGIN").count() == 2 && now.contains(old.trim()), "{now}");
        Ok(())
    })?;
    cluster.eventually("only the new root is trusted", |cluster| {
        let now = roots(cluster)?;
        ensure!(now.matches("BEGIN").count() == 1 && !now.contains(old.trim()), "{now}");
        Ok(())
    })?;
    let took = begin.elapsed();
    let new = roots(cluster)?;
    leads_to(cluster, &new).context("after")?;
    ensure!(leads_to(cluster, &old).is_err(), "a certificate still leads to the old root");
    encrypted(&wire::during(cluster, || load::answered(cluster, SHOP, "caller", STREAM))?)?;
    held(cluster)?;
    let stream = Stream::of(cluster, SHOP, "caller", since)?;
    ensure!(stream.failed() == 0, "{} of {} new connections failed", stream.failed(), stream.made());
    pods::end(cluster, SHOP, &["caller", "host"])?;
    Ok(format!(
        "replaced in {:.0} s; {HELD} held connections and {} new ones: none failed",
        took.as_secs_f64(),
        stream.made()
    ))
}

fn held(cluster: &Cluster) -> Result<()> {
    let found = load::ends(cluster, SHOP, "caller", "held")?;
    ensure!(found == Ends { ended: 0, alive: HELD }, "{found:?}, of {HELD}");
    Ok(())
}

/// Has authority and agents begin anew with short lives: no certificate from before outlives a turn of the rotation.
fn shorten_lives(workspace: &Workspace, cluster: &Cluster) -> Result<()> {
    let mut objects = deploy::base(workspace)?;
    objects.retain(|object| name_of(object) == "ConfigMap/tacit-authority");
    let [config] = objects.as_mut_slice() else { bail!("the authority has one ConfigMap") };
    let text = config["data"]["authority.yaml"].as_str().context("a ConfigMap without authority.yaml")?;
    let mut fields = deploy::parse(text)?;
    fields["leafLifetime"] = json!(format!("{LEAF_SECONDS}s"));
    // JSON is YAML too.
    config["data"]["authority.yaml"] = json!(fields.to_string());
    cluster.apply(&objects)?;
    for what in ["deployment/tacit-authority", "daemonset/tacit-agent"] {
        cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", what])?;
        rolled_out(cluster, what)?;
    }
    for node in ["node1", "node2"] {
        cluster.eventually("certificates are short", |cluster| {
            let status = status(cluster, node)?;
            let all = status["certificates"].as_array().context("a status without certificates")?;
            let is_short =
                |held: &Value| held["seconds_left"].as_i64().is_some_and(|left| left <= LEAF_SECONDS);
            ensure!(!all.is_empty() && all.iter().all(is_short), "{all:?}");
            Ok(())
        })?;
    }
    both_are(cluster, "enrolled", is_enrolled)
}

fn start(cluster: &Cluster) -> Result<()> {
    let [near, far] = cluster.nodes.as_slice() else { bail!("there are two nodes") };
    cluster.apply(&[pods::pod(SHOP, "host", far.plan.name, &load::serve())])?;
    pods::ready(cluster, SHOP, &["pod/host"])?;
    let host = pods::address(cluster, SHOP, "host")?;
    load::reaches(cluster, SHOP, "client", &host)?;
    // From a pod that is enrolled: what it opened before would be reset, or fail.
    cluster.apply(&[pods::pod(SHOP, "caller", near.plan.name, "sleep infinity")])?;
    pods::ready(cluster, SHOP, &["pod/caller"])?;
    load::reaches(cluster, SHOP, "caller", &host)?;
    let held = [Held { name: "held", to: &host, port: ECHO, line: MARKER, number: HELD }];
    load::begin(cluster, SHOP, "caller", &held, Some(&host))
}

/// Checks that the certificate of the server's pod leads to these roots, from the view of a peer on another node.
fn leads_to(cluster: &Cluster, roots: &str) -> Result<()> {
    let node = &cluster.nodes[0];
    let file = node.folder.join("peer.pem");
    fs::write(&file, roots)?;
    let web = pods::address(cluster, SHOP, "web")?;
    // It ends with an alert: there is no certificate of a client.
    let connect = format!(
        "timeout 10 openssl s_client -connect {web}:{TUNNEL} -CAfile {} </dev/null 2>&1 || true",
        file.display()
    );
    let said = run(node.command("sh").args(["-c", &connect]))?;
    ensure!(said.contains("Verify return code: 0 (ok)"), "{said}");
    Ok(())
}
