//! Attacks of other tenants of the victim's node, and flows of the node itself. Those that others send in clear are judged
//! by what the victim's application gets.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use anyhow::{Context as _, Result};
use nix::{ifaddrs::getifaddrs, net::if_::if_nametoindex, sys::socket::SockaddrStorage};
use tacit_topology::{Node, Pod, until};

use crate::{
    Family,
    catalogue::{From, Layout, Neighbour, Tags, To, Who},
    driver::gateway,
    flood,
    judge::Outcome,
    step_process::{Step, patient, simple},
    translation,
    wire::Sighting,
    world::{ALLOWED_PORT, DISABLED_PORT, PORT, World, address, datagram, foreign, ip, on_link},
};

/// Port of attackers that choose their own.
const OWN_PORT: u16 = 9200;
/// Port of probes of the node that somebody continues.
const PROBE_PORT: u16 = 9201;
const DISCARD: u16 = 9;

/// Runs an attack to its end, and puts things right again.
pub(crate) fn drive(world: &World, what: Neighbour, family: Family, marker: &str) -> Result<Outcome> {
    let bridged = &world.bridged;
    let (guarded, stranger) = (&bridged.guarded, address(&world.stranger, family, PORT));
    let own = |pod: &Pod| address(pod, family, OWN_PORT).to_string();
    match what {
        Neighbour::In(step, to) => {
            let target = target(&bridged.neighbour, guarded, family, to)?;
            simple(world, &bridged.neighbour, step, target, marker, &[])
        }
        Neighbour::Out(step, to) => {
            let target = target(&bridged.tenant, &bridged.neighbour, family, to)?;
            simple(world, &bridged.tenant, step, target, marker, &[])
        }
        Neighbour::Claim(who, tags) => claim(world, who, tags, family, marker),
        Neighbour::Spoofed => {
            let source = SocketAddr::new(foreign(&bridged.open, family), OWN_PORT).to_string();
            simple(world, &bridged.open, "raw", stranger, marker, &[&source])
        }
        Neighbour::SpoofedFrame(Tags(tags)) => {
            let open = &bridged.open;
            let source = SocketAddr::new(foreign(open, family), OWN_PORT).to_string();
            let (gateway, tags) = (gateway(open).to_string(), tags.to_string());
            let extra = [&*source, &gateway, &hardware(open)?, &tags];
            simple(world, open, "packet-tagged", stranger, marker, &extra)
        }
        Neighbour::ForeignHardware => {
            let (to, from) = (hardware(&bridged.neighbour)?, hardware(guarded)?);
            let target = address(&bridged.neighbour, family, PORT);
            simple(
                world,
                &bridged.open,
                "packet-hardware",
                target,
                marker,
                &[&own(&bridged.open), &to, &from],
            )
        }
        Neighbour::NodeAddress(from, layout) => {
            let (pod, claimed) = match from {
                From::Bridge => (&bridged.neighbour, node_address(guarded, family)),
                From::Wire => (&world.outsider, wire_address(world.far_node()?, family)),
            };
            let source = SocketAddr::new(claimed, OWN_PORT).to_string();
            simple(world, pod, "raw", address(victim(world, layout), family, PORT), marker, &[&source])
        }
        Neighbour::NodeAddressTcp => node_address_tcp(world, family, marker),
        Neighbour::NodeFlowFragments => node_flow_fragments(world, marker),
        Neighbour::HostNetwork(step, layout) => {
            let target = address(victim(world, layout), family, PORT);
            simple(world, &bridged.host, step, target, marker, &[])
        }
        Neighbour::Probe(step, layout) => {
            probe(world, step, address(victim(world, layout), family, PORT), marker, &[])
        }
        Neighbour::Encapsulated(kind) => encapsulated(world, kind, family, marker),
        Neighbour::AllowedSource => {
            let source = address(&world.stranger, family, ALLOWED_PORT).to_string();
            let target = address(guarded, family, PORT);
            simple(world, &bridged.neighbour, "raw", target, marker, &[&source])
        }
        Neighbour::AllowedQuery => {
            let target = address(&world.stranger, family, ALLOWED_PORT);
            simple(world, &bridged.tenant, "query", target, marker, &[])
        }
        Neighbour::DisabledPort => {
            let target = address(&world.victim, family, DISABLED_PORT);
            simple(world, &world.attacker, "tcp", target, marker, &[])
        }
        Neighbour::TranslatedDial(dial) => translation::of_agents_dial(world, dial, family, marker),
        Neighbour::Masqueraded(step, layout) => translation::masqueraded(world, step, layout, family, marker),
        Neighbour::Flooded => flood::connections(world, family, marker),
        Neighbour::ReplayedCookies => flood::replayed_cookies(world, family, marker),
    }
}

