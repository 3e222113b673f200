//! AuthorizationPolicy on whole nodes: connections across nodes, on one node and as plaintext, and open flows when a
//! policy changes.
//!
//! Every rejection has a control: the same client connects to a pod that no policy selects, or an allowed client to the
//! same pod.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    io::Read,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
};
use tacit_tests::{Client, Mesh, Plan, Server, agent_program, fresh_port, observe};
use tacit_topology::{Agent, HANG, Pod, Tunnel, WorkloadEntry, run, until};

const GREETING: &str = "welcome";

/// Clients `cart` and `batch` on node a, `near` and `other` beside the servers `web` and `db` on node b, and pods outside
/// the mesh.
fn plan() -> Plan {
    Plan::new("authz")
        .pod("a", "shop", "cart")
        .pod("a", "shop", "batch")
        .pod("b", "shop", "near")
        .pod("b", "shop", "other")
        .pod("b", "shop", "web")
        .pod("b", "shop", "db")
        .outside("a", "shop", "stranger")
        .outside("b", "shop", "neighbour")
}

/// Returns an AuthorizationPolicy for `web`. `rest` is the rest of its `spec` in flow style.
fn for_web(name: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: web}}}}, {rest}}}\n"
    )
}

fn principals(names: &[&str]) -> String {
    let all: Vec<_> = names.iter().map(|name| format!("cluster.local/ns/shop/sa/{name}")).collect();
    format!("rules: [{{from: [{{source: {{principals: [{}]}}}}]}}]", all.join(", "))
}

/// Starts a server for each family that sends a greeting to every client.
fn greeters(pod: &Pod) -> Result<Vec<Server>> {
    let greeting = format!("send:{GREETING}");
    let port = fresh_port();
    let start = |ip: IpAddr| Server::start(pod, SocketAddr::new(ip, port), &[&greeting, "shut", "read-end"]);
    Ok(vec![start(pod.ipv4().into())?, start(pod.ipv6().into())?])
}

/// Returns true if `pod` gets the greeting and false after a reset. Any other outcome is an error.
fn is_greeted(pod: &Pod, server: &Server) -> Result<bool> {
    let events = Client::run(pod, server.address(), &["read-end"])?;
    let has = |key: &str, value: &str| events.iter().any(|event| event[key] == value);
    if has("end", "eof") && has("text", &format!("{GREETING}\n")) {
        return Ok(true);
    }
    let reset =
        has("end", "ConnectionReset") || has("error", "ConnectionRefused") || has("error", "ConnectionReset");
    ensure!(reset, "{} at {}: {events:?}", pod.name(), server.address());
    Ok(false)
}

