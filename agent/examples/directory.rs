//! Cost of the directory of a large cluster: `cargo run --release -p tacit --example directory [PODS SERVICES]`.
//!
//! A child process plays the API server, so that its memory is not counted: it lists pods in pages of 500 (two addresses,
//! five labels, the usual noise of spec and status), services and endpoint slices of ten endpoints, and sends one change
//! of a pod for each line it gets; another line has all pods listed again. Measured are the memory of this process, lookups
//! of addresses in random order, and the time from the server's line to the published snapshot in which the change is seen,
//! network and decoding included.

use std::{
    env,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tacit_core::spiffe::TrustDomain;
use tacit_kernel::host;
use tacit_sources::directory::{self, CgroupLayout, EnrolLabel, LocalNode, Options};

const PODS: usize = 100_000;
const SERVICES: usize = 10_000;
const PODS_OF_A_NODE: usize = 100;
const ENDPOINTS: usize = 10;
const LOOKUPS: usize = 1_000_000;
const CHANGES: usize = 2_000;
/// The order to have all pods listed again.
const RELIST: &str = "relist";

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let number = |index: usize, default| args.get(index).map_or(Ok(default), |text| text.parse::<usize>());
    if args.first().is_some_and(|first| first == "serve") {
        return serve(number(1, PODS)?, number(2, SERVICES)?);
    }
    let (pods, services) = (number(0, PODS)?, number(1, SERVICES)?);
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(measure(pods, services))
}