/// A step of a process of the victim's node.
fn probe(world: &World, step: &str, target: SocketAddr, marker: &str, extra: &[&str]) -> Result<Outcome> {
    let mut command = world.far_node()?.command(&world.programs.own)?;
    command.args(["step", step, &target.to_string(), marker]).args(extra);
    Step::start(patient(world, command))?.end()
}

/// The victim of a layout.
pub(crate) fn victim(world: &World, layout: Layout) -> &Pod {
    match layout {
        Layout::Routed => &world.victim,
        Layout::Bridged => &world.bridged.guarded,
    }
}

/// An address of `pod`, or of everyone, as `from` reaches it on the bridge.
fn target(from: &Pod, pod: &Pod, family: Family, to: To) -> Result<SocketAddr> {
    let [a, b, c, _] = pod.ipv4().octets();
    let everyone_v6 = "ff02::fb".parse().context("literal")?;
    Ok(match (to, family) {
        (To::LinkLocal, _) => scoped(from, link_local(pod)?)?,
        (To::OnLink, _) => SocketAddr::new(on_link(pod, family), PORT),
        (To::Multicast, Family::V6) => scoped(from, everyone_v6)?,
        (To::Multicast, _) => SocketAddr::from(([224, 0, 0, 251], PORT)),
        (To::Broadcast, _) => SocketAddr::from(([a, b, c, 255], PORT)),
    })
}

fn scoped(from: &Pod, address: Ipv6Addr) -> Result<SocketAddr> {
    let index = from.netns().enter(|| if_nametoindex("eth0"))??;
    Ok(SocketAddrV6::new(address, PORT, 0, index).into())
}

fn link_local(pod: &Pod) -> Result<Ipv6Addr> {
    let addresses = of_link(pod)?;
    let mut v6 = addresses.iter().filter_map(|address| Some(address.as_sockaddr_in6()?.ip()));
    v6.find(Ipv6Addr::is_unicast_link_local).context("a pod has a link-local address")
}

/// The hardware address of a pod's end of its link.
fn hardware(pod: &Pod) -> Result<String> {
    let bytes = of_link(pod)?.iter().find_map(|address| address.as_link_addr()?.addr());
    let bytes = bytes.context("a pod's link has a hardware address")?;
    Ok(bytes.map(|byte| format!("{byte:02x}")).join(":"))
}

/// All addresses of a pod's end of its link.
fn of_link(pod: &Pod) -> Result<Vec<SockaddrStorage>> {
    let addresses = pod.netns().enter(|| -> nix::Result<Vec<_>> {
        let of_link = getifaddrs()?.filter(|interface| interface.interface_name == "eth0");
        Ok(of_link.filter_map(|interface| interface.address).collect())
    })?;
    Ok(addresses?)
}

/// Name of the host end of a pod's link.
pub(crate) fn host_end(pod: &Pod) -> String {
    format!("pod{}", pod.ipv4().octets()[3])
}

/// The node's address on the link of a bridged pod.
fn node_address(pod: &Pod, family: Family) -> IpAddr {
    match family {
        Family::V4 | Family::Mapped => gateway(pod),
        Family::V6 => {
            let mut segments = pod.ipv6().segments();
            segments[7] = 1;
            IpAddr::from(segments)
        }
    }
}

pub(crate) fn wire_address(node: &Node, family: Family) -> IpAddr {
    match family {
        Family::V4 | Family::Mapped => node.wire_ipv4().into(),
        Family::V6 => node.wire_ipv6().into(),
    }
}

