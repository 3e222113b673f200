//! A cluster of two nodes: etcd, API server, controller manager, scheduler and DNS server on the first, and on both
//! containerd, the kubelet and kube-proxy.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tacit_topology::{run, until};
use xtask_support::progress::Progress;

use super::{
    cgroup::{self, NodeCgroup},
    dns,
    node::{Lifetime, Node, NodePlan},
    node_config,
    programs::Programs,
    runtime,
};

const PKI: &str = include_str!("pki.sh");
/// Folders and cgroups of clusters are called so, with the id of the process that made them.
pub(super) const MARK: &str = "tacit-kube-";

const PLANS: [NodePlan; 2] = [
    NodePlan { name: "node1", address: "10.99.0.1", pods: "10.244.0.0/24", proxy_mode: "nftables" },
    NodePlan { name: "node2", address: "10.99.0.2", pods: "10.244.1.0/24", proxy_mode: "iptables" },
];
/// Of all pods, and of all services.
const PODS: &str = "10.244.0.0/16";
pub(super) const SERVICES: &str = "10.96.0.0/16";
/// The device of the wire between the nodes.
pub(super) const WIRE: &str = "eth0";

/// Images of the tests' pods and of pod sandboxes.
pub(super) const BUSYBOX: &str = "localhost/busybox:1";
pub(super) const PAUSE: &str = "localhost/pause:1";

/// For one `kubectl`, in seconds; above the 120 s that some are told to wait.
const KUBECTL_SECONDS: &str = "180";

/// File in the folder of a cluster that was kept.
pub(super) const KEPT: &str = "kept";

/// A running cluster. Dropping it takes it down.
pub(super) struct Cluster {
    pub(super) nodes: Vec<Node>,
    pub(super) folder: PathBuf,
    name: String,
    programs: PathBuf,
}

