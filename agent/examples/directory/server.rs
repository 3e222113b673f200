//! The API server of the measurement: lists of a generated cluster, and changes of pods on order.

use std::{
    collections::HashMap,
    fmt,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

const PODS_OF_A_NODE: usize = 100;
const ENDPOINTS: usize = 10;

/// An order on a line of the server's stdin.
pub(super) enum Order {
    /// All pods must be listed again.
    Relist,
    /// The pod of this number gets the address.
    Address(usize, IpAddr),
    /// Changes of pods, so many a second, and then the address of number `last` for a pod.
    Paced {
        count: usize,
        rate: usize,
        /// They give a pod a new address.
        matters: bool,
        last: usize,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relist => write!(f, "relist"),
            Self::Address(pod, address) => write!(f, "address {pod} {address}"),
            Self::Paced { count, rate, matters, last } => write!(f, "paced {count} {rate} {matters} {last}"),
        }
    }
}

impl Order {
    fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        Ok(match words.as_slice() {
            ["relist"] => Self::Relist,
            ["address", pod, address] => Self::Address(pod.parse()?, address.parse()?),
            ["paced", count, rate, matters, last] => Self::Paced {
                count: count.parse()?,
                rate: rate.parse()?,
                matters: matters.parse()?,
                last: last.parse()?,
            },
            _ => bail!("no order: {line:?}"),
        })
    }
}

fn ipv4(base: [u8; 4], index: usize) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes(base) + u32::try_from(index).unwrap_or(u32::MAX)).into()
}

/// All pods' ranges are one node's: what tells of ranges is not what is measured.
const NODE: &str = r#"{"metadata":{"name":"node-0"},"spec":{"podCIDRs":["10.64.0.0/11","fd64::/16"]}}"#;
const SERVICE_CIDR: &str = r#"{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/12"]}}"#;

pub(super) fn pod_address(index: usize) -> IpAddr {
    ipv4([10, 64, 0, 1], index)
}

pub(super) fn service_address(index: usize) -> IpAddr {
    ipv4([10, 96, 0, 1], index)
}

pub(super) fn changed_address(change: usize) -> IpAddr {
    ipv4([10, 80, 0, 1], change)
}

/// Returns a pod of some 10 KiB, as the API server sends it. `revision` is in parts that make no difference to the directory.
fn pod(index: usize, address: IpAddr, revision: usize) -> String {
    let (node, app) = (index / PODS_OF_A_NODE, index % 500);
    let replaced = [
        ("@INDEX", format!("{index:05}")),
        ("@UID", format!("{index:08x}-6c1f-4a6e-9d8a-2f1f3c5d7e9b")),
        ("@VERSION", (index + revision).to_string()),
        ("@REVISION", revision.to_string()),
        ("@NAMESPACE", format!("ns-{}", app % 50)),
        ("@APP", format!("app-{app}")),
        ("@NODE", format!("node-{node}")),
        ("@IPV4", address.to_string()),
        ("@IPV6", format!("fd64::{:x}:{:x}", index >> 16, index & 0xffff)),
    ];
    let begin: String = include_str!("pod.json").lines().map(str::trim).collect();
    replaced.iter().fold(begin, |text, (name, value)| text.replace(name, value))
}

fn service(index: usize) -> String {
    format!(
        r#"{{"metadata":{{"name":"svc-{index}","namespace":"ns-{ns}","resourceVersion":"1"}},"spec":{{"clusterIP":"{ip}","clusterIPs":["{ip}"],"ports":[{{"name":"http","port":80,"protocol":"TCP"}}]}}}}"#,
        ns = index % 50,
        ip = service_address(index),
    )
}

fn slice(index: usize, pods: usize) -> String {
    let endpoint = |i: usize| {
        let pod = (index * ENDPOINTS + i) % pods;
        let node = pod / PODS_OF_A_NODE;
        format!(
            r#"{{"addresses":["{}"],"conditions":{{"ready":true}},"nodeName":"node-{node}"}}"#,
            pod_address(pod)
        )
    };
    let endpoints: Vec<String> = (0..ENDPOINTS).map(endpoint).collect();
    format!(
        r#"{{"metadata":{{"name":"svc-{index}-abcde","namespace":"ns-{ns}","resourceVersion":"1","labels":{{"kubernetes.io/service-name":"svc-{index}"}}}},"addressType":"IPv4","ports":[{{"name":"http","port":8080,"protocol":"TCP"}}],"endpoints":[{endpoints}]}}"#,
        ns = index % 50,
        endpoints = endpoints.join(","),
    )
}

