//! Cost of the directory of a large cluster: `cargo run --release -p tacit --example directory [PODS SERVICES]`.
//!
//! A child process plays the API server, so that neither its memory nor its time is counted. It lists pods of some 10 KiB in pages
//! of 500 (two addresses, five labels, `managedFields`), services and endpoint slices of ten endpoints. Measured are:
//!
//! - memory, and the time until the directory is complete;
//! - lookups of addresses in random order;
//! - the time from a change of a pod to the published directory that has it, one at a time;
//! - the processor time of this process for each change, at 100 changes a second, and the number of directories that it publishes.
//!   One kind of change matters, a new address, and one does not, another annotation and condition;
//! - a relist.
//!
//! `directory follow KUBECONFIG` follows a real cluster instead, as the agent of `node-0`.

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};
use tacit_core::{directory::Directory, spiffe::TrustDomain};
use tacit_kernel::host;
use tacit_sources::{
    directory::{self, CgroupLayout, LocalNode, Options},
    reload::Watched,
};
use tokio::time::sleep;

mod server;

use server::{Order, changed_address, pod_address, serve, service_address};

const PODS: usize = 100_000;
const SERVICES: usize = 10_000;
const LOOKUPS: usize = 1_000_000;
const CHANGES: usize = 200;
/// Time between two changes of which the delay is measured. Agents gather changes that follow each other sooner.
const PAUSE: Duration = Duration::from_millis(100);
/// Changes of a second while processor time is measured, and their number.
const RATE: usize = 100;
const PACED: usize = 1_000;
/// Time between two figures of a cluster that is followed.
const SHOWN: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let number = |index: usize, default| args.get(index).map_or(Ok(default), |text| text.parse::<usize>());
    if args.first().is_some_and(|first| first == "serve") {
        return serve(number(1, PODS)?, number(2, SERVICES)?);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if let [first, file] = args.as_slice()
        && first == "follow"
    {
        return runtime.block_on(follow(Path::new(file)));
    }
    runtime.block_on(measure(number(0, PODS)?, number(1, SERVICES)?))
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
    let opened = open(&config).await;
    std::fs::remove_file(config)?;
    let watched = opened?;
    let directory = watched.current();
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
        writeln!(orders, "{}", Order::Address(pod, address))?;
        changes.wait_for(|directory| directory.at(address).is_some()).await?;
        took.push(begin.elapsed());
        sleep(PAUSE).await;
    }
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    println!("one pod change: p50 {:.1?}, p99 {:.1?}, most {:.1?}", at(50), at(99), at(100));
    host::release_memory();
    println!("memory after {CHANGES} changes: {} MiB", memory()?.0);
    let mut last = CHANGES;
    for matters in [true, false] {
        last += PACED + 1;
        paced(&watched, &mut orders, matters, last).await?;
    }
    // The peak is counted from here on.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let (begin, last) = (Instant::now(), changed_address(last + 1));
    writeln!(orders, "{}", Order::Relist)?;
    writeln!(orders, "{}", Order::Address(0, last))?;
    changes.wait_for(|directory| directory.at(last).is_some()).await?;
    println!("all pods listed again in {:.2?}; memory at most {} MiB", begin.elapsed(), memory()?.1);
    server.kill()?;
    server.wait()?;
    Ok(())
}

/// Opens the directory of a cluster and prints what that took.
async fn open(kubeconfig: &Path) -> Result<Watched<Directory>> {
    let (before, begin) = (memory()?, Instant::now());
    let options = Options { kubeconfig: Some(kubeconfig.to_owned()), ..Options::default() };
    let local_node = LocalNode {
        node: "node-0".into(),
        trust_domain: TrustDomain::parse("cluster.local")?,
        cgroups: CgroupLayout::of(Path::new("/sys/fs/cgroup/kubepods.slice")),
        ranges: Arc::default(),
    };
    let (opening, _) = directory::open(&options, local_node).await?;
    let watched = opening.complete().await.context("the tasks that watch the API exited")?;
    let directory = watched.current();
    println!("{} workloads, {} services", directory.len(), directory.services().count());
    let (took, used, now) = (begin.elapsed(), processor_time()?, memory()?);
    println!(
        "complete after {took:.2?}, {used:.2?} of processor time; memory {} -> {} MiB, at most {} MiB",
        before.0, now.0, now.1
    );
    Ok(watched)
}

/// Follows the cluster of a kubeconfig file, and prints every ten seconds what that took.
async fn follow(kubeconfig: &Path) -> Result<()> {
    let watched = open(kubeconfig).await?;
    loop {
        let (used, loads) = (processor_time()?, watched.state().loads);
        sleep(SHOWN).await;
        host::release_memory();
        let used = processor_time()?.saturating_sub(used);
        let loads = watched.state().loads - loads;
        println!("{SHOWN:?}: {used:.2?} of processor time, {loads} directories, {} MiB", memory()?.0);
    }
}

/// Measures the processor time of changes that come at [`RATE`]. The last one, with the address of number `last`, ends them.
async fn paced(
    watched: &Watched<Directory>,
    orders: &mut ChildStdin,
    matters: bool,
    last: usize,
) -> Result<()> {
    let mut changes = watched.subscribe();
    let (loads, before) = (watched.state().loads, processor_time()?);
    writeln!(orders, "{}", Order::Paced { count: PACED, rate: RATE, matters, last })?;
    changes.wait_for(|directory| directory.at(changed_address(last)).is_some()).await?;
    let used = processor_time()?.saturating_sub(before);
    let each = used.as_secs_f64() * 1e6 / PACED as f64;
    let published = watched.state().loads - loads;
    let what = if matters { "matter" } else { "do not matter" };
    println!(
        "{PACED} changes that {what}, {RATE} a second: {each:.0} us of processor time each, {published} directories"
    );
    Ok(())
}

/// The processor time that this process has used.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
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

fn kubeconfig(port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"http://127.0.0.1:{port}\"}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: c}}}}]\nusers: [{{name: c, user: {{}}}}]\n"
    )
}
