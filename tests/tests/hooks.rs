//! Another program at the connect hooks translates a service, as the socket load balancer of a network plugin does, before or after
//! Tacit's program. The service's address is outside the configured ranges.

use anyhow::{Context, Result, ensure};
use std::{
    cell::RefCell,
    fmt::Write as _,
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, agent_program, fresh_port, observe};
use tacit_topology::{Process, directory_text, run};

const VIP: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 10);
/// A port that `allowClear` names.
const CLEAR: u16 = 53;

fn plan(tag: &str) -> Plan {
    Plan::new(tag)
        .policy(STRICT_MESH)
        .config(&format!("allowClear: [\"{VIP}:{CLEAR}/udp\"]\n"))
        .pod("a", "shop", "client")
        .pod("b", "shop", "server")
}

/// Starts the other program on node a. It ends with the process.
fn start_balancer(mesh: &Mesh) -> Result<Process> {
    let (node, to) = (mesh.topology().node("a")?, mesh.pod("server")?.ipv4());
    let mut command = Command::new(agent_program()?.with_file_name("tacit-attack"));
    command.args(["step", "translate", &format!("{VIP}:1"), &to.to_string()]).arg(node.pods_cgroup());
    let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    let mut line = String::new();
    BufReader::new(process.take_stdout().context("stdout")?).read_line(&mut line)?;
    ensure!(line.trim() == "waiting", "{line}");
    Ok(process)
}

fn serve(mesh: &Mesh) -> Result<Server> {
    let pod = mesh.pod("server")?;
    Server::start(pod, SocketAddr::new(pod.ipv4().into(), fresh_port()), &["echo"])
}

fn load_services(mesh: &Mesh, port: u16) -> Result<()> {
    let mut text = directory_text(&mesh.directory());
    let endpoint = mesh.pod("server")?.ipv4();
    writeln!(
        text,
        "services:\n- name: web\n  namespace: shop\n  addresses: [{VIP}]\n  ports: [{{port: {port}}}, {{port: {CLEAR}}}]\n  \
         endpoints: [{{addresses: [{endpoint}], ready: true}}]"
    )?;
    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_directory_text(&text)?;
    }
    observe::wait_status(mesh.agent("a")?, "the service is covered", |status| {
        let ranges = status["mesh"]["ranges"].as_array()?;
        ranges.iter().any(|range| *range == format!("{VIP}/32")).then_some(())
    })
}

/// Returns the programs at connect4 on node a, in the order in which they run, Tacit's as "tacit".
fn order(mesh: &Mesh) -> Result<Vec<String>> {
    let status = observe::status(mesh.agent("a")?)?;
    let programs = status["connect_hooks"].as_array().context("connect_hooks")?;
    let of_hook = programs.iter().filter(|program| program["hook"] == "connect4");
    let name = |program: &serde_json::Value| match program["is_tacit"] == true {
        true => "tacit".to_owned(),
        false => program["name"].as_str().unwrap_or_default().to_owned(),
    };
    Ok(of_hook.map(name).collect())
}

fn works(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh)?;
    let port = server.address().port();
    load_services(mesh, port)?;
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, SocketAddr::new(IpAddr::from(VIP), port), "text to a service")?;
    ensure!(capture.finish()?.occurrences(b"text to a service") == 0, "plaintext of a STRICT pod");
    let mut step = mesh.pod("client")?.command(agent_program()?.with_file_name("tacit-attack"));
    step.args(["step", "udp", &format!("{VIP}:{CLEAR}"), "a query"]);
    let told = run(step.env("TACIT_ATTACK_PATIENCE_MS", "2000"))?;
    ensure!(told.trim() == "sent", "allowClear by the service's address: {told}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_service_is_captured_if_another_program_runs_later() -> Result<()> {
    let mesh = plan("later").with_agents()?;
    let _balancer = start_balancer(&mesh)?;
    assert_eq!(order(&mesh)?, ["tacit", "others_balancer"]);
    let table = mesh.agent("a")?.status_table()?;
    ensure!(table.contains("others_balancer") && table.contains("runs after Tacit's"), "{table}");
    works(&mesh)
}

#[test]
#[ignore = "needs root"]
fn a_service_is_captured_if_another_program_runs_earlier() -> Result<()> {
    let balancer = RefCell::new(None);
    let mesh = plan("early").with_directories(|node, mesh| {
        if node == "a" {
            *balancer.borrow_mut() = Some(start_balancer(mesh)?);
        }
        Ok(mesh.directory())
    })?;
    assert_eq!(order(&mesh)?, ["others_balancer", "tacit"]);
    works(&mesh)
}

#[test]
#[ignore = "needs root"]
fn control_the_service_is_reached_in_clear_without_tacit() -> Result<()> {
    let mesh = plan("hookc").without_agents()?;
    let _balancer = start_balancer(&mesh)?;
    let server = serve(&mesh)?;
    let to = SocketAddr::new(IpAddr::from(VIP), server.address().port());
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, to, "text to a service")?;
    ensure!(capture.finish()?.occurrences(b"text to a service") > 0, "no plaintext");
    Ok(())
}
