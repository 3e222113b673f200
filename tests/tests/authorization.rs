//! AuthorizationPolicy on whole nodes: who is let in across nodes, on one node and in clear, and what becomes of flows
//! under way when policy changes.
//!
//! The control of every refusal is beside it: the same client at a pod that no policy selects, or an allowed client at the
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

/// Clients `cart` and `batch` on node a, `near` and `other` beside the servers `web` and `db` on node b, and strangers.
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

/// An AuthorizationPolicy for `web`; the rest of its `spec` in flow style.
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

/// A server that greets everybody, for each family.
fn greeters(pod: &Pod) -> Result<Vec<Server>> {
    let greeting = format!("send:{GREETING}");
    let port = fresh_port();
    let start = |ip: IpAddr| Server::start(pod, SocketAddr::new(ip, port), &[&greeting, "shut", "read-end"]);
    Ok(vec![start(pod.ipv4().into())?, start(pod.ipv6().into())?])
}

/// Whether `pod` is greeted; anything else than a greeting or a reset is an error.
fn is_greeted(pod: &Pod, server: &Server) -> Result<bool> {
    let told = Client::run(pod, server.address(), &["read-end"])?;
    let has = |key: &str, value: &str| told.iter().any(|event| event[key] == value);
    if has("end", "eof") && has("text", &format!("{GREETING}\n")) {
        return Ok(true);
    }
    let reset =
        has("end", "ConnectionReset") || has("error", "ConnectionRefused") || has("error", "ConnectionReset");
    ensure!(reset, "{} at {}: {told:?}", pod.name(), server.address());
    Ok(false)
}

fn meets(mesh: &Mesh, name: &str, servers: &[Server], expected: bool) -> Result<()> {
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
        meets(&mesh, name, &web, allowed)?;
        meets(&mesh, name, &db, true)?;
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
    ensure!(log.contains("rule 1 of AUDIT policy shop/watch"), "no audit is logged");
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
    meets(&mesh, "neighbour", &web, true)?;
    mesh.agent("b")?.files().set_policy(&policy)?;
    let neighbour = mesh.pod("neighbour")?;
    until("the policy in force", || Ok((!is_greeted(neighbour, &web[0])?).then_some(())))?;
    for (name, allowed) in [("stranger", true), ("neighbour", false)] {
        meets(&mesh, name, &web, allowed)?;
        meets(&mesh, name, &db, true)?;
    }
    // The application still sees who it talks to, though the agent is between.
    let (peers, stranger) = (web[0].events().so_far(), stranger_of(&mesh)?);
    let named =
        peers.iter().any(|event| event["peer"].as_str().is_some_and(|peer| peer.starts_with(&stranger)));
    ensure!(named, "{peers:?}");
    for server in &web {
        ensure!(probe(&mesh, server.address())? == format!("{GREETING}\n"), "the node's probe");
    }
    let judged = [("reason", "inbound_to_judge")];
    ensure!(observe::metric(mesh.agent("b")?, "tacit_kernel_verdicts_total", &judged)? >= 4, "not steered");
    mesh.agent_mut("b")?.kill()?;
    let stranger = mesh.pod("stranger")?;
    until("refused without an agent", || Ok((!is_greeted(stranger, &web[0])?).then_some(())))?;
    meets(&mesh, "stranger", &web, false)?;
    meets(&mesh, "stranger", &db, true)
}

fn stranger_of(mesh: &Mesh) -> Result<String> {
    Ok(mesh.pod("stranger")?.ipv4().to_string())
}

/// From node b itself, as its kubelet would.
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
    // Without a policy plaintext goes by the kernel alone, with one it goes through the agent: both must end.
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
        until("all counted", || Ok((counted()? == ended).then_some(())))
            .with_context(|| format!("step {number}: {ended} ended, {:?} counted", counted()))?;
    }
    let log = mesh.agent("b")?.log()?;
    ensure!(log.contains("connection closed: policy no longer allows it"), "not logged");
    Ok(())
}

/// Opens flows to `web` under one policy and looks at them under the next.
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
        let told = client.finish()?;
        ensure!(
            told.iter().any(|event| event["end"] == "ConnectionReset"),
            "{name}: {told:?}\n{}",
            agent.log()?
        );
    }
    for (_, client) in &mut staying {
        client.proceed()?;
    }
    for (name, client) in staying {
        let told = client.finish()?;
        let has = |key: &str, value: &str| told.iter().any(|event| event[key] == value);
        ensure!(has("text", "two") && has("end", "eof"), "{name}: {told:?}");
    }
    Ok(())
}

/// Whether these policies, and no others, select `web`, and its mode is PERMISSIVE.
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
