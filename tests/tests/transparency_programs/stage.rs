//! The meshes without and with Tacit, and programs in their pods.

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail, ensure};
use tacit_tests::{Mesh, Plan};
use tacit_topology::{HANG, Pod, Process, WorkloadEntry, until};

/// Port of nginx in the pods `far` and `near`.
const WEB: u16 = 80;
/// A port that policies deny. nginx listens on it.
const DENIED: u16 = 81;
/// The same with PROXY protocol.
const WEB_PROXIED: u16 = 82;
/// HTTP/2 without TLS.
const WEB_TWO: u16 = 83;
/// Ports on which nginx listens at addresses of one family only.
const WEB_V4: u16 = 84;
const WEB_V6: u16 = 85;
/// The same with TCP_DEFER_ACCEPT.
const WEB_DEFERRED: u16 = 86;
/// A port on which nobody listens.
const CLOSED: u16 = 79;
/// Addresses of workloads to which the routes of node b lead nowhere: without an answer, and with one.
const SILENT: [&str; 2] = ["10.77.2.202", "fd77:2::202"];
const UNREACHABLE: [&str; 2] = ["10.77.2.201", "fd77:2::201"];
/// Repetitions of a SYN in the pod `client`: `connect()` gives up after some three seconds instead of two minutes.
const SYN_RETRIES: &str = "1";
/// Folders of the system's own programs, which come before `PATH`: the first ones there may be wrappers, which start slowly.
const SYSTEM: &str = "/usr/bin:/bin:/usr/sbin:/sbin";

/// The surroundings of one line: a mesh, and names for its addresses and ports.
pub(crate) struct Scene<'a> {
    mesh: &'a Mesh,
    folder: PathBuf,
    names: BTreeMap<String, String>,
}

impl<'a> Scene<'a> {
    /// Makes the scene of a line whose first port is `ports`.
    pub(crate) fn new(mesh: &'a Mesh, ports: u16) -> Result<Self> {
        let folder = mesh.topology().node("a")?.files()?.join(ports.to_string());
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let mut names = BTreeMap::new();
        let mut name = |name: &str, value: String| names.insert(name.to_owned(), value);
        for pod in ["client", "near", "far"] {
            let pod = mesh.pod(pod)?;
            name(&format!("{}4", pod.name()), pod.ipv4().to_string());
            name(&format!("{}6", pod.name()), pod.ipv6().to_string());
        }
        for (kind, [v4, v6]) in [("silent", SILENT), ("unreachable", UNREACHABLE)] {
            name(&format!("{kind}4"), v4.to_owned());
            name(&format!("{kind}6"), v6.to_owned());
        }
        let known = [
            ("web", WEB),
            ("denied", DENIED),
            ("proxied", WEB_PROXIED),
            ("two", WEB_TWO),
            ("v4", WEB_V4),
            ("v6", WEB_V6),
            ("deferred", WEB_DEFERRED),
            ("closed", CLOSED),
        ];
        let own = [("p1", ports), ("p2", ports + 1), ("p3", ports + 2), ("p4", ports + 3)];
        known.into_iter().chain(own).for_each(|(port, number)| drop(name(port, number.to_string())));
        name("folder", folder.display().to_string());
        Ok(Self { mesh, folder, names })
    }

    /// Replaces names in braces: `{far4}`, `{near6}`, `{silent4}`, `{closed}`, `{p1}` ...
    pub(crate) fn fill(&self, text: &str) -> String {
        self.names
            .iter()
            .fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
    }

    /// Returns the value of a name.
    pub(crate) fn port(&self, name: &str) -> Result<u16> {
        self.fill(&format!("{{{name}}}")).parse().with_context(|| format!("no port {name}"))
    }

