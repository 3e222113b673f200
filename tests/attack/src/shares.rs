//! Attacks on what pods share: one holder fills its share, and another holder's flow must pass meanwhile.
//!
//! ```text
//! the attacker fills ── its share is full, says its agent ── its next use ── the victim's flow ── what became of the next use
//! ```
//! Without Tacit there are no shares: the attacker's next use succeeds, and so does the victim's flow. With Tacit the
//! attacker's next use must fail, or else nothing was full and the attack has proven nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tacit_topology::{Agent, Pod, Tunnel, WorkloadEntry, scale, until, within};

use crate::{
    Family,
    catalogue::Shared,
    judge::{Fill, Outcome, SENT, Share},
    step_process::{Step, command, simple},
    world::{ALLOWED_PORT, PORT, World, address, marker},
};

/// Port of the tunnels.
const TUNNEL: u16 = 15008;
/// Port of a pod that accepts no connection, and of one whose queue takes many.
const DEAF: u16 = 9301;
const PATIENT: u16 = 9302;
/// Port of the victim's datagrams.
const VICTIM_PORT: u16 = 20_900;
/// Descriptors of the agents, so that a pod's share of connections is above its share of pending ones: 2,390 and 2,048.
pub(crate) const DESCRIPTORS: u64 = 8192;
/// Uses that are tried: more than the share of one holder.
const CONNECTIONS: &str = "2600";
const PENDING: &str = "2300";
const HANDSHAKES: &str = "300";
const OUTGOING_HANDSHAKES: &str = "900";
const DIALS: &str = "700";
/// Rounds of an attack whose units expire after 5 s: on a slow machine the victim's flow can take longer, and proves nothing then.
const ROUNDS: u32 = 4;
/// Flows that the victim has at once: more than the idle sessions that it has from other attacks.
const AT_ONCE: &str = "4";

/// One attack: who fills what.
struct Attack<'w> {
    step: &'static str,
    /// The pod that runs the step.
    pod: &'w Pod,
    target: SocketAddr,
    arguments: Vec<String>,
    /// The holder of the share, as the agent names it.
    holder: String,
    /// The agent that shows the share, and the share's name.
    shown: Option<(&'w Agent, &'static str)>,
}

/// A pod of the mesh whose packets are lost on their way.
pub(crate) fn silent() -> WorkloadEntry {
    WorkloadEntry {
        name: "silent".to_owned(),
        namespace: "attack".to_owned(),
        service_account: "silent".to_owned(),
        addresses: [Family::V4, Family::V6].map(silent_address).to_vec(),
        node: "c".to_owned(),
        labels: Vec::new(),
        tunnel: Tunnel::Tacit,
        egress: None,
        connect: None,
    }
}