fn check_access(mesh: &Mesh, name: &str, servers: &[Server], expected: bool) -> Result<()> {
    for server in servers {
        let greeted = is_greeted(mesh.pod(name)?, server)?;
        ensure!(greeted == expected, "{name} at {}: greeted {greeted}", server.address());
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_policy_lets_in_only_allowed_principals_across_nodes_and_on_one() -> Result<()> {
    let audit = for_web("watch", &format!("action: AUDIT, {}", principals(&["cart"])));
    let policy = for_web("allow", &principals(&["cart", "near"])) + &audit;
    let mesh = plan().policy(&policy).with_agents()?;
    let (web, db) = (greeters(mesh.pod("web")?)?, greeters(mesh.pod("db")?)?);
    let agent = mesh.agent("b")?;
    for (name, allowed) in [("cart", true), ("near", true), ("batch", false), ("other", false)] {
        let before = observe::refused(agent, "not_allowed_by_policy")?;
        check_access(&mesh, name, &web, allowed)?;
        check_access(&mesh, name, &db, true)?;
        if !allowed {
            let who = format!("ns/shop/sa/{name}");
            observe::wait_refused(agent, "not_allowed_by_policy", before, &who)?;
        }
    }
    for server in &web {
        assert_eq!(server.accepted()?, 2, "{}", server.address());
    }
    assert_eq!(observe::metric(agent, "tacit_connections_audited_total", &[])?, 2);
    let (audit, policy) = ("rule 1 of AUDIT policy shop/watch", "no rule allows it of ALLOW shop/allow");
    observe::wait_log(agent, &[audit, policy]).map(drop)
}

#[test]
#[ignore = "needs root"]
fn a_policy_decides_on_plaintext_in_permissive_and_without_an_agent_it_is_refused() -> Result<()> {
    let mut mesh = plan().config("heartbeatTimeout: 1s\n").with_agents()?;
    let stranger = mesh.pod("stranger")?;
    let blocks = format!("{}, \"{}\"", stranger.ipv4(), stranger.ipv6());
    let policy = for_web("strangers", &format!("rules: [{{from: [{{source: {{ipBlocks: [{blocks}]}}}}]}}]"));
    let (web, db) = (greeters(mesh.pod("web")?)?, greeters(mesh.pod("db")?)?);
    check_access(&mesh, "neighbour", &web, true)?;
    mesh.agent("b")?.files().set_policy(&policy)?;
    let neighbour = mesh.pod("neighbour")?;
    until("the policy in force", || Ok((!is_greeted(neighbour, &web[0])?).then_some(())))?;
    for (name, allowed) in [("stranger", true), ("neighbour", false)] {
        check_access(&mesh, name, &web, allowed)?;
        check_access(&mesh, name, &db, true)?;
    }
    // The application sees the client's address although the agent relays the connection.
    let (peers, stranger) = (web[0].events().so_far(), stranger_of(&mesh)?);
    let named =
        peers.iter().any(|event| event["peer"].as_str().is_some_and(|peer| peer.starts_with(&stranger)));
    ensure!(named, "no peer {stranger} in {peers:?}");
    for server in &web {
        ensure!(probe(&mesh, server.address())? == format!("{GREETING}\n"), "the node's probe");
    }
    let steered = [("reason", "inbound_to_judge")];
    ensure!(observe::metric(mesh.agent("b")?, "tacit_kernel_verdicts_total", &steered)? >= 4, "not steered");
    mesh.agent_mut("b")?.kill()?;
    let stranger = mesh.pod("stranger")?;
    until("connections rejected without an agent", || Ok((!is_greeted(stranger, &web[0])?).then_some(())))?;
    check_access(&mesh, "stranger", &web, false)?;
    check_access(&mesh, "stranger", &db, true)
}

fn stranger_of(mesh: &Mesh) -> Result<String> {
    Ok(mesh.pod("stranger")?.ipv4().to_string())
}

/// Connects from node b itself, as its kubelet does.
fn probe(mesh: &Mesh, to: SocketAddr) -> Result<String> {
    let read = mesh.topology().node("b")?.netns().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, HANG)?;
        stream.set_read_timeout(Some(HANG))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    read.with_context(|| format!("probe of {to}"))
}

#[test]
#[ignore = "needs root"]
fn a_changed_policy_closes_the_flows_it_no_longer_allows_and_no_others() -> Result<()> {
    let mesh = plan().with_agents()?;
    let all = for_web("all", "rules: [{}]");
    let few = for_web("few", &principals(&["batch", "other"]));
    let strict = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";
    let (meshed, strangers) = (["cart", "near"], ["stranger", "neighbour"]);
    // Without a policy plaintext passes in the kernel alone, with one it passes through the agent. Both must be closed.
    let steps = [
        ("", few.clone(), [&meshed[..], &strangers].concat(), vec!["batch", "other"]),
        (&all, few, [&meshed[..], &strangers].concat(), vec!["batch", "other"]),
        ("", strict.to_owned(), strangers.to_vec(), meshed.to_vec()),
        (&all, all.clone() + strict, strangers.to_vec(), meshed.to_vec()),
    ];
    let mut ended = 0;
    for (number, (before, after, closing, staying)) in steps.into_iter().enumerate() {
        ended += closing.len() as u64;
        change(&mesh, (before, &after), &closing, &staying).with_context(|| format!("step {number}"))?;
        let counted = || observe::metric(mesh.agent("b")?, "tacit_connections_revoked_total", &[]);
        until("all closed flows counted", || Ok((counted()? == ended).then_some(()))).with_context(|| {
            format!("step {number}: expected {ended} closed flows, counted {:?}", counted())
        })?;
    }
    observe::wait_log(mesh.agent("b")?, &["connection closed: policy no longer allows it"]).map(drop)
}

/// Opens flows to `web` under one policy and checks them under the next.
fn change(
    mesh: &Mesh,
    (before, after): (&str, &str),
    closing: &[&'static str],
    staying: &[&'static str],
) -> Result<()> {
    let (agent, web) = (mesh.agent("b")?, mesh.pod("web")?);
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    agent.files().set_policy(before)?;
    let names = if before.is_empty() { &[][..] } else { &["shop/all"] };
    observe::wait_status(agent, "the policy before", |status| is_in_force(status, names))?;
    let to_server = |names: &[&'static str]| names.iter().map(|name| (*name, &server)).collect::<Vec<_>>();
    let flows = Flows::open(mesh, &to_server(closing), &to_server(staying))?;
    agent.files().set_policy(after)?;
    flows.check(agent)
}

/// Open flows, each with the name of its client.
struct Flows {
    closing: Vec<(&'static str, Client)>,
    staying: Vec<(&'static str, Client)>,
}

impl Flows {
    /// Opens a flow for each client and echo server, and waits for the first answer.
    fn open(
        mesh: &Mesh,
        closing: &[(&'static str, &Server)],
        staying: &[(&'static str, &Server)],
    ) -> Result<Self> {
        let start = |flows: &[(&'static str, &Server)], steps: &[&str]| -> Result<Vec<_>> {
            let one = |(name, server): &(&'static str, &Server)| -> Result<_> {
                let client = Client::start(mesh.pod(name)?, server.address(), steps)?;
                client.events().first("line").with_context(|| (*name).to_owned())?;
                Ok((*name, client))
            };
            flows.iter().map(one).collect()
        };
        Ok(Self {
            closing: start(closing, &["send:one", "line", "read-end"])?,
            staying: start(staying, &["send:one", "line", "pause", "send:two", "line", "shut", "read-end"])?,
        })
    }

    /// Waits until the closing flows are reset, and checks that the others still carry data. `agent` is for the error.
    fn check(self, agent: &Agent) -> Result<()> {
        for (name, client) in self.closing {
            let events = client.finish()?;
            let reset = events.iter().any(|event| event["end"] == "ConnectionReset");
            ensure!(reset, "{name}: {events:?}\n{}", agent.log()?);
        }
        for (name, mut client) in self.staying {
            client.proceed()?;
            let events = client.finish()?;
            let has = |key: &str, value: &str| events.iter().any(|event| event[key] == value);
            ensure!(has("text", "two") && has("end", "eof"), "{name}: {events:?}");
        }
        Ok(())
    }
}

#[test]
#[ignore = "needs root"]
fn flows_of_a_pod_that_was_enrolled_anew_obey_a_changed_policy() -> Result<()> {
    let mesh = plan().policy(&for_web("all", "rules: [{}]")).with_agents()?;
    let (agent, web) = (mesh.agent("b")?, mesh.pod("web")?);
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    let to_server = |names: &[&'static str]| names.iter().map(|name| (*name, &server)).collect::<Vec<_>>();
    let closing = to_server(&["cart", "near", "stranger", "neighbour"]);
    let flows = Flows::open(&mesh, &closing, &to_server(&["batch", "other"]))?;
    let mut directory = mesh.directory();
    entry(&mut directory, "web")?.egress = Some("open");
    agent.files().set_directory(&directory)?;
    observe::wait_log(agent, &["no longer enrolled"])?;
    observe::wait_enrolled(agent)?;
    agent.files().set_policy(&for_web("few", &principals(&["batch", "other"])))?;
    flows.check(agent)
}

fn entry<'a>(directory: &'a mut [WorkloadEntry], name: &str) -> Result<&'a mut WorkloadEntry> {
    directory.iter_mut().find(|entry| entry.name == name).with_context(|| format!("no entry {name}"))
}

/// Returns a PeerAuthentication for `app`. `ports` is the rest of its `spec` in flow style.
fn mode(app: &str, mode: &str, ports: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {app}, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: {app}}}}}, mtls: {{mode: {mode}}}{ports}}}\n"
    )
}

/// The client's agent alone reads the changed files, so no other agent and no kernel of another node ends a flow.
#[test]
#[ignore = "needs root"]
fn plaintext_that_the_clients_agent_carries_ends_when_a_pod_becomes_strict() -> Result<()> {
    let outside = |mesh: &Mesh| -> Result<_> {
        let mut directory = mesh.directory();
        entry(&mut directory, "other")?.tunnel = Tunnel::None;
        Ok(directory)
    };
    let port = fresh_port();
    let disabled = format!(", portLevelMtls: {{{port}: {{mode: DISABLE}}}}");
    let before = mode("web", "PERMISSIVE", &disabled) + &mode("db", "PERMISSIVE", &disabled);
    let mesh = plan().policy(&before).with_directories(|_, mesh| outside(mesh))?;
    let serve = |name: &str| -> Result<_> {
        let pod = mesh.pod(name)?;
        Server::start(pod, SocketAddr::new(pod.ipv4().into(), port), &["echo"])
    };
    let (web, db, other) = (serve("web")?, serve("db")?, serve("other")?);
    let agent = mesh.agent("a")?;
    let ended = || observe::metric(agent, "tacit_connections_revoked_total", &[("reporter", "source")]);

    // The destination becomes STRICT.
    let flows = Flows::open(&mesh, &[("cart", &web)], &[("cart", &db)])?;
    agent.files().set_policy(&(mode("web", "STRICT", "") + &mode("db", "PERMISSIVE", &disabled)))?;
    flows.check(agent)?;
    assert_eq!(ended()?, 1);

    // The client becomes STRICT by policy.
    let flows = Flows::open(&mesh, &[("cart", &other)], &[("batch", &other)])?;
    agent.files().set_policy(&(before.clone() + &mode("cart", "STRICT", "")))?;
    flows.check(agent)?;
    assert_eq!(ended()?, 2);

    // The client becomes STRICT by its entry of the directory.
    agent.files().set_policy(&before)?;
    let cart = mesh.pod("cart")?;
    until("cart PERMISSIVE again", || Ok(Client::echo(cart, other.address(), "hello").ok()))?;
    let flows = Flows::open(&mesh, &[("batch", &other)], &[("cart", &other)])?;
    let mut directory = outside(&mesh)?;
    entry(&mut directory, "batch")?.egress = Some("strict");
    agent.files().set_directory(&directory)?;
    flows.check(agent)?;
    assert_eq!(ended()?, 3);
    Ok(())
}

/// The destination does not answer the agent's SYN before the mode has changed. Only the client's agent reads the change.
#[test]
#[ignore = "needs root"]
fn plaintext_is_not_carried_if_the_mode_changes_while_the_agent_connects() -> Result<()> {
    let port = fresh_port();
    let before = mode("web", "PERMISSIVE", &format!(", portLevelMtls: {{{port}: {{mode: DISABLE}}}}"));
    let mesh = plan().policy(&before).with_agents()?;
    let (agent, web) = (mesh.agent("a")?, mesh.pod("web")?);
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), port), &["echo"])?;
    let loads = |status: &Value| status["sources"][1]["loads"].as_u64();
    let black_hole = |what: &str| -> Result<()> {
        let (node, web) = (mesh.topology().node("a")?.netns().name(), format!("{}/32", web.ipv4()));
        run(Command::new("ip").args(["-n", node, "route", what, "blackhole", &web])).map(drop)
    };
    let other_change = before.clone() + &mode("db", "STRICT", "");
    for (policy, expected) in [(other_change, true), (mode("web", "STRICT", ""), false)] {
        let loaded = loads(&observe::status(agent)?);
        black_hole("add")?;
        let client = Client::start(mesh.pod("cart")?, server.address(), &["send:one", "line"])?;
        let netns = mesh.pod("cart")?.netns();
        until("a SYN of the agent", || {
            let sockets = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))??;
            Ok(sockets.lines().any(|line| line.split_whitespace().nth(3) == Some("02")).then_some(()))
        })?;
        agent.files().set_policy(&policy)?;
        observe::wait_status(agent, "the policy", |status| (loads(status) > loaded).then_some(()))?;
        black_hole("del")?;
        let events = client.finish()?;
        let echoed = events.iter().any(|event| event["text"] == "one");
        ensure!(echoed == expected, "expected an echo {expected}: {events:?}\n{}", agent.log()?);
    }
    Ok(())
}

