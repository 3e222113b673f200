//! The filters of the guard on the host end of a link, for kernels without tcx. The kernel keeps the filter when its agent
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

use tacit_abi::Link;

use crate::netlink;

/// Before whatever else filters there.
const PRIORITY: u16 = 1;
/// Known, so that a later agent finds it.
const HANDLE: TcHandle = TcHandle::new(0, 0x7ac1);

/// Adds the guard's filter in one direction, or replaces it atomically.
pub(crate) fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    way: TcAttachType,
) -> Result<(), ProgramError> {
    // It may exist already: of Cilium, or of an earlier agent.
    let _ = qdisc_add_clsact(interface);
    let options =
        TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() });
    let id = match program.attach_with_options(interface, way, options) {
        Ok(id) => id,
        Err(ProgramError::TcError(_) | ProgramError::NetlinkError(_)) => {
            program.attach_to_link(filter(interface, way)?)?
        }
        Err(error) => return Err(error),
    };
    // Dropped, it would take the filter away; the filter is to outlive the agent.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn filter(interface: &str, way: TcAttachType) -> Result<SchedClassifierLink, ProgramError> {
    SchedClassifierLink::attached(interface, way, PRIORITY, HANDLE, None).map_err(ProgramError::IOError)
}

/// Removes the guard's filter, if there is one.
pub(crate) fn detach(interface: &str, way: TcAttachType) {
    if let Ok(filter) = filter(interface, way) {
        let _ = filter.detach();
    }
}

/// Removes the filters that an agent has left on the links that the pinned map tells. Pins do not hold them.
pub(crate) fn detach_all(links: &Path) {
    let Ok(map) = MapData::from_pin(links).map(Map::HashMap) else { return };
    let Ok(map): Result<HashMap<MapData, u32, Link>, _> = map.try_into() else { return };
    let told: Vec<u32> = map.keys().filter_map(Result::ok).collect();
    let Ok(interfaces) = netlink::interfaces() else { return };
    for interface in interfaces.iter().filter(|interface| told.contains(&interface.index)) {
        detach(&interface.name, TcAttachType::Ingress);
        detach(&interface.name, TcAttachType::Egress);
    }
}
