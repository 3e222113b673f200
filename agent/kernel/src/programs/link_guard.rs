//! The guard on the host end of a pod's links: what no socket hook sees must pass here.
//!
//! ```text
//! since 6.6    tcx link, first of all programs there, pinned as guard-<cgroup id>-<interface>
//! before       filter of a clsact qdisc (`clsact`): the kernel keeps it, pins are not needed
//! ```
//! Only links of Ethernet whose other end is in the node's namespace can be guarded so (veth, netkit in its L2 mode).
//! A pod with another kind of network (macvlan, a passed-through card) has the guard at its sockets alone, and says so.

use std::{collections::HashMap, net::Ipv6Addr, os::fd::AsFd as _};

use aya::{
    programs::{
        ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, LinkOrder},
        tc::TcAttachOptions,
    },
    sys::SyscallError,
};
use nix::ifaddrs::getifaddrs;
use tacit_core::error_chain::format_chain;

use super::{
    super::{
        KernelError, clsact, netlink,
        netns::{HostNetns, Netns},
    },
    Programs,
};

pub(super) const GUARD_LINK: &str = "guard_link";
pub(super) const GUARD_ARRIVAL: &str = "guard_arrival";

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

/// The host end of a pod's link, as the node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostEnd {
    /// Its name.
    pub interface: String,
    /// Its index.
    pub index: u32,
    /// True for a port of a bridge, on which other pods can be reached without the node.
    pub has_neighbours: bool,
    /// Hardware address of the pod's end.
    pub hardware: Option<[u8; 6]>,
    /// Link-local address of the pod's end.
    pub link_local: Option<Ipv6Addr>,
}

/// Program, direction and start of the pin's name of the two places on a host end.
const DIRECTIONS: [(&str, TcAttachType, &str); 2] =
    [(GUARD_LINK, TcAttachType::Ingress, "guard"), (GUARD_ARRIVAL, TcAttachType::Egress, "arrival")];

impl Programs {
    /// Guards every link of a pod that can be; idempotent, and atomic where it was guarded before. `tell` is given each
    /// host end before the programs run there.
    ///
    /// # Errors
    /// [`KernelError::Attach`]; links guarded until then stay so.
    pub fn guard_links(
        &mut self,
        pod: u64,
        netns: &Netns,
        host: &HostNetns,
        tell: impl Fn(&HostEnd) -> Result<(), KernelError>,
    ) -> Result<Vec<GuardedLink>, KernelError> {
        let ends = host_ends(netns, host).map_err(|e| KernelError::Attach {
            program: GUARD_LINK,
            target: format!("links of netns {}", netns.inode()),
            problem: e.to_string(),
        })?;
        let mut guarded = Vec::new();
        for end in ends {
            tell(&end)?;
            let mut by = "";
            // The arrival program records proofs, so it is attached before the program that drops frames without one.
            for direction in DIRECTIONS.into_iter().rev() {
                by = self.guard_link(pod, &end, direction)?;
            }
            guarded.push(GuardedLink { interface: end.interface, index: end.index, by });
        }
        Ok(guarded)
    }

    fn guard_link(
        &mut self,
        pod: u64,
        end: &HostEnd,
        (name, way, pin): (&'static str, TcAttachType, &str),
    ) -> Result<&'static str, KernelError> {
        let pin = format!("{pin}-{pod}-{}", end.index);
        if self.adopt(name, &pin, u64::from(end.index))?.is_some() {
            return Ok("tcx");
        }
        let failed = |problem: String| KernelError::Attach {
            program: name,
            target: format!("interface {}", end.interface),
            problem,
        };
        let path = self.pins.link(&pin);
        let program = self.classifier(name).map_err(|e| failed(format_chain(&e)))?;
        match tcx(program, &end.interface, way) {
            Ok(link) => {
                link.pin(&path).map_err(|e| failed(format!("pin {}: {e}", path.display())))?;
                self.pins.hold(&path).map_err(|e| failed(e.to_string()))?;
                Ok("tcx")
            }
            Err(error) if is_unknown(&error) => {
                clsact::attach(program, &end.interface, way).map_err(|e| failed(format_chain(&e)))?;
                Ok("clsact")
            }
            Err(error) => Err(failed(format_chain(&error))),
        }
    }