/// Returns `Some` if exactly these policies select `web` and its mode is PERMISSIVE.
fn is_in_force(status: &Value, names: &[&str]) -> Option<()> {
    let web = status["pods"].as_array()?.iter().find(|pod| pod["name"] == "web")?;
    let policies: Vec<_> = web["policies"].as_array()?.iter().filter_map(Value::as_str).collect();
    (policies == names && web["mode"] == "PERMISSIVE").then_some(())
}

#[test]
#[ignore = "needs root"]
fn policy_explain_says_who_decides_and_its_exit_code_is_the_verdict() -> Result<()> {
    let deny = "action: DENY, rules: [{to: [{operation: {ports: ['81']}}]}]";
    let policy = for_web("allow", &principals(&["cart"])) + &for_web("no-81", deny);
    let mesh = plan().policy(&policy).with_agents()?;
    let agent = mesh.agent("b")?;
    let stranger = stranger_of(&mesh)?;
    for (from, to, port, code, part) in [
        ("shop/cart", "shop/web", "80", 0, "rule 1 of ALLOW policy shop/allow"),
        ("shop/cart", "shop/web", "81", 1, "rule 1 of DENY policy shop/no-81"),
        ("shop/batch", "shop/web", "80", 1, "ALLOW shop/allow"),
        (stranger.as_str(), "shop/web", "80", 1, "ALLOW shop/allow"),
        (stranger.as_str(), "shop/db", "80", 0, "No AuthorizationPolicy"),
        ("shop/nobody", "shop/web", "80", 2, "shop/nobody"),
        ("shop/cart", "shop/web", "http", 2, "http"),
    ] {
        let (status, text) = explain(agent, &[from, to, port])?;
        ensure!(status == code && text.contains(part), "{from} {to} {port}: {status}: {text}");
    }
    let (_, json) = explain(agent, &["shop/cart", "shop/web", "80", "-o", "json"])?;
    let json: Value = serde_json::from_str(&json).context(json)?;
    ensure!(json["allow"] == true && json["paths"][0]["mode"] == "PERMISSIVE", "{json}");
    Ok(())
}

fn explain(agent: &Agent, arguments: &[&str]) -> Result<(i32, String)> {
    let mut command = Command::new(agent_program()?);
    command.args(["policy", "explain"]).args(arguments).arg("--socket").arg(agent.files().socket());
    let output = command.output().context("start tacit policy explain")?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().context("no exit code")?, String::from_utf8(text)?))
}
