//! A mesh of Tacit with a pod that a real ztunnel serves.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use tacit_tests::{Mesh, Plan};
use tacit_topology::{MeshFiles, Pod, Process, Tunnel, WorkloadEntry, http_get, until};

use crate::ca::Authority;

/// Identity of `peer`.
pub(crate) const PEER: &str = "spiffe://cluster.local/ns/shop/sa/peer";
/// Name in the authority's certificate.
const AUTHORITY: &str = "authority.tacit.test";
/// Address of the authority in the pod's namespace.
const AUTHORITY_AT: &str = "127.0.0.1:15012";
/// Virtual address of a service of `peer` and of one of `web`, with port 80.
pub(crate) const SERVICES: [&str; 2] = ["10.77.200.1", "10.77.200.2"];

/// Deviations from the usual mesh.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup<'a> {
    /// Policies of Tacit.
    pub(crate) policy: &'a str,
    /// Further lines of the agents' configuration.
    pub(crate) config: &'a str,
    /// Policies of the ztunnel, in its format.
    pub(crate) ztunnel_policies: &'a str,
    /// Service account of `peer` in Tacit's directory.
    pub(crate) peer_account: &'a str,
    /// Service account of `web` in the ztunnel's file.
    pub(crate) web_account: &'a str,
    /// Port of the services' endpoints.
    pub(crate) target_port: u16,
    /// Lifetime of the ztunnel's certificates. It renews them after half of it.
    pub(crate) lifetime_seconds: i64,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self {
            policy: "",
            config: "",
            ztunnel_policies: "[]",
            peer_account: "peer",
            web_account: "web",
            target_port: 20_000,
            lifetime_seconds: 3600,
        }
    }
}

/// The mesh. Its processes end when it is dropped.
pub(crate) struct Interop {
    pub(crate) mesh: Mesh,
    pub(crate) ztunnel: Process,
    pub(crate) authority: Authority,
    program: PathBuf,
    folder: PathBuf,
}

impl Interop {
    /// Starts everything, and waits until it serves.
    pub(crate) fn start(tag: &str, program: &Path, setup: Setup<'_>) -> Result<Self> {
        let plan = Plan::new(tag).pod("b", "shop", "web").outside("a", "shop", "peer");
        let mesh = plan.policy(setup.policy).config(setup.config).with_directories(|_, mesh| {
            let peer = WorkloadEntry {
                tunnel: Tunnel::Hbone,
                service_account: setup.peer_account.to_owned(),
                ..WorkloadEntry::of(mesh.pod("peer")?)
            };
            Ok([mesh.directory(), vec![peer]].concat())
        })?;
        add_services(&mesh, setup)?;
        let folder = mesh.topology().files().join("ztunnel");
        fs::create_dir_all(&folder)?;
        let authority = start_authority(&mesh, &folder, setup)?;
        fs::write(folder.join("workloads.yaml"), workloads(&mesh, setup)?)?;
        let ztunnel = start_ztunnel(program, mesh.pod("peer")?, &folder)?;
        Ok(Self { mesh, ztunnel, authority, program: program.to_owned(), folder })
    }

    /// Starts another ztunnel, after the first one has ended.
    pub(crate) fn restart_ztunnel(&mut self) -> Result<()> {
        self.ztunnel = start_ztunnel(&self.program, self.mesh.pod("peer")?, &self.folder)?;
        Ok(())
    }

    pub(crate) fn web(&self) -> Result<&Pod> {
        self.mesh.pod("web")
    }

    pub(crate) fn peer(&self) -> Result<&Pod> {
        self.mesh.pod("peer")
    }

    /// Returns what the ztunnel has logged.
    pub(crate) fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("ztunnel.log"))?)
    }
}

/// Adds a service of each pod to the directories of Tacit.
fn add_services(mesh: &Mesh, setup: Setup<'_>) -> Result<()> {
    let mut services = String::from("services:\n");
    for (name, address) in ["peer", "web"].into_iter().zip(SERVICES) {
        let pod = mesh.pod(name)?;
        services += &format!(
            "  - {{name: {name}, namespace: shop, addresses: [{address}], ports: [{{port: 80, targetPort: http}}], \
             endpoints: [{{addresses: [{}], ready: true, ports: {{http: {}}}}}]}}\n",
            pod.ipv4(),
            setup.target_port
        );
    }
    for node in ["a", "b"] {
        let files = mesh.agent(node)?.files();
        let path = files.config().with_file_name("directory.yaml");
        let text = fs::read_to_string(&path)?;
        files.set_directory_text(&format!("{text}{services}"))?;
    }
    Ok(())
}

