//! A capture of the wire between the nodes, made by tcpdump.

use crate::{
    netns::Netns,
    node::{Node, WIRE},
    pcap::Traffic,
    process::Process,
    wait::until,
};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
};

/// The discard port. Nothing listens on it: the packet only has to cross the wire.
const DISCARD: u16 = 9;
/// Bytes at the end of the file in which the last packet is searched, because other packets may follow it.
const TAIL: usize = 1 << 20;

/// A running capture. Dropping it stops tcpdump. Its file is removed with the topology.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
    messages: PathBuf,
    netns: Netns,
    peer: SocketAddr,
}

impl Capture {
    pub(crate) fn start(node: &Node, peer: IpAddr, folder: &Path) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let file = folder.join(format!("wire{number}.pcap"));
        let messages = folder.join(format!("wire{number}.log"));
        let log = fs::File::create(&messages).with_context(|| format!("create {}", messages.display()))?;
        let mut command = node.command("tcpdump")?;
        command.args(["-i", WIRE, "-n", "-U", "--immediate-mode", "-B", "65536", "-Z", "root", "-w"]);
        command.arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut tcpdump = Process::spawn(&mut command)?;
        until("tcpdump capturing", || {
            let output = fs::read_to_string(&messages)?;
            if let Some(status) = tcpdump.ended()? {
                bail!("tcpdump exited: {status}: {output}");
            }
            Ok(output.contains("listening on").then_some(()))
        })?;
        Ok(Self {
            tcpdump,
            file,
            messages,
            netns: node.netns().clone(),
            peer: SocketAddr::new(peer, DISCARD),
        })
    }

    /// Returns the path of the file, in pcap format.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Stops the capture and parses it. It contains every packet that crossed the wire before the call.
    ///
    /// # Errors
    /// Fails if tcpdump fails or lost packets, because then an absent marker proves nothing.
    pub fn finish(mut self) -> Result<Traffic> {
        let last = format!("end of recording {}", self.file.display());
        self.netns.enter(|| -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0").context("socket for the last packet")?;
            socket.send_to(last.as_bytes(), self.peer).context("send the last packet")?;
            Ok(())
        })??;
        until("last packet captured", || {
            let bytes = fs::read(&self.file)?;
            let tail = bytes.get(bytes.len().saturating_sub(TAIL)..).unwrap_or_default();
            Ok(tail.windows(last.len()).any(|window| window == last.as_bytes()).then_some(()))
        })?;
        self.tcpdump.signal(Signal::SIGINT)?;
        self.tcpdump.wait()?;
        let output = fs::read_to_string(&self.messages)?;
        let lost = output
            .lines()
            .find(|line| line.ends_with("dropped by kernel"))
            .context("no count of lost packets in the output of tcpdump")?;
        if !lost.starts_with("0 ") {
            bail!("tcpdump lost packets: {lost}");
        }
        Traffic::parse(&fs::read(&self.file)?)
    }
}
