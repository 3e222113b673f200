//! A `tacit agent` on a node, in the node's namespace and a cgroup outside the pods'. It is queried through its socket
//! and its metrics port.

use crate::{
    mesh::MeshFiles,
    netns::Netns,
    node::Node,
    process::{Process, run},
    wait::{HANG, until},
};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

/// Largest response that is read, in bytes.
const RESPONSE_MAX: u64 = 4 << 20;

/// An agent, running or stopped. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    node: String,
    netns: Netns,
    command: Command,
    files: MeshFiles,
    log: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// Starts `program agent --config <files>` on `node` with debug logs. Does not wait until it is ready.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start(node: &Node, program: &Path, files: &MeshFiles) -> Result<Self> {
        Self::start_with(node, program, files, &["-v"])
    }

    /// Starts an agent like [`Agent::start`], with the log level of production.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start_quiet(node: &Node, program: &Path, files: &MeshFiles) -> Result<Self> {
        Self::start_with(node, program, files, &[])
    }

    /// Starts an agent like [`Agent::start`], with a limit of open files.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start_limited(node: &Node, program: &Path, files: &MeshFiles, descriptors: u64) -> Result<Self> {
        Self::start(node, &limited(program, descriptors, &node.files()?)?, files)
    }

    /// Starts a second agent on the same node with `--stand-by`, which takes over from this one. `name` is the name of its
    /// cgroup and its socket.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start_standby(&self, node: &Node, name: &str) -> Result<Self> {
        Self::start_with(node, &self.program, &self.files.standby(name)?, &["-v", "--stand-by"])
    }

    fn start_with(node: &Node, program: &Path, files: &MeshFiles, flags: &[&str]) -> Result<Self> {
        let mut command = node.command_in(files.agent(), program)?;
        command.arg("agent").arg("--config").arg(files.config()).args(flags);
        let mut agent = Self {
            program: program.to_owned(),
            node: node.name().to_owned(),
            netns: node.netns().clone(),
            command,
            files: files.clone(),
            log: files.log(),
            process: None,
        };
        agent.restart()?;
        Ok(agent)
    }

    /// Starts the agent again after it exited. It appends to the same log file.
    ///
    /// # Errors
    /// Fails if it still runs or cannot be started.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("the agent of node {} is already running", self.node);
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let stderr = log.try_clone().context("duplicate the log file's descriptor")?;
        self.process = Some(Process::spawn(self.command.stdin(Stdio::null()).stdout(log).stderr(stderr))?);
        Ok(())
    }

    /// Waits until `/healthz/ready` returns 200.
    ///
    /// # Errors
    /// Fails if the agent exits or does not become ready; the message has its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let what = format!("agent of node {} ready", self.node);
        let ready = until(&what, || {
            if let Some(status) = self.process.as_mut().context("the agent does not run")?.ended()? {
                bail!("the agent of node {} exited: {status}", self.node);
            }
            let response = http_get(&self.netns, MeshFiles::METRICS, "/healthz/ready");
            Ok(response.ok().filter(|(status, _)| *status == 200).map(drop))
        });
        ready.with_context(|| format!("log of the agent:\n{}", self.log().unwrap_or_default()))
    }

    /// Returns the node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns the files that the agent reads.
    #[must_use]
    pub fn files(&self) -> &MeshFiles {
        &self.files
    }

    /// Returns the agent's process id while it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Returns the agent's log, from all its starts.
    ///
    /// # Errors
    /// Fails if the log cannot be read.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }

    /// Returns the output of `tacit status -o json`.
    ///
    /// # Errors
    /// Fails if the command fails.
    pub fn status(&self) -> Result<String> {
        self.run_command(&["status", "-o", "json"])
    }

    /// Returns the output of `tacit status -o table`.
    ///
    /// # Errors
    /// Fails if the command fails.
    pub fn status_table(&self) -> Result<String> {
        self.run_command(&["status", "-o", "pods"])
    }

    /// Returns the text of the agent's metrics.
    ///
    /// # Errors
    /// Fails if the response is not 200.
    pub fn metrics(&self) -> Result<String> {
        match http_get(&self.netns, MeshFiles::METRICS, "/metrics")? {
            (200, text) => Ok(text),
            (status, text) => bail!("metrics of node {}: status {status}: {text}", self.node),
        }
    }

    /// Runs `tacit uninstall` with the agent's configuration and returns its output.
    ///
    /// # Errors
    /// Fails if the command fails, which it does while an agent runs.
    pub fn uninstall(&self) -> Result<String> {
        run(Command::new(&self.program).arg("uninstall").arg("--config").arg(self.files.config()))
    }

    /// Sends SIGTERM, which drains the agent, and waits until it exits.
    ///
    /// # Errors
    /// Fails if the agent does not run or does not exit.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.stop_with(Signal::SIGTERM)
    }

    /// Sends SIGTERM without waiting; see [`Agent::wait_end`].
    ///
    /// # Errors
    /// Fails if it is not running.
    pub fn send_sigterm(&self) -> Result<()> {
        self.process.as_ref().context("the agent does not run")?.signal(Signal::SIGTERM)
    }

    /// Kills the agent (SIGKILL) and waits until it exits.
    ///
    /// # Errors
    /// Fails if it is not running.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.stop_with(Signal::SIGKILL)
    }

    /// Stops the agent's process (SIGSTOP).
    ///
    /// # Errors
    /// Fails if it is not running.
    pub fn pause(&self) -> Result<()> {
        self.process.as_ref().context("the agent does not run")?.signal(Signal::SIGSTOP)
    }

    /// Continues the agent's process (SIGCONT).
    ///
    /// # Errors
    /// Fails if it is not running.
    pub fn resume(&self) -> Result<()> {
        self.process.as_ref().context("the agent does not run")?.signal(Signal::SIGCONT)
    }

    /// Waits until the agent exits.
    ///
    /// # Errors
    /// Fails if the agent does not exit.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        let status = self.process.as_mut().context("the agent does not run")?.wait()?;
        self.process = None;
        Ok(status)
    }

    fn stop_with(&mut self, signal: Signal) -> Result<ExitStatus> {
        self.process.as_mut().context("the agent does not run")?.signal(signal)?;
        self.wait_end()
    }

    fn run_command(&self, args: &[&str]) -> Result<String> {
        run(Command::new(&self.program).args(args).arg("--socket").arg(self.files.socket()))
    }
}

/// Writes a program to `folder` that lowers its limit of open files and then becomes `program`.
fn limited(program: &Path, descriptors: u64, folder: &Path) -> Result<PathBuf> {
    let limited = folder.join("limited-agent");
    let script = format!("#!/bin/sh\nulimit -n {descriptors}\nexec {} \"$@\"\n", program.display());
    fs::write(&limited, script).with_context(|| format!("write {}", limited.display()))?;
    fs::set_permissions(&limited, fs::Permissions::from_mode(0o755))?;
    Ok(limited)
}

/// Sends one HTTP GET from `netns` and returns the status and the body.
///
/// # Errors
/// Fails if there is no response, or if it is not HTTP.
pub fn http_get(netns: &Netns, address: &str, path: &str) -> Result<(u16, String)> {
    let address: SocketAddr = address.parse().with_context(|| format!("address {address}"))?;
    let response = netns.enter(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, HANG)?;
        stream.set_read_timeout(Some(HANG))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut response = String::new();
        stream.take(RESPONSE_MAX).read_to_string(&mut response)?;
        Ok(response)
    })??;
    let (head, body) = response.split_once("\r\n\r\n").context("response without an end of its headers")?;
    let status =
        head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("response without a status")?;
    Ok((status, body.to_owned()))
}