/// Starts the authority of the ztunnel in the namespace of `peer`.
fn start_authority(mesh: &Mesh, folder: &Path, setup: Setup<'_>) -> Result<Authority> {
    let root = mesh.agent("a")?.files().issuer();
    fs::copy(root.join("root-cert.pem"), folder.join("roots.pem"))?;
    fs::write(folder.join("token"), "any")?;
    let netns = mesh.pod("peer")?.netns();
    Authority::start(netns, AUTHORITY_AT.parse()?, AUTHORITY, root, PEER, setup.lifetime_seconds)
}

/// The ztunnel's view, in its format for files.
fn workloads(mesh: &Mesh, setup: Setup<'_>) -> Result<String> {
    let mut text = String::from("workloads:\n");
    for (name, account, node) in [("peer", "peer", "a"), ("web", setup.web_account, "b")] {
        let pod = mesh.pod(name)?;
        text += &format!(
            "- {{uid: cluster1//v1/Pod/shop/{name}, name: {name}, namespace: shop, serviceAccount: {account}, \
             trustDomain: {}, workloadIps: [\"{}\", \"{}\"], protocol: HBONE, node: {node}, network: \"\", \
             clusterId: cluster1, services: {{\"shop/{name}.shop.svc.cluster.local\": {{80: {}}}}}}}\n",
            MeshFiles::TRUST_DOMAIN,
            pod.ipv4(),
            pod.ipv6(),
            setup.target_port
        );
    }
    text += "services:\n";
    for (name, address) in ["peer", "web"].into_iter().zip(SERVICES) {
        text += &format!(
            "- {{name: {name}, namespace: shop, hostname: {name}.shop.svc.cluster.local, vips: [\"/{address}\"], \
             ports: {{80: {}}}}}\n",
            setup.target_port
        );
    }
    text += &format!("policies: {}\n", setup.ztunnel_policies);
    Ok(text)
}

fn start_ztunnel(program: &Path, peer: &Pod, folder: &Path) -> Result<Process> {
    let log = fs::File::options().create(true).append(true).open(folder.join("ztunnel.log"))?;
    let file = |name: &str| folder.join(name).display().to_string();
    let mut command = peer.command(program);
    command
        .envs([
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", "shop/peer/peer"),
            ("UNSTABLE_ENABLE_SOCKS5", "true"),
            ("NODE_NAME", "a"),
            ("CLUSTER_ID", "cluster1"),
            ("IPV6_ENABLED", "true"),
            ("CA_ADDRESS", &format!("https://{AUTHORITY_AT}")),
            ("ALT_CA_HOSTNAME", AUTHORITY),
            ("CA_ROOT_CA", &file("roots.pem")),
            ("AUTH_TOKEN", &file("token")),
            ("LOCAL_XDS_PATH", &file("workloads.yaml")),
            ("XDS_ADDRESS", ""),
            ("ENABLE_ORIG_SRC", "false"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "60"),
            ("RUST_LOG", "info"),
        ])
        .env("INSTANCE_IP", peer.ipv4().to_string())
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut ztunnel = Process::spawn(&mut command).with_context(|| program.display().to_string())?;
    until("the ztunnel", || {
        if let Some(status) = ztunnel.ended()? {
            let log = fs::read_to_string(folder.join("ztunnel.log"))?;
            let error = log.lines().rev().find(|line| line.starts_with("Error")).unwrap_or_default();
            bail!("the ztunnel has ended: {status}: {error}");
        }
        let ready = http_get(peer.netns(), "127.0.0.1:15021", "/healthz/ready");
        Ok(ready.is_ok_and(|(status, _)| status == 200).then_some(()))
    })?;
    Ok(ztunnel)
}

/// Returns the addresses of a pod with `port`.
pub(crate) fn addresses(pod: &Pod, port: u16) -> [SocketAddr; 2] {
    [SocketAddr::new(pod.ipv4().into(), port), SocketAddr::new(pod.ipv6().into(), port)]
}
