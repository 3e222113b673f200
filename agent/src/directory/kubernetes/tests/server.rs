//! As much of an API server as list and watch need: versions, pages of two objects, chunked watches, a history that can
//! be forgotten, and faults on demand.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub(super) const NAMESPACES: &str = "/api/v1/namespaces";
pub(super) const PODS: &str = "/api/v1/pods";
pub(super) const SERVICES: &str = "/api/v1/services";
pub(super) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub(super) const SLICES_BETA: &str = "/apis/discovery.k8s.io/v1beta1/endpointslices";

const PAGE: usize = 2;

/// The server; it ends with this value.
pub(super) struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    /// Counts what happened, so that everybody looks again.
    changed: watch::Sender<u64>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// Events before it are forgotten.
    oldest: u64,
    objects: HashMap<String, BTreeMap<String, Value>>,
    history: Vec<(u64, String, Value)>,
    absent: HashSet<String>,
    is_down: bool,
    /// Connections of an earlier era are broken.
    era: u64,
    lists: HashMap<String, usize>,
    refused: HashMap<String, usize>,
    watches: HashMap<String, usize>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(super) fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("non-blocking");
        let address = listener.local_addr().expect("an address");
        let listener = TcpListener::from_std(listener).expect("a runtime");
        let state = Arc::new(Mutex::new(State { version: 10, ..State::default() }));
        let (changed, _) = watch::channel(0);
        let (of_task, news) = (Arc::clone(&state), changed.clone());
        let task = tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(serve(connection, Arc::clone(&of_task), news.clone()));
            }
        });
        Self { address, state, changed, task }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes or changes an object.
    pub(super) fn set(&self, path: &str, mut object: Value) {
        self.change(|state| {
            state.version += 1;
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
            let known = state.objects.entry(path.to_owned()).or_default().insert(name, object.clone());
            let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
            state.history.push((state.version, path.to_owned(), json!({"type": kind, "object": object})));
        });
    }

    pub(super) fn remove(&self, path: &str, name: &str) {
        self.change(|state| {
            state.version += 1;
            let mut object =
                state.objects.get_mut(path).and_then(|all| all.remove(name)).expect("it is there");
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            state.history.push((
                state.version,
                path.to_owned(),
                json!({"type": "DELETED", "object": object}),
            ));
        });
    }

    /// The server knows no such path.
    pub(super) fn without(&self, path: &str) {
        self.change(|state| _ = state.absent.insert(path.to_owned()));
    }

    pub(super) fn with(&self, path: &str) {
        self.change(|state| _ = state.absent.remove(path));
    }

    pub(super) fn break_connections(&self) {
        self.change(|state| state.era += 1);
    }

    pub(super) fn go_down(&self) {
        self.change(|state| state.is_down = true);
    }

    pub(super) fn come_up(&self) {
        self.change(|state| state.is_down = false);
    }

    /// Watches from versions up to now are answered with 410.
    pub(super) fn forget_history(&self) {
        self.change(|state| {
            state.version += 1;
            state.oldest = state.version;
            state.history.clear();
        });
    }

    pub(super) fn lists(&self, path: &str) -> usize {
        lock(&self.state).lists.get(path).copied().unwrap_or(0)
    }

    /// Waits until so many watches were opened.
    pub(super) async fn watches(&self, path: &str, count: usize) {
        self.until(|state| state.watches.get(path).copied().unwrap_or(0) >= count).await;
    }

    /// Waits until so many requests were answered with 404.
    pub(super) async fn lists_failed(&self, path: &str, count: usize) {
        self.until(|state| state.refused.get(path).copied().unwrap_or(0) >= count).await;
    }

    async fn until(&self, is: impl Fn(&State) -> bool) {
        let mut changed = self.changed.subscribe();
        while !is(&lock(&self.state)) {
            changed.changed().await.expect("the server lives");
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.send_modify(|count| *count += 1);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One request a connection; what goes wrong is the client's to notice.
async fn serve(mut connection: TcpStream, state: Arc<Mutex<State>>, changed: watch::Sender<u64>) {
    let mut head = Vec::new();
    let mut part = [0; 4096];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        match connection.read(&mut part).await {
            Ok(1..) if lock(&state).is_down => return,
            Ok(read @ 1..) => head.extend_from_slice(&part[..read]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head);
    let target = head.split(' ').nth(1).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: HashMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
    if lock(&state).absent.contains(path) {
        let refusal = json!({"kind": "Status", "status": "Failure", "message": "no such resource", "reason": "NotFound", "code": 404});
        *lock(&state).refused.entry(path.to_owned()).or_default() += 1;
        changed.send_modify(|count| *count += 1);
        let _ = answer(&mut connection, "404 Not Found", &refusal).await;
    } else if query.contains_key("watch") {
        let _ = watch(connection, &state, &changed, path, &query).await;
    } else {
        let page = list(&mut lock(&state), path, &query);
        let _ = answer(&mut connection, "200 OK", &page).await;
    }
}

fn list(state: &mut State, path: &str, query: &HashMap<&str, &str>) -> Value {
    let begin: usize = query.get("continue").and_then(|token| token.parse().ok()).unwrap_or(0);
    if begin == 0 {
        *state.lists.entry(path.to_owned()).or_default() += 1;
    }
    let all: Vec<Value> = state.objects.get(path).into_iter().flat_map(|all| all.values().cloned()).collect();
    let end = all.len().min(begin + PAGE);
    let next = if end < all.len() { end.to_string() } else { String::new() };
    let items = all.get(begin..end).filter(|items| !items.is_empty());
    json!({"kind": "List", "apiVersion": "v1", "items": items,
           "metadata": {"resourceVersion": state.version.to_string(), "continue": next}})
}

async fn answer(connection: &mut TcpStream, status: &str, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).await
}

async fn watch(
    mut connection: TcpStream,
    state: &Mutex<State>,
    changed: &watch::Sender<u64>,
    path: &str,
    query: &HashMap<&str, &str>,
) -> std::io::Result<()> {
    let mut from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let mut news = changed.subscribe();
    let era = lock(state).era;
    connection
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        .await?;
    if from < lock(state).oldest {
        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "status": "Failure", "message": "too old resource version",
                          "reason": "Expired", "code": 410}});
        chunk(&mut connection, &gone).await?;
        return connection.write_all(b"0\r\n\r\n").await;
    }
    *lock(state).watches.entry(path.to_owned()).or_default() += 1;
    changed.send_modify(|count| *count += 1);
    let kind = json!({"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": from.to_string()}}});
    chunk(&mut connection, &kind).await?;
    loop {
        news.mark_unchanged();
        let (events, broken) = {
            let state = lock(state);
            let of_path = state.history.iter().filter(|(version, of, _)| *version > from && of == path);
            let events: Vec<(u64, Value)> =
                of_path.map(|(version, _, event)| (*version, event.clone())).collect();
            (events, state.era != era)
        };
        if broken {
            return Ok(());
        }
        for (version, event) in events {
            chunk(&mut connection, &event).await?;
            from = version;
        }
        if news.changed().await.is_err() {
            return Ok(());
        }
    }
}

async fn chunk(connection: &mut TcpStream, value: &Value) -> std::io::Result<()> {
    let line = format!("{value}\n");
    connection.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
}
