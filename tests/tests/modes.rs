//! PERMISSIVE, STRICT and DISABLE, of workloads and of ports, with every kind of client.
//!
//! The mesh has one server pod for each mode of a workload, with one port for each mode of a port. Expected outcomes are
//! computed by `Origin::is_accepted` and not listed case by case.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fmt::Write,
    io::Read,
    net::{IpAddr, SocketAddr, TcpStream},
    sync::OnceLock,
    time::Duration,
};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe, with_and_without_tacit};
use tacit_topology::{HANG, WorkloadEntry};

/// Greeting of the servers. Clients send nothing, so only their connection can be rejected.
const GREETING: &str = "welcome";
/// Port without an override. The port of a [`Setting`] is its number above this one.
const PORT: u16 = 8000;
/// Time after which a connection counts as dropped. Those that are taken need milliseconds.
const DROPPED: Duration = Duration::from_secs(2);

/// Mode in a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    Absent,
    Unset,
    Disable,
    Permissive,
    Strict,
}

/// Origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    MeshedFar,
    MeshedNear,
    StrangerFar,
    StrangerNear,
    /// The server's own node, like a kubelet's probe.
    OwnNode,
    /// Another node, whose connections are not probes.
    OtherNode,
}

const SETTINGS: [Setting; 5] =
    [Setting::Absent, Setting::Unset, Setting::Disable, Setting::Permissive, Setting::Strict];
const WORKLOADS: [Setting; 4] = [Setting::Unset, Setting::Disable, Setting::Permissive, Setting::Strict];

impl Setting {
    fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Unset => "unset",
            Self::Disable => "disable",
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }

    fn port(self) -> u16 {
        PORT + self as u16
    }

    /// Returns `wider` for an absent or unset mode.
    fn or(self, wider: Self) -> Self {
        match self {
            Self::Absent | Self::Unset => wider,
            mode => mode,
        }
    }
}

impl Origin {
    /// Returns true if the connection is accepted. By Istio's rules, STRICT rejects plaintext that is not the node's probe.
    fn is_accepted(self, workload: Setting, port: Setting) -> bool {
        let mode = port.or(workload.or(Setting::Permissive));
        match self {
            Self::MeshedFar | Self::MeshedNear | Self::OwnNode => true,
            Self::StrangerFar | Self::StrangerNear | Self::OtherNode => mode != Setting::Strict,
        }
    }
}

with_and_without_tacit!(plan:
    a_meshed_client_of_the_other_node_is_always_let_in,
    a_meshed_client_of_the_same_node_is_always_let_in,
    a_stranger_of_the_other_node_is_refused_in_strict,
    a_stranger_of_the_same_node_is_refused_in_strict,
    a_probe_of_the_pods_own_node_is_always_let_in,
    another_node_is_refused_in_strict,
    only_what_is_disabled_can_be_read_on_the_wire,
);

fn plan() -> Plan {
    plan_of("modes")
}

fn plan_of(tag: &str) -> Plan {
    let plan = Plan::new(tag)
        .pod("a", "shop", "client-a")
        .pod("b", "shop", "client-b")
        .outside("a", "shop", "stranger-a")
        .outside("b", "shop", "stranger-b");
    WORKLOADS.iter().fold(plan, |plan, mode| plan.pod("b", "shop", mode.name())).policy(&policy())
}

fn policy() -> String {
    let mut text = String::new();
    for workload in WORKLOADS {
        let (name, mode) = (workload.name(), workload.name().to_uppercase());
        let _ = writeln!(text, "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication");
        let _ = writeln!(text, "metadata: {{name: {name}, namespace: shop}}");
        let _ =
            writeln!(text, "spec:\n  selector: {{matchLabels: {{app: {name}}}}}\n  mtls: {{mode: {mode}}}");
        let _ = writeln!(text, "  portLevelMtls:");
        for port in SETTINGS.into_iter().filter(|port| *port != Setting::Absent) {
            let _ = writeln!(text, "    {}: {{mode: {}}}", port.port(), port.name().to_uppercase());
        }
    }
    text
}

fn a_meshed_client_of_the_other_node_is_always_let_in(mesh: &Mesh) -> Result<()> {
    matrix(mesh, Origin::MeshedFar)
}

fn a_meshed_client_of_the_same_node_is_always_let_in(mesh: &Mesh) -> Result<()> {
    matrix(mesh, Origin::MeshedNear)
}

fn a_stranger_of_the_other_node_is_refused_in_strict(mesh: &Mesh) -> Result<()> {
    matrix(mesh, Origin::StrangerFar)
}

fn a_stranger_of_the_same_node_is_refused_in_strict(mesh: &Mesh) -> Result<()> {
    matrix(mesh, Origin::StrangerNear)
}

