//! A simulated API server with lists and watches: versions, pages of two objects, chunked watches, a history that can expire,
//! custom resource definitions, and faults on demand. Created objects are recorded.

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

/// Path of custom resource definitions.
pub(crate) const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

const PAGE: usize = 2;

/// An event type with its object.
type Event = (&'static str, Value);

/// The server. Dropping it stops it.
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    /// Counts changes, to wake all waiters.
    changed: watch::Sender<u64>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// Events before this version have expired.
    oldest: u64,
    objects: HashMap<String, BTreeMap<String, Value>>,
    history: Vec<(u64, String, Event)>,
    absent: HashSet<String>,
    /// Paths answered with 503.
    failing: HashSet<String>,
    /// Objects that are read by themselves, by path.
    single: HashMap<String, Value>,
    /// Objects that are being deleted.
    ending: HashSet<String>,
    created: HashMap<String, Vec<Value>>,
    is_down: bool,
    /// Connections of an earlier era are broken.
    era: u64,
    lists: HashMap<String, usize>,
    refused: HashMap<String, usize>,
    watches: HashMap<String, usize>,
    /// Queries of lists and watches, by path.
    queries: HashMap<String, Vec<String>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) fn start() -> Self {
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

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Creates or updates an object.
    pub(crate) fn set(&self, path: &str, mut object: Value) {
        self.change(|state| {
            state.version += 1;
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
            let known = state.objects.entry(path.to_owned()).or_default().insert(name, object.clone());
            let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
            state.history.push((state.version, path.to_owned(), (kind, object)));
        });
    }

    pub(crate) fn remove(&self, path: &str, name: &str) {
        self.change(|state| {
            state.version += 1;
            let mut object =
                state.objects.get_mut(path).and_then(|all| all.remove(name)).expect("it is there");
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            state.history.push((state.version, path.to_owned(), ("DELETED", object)));
        });
    }

    /// Answers this path with 404.
    pub(crate) fn without(&self, path: &str) {
        self.change(|state| _ = state.absent.insert(path.to_owned()));
    }

    pub(crate) fn with(&self, path: &str) {
        self.change(|state| _ = state.absent.remove(path));
    }

    /// Answers requests for this path, if any, with 503.
    pub(crate) fn fail_only(&self, path: Option<&str>) {
        self.change(|state| state.failing = path.map(str::to_owned).into_iter().collect());
    }

    /// Answers reads of this path with the object.
    pub(crate) fn single(&self, path: &str, object: Value) {
        self.change(|state| _ = state.single.insert(path.to_owned(), object));
    }

    /// Marks the object at this path as being deleted.
    pub(crate) fn end(&self, path: &str) {
        self.change(|state| _ = state.ending.insert(path.to_owned()));
    }

    /// Waits until `count` objects were created at this path, and returns them.
    pub(crate) async fn created(&self, path: &str, count: usize) -> Vec<Value> {
        let found = |state: &State| state.created.get(path).cloned().unwrap_or_default();
        self.until(|state| found(state).len() >= count).await;
        found(&lock(&self.state))
    }

    pub(crate) fn break_connections(&self) {
        self.change(|state| state.era += 1);
    }

    pub(crate) fn go_down(&self) {
        self.change(|state| state.is_down = true);
    }

    pub(crate) fn come_up(&self) {
        self.change(|state| state.is_down = false);
    }

    /// Answers watches from versions up to now with 410.
    pub(crate) fn forget_history(&self) {
        self.change(|state| {
            state.version += 1;
            state.oldest = state.version;
            state.history.clear();
        });
    }

    /// Returns how often the path was listed, or read if it is a definition.
    pub(crate) fn lists(&self, path: &str) -> usize {
        lock(&self.state).lists.get(path).copied().unwrap_or(0)
    }

    /// Returns the queries of the lists and watches of the path.
    pub(crate) fn queries(&self, path: &str) -> Vec<String> {
        lock(&self.state).queries.get(path).cloned().unwrap_or_default()
    }

    /// Waits until `count` watches were opened.
    pub(crate) async fn watches(&self, path: &str, count: usize) {
        self.until(|state| state.watches.get(path).copied().unwrap_or(0) >= count).await;
    }

    /// Waits until `count` requests were answered with 404 or 503.
    pub(crate) async fn lists_failed(&self, path: &str, count: usize) {
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

/// Serves one request per connection. The client notices failures.
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
    let text = String::from_utf8_lossy(&head);
    let mut words = text.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    lock(&state).queries.entry(path.to_owned()).or_default().push(query.to_owned());
    let query: HashMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
    let fault = fault(&lock(&state), path);
    if let Some((status, refusal)) = fault {
        *lock(&state).refused.entry(path.to_owned()).or_default() += 1;
        changed.send_modify(|count| *count += 1);
        let _ = answer(&mut connection, status, &refusal).await;
    } else if method == "POST" {
        let Some(object) = body(&mut connection, &text).await else { return };
        let (status, answered) = create(&mut lock(&state), path, object);
        changed.send_modify(|count| *count += 1);
        let _ = answer(&mut connection, status, &answered).await;
    } else if path.starts_with(DEFINITIONS) {
        *lock(&state).lists.entry(path.to_owned()).or_default() += 1;
        let ending = lock(&state).ending.contains(path).then_some("2026-01-01T00:00:00Z");
        let definition = json!({"metadata": {"name": "definition", "deletionTimestamp": ending}});
        let _ = answer(&mut connection, "200 OK", &definition).await;
    } else if let Some(object) = single(&state, path) {
        let _ = answer(&mut connection, "200 OK", &object).await;
    } else if query.contains_key("watch") {
        let _ = watch(connection, &state, &changed, path, &query).await;
    } else {
        let page = list(&mut lock(&state), path, &query);
        changed.send_modify(|count| *count += 1);
        let _ = answer(&mut connection, "200 OK", &page).await;
    }
}

fn single(state: &Mutex<State>, path: &str) -> Option<Value> {
    lock(state).single.get(path).cloned()
}

/// Returns the configured error of a path.
fn fault(state: &State, path: &str) -> Option<(&'static str, Value)> {
    let refusal = |message, reason, code| json!({"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code});
    if state.absent.contains(path) {
        return Some(("404 Not Found", refusal("no such resource", "NotFound", 404)));
    }
    let failing = state.failing.contains(path);
    failing.then(|| ("503 Service Unavailable", refusal("etcd is away", "ServiceUnavailable", 503)))
}

/// Reads the rest of a request body, by `content-length`.
async fn body(connection: &mut TcpStream, read: &str) -> Option<Value> {
    let (head, begun) = read.split_once("\r\n\r\n")?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())?;
    let mut body = begun.as_bytes().to_vec();
    let missing = body.len();
    body.resize(length, 0);
    connection.read_exact(&mut body[missing..]).await.ok()?;
    serde_json::from_slice(&body).ok()
}

fn create(state: &mut State, path: &str, object: Value) -> (&'static str, Value) {
    let all = state.created.entry(path.to_owned()).or_default();
    if all.iter().any(|other| other["metadata"]["name"] == object["metadata"]["name"]) {
        let refusal = json!({"kind": "Status", "status": "Failure", "message": "it exists", "reason": "AlreadyExists", "code": 409});
        return ("409 Conflict", refusal);
    }
    all.push(object.clone());
    ("201 Created", object)
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
        let gone = json!({"kind": "Status", "status": "Failure", "message": "too old resource version",
                          "reason": "Expired", "code": 410});
        chunk(&mut connection, &("ERROR", gone)).await?;
        return connection.write_all(b"0\r\n\r\n").await;
    }
    *lock(state).watches.entry(path.to_owned()).or_default() += 1;
    changed.send_modify(|count| *count += 1);
    let bookmark =
        json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": from.to_string()}});
    chunk(&mut connection, &("BOOKMARK", bookmark)).await?;
    loop {
        news.mark_unchanged();
        let (events, broken) = {
            let state = lock(state);
            let of_path = state.history.iter().filter(|(version, of, _)| *version > from && of == path);
            let events: Vec<(u64, Event)> =
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

/// Writes one event. The type comes first, as in the API server.
async fn chunk(connection: &mut TcpStream, (kind, object): &Event) -> std::io::Result<()> {
    let line = format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n");
    connection.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
}
