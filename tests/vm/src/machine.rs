//! One boot of one kernel in QEMU, by emulation: no KVM is needed.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// A machine to boot.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    /// A folder for its second serial port.
    pub(super) work: &'a Path,
    /// Its network, if it has any.
    pub(super) wire: Option<Wire<'a>>,
}

/// One end of a wire between two machines.
#[derive(Clone, Copy)]
pub(super) struct Wire<'a> {
    /// This end's socket.
    pub(super) local: &'a Path,
    /// The other end's.
    pub(super) remote: &'a Path,
    /// 1 or 2: makes its hardware address.
    pub(super) number: usize,
}

/// A machine that says nothing for so long hangs. Every test prints a line, and ends its own waits after five minutes.
const SILENCE: Duration = Duration::from_secs(20 * 60);
const MEMORY_MB: &str = "3072";
const APPEND: &str = "console=ttyS0,115200 quiet loglevel=3 panic=-1 oops=panic nokaslr mitigations=off \
                      tsc=reliable random.trust_cpu=on cryptomgr.notests";

/// Both of the guest's processors on one thread. With a thread for each, QEMU (7.2 is Debian 12's) now and then keeps a
/// translation of the breakpoint that the kernel's own patching puts into code for a moment: both processors then trap there
/// without end (`__netif_receive_skb_core` as its hook for ingress goes on or off), and the kernel reports a soft lockup.
const EMULATION: &str = "tcg,thread=single";

impl Machine<'_> {
    fn command(&self) -> Command {
        // It must not outlive this thread, however that ends.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        qemu.args(["-accel", EMULATION, "-M", "q35", "-cpu", "max", "-smp", "2", "-m", MEMORY_MB])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-chardev", "stdio,id=c0,signal=off", "-serial", "chardev:c0", "-serial"])
            .arg(format!("file:{}", self.work.join("exit").display()))
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", APPEND]);
        let Some(Wire { local, remote, number }) = self.wire else {
            qemu.args(["-nic", "none"]);
            return qemu;
        };
        let ends = [("local", local), ("remote", remote)]
            .map(|(end, path)| format!("{end}.type=unix,{end}.path={}", path.display()));
        qemu.args(["-netdev", &format!("dgram,id=n0,{}", ends.join(","))]);
        qemu.args(["-device", &format!("virtio-net-pci,netdev=n0,romfile=,mac=52:54:00:00:00:0{number}")]);
        qemu
    }

    /// Boots, hands every line of the console to `line`, and returns the exit code that the guest told.
    ///
    /// # Errors
    /// Fails if it cannot be started, told no code (a panic), or hangs.
    pub(super) fn run(&self, mut line: impl FnMut(&str)) -> Result<i32> {
        let mut qemu =
            self.command().stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start QEMU")?;
        let console = qemu.stdout.take().context("QEMU was given a pipe")?;
        let (sender, lines) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            for text in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                // Nobody listens any more to a guest that hangs.
                let _ = sender.send(String::from_utf8_lossy(&text).trim_end().to_owned());
            }
        });
        let in_time = loop {
            match lines.recv_timeout(SILENCE) {
                Ok(text) => line(&text),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break true,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => break false,
            }
        };
        if !in_time {
            qemu.kill().context("kill QEMU")?;
        }
        qemu.wait().context("wait for QEMU")?;
        let _ = reader.join();
        if !in_time {
            bail!("the guest hangs: it printed nothing for {SILENCE:?}");
        }
        self.exit_code()
    }

    /// An interactive boot on the caller's terminal.
    pub(super) fn shell(&self) -> Result<()> {
        self.command().status().context("start QEMU").map(drop)
    }

    fn exit_code(&self) -> Result<i32> {
        let told = fs::read_to_string(self.work.join("exit")).unwrap_or_default();
        let code = told.lines().find_map(|l| l.strip_prefix("EXIT ")).and_then(|c| c.trim().parse().ok());
        code.context("the guest ended without an exit code: it panicked or ran out of memory")
    }
}