fn a_probe_of_the_pods_own_node_is_always_let_in(mesh: &Mesh) -> Result<()> {
    matrix(mesh, Origin::OwnNode)
}

fn another_node_is_refused_in_strict(mesh: &Mesh) -> Result<()> {
    matrix(mesh, Origin::OtherNode)
}

/// Connects to all workloads and ports over both families and reports all wrong outcomes together.
fn matrix(mesh: &Mesh, origin: Origin) -> Result<()> {
    serve_all(mesh)?;
    let mut wrong = Vec::new();
    for workload in WORKLOADS {
        let pod = mesh.pod(workload.name())?;
        for port in SETTINGS {
            for address in [IpAddr::V4(pod.ipv4()), IpAddr::V6(pod.ipv6())] {
                let expected = !mesh.has_tacit() || origin.is_accepted(workload, port);
                let outcome = connect(mesh, origin, SocketAddr::new(address, port.port()))?;
                if outcome != if expected { Outcome::Greeted } else { Outcome::Reset } {
                    wrong.push(format!("{origin:?} to {workload:?} port {port:?} at {address}: {outcome:?}"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{} wrong outcomes:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

fn only_what_is_disabled_can_be_read_on_the_wire(mesh: &Mesh) -> Result<()> {
    let mut wrong = Vec::new();
    for workload in WORKLOADS {
        let pod = mesh.pod(workload.name())?;
        for port in [Setting::Absent, Setting::Disable] {
            // A fresh port has no override.
            let number = if port == Setting::Absent { fresh_port() } else { port.port() };
            let address = SocketAddr::new(pod.ipv4().into(), number);
            let marker = format!("mode-marker-{}-{}", workload.name(), port.name());
            let _server = match port {
                Setting::Absent => Some(Server::start(pod, address, &[&format!("send:{marker}")])?),
                _ => None,
            };
            serve_all(mesh)?;
            let capture = mesh.topology().capture()?;
            let events =
                Client::run(mesh.pod("client-a")?, address, &[&format!("send:{marker}"), "read-end"])?;
            let readable = capture.finish()?.occurrences(marker.as_bytes()) > 0;
            let disabled = port.or(workload) == Setting::Disable;
            if readable != (disabled || !mesh.has_tacit()) {
                wrong.push(format!("{workload:?} port {port:?}: readable {readable}; {events:?}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{} wrong outcomes:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn no_policy_goes_below_the_minimum_mode() -> Result<()> {
    let plan = plan_of("minmode").config("minimumMode: STRICT\n");
    let mesh = plan.with_agents()?;
    for workload in WORKLOADS {
        let pod = mesh.pod(workload.name())?;
        for port in [Setting::Absent, Setting::Disable] {
            let at = SocketAddr::new(pod.ipv4().into(), port.port());
            let _server = Server::start(pod, at, &[&format!("send:{GREETING}"), "shut", "read-end"])?;
            for (origin, expected) in
                [(Origin::MeshedFar, Outcome::Greeted), (Origin::StrangerFar, Outcome::Reset)]
            {
                let found = connect(&mesh, origin, at)?;
                ensure!(found == expected, "{origin:?} to {workload:?}, port {port:?}: {found:?}");
            }
        }
    }
    let status = observe::status(mesh.agent("b")?)?;
    let pods = status["pods"].as_array().context("pods")?;
    for pod in pods.iter().filter(|pod| pod["name"] != "client-b") {
        ensure!(pod["mode"] == "STRICT" && pod["raised_by_minimum"] == true, "{pod:#}");
    }
    Ok(())
}

/// The directory gives pod `late` an address that its namespace does not have.
#[test]
#[ignore = "needs root"]
fn the_policy_of_a_pod_that_cannot_be_enrolled_is_followed() -> Result<()> {
    let mesh =
        Plan::new("modehold").pod("b", "shop", "web").outside("a", "shop", "stranger").with_agents()?;
    let (b, stranger) = (mesh.agent("b")?, mesh.pod("stranger")?);
    let late = mesh.topology().node("b")?.pod("shop", "late")?;
    let server = Server::start(&late, SocketAddr::new(late.ipv4().into(), fresh_port()), &["echo"])?;
    let elsewhere = WorkloadEntry { addresses: vec![[10, 77, 250, 250].into()], ..WorkloadEntry::of(&late) };
    b.files().set_directory(&[mesh.directory(), vec![elsewhere]].concat())?;
    let waits_with = |mode: &str| {
        observe::wait_status(b, &format!("{mode} of a pod that waits"), |status| {
            let pod = status["pods"].as_array()?.iter().find(|pod| pod["name"] == "late")?;
            let waits =
                pod["state"].to_string().contains("no process of its cgroup is in a network namespace");
            (waits && pod["mode"] == mode).then_some(())
        })
    };
    waits_with("PERMISSIVE")?;
    Client::echo(stranger, server.address(), "control: plaintext is taken")?;
    b.files().set_policy(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    waits_with("STRICT")?;
    let accepted = server.accepted()?;
    let connect = || TcpStream::connect_timeout(&server.address(), DROPPED);
    ensure!(
        stranger.netns().enter(connect)?.is_err() && server.accepted()? == accepted,
        "plaintext is taken"
    );
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_refused_stranger_is_counted_and_logged_by_address_and_reason() -> Result<()> {
    const REASON: &str = "plaintext_in_strict";
    let mesh = plan().with_agents()?;
    let (strict, stranger) = (mesh.pod("strict")?, mesh.pod("stranger-a")?);
    let agent = mesh.agent("b")?;
    for (to, who) in [
        (IpAddr::V4(strict.ipv4()), IpAddr::V4(stranger.ipv4())),
        (IpAddr::V6(strict.ipv6()), IpAddr::V6(stranger.ipv6())),
    ] {
        let server = Server::start(strict, SocketAddr::new(to, PORT), &["echo"])?;
        let before = observe::refused(agent, REASON)?;
        Client::run(stranger, server.address(), &["read-end"])?;
        observe::wait_refused(agent, REASON, before, &who.to_string())?;
        assert_eq!(server.accepted()?, 0);
    }
    Ok(())
}

/// Outcome of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Greeted,
    /// Refused or reset before any byte.
    Reset,
    Other(String),
}

fn connect(mesh: &Mesh, origin: Origin, to: SocketAddr) -> Result<Outcome> {
    let pod = match origin {
        Origin::MeshedFar => "client-a",
        Origin::MeshedNear => "client-b",
        Origin::StrangerFar => "stranger-a",
        Origin::StrangerNear => "stranger-b",
        Origin::OwnNode => return probe(mesh, "b", to),
        Origin::OtherNode => return probe(mesh, "a", to),
    };
    let events = Client::run(mesh.pod(pod)?, to, &["read-end"])?;
    let is = |event: &Value, key: &str, value: &str| event[key] == value;
    // A reset can arrive before connect() returns.
    let is_refusal =
        |event: &Value| ["ConnectionRefused", "ConnectionReset"].iter().any(|kind| is(event, "error", kind));
    let refused = events.iter().any(|event| is(event, "step", "connect") && is_refusal(event));
    let end = events.iter().find(|event| is(event, "event", "end"));
    Ok(match end {
        Some(end) if is(end, "end", "eof") && end["text"] == format!("{GREETING}\n") => Outcome::Greeted,
        Some(end) if is(end, "end", "ConnectionReset") && end["bytes"] == 0 => Outcome::Reset,
        None if refused => Outcome::Reset,
        _ => Outcome::Other(format!("{events:?}")),
    })
}

/// Connects from a node itself, outside all pods and their cgroups.
fn probe(mesh: &Mesh, node: &str, to: SocketAddr) -> Result<Outcome> {
    let answer = mesh.topology().node(node)?.netns().enter(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, HANG)?;
        stream.set_read_timeout(Some(HANG))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    Ok(match answer {
        Ok(text) if text == format!("{GREETING}\n") => Outcome::Greeted,
        Err(error)
            if [std::io::ErrorKind::ConnectionReset, std::io::ErrorKind::ConnectionRefused]
                .contains(&error.kind()) =>
        {
            Outcome::Reset
        }
        other => Outcome::Other(format!("{other:?}")),
    })
}

/// Starts the servers of the matrix, once for each mesh. They run until the test process exits.
fn serve_all(mesh: &Mesh) -> Result<()> {
    static WITH: OnceLock<Result<Vec<Server>, String>> = OnceLock::new();
    static WITHOUT: OnceLock<Result<Vec<Server>, String>> = OnceLock::new();
    let cell = if mesh.has_tacit() { &WITH } else { &WITHOUT };
    let start = || -> Result<Vec<Server>> {
        let greeting = format!("send:{GREETING}");
        let mut servers = Vec::new();
        for workload in WORKLOADS {
            for port in SETTINGS {
                let any = SocketAddr::new(IpAddr::from([0_u16; 8]), port.port());
                servers.push(Server::start(
                    mesh.pod(workload.name())?,
                    any,
                    &[&greeting, "shut", "read-end"],
                )?);
            }
        }
        Ok(servers)
    };
    let started = cell.get_or_init(|| start().map_err(|error| format!("{error:#}")));
    started.as_ref().map(drop).map_err(|text| anyhow::anyhow!("{text}")).context("servers of the matrix")
}
