//! A simulated Kubernetes API on loopback: token reviews, pods, Secrets and ConfigMaps with optimistic concurrency. Other
//! requests are rejected.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use kube::Client;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// The API's content.
#[derive(Default)]
pub(super) struct Content {
    /// Review status by token.
    pub(super) tokens: BTreeMap<String, Value>,
    /// Pods, Secrets and ConfigMaps by path.
    objects: BTreeMap<String, Value>,
    version: u64,
    /// Pods sent in lists.
    pub(super) pods_sent: usize,
    /// Paths that contain this text are answered with 500.
    pub(super) failing: Option<&'static str>,
    /// Number of conflicts for the next writes to paths that contain this text.
    pub(super) conflicts: Option<(&'static str, u32)>,
    /// Paths that contain this text are never answered.
    pub(super) hanging: Option<&'static str>,
}

/// A running API.
#[derive(Clone)]
pub(super) struct Api {
    content: Arc<Mutex<Content>>,
    pub(super) client: Client,
    _server: Arc<AbortOnDropHandle<()>>,
}

impl Api {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let content: Arc<Mutex<Content>> = Arc::default();
        let served = content.clone();
        let server = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let content = served.clone();
                let handler = service_fn(move |request| answer(content.clone(), request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(tcp), handler));
            }
        });
        let config = kube::Config::new(format!("http://{address}").parse().expect("a URL"));
        let client = Client::try_from(config).expect("a client");
        Self { content, client, _server: Arc::new(AbortOnDropHandle::new(server)) }
    }

    pub(super) fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().expect("no panic")
    }

    /// Adds a token of the agent on `node`, bound to its pod.
    pub(super) fn add_agent(&self, token: &str, node: &str) {
        let pod = format!("tacit-{node}");
        self.add_pod("tacit-system", &pod, "tacit-agent", node);
        let review = json!({
            "authenticated": true,
            "audiences": ["tacit-authority"],
            "user": {
                "username": "system:serviceaccount:tacit-system:tacit-agent",
                "extra": {
                    "authentication.kubernetes.io/pod-name": [pod],
                    "authentication.kubernetes.io/pod-uid": [format!("uid-{pod}")],
                },
            },
        });
        self.content().tokens.insert(token.to_owned(), review);
    }

    pub(super) fn add_pod(&self, namespace: &str, name: &str, account: &str, node: &str) {
        self.add_pod_in("Running", namespace, name, account, node);
    }

    /// Adds a pod in a phase.
    pub(super) fn add_pod_in(&self, phase: &str, namespace: &str, name: &str, account: &str, node: &str) {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{name}")},
            "spec": {"nodeName": node, "serviceAccountName": account, "containers": []},
            "status": {"phase": phase},
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        self.content().objects.insert(path, pod);
    }

    /// Adds the mirror pod of a static pod, as the kubelet of `node` does: its spec has no service account.
    pub(super) fn add_static_pod(&self, namespace: &str, name: &str, node: &str) {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": format!("uid-{name}"),
                "annotations": {"kubernetes.io/config.mirror": "0123456789abcdef0123456789abcdef"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": "1", "controller": true}],
            },
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": "Running"},
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        self.content().objects.insert(path, pod);
    }

    /// Returns the object at `path`, or null.
    pub(super) fn object(&self, path: &str) -> Value {
        self.content().objects.get(path).cloned().unwrap_or_default()
    }

    /// Writes an object as another client.
    pub(super) fn put(&self, path: &str, object: Value) {
        self.content().write(path, object);
    }
}