impl Cluster {
    /// Brings everything up; pods can be started when it returns.
    pub(super) fn start(programs: &Programs, tacit: &Path, lifetime: Lifetime) -> Result<Self> {
        let name = format!("{MARK}{}", std::process::id());
        let folder = env::temp_dir().join(&name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let bin = folder.join("bin");
        let mut cluster = Self { nodes: Vec::new(), folder, name, programs: bin };
        let mut progress = Progress::new(5);
        progress.step("nodes", || {
            programs.link(&cluster.programs)?;
            cluster.add_nodes(lifetime)
        })?;
        progress.step("etcd, API server", || cluster.start_api())?;
        progress.step("controllers, scheduler, DNS", || {
            cluster.start_controllers()?;
            cluster.start_dns()
        })?;
        progress.step("containerd, images", || cluster.start_containers(programs, tacit))?;
        progress.step("kubelets, proxies", || cluster.start_kubelets())?;
        Ok(cluster)
    }

    fn add_nodes(&mut self, lifetime: Lifetime) -> Result<()> {
        for plan in PLANS {
            let folder = self.folder.join(plan.name);
            let cgroup = NodeCgroup::create(&cgroup_name(&self.name, plan.name))?;
            self.nodes.push(Node::start(plan, folder, cgroup, &self.programs, lifetime)?);
        }
        self.connect()?;
        let mut pki = Command::new("sh");
        pki.args(["-c", PKI, "pki"]).arg(self.pki()).arg(PLANS[0].address);
        run(pki.args(PLANS.map(|plan| format!("{}={}", plan.name, plan.address)))).map(drop)
    }

    /// One wire between the nodes, and routes to each other's pods. Services are translated before they would leave.
    fn connect(&self) -> Result<()> {
        let [first, second] = self.nodes.as_slice() else { bail!("the wire has two ends") };
        let peer = second.pid.to_string();
        let ends = ["link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", &peer];
        // In the first node's network alone: the other's process is known by this machine's number.
        let mut link = Command::new("nsenter");
        run(link.args(["--target", &first.pid.to_string(), "--net", "ip"]).args(ends))?;
        for (near, far) in [(first, second), (second, first)] {
            let ip = |line: &str| run(near.command("ip").args(line.split(' ')));
            ip(&format!("address add {}/24 dev {WIRE}", near.plan.address))?;
            ip(&format!("link set {WIRE} up"))?;
            ip(&format!("route add {} via {}", far.plan.pods, far.plan.address))?;
            ip(&format!("route add {SERVICES} dev {WIRE}"))?;
        }
        Ok(())
    }

    fn start_api(&mut self) -> Result<()> {
        let etcd = flags(&[
            ("data-dir", &self.folder.join("etcd").display().to_string()),
            ("listen-client-urls", "http://127.0.0.1:2379"),
            ("advertise-client-urls", "http://127.0.0.1:2379"),
            ("listen-peer-urls", "http://127.0.0.1:2380"),
            ("unsafe-no-fsync", "true"),
        ]);
        self.nodes[0].daemon("etcd", &etcd)?;
        self.answers("etcd", |node| {
            let mut curl = node.command("curl");
            curl.args(["-fs", "http://127.0.0.1:2379/health"]);
            curl
        })?;
        let flags = self.api_flags();
        self.nodes[0].daemon("kube-apiserver", &flags)?;
        let admin = self.kubeconfig("admin");
        self.answers("kube-apiserver", |node| {
            let mut kubectl = node.command("kubectl");
            kubectl.arg("--kubeconfig").arg(&admin).args(["get", "--raw", "/readyz"]);
            kubectl
        })
    }

    fn api_flags(&self) -> Vec<String> {
        let pki = |name: &str| self.pki().join(name).display().to_string();
        flags(&[
            ("etcd-servers", "http://127.0.0.1:2379"),
            ("secure-port", "6443"),
            ("advertise-address", PLANS[0].address),
            ("service-cluster-ip-range", SERVICES),
            ("tls-cert-file", &pki("apiserver.crt")),
            ("tls-private-key-file", &pki("apiserver.key")),
            ("client-ca-file", &pki("ca.crt")),
            ("authorization-mode", "Node,RBAC"),
            ("enable-admission-plugins", "NodeRestriction"),
            ("allow-privileged", "true"),
            ("service-account-issuer", "https://kubernetes.default.svc"),
            ("service-account-signing-key-file", &pki("sa.key")),
            ("service-account-key-file", &pki("sa.pub")),
            ("api-audiences", "https://kubernetes.default.svc"),
            ("kubelet-client-certificate", &pki("apiserver-kubelet.crt")),
            ("kubelet-client-key", &pki("apiserver-kubelet.key")),
            ("kubelet-certificate-authority", &pki("ca.crt")),
            ("kubelet-preferred-address-types", "InternalIP"),
        ])
    }

    fn start_controllers(&mut self) -> Result<()> {
        let pki = |name: &str| self.pki().join(name).display().to_string();
        let access = |name: &str| {
            let file = self.kubeconfig(name).display().to_string();
            [
                ("kubeconfig", file.clone()),
                ("authentication-kubeconfig", file.clone()),
                ("authorization-kubeconfig", file),
            ]
        };
        let plain = |name: &str, more: &[(&str, &str)]| {
            let own = access(name);
            let all: Vec<(&str, &str)> =
                own.iter().map(|(flag, value)| (*flag, value.as_str())).chain(more.iter().copied()).collect();
            flags(&[all.as_slice(), &[("leader-elect", "false")]].concat())
        };
        let controllers = plain(
            "controller-manager",
            &[
                ("use-service-account-credentials", "true"),
                ("root-ca-file", &pki("ca.crt")),
                ("service-account-private-key-file", &pki("sa.key")),
                ("cluster-signing-cert-file", &pki("ca.crt")),
                ("cluster-signing-key-file", &pki("ca.key")),
                ("allocate-node-cidrs", "false"),
            ],
        );
        let scheduler = plain("scheduler", &[]);
        self.nodes[0].daemon("kube-controller-manager", &controllers)?;
        self.nodes[0].daemon("kube-scheduler", &scheduler)?;
        // Without it no pod is admitted.
        self.eventually("the default service account", |cluster| {
            cluster.kubectl(&["get", "serviceaccount", "default"]).map(drop)
        })
    }

    fn start_dns(&mut self) -> Result<()> {
        let file = self.folder.join("Corefile");
        let arguments = dns::configure(&file, PLANS[0].address, &self.kubeconfig("admin"))?;
        self.nodes[0].daemon("coredns", &arguments)?;
        self.apply(&dns::service(PLANS[0].address))?;
        self.answers("coredns", |node| {
            let mut curl = node.command("curl");
            curl.args(["-fs", dns::READY]);
            curl
        })
    }

    fn start_containers(&mut self, programs: &Programs, tacit: &Path) -> Result<()> {
        let busybox = self.programs.join("busybox");
        let archives = [self.folder.join("busybox.tar"), self.folder.join("pause.tar"), tacit.to_owned()];
        xtask_image::single(BUSYBOX, &busybox, &["bin/busybox", "sh"], &archives[0])?;
        xtask_image::single(PAUSE, &busybox, &["bin/busybox", "sleep", "infinity"], &archives[1])?;
        let unlimited = self.programs.join(runtime::NAME);
        fs::copy(env::current_exe()?, &unlimited).with_context(|| format!("no {}", unlimited.display()))?;
        for node in &mut self.nodes {
            // The node has these folders in the usual places of CNI.
            let list = node.folder.join("net.d/10-bridge.conflist");
            fs::write(list, node_config::bridge(node.plan.pods).to_string())?;
            programs.copy_plugins(&node.folder.join("plugins"))?;
            let file = node.folder.join("containerd.toml");
            let runc = if node.has_limits()? { self.programs.join("runc") } else { unlimited.clone() };
            fs::write(&file, node_config::containerd(&node.folder, &runc))?;
            node.daemon("containerd", &["-c".to_owned(), file.display().to_string()])?;
        }
        for node in &self.nodes {
            until("containerd answers", || Ok(run(node.command("ctr").arg("version")).ok()))?;
            for archive in &archives {
                run(node.command("ctr").args(["images", "import"]).arg(archive))?;
            }
        }
        Ok(())
    }

    fn start_kubelets(&mut self) -> Result<()> {
        let (pki, proxy) = (self.pki(), self.kubeconfig("proxy").display().to_string());
        for node in &mut self.nodes {
            let NodePlan { name, address, proxy_mode, .. } = node.plan;
            let file = node.folder.join("kubelet.json");
            fs::write(&file, node_config::kubelet(&pki, name).to_string())?;
            let arguments = flags(&[
                ("config", &file.display().to_string()),
                ("kubeconfig", &pki.join(format!("{name}.kubeconfig")).display().to_string()),
                ("hostname-override", name),
                ("node-ip", address),
            ]);
            node.daemon("kubelet", &arguments)?;
            let arguments = flags(&[
                ("kubeconfig", &proxy),
                ("proxy-mode", proxy_mode),
                ("cluster-cidr", PODS),
                ("hostname-override", name),
                // The machine's limits of connection tracking stay as they are.
                ("conntrack-max-per-core", "0"),
                ("conntrack-min", "0"),
                ("conntrack-tcp-timeout-established", "0s"),
                ("conntrack-tcp-timeout-close-wait", "0s"),
            ]);
            node.daemon("kube-proxy", &arguments)?;
        }
        self.eventually("both nodes are Ready", |cluster| {
            let path = "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}";
            let states = cluster.kubectl(&["get", "nodes", "-o", path])?;
            if states == "True True" { Ok(()) } else { bail!("{states:?}") }
        })?;
        self.tell_pod_ranges()
    }

    /// Nodes say where their pods' addresses are taken from. The controller manager would give out ranges in the order in
    /// which nodes come.
    fn tell_pod_ranges(&self) -> Result<()> {
        for NodePlan { name, pods, .. } in PLANS {
            let ranges = json!({"spec": {"podCIDR": pods, "podCIDRs": [pods]}}).to_string();
            self.kubectl(&["patch", "node", name, "--type=merge", "-p", &ranges])?;
        }
        Ok(())
    }

    /// Waits until a command of the first node succeeds; says what the daemon wrote when it never does.
    fn answers(&self, daemon: &str, command: impl Fn(&Node) -> Command) -> Result<()> {
        let node = &self.nodes[0];
        until(&format!("{daemon} answers"), || Ok(run(&mut command(node)).ok().map(drop)))
            .with_context(|| tail(&node.log(daemon)))
    }

    /// Asks until it is so; the last answer is the error's.
    pub(super) fn eventually(&self, what: &str, ask: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let mut last = String::new();
        until(what, || match ask(self) {
            Ok(()) => Ok(Some(())),
            Err(error) => {
                last = format!("{error:#}");
                Ok(None)
            }
        })
        .with_context(|| format!("last answer: {last}"))
    }

    /// Returns the output of `kubectl`, as the cluster's administrator.
    pub(super) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.nodes[0].command("timeout");
        command.args([KUBECTL_SECONDS, "kubectl"]);
        Ok(run(command.arg("--kubeconfig").arg(self.kubeconfig("admin")).args(arguments))?.trim().to_owned())
    }