/// Prints the port, and answers until stdin ends.
pub(super) fn serve(pods: usize, services: usize) -> Result<()> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    println!("{}", listener.local_addr()?.port());
    let watch: Arc<Mutex<Option<TcpStream>>> = Arc::default();
    let of_pods = Arc::clone(&watch);
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let of_pods = Arc::clone(&of_pods);
            thread::spawn(move || answer(connection, pods, services, &of_pods));
        }
    });
    // Of the pods that have changed.
    let mut addresses: HashMap<usize, IpAddr> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        match Order::parse(&line?)? {
            Order::Relist => {
                let taken = watch.lock().ok().and_then(|mut watch| watch.take());
                chunk(
                    taken.context("nobody watches pods")?,
                    r#"{"type":"ERROR","object":{"kind":"Status","status":"Failure","message":"too old","reason":"Expired","code":410}}"#,
                )?;
            }
            Order::Address(index, address) => {
                addresses.insert(index, address);
                change(&watch, index, address, 0)?;
            }
            Order::Paced { count, rate, matters, last } => {
                let (begin, pause) = (Instant::now(), Duration::from_secs(1) / u32::try_from(rate)?);
                for number in 0..count {
                    let due = pause * u32::try_from(number)?;
                    thread::sleep(due.saturating_sub(begin.elapsed()));
                    let index = number % pods;
                    let address = match matters {
                        true => changed_address(last - count + number),
                        false => addresses.get(&index).copied().unwrap_or_else(|| pod_address(index)),
                    };
                    addresses.insert(index, address);
                    change(&watch, index, address, number + 1)?;
                }
                change(&watch, 0, changed_address(last), 0)?;
            }
        }
    }
    Ok(())
}

/// Sends a change of a pod to the client that watches, once one does.
fn change(watch: &Mutex<Option<TcpStream>>, index: usize, address: IpAddr, revision: usize) -> Result<()> {
    let event = format!(r#"{{"type":"MODIFIED","object":{}}}"#, pod(index, address, revision));
    let connection = loop {
        let open = watch.lock().ok().and_then(|watch| watch.as_ref().and_then(|open| open.try_clone().ok()));
        match open {
            Some(connection) => break connection,
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    chunk(connection, &event)
}

fn answer(
    mut connection: TcpStream,
    pods: usize,
    services: usize,
    watch: &Mutex<Option<TcpStream>>,
) -> Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection.try_clone()?);
    loop {
        let mut first = String::new();
        reader.read_line(&mut first)?;
        let mut line = String::new();
        while reader.read_line(&mut line)? > 2 {
            line.clear();
        }
        let target = first.split(' ').nth(1).unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        if query.contains("watch=") {
            connection.write_all(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
            )?;
            if path.ends_with("/pods") {
                *watch.lock().map_err(|_| anyhow::anyhow!("poisoned"))? = Some(connection.try_clone()?);
            }
            // Until the client goes.
            reader.read_to_end(&mut Vec::new())?;
            return Ok(());
        }
        let field = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let begin: usize = field("continue").map_or(Ok(0), str::parse)?;
        let limit: usize = field("limit").map_or(Ok(500), str::parse)?;
        let (count, item): (usize, Box<dyn Fn(usize) -> String>) = match path.rsplit('/').next() {
            Some("pods") => (pods, Box::new(|i| pod(i, pod_address(i), 0))),
            Some("services") => (services, Box::new(service)),
            Some("nodes") => (1, Box::new(|_| NODE.to_owned())),
            Some("servicecidrs") => (1, Box::new(|_| SERVICE_CIDR.to_owned())),
            Some("endpointslices") => (services, Box::new(move |i| slice(i, pods))),
            _ => (
                50,
                Box::new(|i| {
                    format!(r#"{{"metadata":{{"name":"ns-{i}","labels":{{"tacit.io/enrol":"true"}}}}}}"#)
                }),
            ),
        };
        let end = count.min(begin + limit);
        let items: Vec<String> = (begin..end).map(item).collect();
        let next = if end < count { end.to_string() } else { String::new() };
        let body = format!(
            r#"{{"metadata":{{"resourceVersion":"1","continue":"{next}"}},"items":[{}]}}"#,
            items.join(",")
        );
        write!(
            connection,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
}

fn chunk(mut connection: TcpStream, line: &str) -> Result<()> {
    write!(connection, "{:x}\r\n{line}\n\r\n", line.len() + 1)?;
    Ok(())
}
