//! The host end of a pod's link: what the agent has seen of the pod's end, and what that is compared with.

use crate::Address;

/// The host end of a pod's link. The map's key is its interface index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Id of the pod's cgroup.
    pub cgroup: u64,
    /// Hardware address of the pod's end, see [`hardware_address`]; 0 if it is not checked.
    pub hardware: u64,
    /// 1 if other pods can be reached on the link without the node, as on a bridge; else 0.
    pub has_neighbours: u64,
    /// The pod's link-local address or [`Address::NONE`]. Only compared if the link has neighbours.
    pub link_local: Address,
}

const _: () = assert!(size_of::<Link>() == 40);

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for Link {}

impl Link {
    /// Returns the entry after `known`, the one that the interface has. What was seen first counts, for the same pod.
    #[must_use]
    pub fn after(self, known: Option<Self>) -> Self {
        let Some(known) = known.filter(|known| known.cgroup == self.cgroup) else { return self };
        let is_checked = self.has_neighbours != 0 && known.hardware != 0;
        Self {
            hardware: if is_checked { known.hardware } else { self.hardware },
            link_local: if known.link_local.is_none() { self.link_local } else { known.link_local },
            ..self
        }
    }

    /// Returns true if an address of this link is one of `other`'s, where neighbours could take one for the other.
    #[must_use]
    pub fn claims_address_of(&self, other: &Self) -> bool {
        let may_meet = self.has_neighbours != 0 && other.has_neighbours != 0;
        let same_hardware = self.hardware != 0 && self.hardware == other.hardware;
        let same_local = !self.link_local.is_none() && self.link_local.same(&other.link_local);
        may_meet && (same_hardware || same_local)
    }
}

/// Returns the number of a hardware address of six bytes.
#[inline(always)]
#[must_use]
pub const fn hardware_address(bytes: [u8; 6]) -> u64 {
    u64::from_be_bytes([0, 0, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn local(last: u32) -> Address {
        Address([0xfe80_0000_u32.to_be(), 0, 0, last.to_be()])
    }

    const BRIDGED: Link = Link { cgroup: 7, hardware: 2, has_neighbours: 1, link_local: local(2) };

    #[test]
    fn what_was_seen_first_of_a_link_counts_for_its_pod() {
        let changed = Link { hardware: 9, link_local: local(9), ..BRIDGED };
        assert_eq!(changed.after(Some(BRIDGED)), BRIDGED);
        assert_eq!(changed.after(None), changed);
        let others = Link { cgroup: 8, ..BRIDGED };
        assert_eq!(changed.after(Some(others)), changed, "the interface has another pod now");
        let early = Link { link_local: Address::NONE, ..BRIDGED };
        assert_eq!(BRIDGED.after(Some(early)), BRIDGED, "its address came later");
        let routed = Link { hardware: 0, has_neighbours: 0, ..changed };
        assert_eq!(routed.after(Some(BRIDGED)).hardware, 0, "no port of a bridge any more");
    }

    #[test]
    fn a_hardware_address_is_a_number_in_the_order_of_its_bytes() {
        assert_eq!(hardware_address([1, 2, 3, 4, 5, 6]), 0x0102_0304_0506);
    }

    #[test]
    fn two_links_of_a_bridge_cannot_have_one_address() {
        let other = Link { cgroup: 8, hardware: 3, link_local: local(3), ..BRIDGED };
        assert!(!BRIDGED.claims_address_of(&other));
        assert!(BRIDGED.claims_address_of(&Link { hardware: 2, ..other }));
        assert!(BRIDGED.claims_address_of(&Link { link_local: local(2), ..other }));
        let unknown = Link { hardware: 0, link_local: Address::NONE, ..other };
        assert!(!unknown.claims_address_of(&Link { cgroup: 9, ..unknown }));
        let routed = Link { hardware: 0, has_neighbours: 0, link_local: local(2), ..other };
        assert!(!BRIDGED.claims_address_of(&routed));
    }
}