    /// Ends the guard on a pod's links; those that went with the pod are gone already. `interfaces`: their host ends.
    pub fn unguard_links(&mut self, pod: u64, interfaces: &[GuardedLink]) {
        for (name, _) in self.pins.links().unwrap_or_default() {
            if pod_of_pin(&name) == Some(pod) {
                self.pins.remove_link(&name);
            }
        }
        for end in interfaces.iter().filter(|end| end.by == "clsact") {
            for (_, way, _) in DIRECTIONS {
                clsact::detach(&end.interface, way);
            }
        }
    }

    /// Pods that have a guarded link, by cgroup id; after a restart also those that are gone.
    ///
    /// # Errors
    /// Fails if the pins cannot be read.
    pub fn guarded(&self) -> Result<Vec<u64>, KernelError> {
        let links = self.pins.links()?;
        Ok(links.iter().filter_map(|(name, _)| pod_of_pin(name)).collect())
    }

    fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier, ProgramError> {
        self.ebpf.program_mut(name).ok_or(ProgramError::UnexpectedProgramType)?.try_into()
    }
}

/// The pod whose link a pin guards, by cgroup id.
fn pod_of_pin(name: &str) -> Option<u64> {
    let (kind, rest) = name.split_once('-')?;
    let is_guard = DIRECTIONS.iter().any(|(_, _, pin)| *pin == kind);
    rest.split('-').next()?.parse().ok().filter(|_| is_guard)
}

/// Host ends of a namespace's links. The node's view decides which interfaces have their other end there: what a pod can
/// write about its own interfaces proves nothing.
pub(crate) fn host_ends(netns: &Netns, host: &HostNetns) -> std::io::Result<Vec<HostEnd>> {
    // Listing them gives each namespace of an other end its number.
    let outside = netlink::interfaces()?;
    let Some(id) = netlink::netns_id(netns.file().as_fd())? else { return Ok(Vec::new()) };
    let inside =
        host.run_in(netns.file(), || Ok::<_, std::io::Error>((netlink::interfaces()?, link_locals()?)))??;
    // An address of the node's own cannot be the pod's.
    let of_node = link_locals()?;
    let is_bridge = |index| outside.iter().any(|other| other.index == index && other.kind == "bridge");
    let ends = outside.iter().filter(|end| end.linked_netns == Some(id) && end.is_ethernet);
    Ok(ends
        .map(|end| {
            let inner = inside.0.iter().find(|inner| Some(inner.index) == end.linked);
            let link_local = inner.and_then(|inner| inside.1.get(&inner.name)).copied();
            let link_local = link_local.filter(|address| of_node.values().all(|own| own != address));
            HostEnd {
                interface: end.name.clone(),
                index: end.index,
                has_neighbours: end.master.is_some_and(is_bridge),
                hardware: inner.and_then(|inner| inner.hardware),
                link_local,
            }
        })
        .collect())
}

/// Returns true if the node has the other end of one of the namespace's links. A pod can make namespaces, but no such link.
#[must_use]
pub fn has_host_end(netns: &Netns, host: &HostNetns) -> bool {
    host_ends(netns, host).is_ok_and(|ends| !ends.is_empty())
}

/// The first link-local address of each interface of the calling thread's namespace.
fn link_locals() -> std::io::Result<HashMap<String, Ipv6Addr>> {
    let mut found = HashMap::new();
    for interface in getifaddrs()? {
        let address =
            interface.address.as_ref().and_then(|address| address.as_sockaddr_in6()).map(|v6| v6.ip());
        if let Some(address) = address.filter(Ipv6Addr::is_unicast_link_local) {
            found.entry(interface.interface_name).or_insert(address);
        }
    }
    Ok(found)
}

/// Hardware addresses of the node's interfaces.
///
/// # Errors
/// The kernel's.
pub(crate) fn node_hardware() -> std::io::Result<Vec<[u8; 6]>> {
    Ok(netlink::interfaces()?.iter().filter_map(|interface| interface.hardware).collect())
}

fn tcx(program: &mut SchedClassifier, interface: &str, way: TcAttachType) -> Result<FdLink, ProgramError> {
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(interface, way, first)?;
    program.take_link(id)?.try_into().map_err(|_| ProgramError::UnexpectedProgramType)
}

/// Returns true for the error of a kernel without tcx.
fn is_unknown(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(SyscallError { io_error, .. })
        if io_error.raw_os_error() == Some(libc::EINVAL))
}
