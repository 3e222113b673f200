//! A recording of the wire between the nodes, by tcpdump.

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

/// The discard port: nothing listens there; the packet matters, not its delivery.
const DISCARD: u16 = 9;
/// Where the last packet is looked for, in bytes before the end of the file: some packets may follow it.
const TAIL: usize = 1 << 20;

/// A running recording. Dropping it ends it; its file is removed with the topology.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
    messages: PathBuf,
    netns: Netns,
    far: SocketAddr,
}

impl Capture {
    pub(crate) fn start(near: &Node, far: IpAddr, folder: &Path) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let file = folder.join(format!("wire{number}.pcap"));
        let messages = folder.join(format!("wire{number}.log"));
        let log = fs::File::create(&messages).with_context(|| format!("make {}", messages.display()))?;
        let mut command = near.command("tcpdump")?;
        command.args(["-i", WIRE, "-n", "-U", "--immediate-mode", "-B", "65536", "-Z", "root", "-w"]);
        command.arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut tcpdump = Process::spawn(&mut command)?;
        until("tcpdump recording", || {
            let said = fs::read_to_string(&messages)?;
            if let Some(status) = tcpdump.ended()? {
                bail!("tcpdump ended: {status}: {said}");
            }
            Ok(said.contains("listening on").then_some(()))
        })?;
        Ok(Self { tcpdump, file, messages, netns: near.netns().clone(), far: SocketAddr::new(far, DISCARD) })
    }

    /// The file, in pcap format.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Ends the recording and reads it. Everything that crossed the wire before the call is in it.
    ///
    /// # Errors
    /// When tcpdump fails or lost packets: a recording with holes proves nothing.
    pub fn finish(mut self) -> Result<Traffic> {
        let last = format!("end of recording {}", self.file.display());
        self.netns.enter(|| -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0").context("socket for the last packet")?;
            socket.send_to(last.as_bytes(), self.far).context("send the last packet")?;
            Ok(())
        })??;
        until("last packet recorded", || {
            let bytes = fs::read(&self.file)?;
            let tail = bytes.get(bytes.len().saturating_sub(TAIL)..).unwrap_or_default();
            Ok(tail.windows(last.len()).any(|window| window == last.as_bytes()).then_some(()))
        })?;
        self.tcpdump.signal(Signal::SIGINT)?;
        self.tcpdump.wait()?;
        let said = fs::read_to_string(&self.messages)?;
        let lost = said
            .lines()
            .find(|line| line.ends_with("dropped by kernel"))
            .context("tcpdump told no losses")?;
        if !lost.starts_with("0 ") {
            bail!("the recording has holes: {lost}");
        }
        Traffic::parse(&fs::read(&self.file)?)
    }
}
