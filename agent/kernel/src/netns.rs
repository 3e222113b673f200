//! Network namespaces: open one through a process in it, enter it for one operation, know it again.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    path::Path,
};

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns};

/// A network namespace held open.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: u64,
    cookie: u64,
}

impl Netns {
    /// The namespace of process `pid`.
    ///
    /// # Errors
    /// Fails if the process is gone, or if this process lacks CAP_SYS_ADMIN or CAP_SYS_PTRACE.
    pub fn of_process(pid: u32, host: &HostNetns) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")), host)
    }

    fn open(path: &Path, host: &HostNetns) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        let cookie = host.run_in(&file, netns_cookie)??;
        Ok(Self { file, inode, cookie })
    }

    /// The same namespace, held open by another descriptor.
    ///
    /// # Errors
    /// Fails if descriptors are used up.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, ..*self })
    }

    /// Inode number; what `bpf_link_info` and `/proc/PID/ns/net` show.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Cookie, as BPF programs see it. Never reused while the system runs.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The addresses of this namespace's interfaces.
    ///
    /// # Errors
    /// Fails if it cannot be entered or its interfaces cannot be listed.
    pub fn addresses(&self, host: &HostNetns) -> io::Result<Vec<IpAddr>> {
        host.run_in(&self.file, crate::host::addresses)?
    }
}

impl Netns {
    /// The ranges of the links that do not leave this namespace of a pod with the addresses `own`: those of its containers or virtual
    /// machines.
    ///
    /// # Errors
    /// As [`Self::addresses`].
    pub fn inner_ranges(&self, host: &HostNetns, own: &[IpAddr]) -> io::Result<Vec<IpNet>> {
        host.run_in(&self.file, || crate::host::inner_ranges(host.file.as_fd(), own))?
    }
}

/// The namespace the agent started in: every excursion ends here.
#[derive(Debug)]
pub struct HostNetns {
    file: File,
    inode: u64,
}

impl HostNetns {
    /// The calling thread's namespace.
    ///
    /// # Errors
    /// Fails if /proc is not mounted.
    pub fn current() -> io::Result<Self> {
        let file = File::open("/proc/thread-self/ns/net")?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// Returns true if `pid` is in this very namespace (a host-network pod).
    ///
    /// # Errors
    /// Fails if the process is gone.
    pub fn is_home_of(&self, pid: u32) -> io::Result<bool> {
        Ok(std::fs::metadata(format!("/proc/{pid}/ns/net"))?.ino() == self.inode)
    }

    /// Runs `act` with the calling thread inside `netns`. `act` must not await: the thread is shared.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered.
    pub fn run_in<T>(&self, netns: &File, act: impl FnOnce() -> T) -> io::Result<T> {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        let _back = Return(&self.file);
        Ok(act())
    }
}

/// Brings the thread home, also when `act` panics.
struct Return<'a>(&'a File);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            // A thread left in a pod's namespace would open other pods' sockets there. Nothing safe can follow.
            tracing::error!(%error, "cannot return to the node's network namespace; aborting");
            std::process::abort();
        }
    }
}

/// Cookie of the calling thread's namespace.
pub(super) fn netns_cookie() -> io::Result<u64> {
    // Any socket tells; an unbound UDP one has no effect on the pod.
    let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))?;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `size` live through the call and `size` is `cookie`'s size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
