//! The interfaces of a namespace, and the namespaces of their other ends.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::sys::socket::SockProtocol;

use super::{NLM_F_ACK, NLM_F_DUMP, Netlink, attributes, u16_at, u32_at};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const IFINFO: usize = 16;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
/// `struct rtgenmsg`, padded.
const RTGENMSG: usize = 4;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINK_NETNSID: u16 = 37;
const ARPHRD_ETHER: u16 = 1;

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Index of what it is linked to: of a veth or netkit, its other end, in that end's namespace.
    pub(crate) linked: Option<u32>,
    /// Number that this namespace has for the one of the other end; `None` where the other end is in this one.
    pub(crate) linked_netns: Option<i32>,
    /// Index of the bridge or other device that it is a port of.
    pub(crate) master: Option<u32>,
    /// Hardware address of an Ethernet interface.
    pub(crate) hardware: Option<[u8; 6]>,
    /// The kernel's name of its kind, such as `veth`; empty for hardware.
    pub(crate) kind: String,
    pub(crate) is_ethernet: bool,
}

/// The interfaces of the calling thread's namespace.
///
/// # Errors
/// The kernel's.
pub(crate) fn interfaces() -> io::Result<Vec<Interface>> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    let mut found = Vec::new();
    netlink.ask(RTM_GETLINK, NLM_F_DUMP, &[0; IFINFO], |kind, body| {
        if kind == RTM_NEWLINK {
            found.extend(interface(body));
        }
    })?;
    Ok(found)
}

fn interface(body: &[u8]) -> Option<Interface> {
    let index = u32_at(body, 4)?;
    let is_ethernet = u16_at(body, 2)? == ARPHRD_ETHER;
    let mut interface = Interface { index, is_ethernet, ..Interface::default() };
    for (kind, value) in attributes(body.get(IFINFO..)?) {
        match kind {
            IFLA_IFNAME => {
                let text = value.strip_suffix(&[0]).unwrap_or(value);
                interface.name = String::from_utf8_lossy(text).into_owned();
            }
            IFLA_LINK => interface.linked = u32_at(value, 0),
            IFLA_LINK_NETNSID => interface.linked_netns = u32_at(value, 0).map(|id| id as i32),
            IFLA_MASTER => interface.master = u32_at(value, 0),
            IFLA_ADDRESS if is_ethernet => interface.hardware = value.try_into().ok(),
            IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                let text = kind.map_or(&[][..], |(_, text)| text.strip_suffix(&[0]).unwrap_or(text));
                interface.kind = String::from_utf8_lossy(text).into_owned();
            }
            _ => {}
        }
    }
    Some(interface)
}

/// The number that the calling thread's namespace has for `netns`; `None` while it has none, which is while none of its
/// interfaces has the other end there.
///
/// # Errors
/// The kernel's.
pub(crate) fn netns_id(netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    let mut body = [0; RTGENMSG + 8];
    body[RTGENMSG..RTGENMSG + 2].copy_from_slice(&8_u16.to_ne_bytes());
    body[RTGENMSG + 2..RTGENMSG + 4].copy_from_slice(&NETNSA_FD.to_ne_bytes());
    body[RTGENMSG + 4..].copy_from_slice(&netns.as_raw_fd().to_ne_bytes());
    let mut found = None;
    // With an acknowledgement, so that the answer ends.
    netlink.ask(RTM_GETNSID, NLM_F_ACK, &body, |kind, body| {
        if kind == RTM_NEWNSID
            && let Some(rest) = body.get(RTGENMSG..)
        {
            let id = attributes(rest).find(|(kind, _)| *kind == NETNSA_NSID);
            found = id.and_then(|(_, value)| u32_at(value, 0)).map(|id| id as i32).filter(|id| *id >= 0);
        }
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_among_the_interfaces() {
        let all = interfaces().expect("netlink");
        assert!(all.iter().any(|i| i.name == "lo" && i.index == 1 && !i.is_ethernet), "{all:?}");
    }

    #[test]
    fn a_cut_message_is_no_interface() {
        assert_eq!(interface(&[0; 6]), None);
    }
}
