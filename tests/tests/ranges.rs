//! Detected ranges of the mesh: an agent reads them from the API, writes them to the kernel while pods are connected, and
//! has them again after a restart.
//!
//! The API is a server of this test in the node's network. It serves lists of its objects, and watches with new ones.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};
use tacit_tests::{Client, Plan, STRICT_MESH, Server, agent_program, fresh_port, observe};
use tacit_topology::{Agent, KUBELET_NAMESPACE, MeshFiles, Netns, until};

const PODS: &str = "/api/v1/pods";
const NODES: &str = "/api/v1/nodes";
/// UID and name of the pod, whose cgroup looks like the kubelet's: `pod` with the UID.
const UID: &str = "c11e27";
/// Range of the addresses of node b's pods.
const RANGE: &str = "10.77.2.0/24";
const MARKER: &str = "this-can-be-read";

#[test]
#[ignore = "needs root"]
fn a_range_holds_from_when_it_is_found_and_after_a_restart() -> Result<()> {
    let mesh = Plan::new("ranges")
        .pod("a", KUBELET_NAMESPACE, UID)
        .outside("b", "shop", "stranger")
        .without_agents()?;
    let (client, stranger) = (mesh.pod(UID)?, mesh.pod("stranger")?);
    let node = mesh.topology().node("a")?;
    let api = Api::start(node.netns())?;
    api.set(
        PODS,
        json!({
            "metadata": {"name": UID, "namespace": KUBELET_NAMESPACE, "uid": UID, "labels": {"tacit.io/enrol": "true"}},
            "spec": {"nodeName": "a", "serviceAccountName": "client"},
            "status": {"phase": "Running", "qosClass": "Guaranteed",
                       "podIPs": [{"ip": client.ipv4()}, {"ip": client.ipv6()}]},
        }),
    );
    let files = MeshFiles::write(mesh.topology(), node, &[], STRICT_MESH, "")?;
    api.configure(&files)?;
    let mut agent = Agent::start(node, &agent_program()?, &files)?;
    agent.wait_ready()?;
    observe::wait_enrolled(&agent)?;
    let own = [format!("{}/32", client.ipv4()), format!("{}/128", client.ipv6())];
    let found = observe::status(&agent)?["mesh"].clone();
    ensure!(found == json!({"configured": 0, "detected": 2, "ranges": own}), "{found}");

    // Control: the API does not have the stranger's range yet, so a STRICT pod sends it plaintext.
    let server = Server::start(stranger, SocketAddr::new(stranger.ipv4().into(), fresh_port()), &["echo"])?;
    let capture = mesh.topology().capture()?;
    Client::echo(client, server.address(), MARKER)?;
    ensure!(capture.finish()?.occurrences(MARKER.as_bytes()) == 2, "the control capture lacks the marker");
    let open_flow = Client::start(client, server.address(), &["send:open", "pause", "read-end"])?;
    open_flow.events().first("connected")?;

    api.add(NODES, json!({"metadata": {"name": "b"}, "spec": {"podCIDR": RANGE, "podCIDRs": [RANGE]}}))?;
    let has_range =
        |status: &Value| status["mesh"]["ranges"].as_array()?.contains(&json!(RANGE)).then_some(());
    observe::wait_status(&agent, "the range detected", has_range)?;
    observe::wait_status(&agent, "the open flow reset", |status| {
        (status["guard"]["resets_at_enrolment"].as_u64()? > 0).then_some(())
    })?;
    let capture = mesh.topology().capture()?;
    ensure!(
        Client::echo(client, server.address(), MARKER).is_err(),
        "plaintext although the range is detected"
    );

    agent.kill()?;
    let refused =
        || Client::echo(client, server.address(), MARKER).err().context("plaintext during a restart");
    refused()?;
    agent.restart()?;
    until("the range detected again", || {
        refused()?;
        Ok(observe::status(&agent).ok().as_ref().and_then(has_range))
    })?;
    agent.wait_ready()?;
    refused()?;
    ensure!(capture.finish()?.occurrences(MARKER.as_bytes()) == 0, "the capture contains the marker");
    Ok(())
}

/// An API server without ServiceCIDRs.
struct Api {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<Value>>,
    watches: BTreeMap<String, Vec<TcpStream>>,
}

impl Api {
    fn start(netns: &Netns) -> Result<Self> {
        let listener = netns.enter(|| TcpListener::bind("127.0.0.1:0"))??;
        let (address, state) = (listener.local_addr()?, Arc::<Mutex<State>>::default());
        let thread_state = Arc::clone(&state);
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let state = Arc::clone(&thread_state);
                // A client that disconnects is not an error of the server.
                thread::spawn(move || serve(connection, &state).ok());
            }
        });
        Ok(Self { address, state })
    }

    /// Configures an agent to read its directory from this API, without configured ranges.
    fn configure(&self, files: &MeshFiles) -> Result<()> {
        let kubeconfig = files.config().with_file_name("kubeconfig.yaml");
        // A server without TLS does not need a CA, but the client requires one, and not every system has one.
        let authority = files.config().with_file_name("api-ca.pem");
        let certificate = rcgen::generate_simple_self_signed(["api".to_owned()]).context("a certificate")?;
        fs::write(&authority, certificate.cert.pem())?;
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: \"http://{}\", certificate-authority: \"{}\"}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: c}}}}]\nusers: [{{name: c, user: {{}}}}]\n",
            self.address,
            authority.display()
        );
        fs::write(&kubeconfig, text)?;
        let config = fs::read_to_string(files.config())?;
        let other_lines =
            config.lines().filter(|line| !line.starts_with("meshRanges:") && !line.starts_with("directory:"));
        let source = "directory: {kubernetes: {kubeconfig: kubeconfig.yaml}}";
        let lines: Vec<&str> = other_lines.chain([source, ""]).collect();
        Ok(fs::write(files.config(), lines.join("\n"))?)
    }

    fn set(&self, path: &str, object: Value) {
        lock(&self.state).objects.entry(path.to_owned()).or_default().push(object);
    }

    /// Adds an object and sends it to the watches, after at least one has started.
    fn add(&self, path: &str, mut object: Value) -> Result<()> {
        until("a watch has started", || {
            Ok(lock(&self.state).watches.get(path).is_some_and(|all| !all.is_empty()).then_some(()))
        })?;
        object["metadata"]["resourceVersion"] = json!("2");
        self.set(path, object.clone());
        let line = format!("{}\n", json!({"type": "ADDED", "object": object}));
        for watch in lock(&self.state).watches.get_mut(path).into_iter().flatten() {
            write!(watch, "{:x}\r\n{line}\r\n", line.len())?;
        }
        Ok(())
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one request.
fn serve(mut connection: TcpStream, state: &Mutex<State>) -> Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let first = lines.next().context("no request")??;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let target = first.split(' ').nth(1).context("no target")?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if query.contains("watch=") {
        connection.write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        )?;
        lock(state).watches.entry(path.to_owned()).or_default().push(connection);
        return Ok(());
    }
    let (status, body) = if path.contains("servicecidrs") {
        let refusal = json!({"kind": "Status", "status": "Failure", "message": "none", "reason": "NotFound", "code": 404});
        ("404 Not Found", refusal)
    } else {
        let items = lock(state).objects.get(path).cloned();
        ("200 OK", json!({"metadata": {"resourceVersion": "1"}, "items": items}))
    };
    let body = body.to_string();
    let length = body.len();
    write!(
        connection,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    Ok(())
}
