//! The cases. Each has a mesh of its own.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::Path,
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tacit_tests::{Client, STRICT_MESH, Server, observe};
use tacit_topology::{HANG, Pod, until};

use crate::{
    socks,
    ztunnel::{Interop, PEER, SERVICES, Setup, addresses},
};

/// Something that is tried.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Path) -> Result<()>,
}

/// All of them.
pub(crate) const ALL: &[Case] = &[
    Case { name: "both directions, IPv4 and IPv6, PERMISSIVE", run: permissive },
    Case { name: "both directions, IPv4 and IPv6, STRICT on both sides", run: strict },
    Case { name: "services, by their addresses, in both directions", run: services },
    Case { name: "policies of Tacit decide on flows of the ztunnel", run: policy_of_tacit },
    Case { name: "policies of the ztunnel decide on flows of Tacit", run: policy_of_ztunnel },
    Case {
        name: "another identity than the expected one is refused by Tacit",
        run: other_identity_for_tacit,
    },
    Case {
        name: "another identity than the expected one is refused by the ztunnel",
        run: other_identity_for_ztunnel,
    },
    Case { name: "closed ports are refused in both directions", run: closed_ports },
    Case { name: "each direction ends alone", run: half_close },
    Case { name: "100 MiB each way with a check of every byte", run: bulk },
    Case { name: "1,000 flows at once from Tacit", run: many_from_tacit },
    Case { name: "1,000 flows at once from the ztunnel", run: many_from_ztunnel },
    Case { name: "a ztunnel that drains and its successor", run: ztunnel_restarts },
    Case { name: "an agent that drains and its successor", run: agent_restarts },
    Case { name: "certificates renewed under load", run: renewal },
];

const PORT: u16 = 20_000;
const DENY_9999: &str = "[{name: no-9999, namespace: shop, scope: Namespace, action: Deny, dryRun: false, \
                         rules: [[[{destinationPorts: [9999]}]]]}]";
/// As istiod converts PeerAuthentication STRICT.
const ZTUNNEL_STRICT: &str = "[{name: strict, namespace: shop, scope: Namespace, action: Deny, dryRun: false, \
                              rules: [[[{notPrincipals: [!Presence []]}]]]}]";

fn permissive(program: &Path) -> Result<()> {
    let interop = Interop::start("iperm", program, Setup::default())?;
    both_directions(&interop)?;
    // The control of the next case: plaintext passes here.
    let [web, _] = serve(interop.web()?, "echo")?;
    let plain = interop.peer()?.netns().enter(|| TcpStream::connect_timeout(&web.address(), HANG))??;
    plain.set_read_timeout(Some(HANG))?;
    socks::echo(plain, "plaintext")
}

fn strict(program: &Path) -> Result<()> {
    let setup = Setup { policy: STRICT_MESH, ztunnel_policies: ZTUNNEL_STRICT, ..Setup::default() };
    let interop = Interop::start("istrict", program, setup)?;
    both_directions(&interop)?;
    let [web, _] = serve(interop.web()?, "echo")?;
    let plain = interop.peer()?.netns().enter(|| TcpStream::connect_timeout(&web.address(), HANG))?;
    if let Ok(plain) = plain {
        plain.set_read_timeout(Some(HANG))?;
        socks::is_refused(plain)?;
    }
    Ok(())
}

/// Echoes over both families, and checks that both sides know each other.
fn both_directions(interop: &Interop) -> Result<()> {
    let agent = interop.mesh.agent("b")?;
    for server in serve(interop.peer()?, "echo")? {
        let to = server.address();
        let mut client =
            Client::start(interop.web()?, to, &["send:out", "line", "pause", "shut", "read-end"])?;
        client.events().first("line").with_context(|| format!("Tacit to the ztunnel, {to}"))?;
        observe::wait_status(agent, "the outgoing flow", |status| {
            let flow = flow(status, |flow| flow["destination"]["address"] == to.to_string())?;
            (flow["wire"] == "h2" && flow["destination"]["identity"] == PEER).then_some(())
        })?;
        client.proceed()?;
        let events = client.finish()?;
        ensure!(end_of(&events)? == "eof", "{events:?}");
    }
    for server in serve(interop.web()?, "echo")? {
        let to = server.address();
        let mut tcp = socks::connect(interop.peer()?, to)?;
        socks::exchange(&mut tcp, "in").with_context(|| format!("the ztunnel to Tacit, {to}"))?;
        observe::wait_status(agent, "the incoming flow", |status| {
            let flow = flow(status, |flow| flow["destination"]["address"] == to.to_string())?;
            (flow["wire"] == "h2" && flow["source"]["identity"] == PEER).then_some(())
        })?;
        socks::echo(tcp, "to the end")?;
    }
    Ok(())
}

