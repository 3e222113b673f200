//! The guest's file system: busybox, modules, the programs under test with their libraries. It is all in memory, so
//! programs are stripped.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use xtask_support::command::{find_program, run, stdout};

use super::kernels::Unpacked;

/// Modules that nodes, pods and the wire between two machines need where they are not built in.
const MODULES: [&str; 13] = [
    "veth",
    "bridge",
    "virtio_pci",
    "virtio_net",
    "sch_ingress",
    "cls_bpf",
    "sctp",
    "dccp_ipv6",
    "tcp_diag",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_redir",
];
/// Programs that tests and harness call, by name.
const TOOLS: [&str; 14] = [
    "ip", "nsenter", "tcpdump", "mount", "umount", "stat", "find", "rm", "rmdir", "sleep", "flock", "cat",
    "sysctl", "grep",
];
const INIT: &str = include_str!("guest-init.sh");

/// A file system being put together in a folder.
pub(super) struct Initramfs {
    folder: PathBuf,
}

impl Initramfs {
    /// With busybox, the tools and the kernel's modules.
    pub(super) fn new(folder: &Path, kernel: &Unpacked) -> Result<Self> {
        let this = Self { folder: folder.join("root") };
        for part in
            ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc", "usr/bin", "usr/sbin", "payload"]
        {
            fs::create_dir_all(this.folder.join(part))?;
        }
        this.shell()?;
        for tool in TOOLS {
            let program = find_program(tool).with_context(|| format!("{tool} is not on PATH"))?;
            this.program(&program, &format!("usr/bin/{tool}"))?;
        }
        this.modules(kernel)?;
        this.text("payload/modules", &MODULES.join(" "))?;
        this.text("etc/passwd", "root:x:0:0:root:/tmp:/bin/sh\n")?;
        this.text("etc/group", "root:x:0:\n")?;
        this.text("init", INIT)?;
        fs::set_permissions(this.folder.join("init"), fs::Permissions::from_mode(0o755))?;
        Ok(this)
    }

    /// busybox for everything, but dash as the shell: busybox' runs its own applets before what is on PATH.
    fn shell(&self) -> Result<()> {
        let busybox = find_program("busybox").context("busybox is not on PATH")?;
        fs::copy(&busybox, self.folder.join("bin/busybox"))?;
        let applets = stdout(Command::new(&busybox).arg("--list")).context("busybox --list")?;
        for applet in applets.lines().filter(|a| !["busybox", "sh"].contains(a)) {
            symlink("busybox", self.folder.join("bin").join(applet))?;
        }
        symlink("../bin/busybox", self.folder.join("sbin/modprobe"))?;
        self.program(Path::new("/bin/dash"), "bin/sh")
    }

    /// Copies a program with the libraries it is linked to.
    pub(super) fn program(&self, from: &Path, to: &str) -> Result<()> {
        self.file(from, to)?;
        // A static program has none, and ldd says so by failing.
        let libraries = stdout(Command::new("ldd").arg(from)).unwrap_or_default();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            let inside = library.trim_start_matches('/');
            if !self.folder.join(inside).exists() {
                self.file(Path::new(library), inside)?;
            }
        }
        Ok(())
    }

    /// As [`Self::program`], without its symbols.
    pub(super) fn stripped(&self, from: &Path, to: &str) -> Result<()> {
        self.program(from, to)?;
        run(Command::new("strip").arg(self.folder.join(to)))
    }

    fn file(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.folder.join(to);
        fs::create_dir_all(to.parent().context("a path below the root")?)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    }

    /// A file of this text.
    pub(super) fn text(&self, to: &str, text: &str) -> Result<()> {
        let to = self.folder.join(to);
        fs::write(&to, text).with_context(|| format!("cannot write {}", to.display()))
    }

    fn modules(&self, kernel: &Unpacked) -> Result<()> {
        let mut wanted = BTreeSet::new();
        for module in MODULES {
            let mut show = Command::new(find_program("modprobe").context("modprobe is not on PATH")?);
            show.args(["-S", &kernel.release, "-d"]).arg(&kernel.folder).args(["--show-depends", module]);
            // Built in, or not there at all: the guest tells by what fails.
            let shown = stdout(&mut show).unwrap_or_default();
            wanted
                .extend(shown.lines().filter_map(|l| l.strip_prefix("insmod ")).map(|l| l.trim().to_owned()));
        }
        let home = format!("lib/modules/{}", kernel.release);
        let source = kernel.folder.join(&home);
        for module in &wanted {
            let inside = module.split_once(&home).map_or("", |(_, rest)| rest).trim_start_matches('/');
            self.module(Path::new(module), &format!("{home}/{inside}"))?;
        }
        fs::create_dir_all(self.folder.join(&home))?;
        for index in ["modules.builtin", "modules.order"] {
            self.file(&source.join(index), &format!("{home}/{index}"))?;
        }
        run(Command::new("/sbin/depmod").arg("-b").arg(&self.folder).arg(&kernel.release))
    }

    /// Modules are unpacked here: not every guest can.
    fn module(&self, from: &Path, to: &str) -> Result<()> {
        let unpacker: Option<&[&str]> = match from.extension().and_then(|e| e.to_str()) {
            Some("xz") => Some(&["xz", "-dc"]),
            Some("zst") => Some(&["zstd", "-qdc"]),
            _ => None,
        };
        let Some(words) = unpacker else { return self.file(from, to) };
        let to = self.folder.join(to).with_extension("");
        fs::create_dir_all(to.parent().context("a path below the root")?)?;
        let mut unpack = Command::new(words[0]);
        run(unpack.args(&words[1..]).arg(from).stdout(File::create(&to)?))
    }

    /// Writes the archive that the kernel unpacks at boot.
    pub(super) fn pack(&self, to: &Path) -> Result<()> {
        let mut find =
            Command::new("find").arg(".").current_dir(&self.folder).stdout(Stdio::piped()).spawn()?;
        let names = find.stdout.take().context("find was given a pipe")?;
        let archive = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
        run(Command::new("cpio")
            .args(["-o", "-H", "newc", "--quiet", "-R", "0:0"])
            .current_dir(&self.folder)
            .stdin(names)
            .stdout(archive))?;
        ensure!(find.wait()?.success(), "find failed in {}", self.folder.display());
        Ok(())
    }
}
