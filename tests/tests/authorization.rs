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
use tacit_topology::{Agent, HANG, Pod, until};

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
    let log = agent.log()?;
    ensure!(log.contains("rule 1 of AUDIT policy shop/watch"), "the log has no audit");
    ensure!(log.contains("no rule allows it of ALLOW shop/allow"), "the log does not name the policy");
    Ok(())
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
    let log = mesh.agent("b")?.log()?;
    ensure!(
        log.contains("connection closed: policy no longer allows it"),
        "the log has no closed connection"
    );
    Ok(())
}

/// Opens flows to `web` under one policy and checks them under the next.
fn change(mesh: &Mesh, (before, after): (&str, &str), closing: &[&str], staying: &[&str]) -> Result<()> {
    let (agent, web) = (mesh.agent("b")?, mesh.pod("web")?);
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    agent.files().set_policy(before)?;
    let names = if before.is_empty() { &[][..] } else { &["shop/all"] };
    observe::wait_status(agent, "the policy before", |status| is_in_force(status, names))?;
    let start = |name: &str, steps: &[&str]| -> Result<_> {
        let client = Client::start(mesh.pod(name)?, server.address(), steps)?;
        client.events().first("line")?;
        Ok((name.to_owned(), client))
    };
    let end = ["send:one", "line", "read-end"];
    let closing: Vec<_> = closing.iter().map(|name| start(name, &end)).collect::<Result<_>>()?;
    let stay = ["send:one", "line", "pause", "send:two", "line", "shut", "read-end"];
    let mut staying: Vec<_> = staying.iter().map(|name| start(name, &stay)).collect::<Result<_>>()?;
    agent.files().set_policy(after)?;
    for (name, client) in closing {
        let events = client.finish()?;
        ensure!(
            events.iter().any(|event| event["end"] == "ConnectionReset"),
            "{name}: {events:?}\n{}",
            agent.log()?
        );
    }
    for (_, client) in &mut staying {
        client.proceed()?;
    }
    for (name, client) in staying {
        let events = client.finish()?;
        let has = |key: &str, value: &str| events.iter().any(|event| event[key] == value);
        ensure!(has("text", "two") && has("end", "eof"), "{name}: {events:?}");
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
