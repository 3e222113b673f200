//! Certificates of a node's identities: they are forgotten with the last pod that needs them.

use anyhow::{Result, ensure};
use serde_json::Value;
use tacit_tests::{Mesh, Plan, observe};
use tacit_topology::WorkloadEntry;

#[test]
#[ignore = "needs root"]
fn an_identity_is_forgotten_with_its_last_pod() -> Result<()> {
    let mesh = plan("cf").with_agents_told(|_, mesh| Ok(of_one_account(mesh)))?;
    let b = mesh.agent("b")?;
    let told = |without: &[&str]| {
        let mut directory = of_one_account(&mesh);
        directory.retain(|workload| !without.contains(&workload.name.as_str()));
        b.files().set_directory(&directory)
    };
    ensure!(certificate(&observe::status(b)?, "shop").is_some(), "no certificate of the account");
    told(&["web"])?;
    observe::wait_status(b, "one pod gone", |status| pod(status, "web").is_none().then_some(()))?;
    ensure!(certificate(&observe::status(b)?, "shop").is_some(), "forgotten while a pod needs it");
    told(&["web", "db"])?;
    observe::wait_status(b, "the identity forgotten", |status| {
        certificate(status, "shop").is_none().then_some(())
    })?;
    ensure!(certificate(&observe::status(b)?, "other").is_some(), "another identity forgotten too");
    Ok(())
}

/// Node a is only there because a topology has two.
fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("b", "shop", "web").pod("b", "shop", "db").pod("b", "shop", "other")
}

/// Pods web and db are of service account `shop`.
fn of_one_account(mesh: &Mesh) -> Vec<WorkloadEntry> {
    let mut directory = mesh.directory();
    for workload in directory.iter_mut().filter(|workload| workload.name != "other") {
        "shop".clone_into(&mut workload.service_account);
    }
    directory
}

fn pod(status: &Value, name: &str) -> Option<Value> {
    status["pods"].as_array()?.iter().find(|pod| pod["name"] == name).cloned()
}

fn certificate(status: &Value, account: &str) -> Option<Value> {
    let is_of =
        |it: &&Value| it["identity"].as_str().is_some_and(|id| id.ends_with(&format!("/sa/{account}")));
    status["certificates"].as_array()?.iter().find(is_of).cloned()
}
