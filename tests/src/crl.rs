//! Revocation lists of the mesh's root, whose key is in the folder of the issuer, and meshes whose agents read one.

use crate::{Mesh, Plan, observe};
use anyhow::{Context, Result};
use rcgen::{Issuer, KeyPair};
use std::{
    fs,
    time::{Duration, SystemTime},
};
use tacit_testing::pki::{authority, revocation_list};
use tacit_topology::Agent;

/// Time after which a list of these tests expires, and before which an expired one has.
const HOUR: Duration = Duration::from_secs(3600);

/// Time at which a list expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// In an hour.
    Later,
    /// An hour ago.
    Past,
}

/// Builds a mesh whose agents check certificates against lists, and gives all agents a list of the mesh's root that revokes nothing.
///
/// # Errors
/// Fails if the mesh cannot be built, or an agent does not read its list.
pub fn mesh(plan: Plan) -> Result<Mesh> {
    // The root is made by the first agent, so the first list is another's.
    let first = empty_of_another_root()?;
    let mesh = plan.config("crl: {file: crl.pem}\n").with_directories(|node, mesh| {
        let file = mesh.topology().node(node)?.files()?.join("crl.pem");
        fs::write(&file, &first).with_context(|| format!("write {}", file.display()))?;
        Ok(mesh.directory())
    })?;
    for node in ["a", "b"] {
        set(mesh.agent(node)?, &[], Expiry::Later)?;
    }
    Ok(mesh)
}

/// Replaces the list of an agent by one of the mesh's root that revokes these serial numbers, in hexadecimal. Waits until the agent
/// has read it.
///
/// # Errors
/// Fails if the list cannot be made or is not read.
pub fn set(agent: &Agent, serials: &[&str], expiry: Expiry) -> Result<()> {
    publish(agent, &of_root(agent, serials, expiry)?)
}

/// Replaces the file of an agent by these lists in PEM. Waits until the agent has read it.
///
/// # Errors
/// Fails if it is not read.
pub fn publish(agent: &Agent, lists: &str) -> Result<()> {
    let loads = loads(agent)?;
    agent.files().set_crl(lists)?;
    observe::wait_status(agent, "another revocation list", |status| {
        (source(status)?["loads"].as_u64()? > loads).then_some(())
    })
}

/// Returns the serial number of the certificate that the agent has for a service account of the namespace `shop`.
///
/// # Errors
/// Fails if it has none.
pub fn serial(agent: &Agent, account: &str) -> Result<String> {
    let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    observe::wait_status(agent, &format!("the certificate of {account}"), |status| {
        let certificates = status["certificates"].as_array()?;
        let held = certificates.iter().find(|held| held["identity"] == identity)?;
        held["serial"].as_str().map(str::to_owned)
    })
}

/// Returns the source of revocation lists in a status.
#[must_use]
pub fn source(status: &serde_json::Value) -> Option<&serde_json::Value> {
    status["sources"].as_array()?.iter().find(|source| source["kind"] == "crl")
}

fn loads(agent: &Agent) -> Result<u64> {
    let status = observe::status(agent)?;
    source(&status).and_then(|source| source["loads"].as_u64()).context("no source of revocation lists")
}

/// Returns a list of the mesh's root.
///
/// # Errors
/// Fails if it cannot be made.
pub fn of_root(agent: &Agent, serials: &[&str], expiry: Expiry) -> Result<String> {
    let folder = agent.files().issuer();
    let read = |name: &str| fs::read_to_string(folder.join(name)).with_context(|| format!("read {name}"));
    let key = KeyPair::from_pem(&read("root-key.pem")?)?;
    signed(&Issuer::from_ca_cert_pem(&read("root-cert.pem")?, key)?, serials, expiry)
}

fn empty_of_another_root() -> Result<String> {
    let (params, key) = authority("another", 1);
    signed(&Issuer::new(params, key), &[], Expiry::Later)
}

/// Returns a list of any issuer.
///
/// # Errors
/// Fails if it cannot be made.
pub fn signed(issuer: &Issuer<'_, KeyPair>, serials: &[&str], expiry: Expiry) -> Result<String> {
    let now = SystemTime::now();
    let next_update = match expiry {
        Expiry::Later => now + HOUR,
        Expiry::Past => now - HOUR,
    };
    let serials: Vec<Vec<u8>> = serials.iter().map(|serial| bytes(serial)).collect::<Result<_>>()?;
    Ok(revocation_list(issuer, &serials, next_update, None))
}

fn bytes(hexadecimal: &str) -> Result<Vec<u8>> {
    let digits: Vec<char> = hexadecimal.chars().collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16);
    digits
        .chunks(2)
        .map(|pair| byte(pair).with_context(|| format!("serial number {hexadecimal:?}")))
        .collect()
}