    /// Starts `program`, for at most three minutes, with the rights of the cluster's administrator.
    pub(super) fn administrator(&self, program: &Path) -> Command {
        let mut command = self.nodes[0].command("timeout");
        command.arg("180").arg(program).arg("--kubeconfig").arg(self.kubeconfig("admin"));
        command
    }

    /// Creates or changes objects.
    pub(super) fn apply(&self, objects: &[Value]) -> Result<()> {
        let file = self.folder.join("apply.json");
        fs::write(&file, json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string())?;
        self.kubectl(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// Returns the command that opens a shell in a kept cluster.
    pub(super) fn reach(&self) -> String {
        format!(
            "nsenter --target {} --net --mount --pid --uts --ipc --cgroup --wd=/ env KUBECONFIG={} PATH={}:$PATH bash",
            self.nodes[0].pid,
            self.kubeconfig("admin").display(),
            self.programs.display()
        )
    }

    /// Lets the cluster run on when this program ends.
    pub(super) fn keep(mut self) -> Result<()> {
        fs::write(self.folder.join(KEPT), "")?;
        std::mem::take(&mut self.nodes).into_iter().for_each(Node::keep);
        // Not dropped: that would take it down.
        std::mem::forget(self);
        Ok(())
    }

    fn pki(&self) -> PathBuf {
        self.folder.join("pki")
    }

    /// Returns the file with the root of the API server's certificate.
    pub(super) fn authority(&self) -> PathBuf {
        self.pki().join("ca.crt")
    }

    fn kubeconfig(&self, who: &str) -> PathBuf {
        self.pki().join(format!("{who}.kubeconfig"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.clear();
        if let Err(error) = remove(&self.folder, &self.name) {
            eprintln!("cannot remove {}: {error:#}", self.name);
        }
    }
}

/// Removes what a cluster leaves when its processes are gone.
pub(super) fn remove(folder: &Path, name: &str) -> Result<()> {
    for plan in PLANS {
        cgroup::remove(&cgroup_name(name, plan.name))?;
    }
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

/// Name of a node's cgroup, below the root of the hierarchy.
fn cgroup_name(cluster: &str, node: &str) -> String {
    format!("{cluster}-{node}")
}

fn flags(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

/// The end of a log.
pub(super) fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(15).collect();
    format!("{}:\n{}", log.display(), lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
}
