//! The filter of the guard on the host end of a link, for kernels without tcx. The kernel keeps the filter when its agent
//! exits; pins do not hold it.

use std::path::Path;

use aya::{
    maps::{HashMap, Map, MapData},
    programs::{
        ProgramError, SchedClassifier, TcAttachType,
        links::Link as _,
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
};

use crate::netlink;

/// Before whatever else filters there.
const PRIORITY: u16 = 1;
/// Known, so that a later agent finds it.
const HANDLE: TcHandle = TcHandle::new(0, 0x7ac1);

/// Adds our filter, or replaces it atomically where it stands.
pub(crate) fn attach(program: &mut SchedClassifier, interface: &str) -> Result<(), ProgramError> {
    // It may be there already: Cilium's, or ours.
    let _ = qdisc_add_clsact(interface);
    let options =
        TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() });
    let id = match program.attach_with_options(interface, TcAttachType::Ingress, options) {
        Ok(id) => id,
        Err(ProgramError::TcError(_) | ProgramError::NetlinkError(_)) => {
            program.attach_to_link(filter(interface)?)?
        }
        Err(error) => return Err(error),
    };
    // Dropped, it would take the filter away; the filter is to outlive the agent.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn filter(interface: &str) -> Result<SchedClassifierLink, ProgramError> {
    SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None)
        .map_err(ProgramError::IOError)
}

/// Best effort: without a filter of ours there is nothing to remove.
pub(crate) fn detach(interface: &str) {
    if let Ok(filter) = filter(interface) {
        let _ = filter.detach();
    }
}

/// Removes the filters that an agent has left on the links that the pinned map tells. Pins do not hold them.
pub(crate) fn detach_all(links: &Path) {
    let Ok(map) = MapData::from_pin(links).map(Map::HashMap) else { return };
    let Ok(map): Result<HashMap<MapData, u32, u64>, _> = map.try_into() else { return };
    let told: Vec<u32> = map.keys().filter_map(Result::ok).collect();
    let Ok(interfaces) = netlink::interfaces() else { return };
    interfaces.iter().filter(|i| told.contains(&i.index)).for_each(|i| detach(&i.name));
}
