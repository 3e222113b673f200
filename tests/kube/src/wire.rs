//! A recording of what goes between the nodes.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Stdio,
};

use anyhow::{Result, bail};
use tacit_topology::{Process, Traffic, run, until};

use super::cluster::{Cluster, WIRE};

/// The discard port: the packet matters, not that somebody gets it.
const LAST: &str = "/dev/udp/10.99.0.2/9";

/// Records while `act` runs; everything that it sent is in the recording.
pub(super) fn during(cluster: &Cluster, act: impl FnOnce() -> Result<()>) -> Result<Traffic> {
    let recording = Recording::start(cluster)?;
    act()?;
    recording.finish(cluster)
}

struct Recording {
    tcpdump: Process,
    file: PathBuf,
    said: PathBuf,
}

impl Recording {
    fn start(cluster: &Cluster) -> Result<Self> {
        let (file, said) = (cluster.folder.join("wire.pcap"), cluster.folder.join("wire.log"));
        let log = File::create(&said)?;
        let mut command = cluster.nodes[0].command("tcpdump");
        command.args(["-i", WIRE, "-n", "-U", "--immediate-mode", "-B", "65536", "-Z", "root", "-w"]);
        command.arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut tcpdump = Process::spawn(&mut command)?;
        until("tcpdump records", || {
            let text = fs::read_to_string(&said)?;
            if tcpdump.ended()?.is_some() {
                bail!("{text}");
            }
            Ok(text.contains("listening on").then_some(()))
        })?;
        Ok(Self { tcpdump, file, said })
    }

    fn finish(self, cluster: &Cluster) -> Result<Traffic> {
        let last = format!("end of recording {}", std::process::id());
        run(cluster.nodes[0].command("bash").args(["-c", &format!("printf '{last}' >{LAST}")]))?;
        until("the last packet is recorded", || {
            let bytes = fs::read(&self.file)?;
            Ok(bytes.windows(last.len()).any(|window| window == last.as_bytes()).then_some(()))
        })?;
        // nsenter waits for tcpdump in the node's pid namespace: a signal to nsenter would not reach it.
        run(cluster.nodes[0].command("sh").args(["-c", "kill -INT $(pidof tcpdump)"]))?;
        let mut tcpdump = self.tcpdump;
        tcpdump.wait()?;
        let said = fs::read_to_string(&self.said)?;
        let is_whole = said.lines().any(|line| line.starts_with("0 ") && line.ends_with("dropped by kernel"));
        if !is_whole {
            bail!("the recording has holes: {said}");
        }
        Traffic::parse(&fs::read(&self.file)?)
    }
}