/// Claims the victim's address. The node's packets to the victim then reach the pod that claims.
fn claim(world: &World, who: Who, Tags(tags): Tags, family: Family, marker: &str) -> Result<Outcome> {
    let (node, guarded) = (world.far_node()?, &world.bridged.guarded);
    let pod = match who {
        Who::Tenant => &world.bridged.tenant,
        Who::Open => &world.bridged.open,
    };
    let victims = address(guarded, family, DISCARD);
    forget(node)?;
    // An entry that a claim can replace.
    datagram(node, "who are you", victims)?;
    until("the victim's hardware address", || is_known(node, victims.ip()))?;
    let own = address(pod, family, OWN_PORT).to_string();
    let mut outcome =
        simple(world, pod, "claim", victims, marker, &[&own, &hardware(pod)?, &tags.to_string()])?;
    datagram(node, marker, victims)?;
    outcome.only = Some(Sighting::ToPod(host_end(pod)));
    world.sightings(marker)?;
    forget(node)?;
    Ok(outcome)
}

fn forget(node: &Node) -> Result<()> {
    ip(node.netns(), "neigh flush dev cni0")
}

/// Returns `Some` if the node has a neighbour's hardware address.
fn is_known(node: &Node, address: IpAddr) -> Result<Option<()>> {
    let mut command = std::process::Command::new("ip");
    command.args(["-n", node.netns().name(), "neigh", "show", "to", &address.to_string()]);
    Ok(tacit_topology::run(&mut command)?.contains("lladdr").then_some(()))
}

/// The neighbour has the node's address, and the victim's answers reach it, as after ARP poisoning.
fn node_address_tcp(world: &World, family: Family, marker: &str) -> Result<Outcome> {
    let (guarded, neighbour) = (&world.bridged.guarded, &world.bridged.neighbour);
    let claimed = node_address(guarded, family);
    let (nodad, length) = if claimed.is_ipv4() { ("", 32) } else { (" nodad", 128) };
    ip(neighbour.netns(), &format!("addr add {claimed}/{length} dev eth0{nodad}"))?;
    let entry = format!("{claimed} lladdr {} dev eth0", hardware(neighbour)?);
    ip(guarded.netns(), &format!("neigh replace {entry}"))?;
    let source = SocketAddr::new(claimed, OWN_PORT).to_string();
    let outcome = simple(world, neighbour, "bind", address(guarded, family, PORT), marker, &[&source]);
    ip(neighbour.netns(), &format!("addr del {claimed}/{length} dev eth0"))?;
    ip(guarded.netns(), &format!("neigh del {entry}"))?;
    outcome
}

/// After a probe, in its name: from the port that the probe had.
fn node_flow_fragments(world: &World, marker: &str) -> Result<Outcome> {
    let (guarded, neighbour) = (&world.bridged.guarded, &world.bridged.neighbour);
    let target = address(guarded, Family::V4, PORT);
    let source = SocketAddr::new(gateway(guarded), PROBE_PORT).to_string();
    probe(world, "bind", target, "probe", &[&source])?;
    let entry = format!("{} lladdr {} dev eth0", gateway(guarded), hardware(neighbour)?);
    ip(guarded.netns(), &format!("neigh replace {entry}"))?;
    let outcome = simple(world, neighbour, "syn-in-fragments", target, marker, &[&source]);
    // The node's datagrams come after what they prove to have been delivered; the answers to them need no way back.
    world.wait_delivered()?;
    ip(guarded.netns(), &format!("neigh del {entry}"))?;
    outcome
}

/// To the other node, which would unpack it.
fn encapsulated(world: &World, kind: &str, family: Family, marker: &str) -> Result<Outcome> {
    let (inner, kind) = if kind == "6in4" { (Family::V6, "ip") } else { (family, kind) };
    let own = address(&world.attacker, inner, OWN_PORT).to_string();
    let victim = address(&world.victim, inner, PORT).to_string();
    let target = SocketAddr::new(wire_address(world.far_node()?, family), 0);
    simple(world, &world.attacker, "encapsulated", target, marker, &[&own, &victim, kind])
}