async fn measure(pods: usize, services: usize) -> Result<()> {
    let mut server = Command::new(env::current_exe()?)
        .args(["serve", &pods.to_string(), &services.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut orders = server.stdin.take().context("stdin of the server")?;
    let mut port = String::new();
    BufReader::new(server.stdout.take().context("stdout of the server")?).read_line(&mut port)?;
    let config = env::temp_dir().join(format!("tacit-directory-{}.yaml", std::process::id()));
    std::fs::write(&config, kubeconfig(port.trim()))?;
    let before = memory()?;
    let begin = Instant::now();
    let options = Options { enrol_label: EnrolLabel::default(), kubeconfig: Some(config.clone()) };
    let local_node = LocalNode {
        node: "node-0".into(),
        trust_domain: TrustDomain::parse("cluster.local")?,
        cgroups: CgroupLayout::of(Path::new("/sys/fs/cgroup/kubepods.slice")),
        ranges: Arc::default(),
    };
    let opening = directory::open(&options, local_node).await;
    std::fs::remove_file(config)?;
    let watched = opening?.complete().await.context("the tasks that watch the API exited")?;
    let directory = watched.current();
    println!("{} workloads, {} services", directory.len(), directory.services().count());
    println!(
        "complete after {:.2?}; memory {} -> {} MiB, at most {} MiB",
        begin.elapsed(),
        before.0,
        memory()?.0,
        memory()?.1
    );
    // The agent does the same every few seconds.
    host::release_memory();
    println!("memory after release: {} MiB", memory()?.0);
    let random = shuffled(pods);
    lookups("workload by address", &random, |i| directory.at(pod_address(i)).is_some());
    lookups("service by address", &random, |i| directory.service_at(service_address(i % services)).is_some());
    drop(directory);
    let mut took = Vec::with_capacity(CHANGES);
    let mut changes = watched.subscribe();
    for change in 0..CHANGES {
        let (pod, address) = (random[change % pods], changed_address(change));
        let begin = Instant::now();
        writeln!(orders, "{pod} {address}")?;
        changes.wait_for(|directory| directory.at(address).is_some()).await?;
        took.push(begin.elapsed());
    }
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    println!("one pod change: p50 {:.1?}, p99 {:.1?}, most {:.1?}", at(50), at(99), at(100));
    host::release_memory();
    println!("memory after {CHANGES} changes: {} MiB", memory()?.0);
    // The peak is counted from here on.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let (begin, last) = (Instant::now(), changed_address(CHANGES));
    writeln!(orders, "{RELIST}")?;
    writeln!(orders, "0 {last}")?;
    changes.wait_for(|directory| directory.at(last).is_some()).await?;
    println!("all pods listed again in {:.2?}; memory at most {} MiB", begin.elapsed(), memory()?.1);
    server.kill()?;
    server.wait()?;
    Ok(())
}

fn lookups(what: &str, order: &[usize], found: impl Fn(usize) -> bool) {
    let begin = Instant::now();
    let hits = (0..LOOKUPS).filter(|i| found(order[i % order.len()])).count();
    let each = begin.elapsed().as_nanos() as f64 / LOOKUPS as f64;
    println!("{what}: {each:.0} ns, {hits} of {LOOKUPS} found");
}

/// Resident memory now and at most, in MiB.
fn memory() -> Result<(usize, usize)> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| -> Result<usize> {
        let line = status.lines().find(|line| line.starts_with(name)).context("no such field")?;
        Ok(line.split_whitespace().nth(1).context("no value")?.parse::<usize>()? / 1024)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

/// 0 to `count`, in an order without locality: multiples of a number that shares no factor with it.
fn shuffled(count: usize) -> Vec<usize> {
    let step = (0..).map(|i| 61_803 + i).find(|step| gcd(*step, count) == 1).unwrap_or(1);
    (0..count).map(|i| i * step % count).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn ipv4(base: [u8; 4], index: usize) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes(base) + u32::try_from(index).unwrap_or(u32::MAX)).into()
}

/// All pods' ranges are one node's: what tells of ranges is not what is measured.
const NODE: &str = r#"{"metadata":{"name":"node-0"},"spec":{"podCIDRs":["10.64.0.0/11","fd64::/16"]}}"#;
const SERVICE_CIDR: &str = r#"{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/12"]}}"#;

fn pod_address(index: usize) -> IpAddr {
    ipv4([10, 64, 0, 1], index)
}

fn service_address(index: usize) -> IpAddr {
    ipv4([10, 96, 0, 1], index)
}

fn changed_address(change: usize) -> IpAddr {
    ipv4([10, 80, 0, 1], change)
}

fn kubeconfig(port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"http://127.0.0.1:{port}\"}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: c}}}}]\nusers: [{{name: c, user: {{}}}}]\n"
    )
}

fn pod(index: usize, address: IpAddr) -> String {
    let (node, app) = (index / PODS_OF_A_NODE, index % 500);
    format!(
        r#"{{"metadata":{{"name":"app-{app}-7d4b9c6f5-{index:05}","namespace":"ns-{ns}","uid":"{index:08x}-6c1f-4a6e-9d8a-2f1f3c5d7e9b","resourceVersion":"{index}","labels":{{"app":"app-{app}","app.kubernetes.io/part-of":"shop","pod-template-hash":"7d4b9c6f5","tier":"web","version":"v1"}},"annotations":{{"checksum/config":"0123456789abcdef"}},"managedFields":[{{"manager":"kubelet","fieldsV1":{{"f:status":{{"f:phase":{{}}}}}}}}]}},"spec":{{"nodeName":"node-{node}","serviceAccountName":"app-{app}","containers":[{{"name":"app","image":"registry.example/app:{app}","env":[{{"name":"A","value":"B"}}]}}]}},"status":{{"phase":"Running","qosClass":"Burstable","podIP":"{address}","podIPs":[{{"ip":"{address}"}},{{"ip":"fd64::{high:x}:{low:x}"}}],"conditions":[{{"type":"Ready","status":"True"}}]}}}}"#,
        ns = app % 50,
        high = index >> 16,
        low = index & 0xffff,
    )
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

/// The server: says its port, answers until its stdin ends.
fn serve(pods: usize, services: usize) -> Result<()> {
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
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line == RELIST {
            let taken = watch.lock().ok().and_then(|mut watch| watch.take());
            chunk(
                taken.context("nobody watches pods")?,
                r#"{"type":"ERROR","object":{"kind":"Status","status":"Failure","message":"too old","reason":"Expired","code":410}}"#,
            )?;
            continue;
        }
        let (index, address) = line.split_once(' ').context("an order is a pod and an address")?;
        let event = format!(r#"{{"type":"MODIFIED","object":{}}}"#, pod(index.parse()?, address.parse()?));
        let connection = loop {
            let open =
                watch.lock().ok().and_then(|watch| watch.as_ref().and_then(|open| open.try_clone().ok()));
            match open {
                Some(connection) => break connection,
                None => thread::sleep(Duration::from_millis(1)),
            }
        };
        chunk(connection, &event)?;
    }
    Ok(())
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
            Some("pods") => (pods, Box::new(|i| pod(i, pod_address(i)))),
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
