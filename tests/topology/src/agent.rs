//! A `tacit agent` on a node: started in the node's namespace and in a cgroup outside the pods', asked through its
//! socket and its metrics port, stopped, killed, started again.

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
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

/// Most of an answer that is read, in bytes.
const ANSWER_MAX: u64 = 4 << 20;

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
    /// Starts `program agent --config <files>` on `node`, logging at debug, without waiting for it to be ready.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(node: &Node, program: &Path, files: &MeshFiles) -> Result<Self> {
        Self::start_with(node, program, files, &["-v"])
    }

    /// As [`Agent::start`], but logging as much as it does in production, not more.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_quiet(node: &Node, program: &Path, files: &MeshFiles) -> Result<Self> {
        Self::start_with(node, program, files, &[])
    }

    /// Starts one more on the same node, which stands by to take over. It is called `name`, and has a cgroup and a socket of
    /// its own.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_beside(&self, node: &Node, name: &str) -> Result<Self> {
        Self::start_with(node, &self.program, &self.files.beside(name)?, &["-v", "--stand-by"])
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

    /// Starts it again after it ended; the log goes on in the same file.
    ///
    /// # Errors
    /// When it still runs or cannot be started.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("the agent of node {} runs already", self.node);
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let also = log.try_clone().context("share the log")?;
        self.process = Some(Process::spawn(self.command.stdin(Stdio::null()).stdout(log).stderr(also))?);
        Ok(())
    }

    /// Waits until it says it is ready.
    ///
    /// # Errors
    /// When it ends or stays unready; the message has its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let what = format!("agent of node {} ready", self.node);
        let ready = until(&what, || {
            if let Some(status) = self.process.as_mut().context("the agent was stopped")?.ended()? {
                bail!("the agent of node {} ended: {status}", self.node);
            }
            let answer = http_get(&self.netns, MeshFiles::METRICS, "/healthz/ready");
            Ok(answer.ok().filter(|(status, _)| *status == 200).map(drop))
        });
        ready.with_context(|| format!("log of the agent:\n{}", self.log().unwrap_or_default()))
    }

    /// Its node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The files it reads.
    #[must_use]
    pub fn files(&self) -> &MeshFiles {
        &self.files
    }

    /// Its process id, while it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// What it logged so far, over all its starts.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }

    /// What `tacit status -o json` prints.
    ///
    /// # Errors
    /// When the command fails.
    pub fn status(&self) -> Result<String> {
        self.operator(&["status", "-o", "json"])
    }

    /// What `tacit status -o table` prints.
    ///
    /// # Errors
    /// When the command fails.
    pub fn status_table(&self) -> Result<String> {
        self.operator(&["status", "-o", "table"])
    }

    /// The text of its metrics.
    ///
    /// # Errors
    /// When it does not answer with them.
    pub fn metrics(&self) -> Result<String> {
        match http_get(&self.netns, MeshFiles::METRICS, "/metrics")? {
            (200, text) => Ok(text),
            (status, text) => bail!("metrics of node {}: status {status}: {text}", self.node),
        }
    }

    /// Runs `tacit uninstall` for its configuration and returns what it printed.
    ///
    /// # Errors
    /// When the command fails, as it must while the agent runs.
    pub fn uninstall(&self) -> Result<String> {
        run(Command::new(&self.program).arg("uninstall").arg("--config").arg(self.files.config()))
    }

    /// Asks it to drain and end (SIGTERM), and waits.
    ///
    /// # Errors
    /// When it is not running, or does not end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.end(Signal::SIGTERM)
    }

    /// Asks it to drain and end (SIGTERM), without waiting; see [`Agent::wait_end`].
    ///
    /// # Errors
    /// When it is not running.
    pub fn ask_to_end(&self) -> Result<()> {
        self.process.as_ref().context("the agent was stopped")?.signal(Signal::SIGTERM)
    }

    /// Kills it with no chance to say good-bye (SIGKILL).
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.end(Signal::SIGKILL)
    }

    /// Stops it where it stands (SIGSTOP).
    ///
    /// # Errors
    /// When it is not running.
    pub fn pause(&self) -> Result<()> {
        self.process.as_ref().context("the agent was stopped")?.signal(Signal::SIGSTOP)
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    /// When it is not running.
    pub fn resume(&self) -> Result<()> {
        self.process.as_ref().context("the agent was stopped")?.signal(Signal::SIGCONT)
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        let status = self.process.as_mut().context("the agent was stopped")?.wait()?;
        self.process = None;
        Ok(status)
    }

    fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        self.process.as_mut().context("the agent was stopped")?.signal(signal)?;
        self.wait_end()
    }

    fn operator(&self, args: &[&str]) -> Result<String> {
        run(Command::new(&self.program).args(args).arg("--socket").arg(self.files.socket()))
    }
}

/// One HTTP GET from within `netns`: status and body.
///
/// # Errors
/// When nothing answers, or not with HTTP.
pub fn http_get(netns: &Netns, address: &str, path: &str) -> Result<(u16, String)> {
    let address: SocketAddr = address.parse().with_context(|| format!("address {address}"))?;
    let answer = netns.enter(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, HANG)?;
        stream.set_read_timeout(Some(HANG))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let (head, body) = answer.split_once("\r\n\r\n").context("answer without an end of its head")?;
    let status =
        head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("answer without a status")?;
    Ok((status, body.to_owned()))
}
