//! The servers of a pod: iperf3, nginx, and `tacit-load` for one client and for many, each on its port.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::{Pod, Process, until};

use super::{
    cpu_pinning::{self, End},
    programs::Programs,
};

/// Port of iperf3.
const IPERF: u16 = 5201;
/// Ports where `tacit-load` echoes, on the last core and on any core.
const ECHO: [u16; 2] = [7001, 7003];
/// Ports where `tacit-load` answers once and closes, on the last core and on any core.
const ANSWER: [u16; 2] = [7002, 7004];
/// Port of nginx.
const HTTP: u16 = 80;

/// Port on which nobody listens.
const CLOSED: u16 = 7009;

/// All of them.
pub(super) const PORTS: [u16; 6] = [HTTP, IPERF, ECHO[0], ECHO[1], ANSWER[0], ANSWER[1]];

/// Bytes of a request on a connection of its own.
pub(super) const REQUEST: u32 = 64;

/// iperf3's server of the pod.
pub(super) fn iperf_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), IPERF).into()
}

/// The pod's echo server for that many clients.
pub(super) fn echo_of(pod: &Pod, clients: u16) -> SocketAddr {
    (pod.ipv4(), ECHO[usize::from(clients > 1)]).into()
}

/// The pod's server that answers once, for that many clients.
pub(super) fn answer_of(pod: &Pod, clients: u16) -> SocketAddr {
    (pod.ipv4(), ANSWER[usize::from(clients > 1)]).into()
}

/// A closed port of the pod.
pub(super) fn closed_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), CLOSED).into()
}

/// nginx of the pod.
pub(super) fn http_of(pod: &Pod) -> SocketAddr {
    (pod.ipv4(), HTTP).into()
}

/// Starts the servers of a pod and waits until all listen.
pub(super) fn start(pod: &Pod, programs: &Programs, folder: &Path) -> Result<Vec<Process>> {
    let mut iperf = pod.command("iperf3");
    iperf.args(["--server", "--port", &IPERF.to_string()]);
    let mut commands = vec![iperf];
    for clients in [1, 2] {
        let server = || match clients {
            1 => cpu_pinning::command(pod, &programs.load, End::Server),
            _ => Ok(pod.command(&programs.load)),
        };
        let (mut echo, mut answer) = (server()?, server()?);
        echo.args(["serve", &echo_of(pod, clients).to_string()]);
        answer.args(["serve", &answer_of(pod, clients).to_string(), "--answer", &REQUEST.to_string()]);
        commands.extend([echo, answer]);
    }
    commands.push(nginx(pod, &programs.nginx, folder)?);
    let mut processes = Vec::new();
    for mut command in commands {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        processes.push(Process::spawn(&mut command)?);
    }
    until(&format!("servers of pod {} listen", pod.name()), || {
        for process in &mut processes {
            if let Some(status) = process.ended()? {
                bail!("a server of pod {} ended: {status}", pod.name());
            }
        }
        // Looked up, not tried: iperf3 takes a connection for a client.
        let sockets = pod.netns().enter(|| {
            ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")))
        })?;
        let sockets = sockets.into_iter().collect::<Result<String, _>>().context("read /proc/net/tcp")?;
        let all = [IPERF, HTTP].iter().chain(&ECHO).chain(&ANSWER).all(|port| listens(&sockets, *port));
        Ok(all.then_some(()))
    })?;
    Ok(processes)
}

/// One worker, one page of 612 bytes from memory (files would cost the same in all columns and hide the difference),
/// connections kept as long as the client likes.
fn nginx(pod: &Pod, program: &Path, folder: &Path) -> Result<Command> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let page = "tacit bench ".repeat(51);
    let text = format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {0}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {0}/body;\n\
         proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi; uwsgi_temp_path {0}/uwsgi;\n\
         scgi_temp_path {0}/scgi; default_type text/plain;\n\
         server {{ listen {HTTP} backlog=4096; return 200 \"{page}\"; }} }}\n",
        folder.display()
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    let mut command = pod.command(program);
    command.arg("-p").arg(folder).arg("-c").arg(file).args(["-e", "stderr"]);
    Ok(command)
}

/// Returns true if a table of `/proc/net/tcp` (proc_net_tcp) has a listener on the port, whatever its address.
fn listens(table: &str, port: u16) -> bool {
    /// `TCP_LISTEN` of the kernel's tcp_states.h.
    const LISTEN: &str = "0A";
    let end = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some(LISTEN)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listener_listens() {
        let table = "  sl  local_address rem_address   st tx_queue\n   \
            0: 02024D0A:1B59 00000000:0000 0A 00000000:00000000 00:00000000\n   \
            1: 02024D0A:1B5A 0202010A:C001 01 00000000:00000000 00:00000000\n";
        assert!(listens(table, 7001));
        assert!(!listens(table, 7002));
        assert!(!listens(table, 80));
    }
}