/// An address of the silent pod. The attacker's node has a route to it that leads nowhere.
pub(crate) fn silent_address(family: Family) -> IpAddr {
    match family {
        Family::V4 | Family::Mapped => Ipv4Addr::new(10, 77, 250, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd77, 0xfa, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// Runs an attack to its end, and waits until the attacker's share is given back.
pub(crate) fn drive(world: &World, shared: Shared, family: Family, marker: &str) -> Result<Outcome> {
    let good = address(&world.victim, family, PORT);
    let at_once = |pod: &Pod| simple(world, pod, "at-once", good, marker, &[AT_ONCE]);
    let one = |pod: &Pod| simple(world, pod, "tcp", good, marker, &[]);
    let attack = || attack(world, shared, family);
    let mut outcome = match shared {
        Shared::Handshakes => under(world, attack(), None, || at_once(&world.other)),
        // The first tunnel of this pod. The attacker's units end after 10 s, so this has to be quick.
        Shared::OutgoingHandshakes => under(world, attack(), None, || one(&world.client)),
        Shared::PendingConnections => under(world, attack(), None, || one(&world.other)),
        Shared::Connections => {
            let listener = listen(world, &world.client, &[(PATIENT, "4096")])?;
            under(world, attack(), Some(listener), || one(&world.other))
        }
        Shared::PendingDials => {
            let listener = || listen(world, &world.attacker, &[(DEAF, "0"), (PATIENT, "128")]);
            // To an application of the attacker's node, whose agent dials it.
            let near = address(&world.client, family, PORT);
            let victim = || simple(world, &world.other, "tcp", near, marker, &[]);
            let mut outcome = under(world, attack(), Some(listener()?), victim)?;
            for _ in 1..ROUNDS {
                if world.has_tacit() && is_next_sent(&outcome) {
                    outcome = under(world, attack(), Some(listener()?), victim)?;
                }
            }
            Ok(outcome)
        }
        Shared::Answers => answers(world, attack(), family, marker),
    }?;
    let expires = matches!(shared, Shared::OutgoingHandshakes | Shared::PendingDials);
    if expires && scale()? > 1 && world.has_tacit() && is_next_sent(&outcome) {
        outcome.absent = Some("units expire before this emulated machine has filled the share".to_owned());
    }
    Ok(outcome)
}

fn is_next_sent(outcome: &Outcome) -> bool {
    outcome.fill.as_ref().is_some_and(|fill| fill.next == SENT)
}

fn attack(world: &World, shared: Shared, family: Family) -> Attack<'_> {
    let attacker = &world.attacker;
    let text = |pod: &Pod, port: u16| address(pod, family, port).to_string();
    let near = |resource| world.agents.first().map(|agent| (agent, resource));
    let base = Attack {
        step: "fill-connects",
        pod: attacker,
        target: SocketAddr::new(silent_address(family), PORT),
        arguments: Vec::new(),
        holder: format!("{}/{}", attacker.namespace(), attacker.name()),
        shown: None,
    };
    match shared {
        Shared::Handshakes => Attack {
            step: "fill-handshakes",
            pod: &world.stranger,
            target: address(&world.victim, family, TUNNEL),
            arguments: vec![HANDSHAKES.to_owned()],
            holder: address(&world.stranger, family, 0).ip().to_string(),
            shown: world.agents.last().map(|agent| (agent, "handshakes")),
        },
        Shared::OutgoingHandshakes => Attack {
            // The next one is to a pod to which the attacker has no session.
            arguments: vec![OUTGOING_HANDSHAKES.to_owned(), text(&world.bridged.guarded, PORT)],
            shown: near("outgoing_handshakes"),
            ..base
        },
        Shared::PendingConnections => Attack {
            arguments: vec![PENDING.to_owned(), text(&world.victim, PORT)],
            shown: near("pending_connections"),
            ..base
        },
        Shared::Connections => Attack {
            step: "fill-connections",
            target: address(&world.client, family, PATIENT),
            arguments: vec![CONNECTIONS.to_owned()],
            shown: near("connections"),
            ..base
        },
        Shared::PendingDials => Attack {
            pod: &world.other,
            target: address(attacker, family, DEAF),
            arguments: vec![DIALS.to_owned(), text(attacker, PATIENT)],
            shown: near("pending_dials"),
            ..base
        },
        Shared::Answers => {
            Attack { step: "fill-answers", target: address(&world.stranger, family, ALLOWED_PORT), ..base }
        }
    }
}

/// Fills a share, and runs the victim's flow while it is full. `listener` is what the attacker connects to.
fn under(
    world: &World,
    attack: Attack<'_>,
    listener: Option<Step>,
    victim: impl FnOnce() -> Result<Outcome>,
) -> Result<Outcome> {
    let arguments: Vec<&str> = attack.arguments.iter().map(String::as_str).collect();
    let fill = command(world, attack.pod, attack.step, attack.target, &marker(), &arguments);
    let mut fill = Step::start(fill)?;
    fill.wait_ready()?;
    let share = full(world, &attack)?;
    fill.proceed()?;
    let mut outcome = victim()?;
    fill.go();
    outcome.fill = Some(Fill { next: fill.end()?.told, share });
    if let Some(mut listener) = listener {
        listener.go();
        listener.end()?;
    }
    wait_given_back(&attack)?;
    Ok(outcome)
}

/// Waits until the attacker's share is full. Returns its figures in the status.
fn full(world: &World, attack: &Attack<'_>) -> Result<Share> {
    let Some((agent, resource)) = attack.shown else { return Ok(Share::Unseen) };
    let figures = within(world.patience, || {
        let row = row(agent, resource)?;
        let is_full = row["full"] == true && row["fullest"] == *attack.holder;
        let of = |field: &str| row[field].as_u64().unwrap_or_default();
        Ok(is_full.then(|| format!("{resource} {} of {}", of("fullest_used"), of("holder_limit"))))
    })?;
    Ok(figures.map_or(Share::Open, Share::Full))
}

fn wait_given_back(attack: &Attack<'_>) -> Result<()> {
    let Some((agent, resource)) = attack.shown else { return Ok(()) };
    until(&format!("the attacker's {resource} given back"), || {
        Ok((row(agent, resource)?["full"] == false).then_some(()))
    })
}

/// The row of one resource in the status of an agent.
fn row(agent: &Agent, resource: &str) -> Result<Value> {
    let status: Value = serde_json::from_str(&agent.status()?)?;
    let shares = status["shares"].as_array().context("shares in the status")?;
    let found = shares.iter().find(|share| share["resource"] == resource);
    found.cloned().with_context(|| format!("no share {resource}"))
}

/// A process of a pod that listens at ports with queues of these lengths, and accepts nothing.
fn listen(world: &World, pod: &Pod, ports: &[(u16, &str)]) -> Result<Step> {
    let ports: Vec<String> = ports.iter().map(|(port, length)| format!("{port}:{length}")).collect();
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    let mut step = Step::start(command(world, pod, "listen", address(pod, Family::V4, 0), "-", &ports))?;
    step.wait_ready()?;
    Ok(step)
}

/// Both the attacker and the victim have sent datagrams before the attacker sends thousands. The answers to the first ones come
/// after these.
fn answers(world: &World, attack: Attack<'_>, family: Family, marker: &str) -> Result<Outcome> {
    let port = VICTIM_PORT.to_string();
    let mut victim =
        Step::start(command(world, &world.other, "late-answer", attack.target, marker, &[&port]))?;
    victim.wait_ready()?;
    let source = attack.target.to_string();
    let mut outcome = Outcome::default();
    let attacked = under(world, attack, None, || {
        let to_attacker = address(&world.attacker, family, 0);
        simple(world, &world.stranger, "late-answers", to_attacker, marker, &[&source])?;
        let to_victim = address(&world.other, family, VICTIM_PORT);
        simple(world, &world.stranger, "raw", to_victim, marker, &[&source])?;
        victim.go();
        outcome = victim.end()?;
        Ok(Outcome::default())
    })?;
    Ok(Outcome { fill: attacked.fill, ..outcome })
}
