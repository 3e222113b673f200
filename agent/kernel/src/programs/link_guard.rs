//! The guard on the host end of a pod's links: what no socket hook sees must pass here.
//!
//! ```text
//! since 6.6    tcx link, first of all programs there, pinned as guard-<cgroup id>-<interface>
//! before       filter of a clsact qdisc (`clsact`): the kernel keeps it, pins are not needed
//! ```
//! Only links of Ethernet whose other end is in the node's namespace can be guarded so (veth, netkit in its L2 mode).
//! A pod with another kind of network (macvlan, a passed-through card) has the guard at its sockets alone, and says so.

use aya::{
    programs::{
        ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, LinkOrder},
        tc::TcAttachOptions,
    },
    sys::SyscallError,
};
use tacit_core::error_chain::format_chain;

use super::{
    super::{
        KernelError, clsact, netlink,
        netns::{HostNetns, Netns},
    },
    Programs,
};

pub(super) const GUARD_LINK: &str = "guard_link";

/// A link of a pod that is guarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardedLink {
    /// Name of its host end.
    pub interface: String,
    /// Index of its host end.
    pub index: u32,
    /// `tcx` or `clsact`.
    pub by: &'static str,
}

impl Programs {
    /// Guards every link of a pod that can be; idempotent, and atomic where it was guarded before. `tell` is given each
    /// host end before the program runs there.
    ///
    /// # Errors
    /// [`KernelError::Attach`]; links guarded until then stay so.
    pub fn guard_links(
        &mut self,
        pod: u64,
        netns: &Netns,
        host: &HostNetns,
        tell: impl Fn(u32) -> Result<(), KernelError>,
    ) -> Result<Vec<GuardedLink>, KernelError> {
        let ends = host_ends(netns, host).map_err(|e| KernelError::Attach {
            program: GUARD_LINK,
            target: format!("links of netns {}", netns.inode()),
            problem: e.to_string(),
        })?;
        let mut guarded = Vec::new();
        for end in ends {
            tell(end.index)?;
            let by = self.guard_link(pod, &end)?;
            guarded.push(GuardedLink { interface: end.name, index: end.index, by });
        }
        Ok(guarded)
    }

    fn guard_link(&mut self, pod: u64, end: &netlink::Interface) -> Result<&'static str, KernelError> {
        let pin = format!("{}{}", prefix(pod), end.index);
        if self.adopt(GUARD_LINK, &pin, u64::from(end.index))?.is_some() {
            return Ok("tcx");
        }
        let failed = |problem: String| KernelError::Attach {
            program: GUARD_LINK,
            target: format!("interface {}", end.name),
            problem,
        };
        let path = self.pins.link(&pin);
        match tcx(self.classifier().map_err(|e| failed(format_chain(&e)))?, &end.name) {
            Ok(link) => {
                link.pin(&path).map_err(|e| failed(format!("pin {}: {e}", path.display())))?;
                self.pins.hold(&path).map_err(|e| failed(e.to_string()))?;
                Ok("tcx")
            }
            Err(error) if is_unknown(&error) => {
                let classifier = self.classifier().map_err(|e| failed(format_chain(&e)))?;
                clsact::attach(classifier, &end.name).map_err(|e| failed(format_chain(&e)))?;
                Ok("clsact")
            }
            Err(error) => Err(failed(format_chain(&error))),
        }
    }

    /// Ends the guard on a pod's links; those that went with the pod are gone already. `interfaces`: their host ends.
    pub fn unguard_links(&mut self, pod: u64, interfaces: &[GuardedLink]) {
        for (name, _) in self.pins.links().unwrap_or_default() {
            if name.starts_with(&prefix(pod)) {
                self.pins.remove_link(&name);
            }
        }
        for end in interfaces.iter().filter(|end| end.by == "clsact") {
            clsact::detach(&end.interface);
        }
    }

    /// Pods that have a guarded link, by cgroup id; after a restart also those that are gone.
    ///
    /// # Errors
    /// When the pins cannot be read.
    pub fn guarded(&self) -> Result<Vec<u64>, KernelError> {
        let links = self.pins.links()?;
        let pod = |name: &str| name.strip_prefix("guard-")?.split('-').next()?.parse().ok();
        Ok(links.iter().filter_map(|(name, _)| pod(name)).collect())
    }

    fn classifier(&mut self) -> Result<&mut SchedClassifier, ProgramError> {
        self.ebpf.program_mut(GUARD_LINK).ok_or(ProgramError::UnexpectedProgramType)?.try_into()
    }
}

fn prefix(pod: u64) -> String {
    format!("guard-{pod}-")
}

/// Host ends of a namespace's links: each end names the other.
fn host_ends(netns: &Netns, host: &HostNetns) -> std::io::Result<Vec<netlink::Interface>> {
    let inside = host.run_in(netns.file(), netlink::interfaces)??;
    let outside = netlink::interfaces()?;
    let pairs = inside.into_iter().filter_map(|inner| {
        let other = outside.iter().find(|o| Some(o.index) == inner.linked)?;
        (other.linked == Some(inner.index) && other.is_ethernet).then(|| other.clone())
    });
    Ok(pairs.collect())
}

fn tcx(program: &mut SchedClassifier, interface: &str) -> Result<FdLink, ProgramError> {
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(interface, TcAttachType::Ingress, first)?;
    program.take_link(id)?.try_into().map_err(|_| ProgramError::UnexpectedProgramType)
}

/// Does the error say that the kernel has no tcx?
fn is_unknown(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(SyscallError { io_error, .. })
        if io_error.raw_os_error() == Some(libc::EINVAL))
}
