//! An API server of Kubernetes for agents in a network namespace: lists of objects, watches with new ones, and patches of the status of pods.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
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
    /// The last version of an object that a watch has.
    version: u64,
    /// Merge patches of the status of pods, refused ones too.
    patches: Vec<Patched>,
    /// True: each patch is refused with 403.
    refuses_patches: bool,
}

/// A merge patch of the status of a pod.
#[derive(Debug, Clone)]
pub struct Patched {
    /// The pod as `namespace/name`.
    pub pod: String,
    /// The patch.
    pub patch: Value,
    /// Status code of the answer.
    pub code: u16,
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
    /// Fails if no watch starts.
    pub fn add(&self, path: &str, object: Value) -> Result<()> {
        until("a watch has started", || {
            Ok(lock(&self.state).watches.get(path).is_some_and(|all| !all.is_empty()).then_some(()))
        })?;
        lock(&self.state).put(path, "ADDED", object);
        Ok(())
    }

    /// Changes the pod `namespace/name`, and sends it to the watches.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn change_pod(&self, pod: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut object = self.pod(pod)?;
        change(&mut object);
        lock(&self.state).put(PODS, "MODIFIED", object);
        Ok(())
    }

    /// Returns the object of the pod `namespace/name`.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn pod(&self, pod: &str) -> Result<Value> {
        lock(&self.state).pod(pod).with_context(|| format!("no pod {pod}"))
    }

    /// Refuses patches with 403 from now on, or not.
    pub fn refuse_patches(&self, refuses: bool) {
        lock(&self.state).refuses_patches = refuses;
    }

    /// Returns all patches so far.
    #[must_use]
    pub fn patches(&self) -> Vec<Patched> {
        lock(&self.state).patches.clone()
    }
}

impl State {
    fn pod(&self, pod: &str) -> Option<Value> {
        let named = |object: &&Value| full_name(object) == pod;
        self.objects.get(PODS)?.iter().find(named).cloned()
    }

    /// Stores a new version of an object and sends it to the watches. Watches whose client is gone are forgotten.
    fn put(&mut self, path: &str, kind: &str, mut object: Value) {
        self.version = self.version.max(1) + 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let objects = self.objects.entry(path.to_owned()).or_default();
        objects.retain(|other| full_name(other) != full_name(&object));
        objects.push(object.clone());
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        let send = |watch: &mut TcpStream| write!(watch, "{:x}\r\n{line}\r\n", line.len()).is_ok();
        self.watches.entry(path.to_owned()).or_default().retain_mut(send);
    }

    /// Applies a merge patch to the metadata of a pod, as a patch of its status does. Returns the answer.
    fn patch(&mut self, pod: &str, patch: &Value) -> (u16, Value) {
        let refusal = |code: u16, message: &str, reason: &str| {
            (
                code,
                json!({"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}),
            )
        };
        if self.refuses_patches {
            return refusal(403, "pods is forbidden: cannot patch resource pods/status", "Forbidden");
        }
        let Some(mut object) = self.pod(pod) else { return refusal(404, "no such pod", "NotFound") };
        if patch["metadata"]["uid"] != object["metadata"]["uid"] {
            return refusal(409, "another pod has the name", "Conflict");
        }
        for (name, value) in patch["metadata"]["annotations"].as_object().into_iter().flatten() {
            match (value, object["metadata"]["annotations"].as_object_mut()) {
                (Value::Null, Some(annotations)) => drop(annotations.remove(name)),
                (Value::Null, None) => {}
                (value, _) => object["metadata"]["annotations"][name] = value.clone(),
            }
        }
        self.put(PODS, "MODIFIED", object.clone());
        (200, object)
    }
}

/// Returns `namespace/name`.
fn full_name(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
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
    let mut reader = BufReader::new(connection.try_clone()?);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
    }
    let mut words = first.split(' ');
    let (method, target) = (words.next().context("no method")?, words.next().context("no target")?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if method == "PATCH" {
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let pod = path.strip_prefix("/api/v1/namespaces/").and_then(|rest| rest.strip_suffix("/status"));
        let pod =
            pod.context("a patch of another object than the status of a pod")?.replacen("/pods/", "/", 1);
        let patch: Value = serde_json::from_slice(&body)?;
        let answered = {
            let mut state = lock(state);
            let (code, answer) = state.patch(&pod, &patch);
            state.patches.push(Patched { pod, patch, code });
            (code, answer)
        };
        return answer(&mut connection, &answered.0.to_string(), &answered.1);
    }
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
    answer(&mut connection, status, &body)
}

/// Answers a request and ends the connection.
fn answer(connection: &mut TcpStream, status: &str, body: &Value) -> Result<()> {
    let body = body.to_string();
    let length = body.len();
    write!(
        connection,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    Ok(())
}
