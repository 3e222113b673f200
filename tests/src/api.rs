//! An API server of Kubernetes for agents in a network namespace: lists of objects, and watches with new ones.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tacit_topology::{KUBELET_NAMESPACE, MeshFiles, Netns, Pod, until};

/// The pods.
pub const PODS: &str = "/api/v1/pods";
/// The nodes.
pub const NODES: &str = "/api/v1/nodes";
/// The services.
pub const SERVICES: &str = "/api/v1/services";

/// An API server without ServiceCIDRs.
pub struct Api {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<Value>>,
    watches: BTreeMap<String, Vec<TcpStream>>,
}

impl Api {
    /// Starts the server in a network namespace.
    ///
    /// # Errors
    /// Fails without a socket there.
    pub fn start(netns: &Netns) -> Result<Self> {
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

    /// Returns the server's address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Configures an agent to read its directory from this API, without configured ranges.
    ///
    /// # Errors
    /// Fails if a file cannot be read or written.
    pub fn configure(&self, files: &MeshFiles) -> Result<()> {
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

    /// Adds an object to the lists that are served from now on.
    pub fn set(&self, path: &str, object: Value) {
        lock(&self.state).objects.entry(path.to_owned()).or_default().push(object);
    }

    /// Adds an object and sends it to the watches, after at least one has started.
    ///
    /// # Errors
    /// Fails if no watch starts, or one has ended.
    pub fn add(&self, path: &str, mut object: Value) -> Result<()> {
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

/// Returns the object of a pod that is enrolled by its label. Its UID, `uid`, is its name too, as that of its cgroup.
#[must_use]
pub fn enrolled_pod(pod: &Pod, uid: &str, node: &str) -> Value {
    json!({
        "metadata": {"name": uid, "namespace": KUBELET_NAMESPACE, "uid": uid, "labels": {"tacit.io/enrol": "true"}},
        "spec": {"nodeName": node, "serviceAccountName": "client"},
        "status": {"phase": "Running", "qosClass": "Guaranteed",
                   "podIPs": [{"ip": pod.ipv4()}, {"ip": pod.ipv6()}]},
    })
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
