//! Access control of the authority: requests as the agents make them, each with an agent's own token.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{
    checks::AUTHORITY,
    cluster::Cluster,
    install,
    node::Node,
    pods::{self, SHOP},
};
use crate::deploy::NAMESPACE;

const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Pods of service accounts of the same names.
const NEAR: &str = "near";
const FAR: &str = "far";

pub(super) fn elsewhere(_: &Workspace, cluster: &Cluster) -> Result<()> {
    let [first, second] = cluster.nodes.as_slice() else { anyhow::bail!("there are two nodes") };
    let sleep = "sleep infinity";
    let near = pods::with_account(SHOP, NEAR, first.plan.name, sleep);
    let far = pods::with_account(SHOP, FAR, second.plan.name, sleep);
    cluster.apply(&[near, far].concat())?;
    pods::ready(cluster, SHOP, &["pod/near", "pod/far"])?;
    // Each is issued to one agent and refused to the other: neither request is refused for what it looks like.
    for (node, own, other) in [(first, NEAR, FAR), (second, FAR, NEAR)] {
        issued(&ask(cluster, node, own)?)?;
        refused(cluster, node, other)?;
    }
    pods::end(cluster, SHOP, &[NEAR, FAR])
}

fn issued(answer: &Answer) -> Result<()> {
    ensure!(answer.body.contains("BEGIN CERTIFICATE"), "not issued: {}", answer.headers);
    Ok(())
}

fn refused(cluster: &Cluster, node: &Node, account: &str) -> Result<()> {
    let answer = ask(cluster, node, account)?;
    ensure!(
        !answer.body.contains("CERTIFICATE"),
        "{} was issued an identity of the other node",
        node.plan.name
    );
    ensure!(answer.headers.contains("grpc-status: 7"), "not PERMISSION_DENIED: {}", answer.headers);
    let wanted = [
        "certificate refused".to_owned(),
        "not_on_node".to_owned(),
        node.plan.name.to_owned(),
        identity(account),
    ];
    cluster.eventually("the refusal is logged", |cluster| {
        let log = cluster.kubectl(&["-n", NAMESPACE, "logs", "-l", AUTHORITY, "--tail=-1"])?;
        let is_told = log.lines().any(|line| wanted.iter().all(|word| line.contains(word)));
        ensure!(is_told, "no line with {}", wanted.join(", "));
        Ok(())
    })
}

fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{SHOP}/sa/{account}")
}

struct Answer {
    /// With the trailers, where gRPC has its status, when there is no body.
    headers: String,
    body: String,
}

/// Asks for a service account's identity from a node, as its agent does.
fn ask(cluster: &Cluster, node: &Node, account: &str) -> Result<Answer> {
    let file = |name: &str| node.folder.join(name);
    let (frame, header, roots) = (file("request.grpc"), file("request.header"), file("request.pem"));
    fs::write(&frame, framed(&request(node, &identity(account))?))?;
    fs::write(&header, format!("authorization: Bearer {}\n", token(cluster, node)?))?;
    fs::write(&roots, self::roots(cluster)?)?;
    let (headers, body) = (file("answer.headers"), file("answer.body"));
    let name = format!("tacit-authority.{NAMESPACE}.svc");
    let at = |prefix: &str, file: &PathBuf| format!("{prefix}{}", file.display());
    let mut curl = node.command("curl");
    curl.args([
        "-sS",
        "--http2",
        "--max-time",
        "10",
        "-H",
        "content-type: application/grpc",
        "-H",
        "te: trailers",
    ]);
    curl.args(["--connect-to", &format!("{name}:15012:{}:15012", install::authority_address(cluster)?)]);
    curl.args(["-H", &at("@", &header), "--data-binary", &at("@", &frame), "--cacert", &at("", &roots)]);
    curl.args(["-D", &at("", &headers), "-o", &at("", &body), &format!("https://{name}:15012{METHOD}")]);
    run(&mut curl)?;
    let text = |file| fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Answer { headers: text(&headers)?, body: text(&body)? })
}

/// The roots that agents are given.
pub(super) fn roots(cluster: &Cluster) -> Result<String> {
    cluster.kubectl(&[
        "-n",
        NAMESPACE,
        "get",
        "configmap",
        "tacit-root",
        "-o",
        "jsonpath={.data.root-cert\\.pem}",
    ])
}

/// The token in the agent's own volume.
fn token(cluster: &Cluster, node: &Node) -> Result<String> {
    let pod = install::agent_on(cluster, node.plan.name)?;
    let uid = cluster.kubectl(&["-n", NAMESPACE, "get", "pod", &pod, "-o", "jsonpath={.metadata.uid}"])?;
    let file = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/token/token");
    let token = run(node.command("cat").arg(&file)).with_context(|| file)?;
    Ok(token.trim().to_owned())
}

/// `IstioCertificateRequest`: the certificate request, and for whom it is.
fn request(node: &Node, identity: &str) -> Result<Vec<u8>> {
    let name = format!("subjectAltName=URI:{identity}");
    let mut openssl = node.command("openssl");
    openssl.args(["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    let csr = run(openssl.args(["-keyout", "/dev/null", "-subj", "/", "-addext", &name]))?;
    let value = field(3, identity.as_bytes());
    let entry = [field(1, b"ImpersonatedIdentity"), field(2, &value)].concat();
    Ok([field(1, csr.as_bytes()), field(4, &field(1, &entry))].concat())
}

/// A field of bytes in protobuf's encoding.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length > 0x7f {
        field.push(length.to_le_bytes()[0] | 0x80);
        length >>= 7;
    }
    field.push(length.to_le_bytes()[0]);
    field.extend(bytes);
    field
}

/// A message in gRPC's framing: not compressed, its length, itself.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("a request is some 700 bytes");
    [&[0], length.to_be_bytes().as_slice(), message].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_above_127_take_two_bytes() {
        assert_eq!(field(1, b"ab"), [0x0a, 2, b'a', b'b']);
        assert_eq!(field(4, &[7; 300])[..3], [0x22, 0xac, 0x02]);
        assert_eq!(framed(&[9; 258])[..6], [0, 0, 0, 1, 2, 9]);
    }
}
