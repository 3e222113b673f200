//! Sources of frames on a pod's link, and what frames there say about who has an address.

use tacit_abi::{Address, Claim, Pod, may_claim, may_send_from};

use crate::{
    facts::Every as _,
    packets::{
        self, HARDWARE, LinkKind, OTHER_LINK_LOCAL, OTHER_V4, OTHER_V6, OWN_LINK_LOCAL, POD_V4, POD_V6,
        is_unspecified,
    },
};

const ADDRESSES: [Address; 7] =
    [POD_V4, POD_V6, OTHER_V4, OTHER_V6, OWN_LINK_LOCAL, OTHER_LINK_LOCAL, Address::NONE];
const OTHER_HARDWARE: u64 = 0x0200_0000_0009;

/// Returns every claim. A new kind of claim does not compile here before it is listed.
fn claims() -> Vec<Claim> {
    let mut all = vec![Claim::Routing];
    for claim in [Claim::Routing, Claim::Advertisement(POD_V4), Claim::Arp { hardware: 0, address: POD_V4 }] {
        match claim {
            Claim::Routing => {}
            Claim::Advertisement(_) => all.extend(ADDRESSES.map(Claim::Advertisement)),
            Claim::Arp { .. } => {
                let unspecified = Address::from_v4_be(0);
                for address in [POD_V4, OTHER_V4, unspecified] {
                    all.extend([HARDWARE, OTHER_HARDWARE].map(|hardware| Claim::Arp { hardware, address }));
                }
            }
        }
    }
    all
}

fn is_own(pod: &Pod, address: &Address) -> bool {
    pod.v4 != Address::NONE && *address == pod.v4 || pod.v6 != Address::NONE && *address == pod.v6
}

#[test]
fn a_pod_with_known_addresses_claims_and_uses_no_other() {
    let mut combinations = 0;
    for pod in packets::pods() {
        for kind in LinkKind::all() {
            let link = kind.link();
            for address in ADDRESSES {
                let expected = is_own(&pod, &address)
                    || is_unspecified(&address)
                    || kind.gives(&address)
                    || !pod.has_addresses();
                assert_eq!(may_send_from(&pod, &link, &address), expected, "{pod:?} {kind:?} {address:?}");
            }
            for claim in claims() {
                let expected = match claim {
                    // A pod is no router.
                    Claim::Routing => false,
                    Claim::Advertisement(target) => {
                        is_own(&pod, &target) || kind.gives(&target) || !pod.has_addresses()
                    }
                    Claim::Arp { hardware, address } => {
                        let is_checked = kind != LinkKind::Routed;
                        let has_address = is_own(&pod, &address) || is_unspecified(&address);
                        (!is_checked || hardware == HARDWARE) && (has_address || !pod.has_addresses())
                    }
                };
                assert_eq!(may_claim(&pod, &link, &claim), expected, "{pod:?} {kind:?} {claim:?}");
            }
            combinations += ADDRESSES.len() + claims().len();
        }
    }
    println!("{combinations} combinations");
}