    pub(crate) fn pod(&self, name: &str) -> Result<&'a Pod> {
        self.mesh.pod(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file with names replaced, and returns its path.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<String> {
        let file = self.folder.join(name);
        fs::write(&file, self.fill(text)).with_context(|| format!("write {}", file.display()))?;
        Ok(file.display().to_string())
    }

    /// Returns the command that runs `words` in a pod.
    pub(crate) fn command(&self, pod: &str, words: &[&str]) -> Result<Command> {
        let [program, arguments @ ..] = words else { bail!("no program") };
        let path = path()?;
        ensure_found(program, &path)?;
        let mut command = self.pod(pod)?.command(program);
        command.args(arguments.iter().map(|word| self.fill(word))).current_dir(&self.folder);
        command.env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a program to its end and returns its exit code and what it printed. Times in messages are left out.
    pub(crate) fn shown(&self, pod: &str, words: &[&str]) -> Result<String> {
        ensure_found(words.first().context("no program")?, &path()?)?;
        let limit = HANG.as_secs().to_string();
        let limited = [&["timeout", &limit], words].concat();
        let output = self.command(pod, &limited)?.output().with_context(|| format!("run {words:?}"))?;
        let code = output.status.code().map_or("no".to_owned(), |code| code.to_string());
        let printed =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).trim_end().to_owned());
        Ok(without_times(format!("exit {code}\n{}", printed.join("\n")).trim_end()))
    }

    /// Returns the file with what a server of [`Scene::server`] has printed.
    pub(crate) fn log(&self, pod: &str, port: u16) -> PathBuf {
        self.folder.join(format!("{pod}-{port}.log"))
    }

    /// Starts a server in a pod and waits until it listens on a port.
    pub(crate) fn server(&self, pod: &str, words: &[&str], port: u16) -> Result<Process> {
        let log = self.log(pod, port);
        let file = fs::File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let mut command = self.command(pod, words)?;
        let mut process = Process::spawn(command.stdout(file.try_clone()?).stderr(file))?;
        let pod = self.pod(pod)?;
        until(&format!("{words:?} listens on port {port} in pod {}", pod.name()), || {
            if let Some(status) = process.ended()? {
                bail!("{words:?}: {status}: {}", fs::read_to_string(&log)?);
            }
            Ok(listens(pod, port)?.then_some(()))
        })?;
        Ok(process)
    }

    /// Starts nginx with these lines in its section `http`.
    pub(crate) fn nginx(&self, pod: &str, http: &str, port: u16) -> Result<Process> {
        let text = format!(
            "user root; daemon off; worker_processes 1; pid {{folder}}/{pod}.pid; error_log stderr;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; client_body_temp_path {{folder}}/{pod}-body; proxy_temp_path {{folder}}/{pod}-proxy;\n\
             fastcgi_temp_path {{folder}}/{pod}-f; uwsgi_temp_path {{folder}}/{pod}-u; scgi_temp_path {{folder}}/{pod}-s;\n\
             default_type text/plain; client_max_body_size 64m; keepalive_requests 100000;\n{http}\n}}\n"
        );
        let name = format!("{pod}-{port}.conf");
        let file = self.write(&name, &text)?;
        self.server(pod, &["nginx", "-p", "{folder}", "-c", &file, "-e", "stderr"], port)
    }
}

/// Starts nginx in the pods `far` and `near`, on all its ports.
pub(crate) fn web(scene: &Scene<'_>) -> Result<Vec<Process>> {
    fs::write(scene.folder().join("big"), vec![b'x'; 4 << 20])?;
    let server = "location / { return 200 \"page\\n\"; }\n\
                  location /who { return 200 \"$remote_addr $server_addr $server_port\\n\"; }\n\
                  location /count { return 200 \"$connection_requests\\n\"; }\n\
                  location /big { root {folder}; }\n";
    let proxied = "location / { return 200 \"$proxy_protocol_addr through $remote_addr\\n\"; }";
    let http = format!(
        "server {{ listen {{web}}; listen [::]:{{web}}; listen {{denied}}; {server} }}\n\
         server {{ listen {{v4}}; listen [::]:{{v6}} ipv6only=on; listen {{deferred}} deferred; {server} }}\n\
         server {{ listen {{two}} http2; {server} }}\n\
         server {{ listen {{proxied}} proxy_protocol; {proxied} }}\n"
    );
    ["far", "near"].iter().map(|pod| scene.nginx(pod, &http, WEB)).collect()
}

