//! SYNs on a pod's loopback: held until the destination has answered, but for what is listed.

use tacit_abi::{Destination, Hold, HoldFacts, Pod, Reason, decide_hold, pod_flag};

use crate::{
    Row, assert_no_dead_line,
    facts::facts,
    first,
    packets::{self, OTHER_V4},
};

facts! {
    /// Facts about a SYN of the pod, if there is one.
    Facts of Option<Pod> {
        captured: bool,
        stale: bool,
        listener: bool,
    }
}

const DESTINATION: Destination = Destination { address: OTHER_V4, port: 80, slot: packets::SLOT };

impl Facts {
    fn has(&self, flag: u32) -> bool {
        self.subject.is_some_and(|pod| pod.flags & flag != 0)
    }
}

impl HoldFacts for Facts {
    fn destination(&self) -> Option<Destination> {
        self.captured().then_some(DESTINATION)
    }
    fn pod(&self) -> Option<Pod> {
        self.subject
    }
    fn is_stale(&self) -> bool {
        self.stale()
    }
    fn has_listener(&self, slot: u32) -> bool {
        assert_eq!(Some(slot), self.subject.map(|pod| pod.slot));
        self.listener()
    }
}

/// SYNs that are delivered at once.
static DELIVERED: [Row<Facts, Hold>; 5] = [
    Row::new("a connection that is not captured", |f| !f.captured(), |_| Hold::Pass),
    Row::new(
        "a pod that is not enrolled",
        |f| f.subject.is_none() || f.has(pod_flag::EXEMPT),
        |_| Hold::Pass,
    ),
    Row::new("a pod with `connect: early`", |f| f.has(pod_flag::CONNECT_EARLY), |_| Hold::Pass),
    Row::new("while no agent writes a heartbeat", Facts::stale, |_| {
        Hold::PassUnanswered(Reason::ConnectUnanswered)
    }),
    Row::new(
        "while no agent listens in the pod",
        |f| !f.listener(),
        |_| Hold::PassUnanswered(Reason::ConnectUnanswered),
    ),
];

#[test]
fn a_captured_connection_is_held_but_for_what_is_listed() {
    let pods = packets::pods().into_iter().map(Some).chain([None]);
    let mut combinations = 0;
    for pod in pods {
        combinations += Facts::each(pod, |facts| {
            let held = || Hold::Hold(facts.subject.expect("another line"), DESTINATION);
            let specified = first(&DELIVERED, facts).unwrap_or_else(held);
            assert_eq!(decide_hold(facts), specified, "{facts:?}");
        });
    }
    assert_no_dead_line(&DELIVERED);
    println!("{combinations} combinations");
}