impl Content {
    fn write(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    fn answer(&mut self, method: &Method, path: &str, query: &str, body: Value) -> (StatusCode, Value) {
        if self.failing.is_some_and(|failing| path.contains(failing)) {
            return failure(StatusCode::INTERNAL_SERVER_ERROR);
        }
        if *method != Method::GET
            && let Some((of, left @ 1..)) = &mut self.conflicts
            && path.contains(*of)
        {
            *left -= 1;
            return failure(StatusCode::CONFLICT);
        }
        match *method {
            Method::POST if path == "/apis/authentication.k8s.io/v1/tokenreviews" => self.review(body),
            Method::GET if path.ends_with("/pods") => self.pods(path, query),
            Method::GET => self
                .objects
                .get(path)
                .map_or_else(|| failure(StatusCode::NOT_FOUND), |object| (StatusCode::OK, object.clone())),
            Method::POST => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().expect("a name"));
                match self.objects.contains_key(&path) {
                    true => failure(StatusCode::CONFLICT),
                    false => (StatusCode::CREATED, self.write(&path, body)),
                }
            }
            Method::PUT => {
                let held = self.objects.get(path).map(|object| &object["metadata"]["resourceVersion"]);
                match held {
                    None => failure(StatusCode::NOT_FOUND),
                    Some(version) if *version != body["metadata"]["resourceVersion"] => {
                        failure(StatusCode::CONFLICT)
                    }
                    Some(_) => (StatusCode::OK, self.write(path, body)),
                }
            }
            _ => failure(StatusCode::METHOD_NOT_ALLOWED),
        }
    }

    /// Reviews a token. Unknown tokens are not authenticated.
    fn review(&self, mut body: Value) -> (StatusCode, Value) {
        let token = body["spec"]["token"].as_str().unwrap_or_default();
        let status = self.tokens.get(token).cloned();
        let status =
            status.unwrap_or_else(|| json!({"authenticated": false, "error": "invalid bearer token"}));
        body["status"] = status;
        (StatusCode::CREATED, body)
    }

    /// Lists pods. Pages are cut before selection, as the API allows, so a page may be empty.
    fn pods(&mut self, path: &str, query: &str) -> (StatusCode, Value) {
        let decoded = query.replace("%2C", ",").replace("%3D", "=").replace("%21", "!");
        let part =
            |name: &str| decoded.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let selector: Vec<_> =
            part("fieldSelector").unwrap_or_default().split(',').filter(|term| !term.is_empty()).collect();
        let number = |name: &str| part(name).map(|text| text.parse::<usize>().expect("a number"));
        let (from, limit) = (number("continue").unwrap_or(0), number("limit").unwrap_or(usize::MAX));
        let prefix = format!("{path}/");
        let all: Vec<_> = self.objects.iter().filter(|(path, _)| path.starts_with(&prefix)).collect();
        let page = all.iter().skip(from).take(limit).map(|(_, pod)| *pod);
        let items: Vec<_> = page.filter(|pod| selector.iter().all(|term| fits(pod, term))).cloned().collect();
        let next = from.saturating_add(limit);
        let next = if next < all.len() { next.to_string() } else { String::new() };
        self.pods_sent += items.len();
        let list =
            json!({"apiVersion": "v1", "kind": "PodList", "metadata": {"continue": next}, "items": items});
        (StatusCode::OK, list)
    }
}

/// Returns true if an object matches a term of a field selector, `field=value` or `field!=value`.
fn fits(object: &Value, term: &str) -> bool {
    let (field, value) = term.split_once('=').expect("a term");
    let (field, wanted) = field.strip_suffix('!').map_or((field, true), |field| (field, false));
    let pointer = format!("/{}", field.replace('.', "/"));
    // An absent field is an empty one.
    (object.pointer(&pointer).and_then(Value::as_str).unwrap_or_default() == value) == wanted
}

fn failure(status: StatusCode) -> (StatusCode, Value) {
    // Kubernetes writes reasons without spaces, and clients recognize 404 by the reason.
    let reason = status.canonical_reason().unwrap_or_default().replace(' ', "");
    let body = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": reason, "reason": reason, "code": status.as_u16(),
    });
    (status, body)
}

async fn answer(
    content: Arc<Mutex<Content>>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let body = serde_json::from_slice(&bytes).unwrap_or_default();
    let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
    let hanging = content.lock().expect("no panic").hanging;
    if hanging.is_some_and(|hanging| path.contains(hanging)) {
        return std::future::pending().await;
    }
    let (status, body) = content.lock().expect("no panic").answer(&head.method, path, query, body);
    let mut response = Response::new(Full::new(body.to_string().into()));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", "application/json".parse().expect("ascii"));
    Ok(response)
}