/// Returns the folders of programs: those of `TACIT_PROGRAMS`, and where the system has them.
fn path() -> Result<OsString> {
    let [ours, path] = ["TACIT_PROGRAMS", "PATH"].map(|name| env::var_os(name).unwrap_or_default());
    let all = [ours, SYSTEM.into(), path];
    env::join_paths(all.iter().flat_map(env::split_paths)).context("PATH")
}

fn ensure_found(program: &str, path: &OsStr) -> Result<()> {
    let is_found = env::split_paths(path).any(|folder| folder.join(program).is_file());
    ensure!(
        is_found,
        "no program {program}: `cargo xtask setup` fetches it. TACIT_PROGRAMS has the folders of programs that are not on PATH"
    );
    Ok(())
}

/// Returns true if a socket listens on the port in a pod, whatever its address.
fn listens(pod: &Pod, port: u16) -> Result<bool> {
    /// `TCP_LISTEN` of the kernel's `tcp_states.h`, as /proc/net/tcp has it.
    const LISTEN: &str = "0A";
    let tables = pod.netns().enter(|| {
        ["tcp", "tcp6"]
            .map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default())
    })?;
    let end = format!(":{port:04X}");
    Ok(tables.iter().flat_map(|table| table.lines()).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some(LISTEN)
    }))
}

/// Replaces `after 12 ms`, which curl prints.
fn without_times(text: &str) -> String {
    let mut parts = text.split("after ");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|digit: char| digit.is_ascii_digit());
        let part = if rest.starts_with(" ms") || rest.starts_with(" milliseconds") { rest } else { part };
        shown.push_str("after ");
        shown.push_str(part.strip_prefix(' ').unwrap_or(part));
    }
    shown
}

pub(crate) fn without_tacit() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || prepared(plan().without_agents()?))
}

pub(crate) fn with_tacit() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || prepared(plan().with_directories(|_, mesh| Ok(directory(mesh)))?))
}

fn plan() -> Plan {
    let policy = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-far, namespace: shop}}\n\
         spec: {{action: DENY, selector: {{matchLabels: {{app: far}}}}, rules: [{{to: [{{operation: {{ports: ['{DENIED}']}}}}]}}]}}\n"
    );
    let plan = Plan::new("programs").policy(&policy);
    plan.pod("a", "shop", "client").pod("a", "shop", "near").pod("b", "shop", "far")
}

/// The pods, and pods that have been there before.
fn directory(mesh: &Mesh) -> Vec<WorkloadEntry> {
    let mut entries = mesh.directory();
    let Some(far) = entries.iter().find(|entry| entry.name == "far").cloned() else { return entries };
    for (name, addresses) in [("silent", SILENT), ("unreachable", UNREACHABLE)] {
        let addresses = addresses.iter().filter_map(|text| text.parse().ok()).collect();
        // No agent waits for pods of a third node.
        entries.push(WorkloadEntry { name: name.to_owned(), addresses, node: "c".to_owned(), ..far.clone() });
    }
    entries
}

/// Has connections of the client fail early, and the routes of node b lead nowhere for some addresses.
fn prepared(mesh: Mesh) -> Result<Mesh> {
    let client = mesh.pod("client")?;
    client.netns().enter(|| fs::write("/proc/sys/net/ipv4/tcp_syn_retries", SYN_RETRIES))??;
    let node = mesh.topology().node("b")?;
    for (kind, addresses) in [("blackhole", SILENT), ("unreachable", UNREACHABLE)] {
        for address in addresses {
            let status = node.command("ip")?.args(["route", "add", kind, address]).status()?;
            ensure!(status.success(), "route {kind} {address}: {status}");
        }
    }
    Ok(mesh)
}
