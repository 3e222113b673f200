//! Address claims of a pod on its link. A bridge and its other pods trust them.

use crate::{Address, Link, Pod};

/// A claim of an address in a frame: an ARP packet, or a message of neighbour discovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// ARP: the sender has these addresses.
    Arp {
        /// Hardware address.
        hardware: u64,
        /// IPv4 address; unspecified in a probe.
        address: Address,
    },
    /// A neighbour advertisement: the target is here.
    Advertisement(Address),
    /// A router advertisement or a redirect: other addresses are reached through somebody.
    Routing,
}

/// Returns true if a pod may say this on its link. What else it says would lead its neighbours' traffic to it.
#[inline(always)]
#[must_use]
pub fn may_claim(pod: &Pod, link: &Link, claim: &Claim) -> bool {
    match claim {
        Claim::Arp { hardware, address } => {
            (link.hardware == 0 || *hardware == link.hardware)
                && (pod.owns(address) || address.is_none_of_family() || !pod.has_addresses())
        }
        Claim::Advertisement(target) => {
            pod.owns(target) || is_own_link_local(link, target) || !pod.has_addresses()
        }
        Claim::Routing => false,
    }
}

/// Returns true if `address` may be the source of a frame on the pod's link.
#[inline(always)]
#[must_use]
pub fn may_send_from(pod: &Pod, link: &Link, address: &Address) -> bool {
    pod.owns(address)
        || address.is_none_of_family()
        || is_own_link_local(link, address)
        || !pod.has_addresses()
}

/// On a link without neighbours nobody is misled by another link-local address.
#[inline(always)]
fn is_own_link_local(link: &Link, address: &Address) -> bool {
    address.is_link_local() && (link.has_neighbours == 0 || address.same(&link.link_local))
}
