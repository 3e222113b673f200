//! The shares of the kernel's tables, which the kernel and enrolment keep.

use std::sync::Arc;

use tacit_core::{
    policy::Policies,
    shares::{Capacity, PENDING_CONNECTIONS, PENDING_DIALS, PORT_MODES, Share, ShareUse},
};
use tacit_kernel::Maps;

use crate::enrol::{Pod, Pods};

/// Returns the use of each table by enrolled pods; holders are cgroup ids.
pub(super) fn usage(maps: &Maps, pods: &Pods, policies: &Policies) -> [ShareUse<u64>; 3] {
    // No bound of these depends on the node.
    let capacity = Capacity { descriptors: 0 };
    let mut all = [PENDING_CONNECTIONS, PENDING_DIALS, PORT_MODES].map(|row: Share| ShareUse {
        resource: row.resource,
        bounds: row.bounds(capacity),
        used: 0,
        fullest: None,
        refused: 0,
    });
    let [captured, dialled] = maps.pending_refused();
    // A namespace beyond its share is counted with the shares of policies.
    let of_namespace = |pod: &Pod| policies.why_not_applied(&pod.workload.namespace).is_some();
    let exceeds = |pod: &&Arc<Pod>| pod.policy().not_applied.is_some() && !of_namespace(pod);
    let not_applied = pods.pods.iter().filter(exceeds).count() as u64;
    for (usage, refused) in all.iter_mut().zip([units(captured), units(dialled), not_applied]) {
        usage.refused = refused;
    }
    for pod in &pods.pods {
        let pending = maps.pending(pod.slot()).unwrap_or_default();
        let of_pod =
            [units(pending.captured), units(pending.dialled), maps.count_port_modes(pod.slot()) as u64];
        for (usage, used) in all.iter_mut().zip(of_pod) {
            usage.used += used;
            if used > usage.fullest.map_or(0, |(_, most)| most) {
                usage.fullest = Some((pod.cgroup, used));
            }
        }
    }
    all
}

/// A count of the kernel, which two CPUs may have under way.
fn units(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}