fn services(program: &Path) -> Result<()> {
    let interop = Interop::start("iserv", program, Setup::default())?;
    let _peer = Server::start(interop.peer()?, addresses(interop.peer()?, PORT)[0], &["echo"])?;
    let _web = Server::start(interop.web()?, addresses(interop.web()?, PORT)[0], &["echo"])?;
    let [peer, web] = SERVICES.map(|address| format!("{address}:80").parse());
    Client::echo(interop.web()?, peer?, "by the service")?;
    socks::echo(socks::connect(interop.peer()?, web?)?, "by the service")
}

fn policy_of_tacit(program: &Path) -> Result<()> {
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: allow, namespace: shop}\n\
                  spec:\n  rules:\n  - from: [{source: {principals: [cluster.local/ns/shop/sa/peer]}}]\n    \
                  to: [{operation: {ports: [\"20000\"]}}]\n";
    let interop = Interop::start("ipolt", program, Setup { policy, ..Setup::default() })?;
    let web = interop.web()?;
    let allowed = Server::start(web, addresses(web, PORT)[0], &["echo"])?;
    let denied = Server::start(web, addresses(web, 20_001)[0], &["echo"])?;
    socks::echo(socks::connect(interop.peer()?, allowed.address())?, "allowed")?;
    socks::is_refused(socks::connect(interop.peer()?, denied.address())?)?;
    ensure!(denied.accepted()? == 0);
    Ok(())
}

fn policy_of_ztunnel(program: &Path) -> Result<()> {
    let setup = Setup { ztunnel_policies: DENY_9999, ..Setup::default() };
    let interop = Interop::start("ipolz", program, setup)?;
    let peer = interop.peer()?;
    let allowed = Server::start(peer, addresses(peer, PORT)[0], &["echo"])?;
    let denied = Server::start(peer, addresses(peer, 9999)[0], &["echo"])?;
    Client::echo(interop.web()?, allowed.address(), "allowed")?;
    let before = observe::refused(interop.mesh.agent("b")?, "policy")?;
    let events = Client::run(interop.web()?, denied.address(), &["send:denied", "read-end"])?;
    ensure!(error_of(&events) == Some("ConnectionRefused"), "{events:?}");
    observe::wait_refused(interop.mesh.agent("b")?, "policy", before, "sa/peer")?;
    ensure!(denied.accepted()? == 0);
    Ok(())
}

fn other_identity_for_tacit(program: &Path) -> Result<()> {
    let interop = Interop::start("iidt", program, Setup { peer_account: "other", ..Setup::default() })?;
    let peer = interop.peer()?;
    let server = Server::start(peer, addresses(peer, PORT)[0], &["echo"])?;
    let before = observe::refused(interop.mesh.agent("b")?, "identity_mismatch")?;
    let events = Client::run(interop.web()?, server.address(), &["send:secret", "read-end"])?;
    ensure!(error_of(&events).is_some(), "{events:?}");
    observe::wait_refused(interop.mesh.agent("b")?, "identity_mismatch", before, "sa/other")?;
    ensure!(server.accepted()? == 0);
    Ok(())
}

fn other_identity_for_ztunnel(program: &Path) -> Result<()> {
    let interop = Interop::start("iidz", program, Setup { web_account: "other", ..Setup::default() })?;
    let web = interop.web()?;
    let server = Server::start(web, addresses(web, PORT)[0], &["echo"])?;
    socks::is_refused(socks::connect(interop.peer()?, server.address())?)?;
    ensure!(server.accepted()? == 0);
    Ok(())
}

fn closed_ports(program: &Path) -> Result<()> {
    let interop = Interop::start("iclos", program, Setup::default())?;
    for to in addresses(interop.peer()?, 20_009) {
        let events = Client::run(interop.web()?, to, &["read-end"])?;
        ensure!(error_of(&events) == Some("ConnectionRefused"), "{events:?}");
    }
    for to in addresses(interop.web()?, 20_009) {
        socks::is_refused(socks::connect(interop.peer()?, to)?)?;
    }
    Ok(())
}

fn half_close(program: &Path) -> Result<()> {
    let interop = Interop::start("ihalf", program, Setup::default())?;
    let steps = ["read-end", "send:late", "shut"];
    for server in serve_steps(interop.peer()?, &steps)? {
        let events = Client::run(interop.web()?, server.address(), &["send:question", "shut", "read-end"])?;
        ensure!(end_of(&events)? == "eof" && text_of(&events)? == "late\n", "{events:?}");
        ensure!(server.events().first("end")?["text"] == "question\n");
    }
    for server in serve_steps(interop.web()?, &steps)? {
        let mut tcp = socks::connect(interop.peer()?, server.address())?;
        tcp.write_all(b"question\n")?;
        tcp.shutdown(Shutdown::Write)?;
        let mut rest = String::new();
        tcp.read_to_string(&mut rest)?;
        ensure!(rest == "late\n", "{rest:?}");
    }
    Ok(())
}

fn bulk(program: &Path) -> Result<()> {
    const BYTES: usize = 100 << 20;
    let interop = Interop::start("ibulk", program, Setup::default())?;
    let (mine, theirs) = (format!("bulk:{BYTES}:1:2"), format!("bulk:{BYTES}:2:1"));
    for server in serve_steps(interop.peer()?, &[&theirs])? {
        let events = Client::run(interop.web()?, server.address(), &[&mine])?;
        let here =
            events.iter().find(|event| event["event"] == "bulk").with_context(|| format!("{events:?}"))?;
        let there = server.events().first("bulk")?;
        ensure!(
            [here, &there].iter().all(|end| end["intact"] == true && end["received"] == BYTES),
            "{here} {there}"
        );
    }
    let piece: Vec<u8> = (0..1_048_573_usize).map(|at| (at * 131 % 253) as u8).collect();
    for server in serve(interop.web()?, "echo")? {
        let mut tcp = socks::connect(interop.peer()?, server.address())?;
        let mut sender = tcp.try_clone()?;
        let sent = piece.clone();
        let sending = thread::spawn(move || -> Result<()> {
            for _ in 0..100 {
                sender.write_all(&sent)?;
            }
            Ok(sender.shutdown(Shutdown::Write)?)
        });
        let mut got = vec![0; piece.len()];
        for number in 0..100 {
            tcp.read_exact(&mut got).with_context(|| format!("piece {number}"))?;
            ensure!(got == piece, "piece {number} differs");
        }
        ensure!(tcp.read(&mut got)? == 0, "bytes behind the last");
        sending.join().map_err(|_| anyhow!("the sender has panicked"))??;
    }
    Ok(())
}

fn many_from_tacit(program: &Path) -> Result<()> {
    let interop = Interop::start("imant", program, Setup::default())?;
    let servers = serve(interop.peer()?, "echo")?;
    let addresses = servers.each_ref().map(|server| server.address().to_string());
    let events =
        Client::with_args(interop.web()?, &["flows", "1000", &addresses[0], &addresses[1]])?.finish()?;
    let done =
        events.iter().find(|event| event["event"] == "flows").with_context(|| format!("{events:?}"))?;
    ensure!(done["echoed"] == 1000, "{done}");
    Ok(())
}

fn many_from_ztunnel(program: &Path) -> Result<()> {
    let interop = Interop::start("imanz", program, Setup::default())?;
    let servers = serve(interop.web()?, "echo")?;
    let mut open = Vec::new();
    for number in 0..1000 {
        let mut tcp = socks::connect(interop.peer()?, servers[number % 2].address())?;
        socks::exchange(&mut tcp, &number.to_string())?;
        open.push(tcp);
    }
    let ports: HashSet<_> = open.iter().filter_map(|tcp| tcp.local_addr().ok()).collect();
    ensure!(ports.len() == 1000);
    for (number, tcp) in open.into_iter().enumerate() {
        socks::echo(tcp, &format!("again {number}"))?;
    }
    Ok(())
}

fn ztunnel_restarts(program: &Path) -> Result<()> {
    let mut interop = Interop::start("irstz", program, Setup::default())?;
    let [server, _v6] = serve(interop.peer()?, "echo")?;
    let mut held = hold(interop.web()?, server.address())?;
    interop.ztunnel.signal(Signal::SIGTERM)?;
    until("the drain of the ztunnel", || Ok(interop.log()?.contains("listener drained").then_some(())))?;
    held.proceed()?;
    let events = held.finish()?;
    ensure!(end_of(&events)? == "eof", "the held flow: {events:?}");
    interop.ztunnel.wait()?;
    interop.restart_ztunnel()?;
    for _ in 0..10 {
        Client::echo(interop.web()?, server.address(), "after the restart")?;
    }
    // Without a drain: a flow is reset, and new ones open on new connections.
    let cut = Client::start(interop.web()?, server.address(), &["send:held", "line", "read-end"])?;
    cut.events().first("line")?;
    interop.ztunnel.signal(Signal::SIGKILL)?;
    interop.ztunnel.wait()?;
    let events = cut.finish()?;
    ensure!(end_of(&events)? == "ConnectionReset", "the flow of the killed ztunnel: {events:?}");
    interop.restart_ztunnel()?;
    Client::echo(interop.web()?, server.address(), "after the kill")
}

fn agent_restarts(program: &Path) -> Result<()> {
    let setup = Setup { config: "drainTimeout: 60s\n", ..Setup::default() };
    let mut interop = Interop::start("irstt", program, setup)?;
    let [out, _v6] = serve(interop.peer()?, "echo")?;
    let [inwards, _v6b] = serve(interop.web()?, "echo")?;
    let mut held = hold(interop.web()?, out.address())?;
    let mut tcp = socks::connect(interop.peer()?, inwards.address())?;
    socks::exchange(&mut tcp, "held")?;
    interop.mesh.agent("b")?.send_sigterm()?;
    observe::wait_log(interop.mesh.agent("b")?, &["draining"])?;
    socks::echo(tcp, "to the end")?;
    held.proceed()?;
    let events = held.finish()?;
    ensure!(end_of(&events)? == "eof", "the held flow: {events:?}");
    let agent = interop.mesh.agent_mut("b")?;
    ensure!(agent.wait_end()?.success(), "the agent did not end well");
    agent.restart()?;
    agent.wait_ready()?;
    observe::wait_enrolled(agent)?;
    Client::echo(interop.web()?, out.address(), "after the restart")?;
    socks::echo(socks::connect(interop.peer()?, inwards.address())?, "after the restart")
}

fn renewal(program: &Path) -> Result<()> {
    let setup = Setup { lifetime_seconds: 20, ..Setup::default() };
    let interop = Interop::start("irenw", program, setup)?;
    let [out, _v6] = serve(interop.peer()?, "echo")?;
    let [inwards, _v6b] = serve(interop.web()?, "echo")?;
    let mut held = hold(interop.web()?, out.address())?;
    let before = interop.authority.signed();
    let mut exchanges = 0;
    until("two renewals of the ztunnel", || {
        Client::echo(interop.web()?, out.address(), "outwards")?;
        socks::echo(socks::connect(interop.peer()?, inwards.address())?, "inwards")?;
        exchanges += 1;
        Ok((interop.authority.signed() >= before + 2).then_some(()))
    })?;
    held.proceed()?;
    let events = held.finish()?;
    ensure!(end_of(&events)? == "eof", "the flow across renewals, beside {exchanges} others: {events:?}");
    Ok(())
}

/// Opens a connection that goes on when it is told to.
fn hold(from: &Pod, to: SocketAddr) -> Result<Client> {
    let client =
        Client::start(from, to, &["send:held", "line", "pause", "send:on", "line", "shut", "read-end"])?;
    client.events().first("line")?;
    Ok(client)
}

fn serve(pod: &Pod, step: &str) -> Result<[Server; 2]> {
    serve_steps(pod, &[step])
}

fn serve_steps(pod: &Pod, steps: &[&str]) -> Result<[Server; 2]> {
    let [v4, v6] = addresses(pod, tacit_tests::fresh_port());
    Ok([Server::start(pod, v4, steps)?, Server::start(pod, v6, steps)?])
}

fn flow(status: &Value, is_meant: impl Fn(&Value) -> bool) -> Option<&Value> {
    status["flows"]["list"].as_array()?.iter().find(|flow| is_meant(flow))
}

fn end_of(events: &[Value]) -> Result<&str> {
    field_of(events, "end")
}

fn text_of(events: &[Value]) -> Result<&str> {
    field_of(events, "text")
}

fn field_of<'a>(events: &'a [Value], field: &str) -> Result<&'a str> {
    let end = events.iter().find(|event| event["event"] == "end");
    end.and_then(|end| end[field].as_str()).with_context(|| format!("no end: {events:?}"))
}

fn error_of(events: &[Value]) -> Option<&str> {
    events.iter().find(|event| event["event"] == "failed")?["error"].as_str()
}
