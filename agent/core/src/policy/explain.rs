//! Explanation of policy for one connection: mode, the rule that decides, and the reason.
//!
//! It is the destination's answer: whether the connection gets that far is for the source's node to know. The verdict
//! comes from the function that decides on real flows.

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use super::{
    Authorization, AuthorizationDecision, Flow, FlowSource, Mode, Modes, Policies, PolicyDenial,
    PolicyVerdict, decide,
};
use crate::{
    directory::{Directory, Protocol, Workload},
    refusal::RefusalReason,
    spiffe::SpiffeId,
};

/// One end, as an operator names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkloadRef {
    /// `namespace/name` of a workload.
    Workload(String, String),
    /// An address.
    Address(IpAddr),
}

/// A question without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// Neither form.
    #[error("{0:?} is neither <namespace>/<name> of a workload nor an IP address: write one of them")]
    WorkloadRef(String),
    /// Directory or policies are not complete.
    #[error("the agent has not read yet what it needs: `tacit status` says why")]
    Starting,
    /// No port.
    #[error("{0:?} is no port: write a number from 1 to 65535")]
    Port(String),
    /// Nobody of that name.
    #[error("the directory has no workload {0}: see `tacit status`, or name an IP address")]
    Unknown(String),
    /// No family in common.
    #[error("{from} and {to} have no address of the same family: name an address of one of them")]
    Families {
        /// The source.
        from: String,
        /// The destination.
        to: String,
    },
}

impl fmt::Display for WorkloadRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(namespace, name) => write!(f, "{namespace}/{name}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

impl WorkloadRef {
    /// Parses `namespace/name` or an IP address.
    ///
    /// # Errors
    /// [`ExplainError::WorkloadRef`].
    pub fn parse(text: &str) -> Result<Self, ExplainError> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address.to_canonical()));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::Workload(namespace.to_owned(), name.to_owned()))
            }
            _ => Err(ExplainError::WorkloadRef(text.to_owned())),
        }
    }

    fn resolve<'d>(&self, directory: &'d Directory) -> Result<Resolved<'d>, ExplainError> {
        match self {
            Self::Address(address) => {
                let workload = directory.at(*address).map(|workload| &**workload);
                Ok(Resolved { addresses: vec![*address], workload })
            }
            Self::Workload(namespace, name) => {
                let mut all = directory.iter();
                let found = all.find(|w| *w.namespace == **namespace && *w.name == **name);
                let found = found.ok_or_else(|| ExplainError::Unknown(format!("{namespace}/{name}")))?;
                Ok(Resolved { addresses: found.addresses.clone(), workload: Some(found) })
            }
        }
    }
}

/// Parses a port.
///
/// # Errors
/// [`ExplainError::Port`].
pub fn port(text: &str) -> Result<u16, ExplainError> {
    let port = text.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| ExplainError::Port(text.to_owned()))
}

struct Resolved<'d> {
    addresses: Vec<IpAddr>,
    workload: Option<&'d Workload>,
}

impl Resolved<'_> {
    fn named(&self, address: IpAddr) -> String {
        match self.workload {
            Some(workload) => format!("{}/{} ({address})", workload.namespace, workload.name),
            None => address.to_string(),
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// True if every path is allowed.
    pub allow: bool,
    /// One for each address family that both ends have.
    pub paths: Vec<PathVerdict>,
}

/// The verdict on a connection between two addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathVerdict {
    /// From whom.
    pub from: String,
    /// To whom.
    pub to: String,
    /// To which port.
    pub port: u16,
    /// The identity that the source proves; `None` for plaintext.
    pub principal: Option<String>,
    /// The mode of the destination at that port; `None` when no policy is kept there.
    pub mode: Option<String>,
    /// Policies that select the destination.
    pub policies: Vec<String>,
    /// True if the connection is allowed.
    pub allow: bool,
    /// The reasons, in sentences.
    pub why: Vec<String>,
}

/// The policy that connections to a workload of this agent's node meet. It can differ from what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyInForce {
    /// The kernel and the data path hold this policy.
    Held {
        /// The modes.
        modes: Modes,
        /// The authorization.
        authorization: Authorization,
        /// The reason why it is not the configured policy.
        not_applied: Option<String>,
        /// The reason why the pod is not enrolled. Only the kernel holds the policy then, and nothing reaches the pod through the agent.
        waits_for: Option<String>,
    },
    /// No policy is held.
    Nothing {
        /// The reason why the pod is not enrolled.
        waits_for: String,
    },
}

/// The snapshots that an explanation reads.
#[derive(Clone, Copy)]
pub struct ExplainContext<'a> {
    /// The workloads and services.
    pub directory: &'a Directory,
    /// All policies, as they were read.
    pub policies: &'a Policies,
    /// Returns the policy in force for a workload of this agent's node.
    pub in_force: &'a dyn Fn(&Workload) -> PolicyInForce,
    /// This agent's node.
    pub node: &'a str,
    /// Returns true for an address of this agent's node.
    pub is_node: &'a dyn Fn(IpAddr) -> bool,
}

/// Explains what a connection meets.
///
/// # Errors
/// [`ExplainError`] when an end is not known.
pub fn explain(
    known: ExplainContext<'_>,
    from: &WorkloadRef,
    to: &WorkloadRef,
    port: u16,
) -> Result<Explanation, ExplainError> {
    let (source, destination) = (from.resolve(known.directory)?, to.resolve(known.directory)?);
    let mut paths = Vec::new();
    for to in &destination.addresses {
        let client = source.addresses.iter().find(|from| from.is_ipv4() == to.is_ipv4());
        if let Some(client) = client {
            paths.push(path(known, (&source, *client), (&destination, *to), port));
        }
    }
    if paths.is_empty() {
        let name = |end: &Resolved<'_>| end.addresses.first().map_or_else(String::new, |a| end.named(*a));
        return Err(ExplainError::Families { from: name(&source), to: name(&destination) });
    }
    Ok(Explanation { allow: paths.iter().all(|path| path.allow), paths })
}

fn path(
    known: ExplainContext<'_>,
    (source, client): (&Resolved<'_>, IpAddr),
    (destination, server): (&Resolved<'_>, IpAddr),
    port: u16,
) -> PathVerdict {
    let mut verdict = PathVerdict {
        from: source.named(client),
        to: destination.named(server),
        port,
        principal: None,
        mode: None,
        policies: Vec::new(),
        allow: true,
        why: Vec::new(),
    };
    if known.directory.is_unclear_at(SocketAddr::new(server, port)) {
        verdict.allow = false;
        verdict.why.push(format!(
            "Agents refuse connections to {server} ({}): more than one pod or service claims it.",
            RefusalReason::DestinationUnclear.label()
        ));
        return verdict;
    }
    let Some(target) = destination.workload.filter(|workload| workload.protocol == Protocol::Tacit) else {
        let is_other_mesh = destination.workload.is_some_and(|workload| workload.protocol == Protocol::Hbone);
        verdict.why.push(if is_other_mesh {
            "The agent of another mesh decides there: the destination is reached by HBONE.".to_owned()
        } else {
            "Nobody keeps a policy there: the destination is not enrolled.".to_owned()
        });
        return verdict;
    };
    let (modes, authorization) = match held(known, target, &mut verdict.why) {
        Some(policy) => policy,
        None => {
            verdict.allow = false;
            return verdict;
        }
    };
    let mode = modes.at(port);
    verdict.mode = Some(name(mode).to_owned());
    verdict.policies = authorization.first_names();
    let (proof, why) = arrival(known, source, client, target, mode);
    verdict.why.push(why);
    verdict.why.extend(mode_in_words(known.policies, target, port, mode));
    let Some(proof) = proof else {
        verdict.why.push(OF_NODE.to_owned());
        return verdict;
    };
    verdict.principal = proof.identity().map(SpiffeId::to_string);
    let flow = Flow { source: proof, client, destination: SocketAddr::new(server, port) };
    let decision = decide(&modes, &authorization, &flow);
    verdict.allow = decision == PolicyVerdict::Allow;
    verdict.why.push(reason(&decision, authorization.is_empty(), &authorization.evaluate(&flow)));
    verdict.why.extend(remarks(known.policies, &authorization, &flow));
    verdict
}

/// Returns the mode in force at a port in words, with the mode that the policies set if `minimumMode` raised it.
fn mode_in_words(
    policies: &Policies,
    target: &Workload,
    port: u16,
    mode: Mode,
) -> impl Iterator<Item = String> + use<> {
    let (written, configured) = (policies.written_modes(target).at(port), policies.modes(target).at(port));
    let raised = (written != configured && mode == configured)
        .then(|| format!("Raised by minimumMode: the policies set {}.", name(written)));
    [format!("The mode of the destination at port {port} is {}.", name(mode))].into_iter().chain(raised)
}

/// Returns the policy that a connection meets, with sentences where it is not the configured policy in full. `None` if there
/// is none yet.
fn held(
    known: ExplainContext<'_>,
    target: &Workload,
    why: &mut Vec<String>,
) -> Option<(Modes, Authorization)> {
    if *target.node != *known.node {
        why.push(format!(
            "Policy as this agent has read it: the agent of node {} knows what is in force there.",
            target.node
        ));
        return Some((known.policies.modes(target), known.policies.authorization(target)));
    }
    match (known.in_force)(target) {
        PolicyInForce::Held { modes, authorization, not_applied, waits_for } => {
            let not_applied = not_applied.map(|error| {
                format!("The configured policy is not applied, STRICT is in force at all ports: {error}.")
            });
            let waits_for = waits_for
                .map(|reason| format!("The destination is not enrolled yet, tunnels to it fail: {reason}."));
            why.extend(not_applied.into_iter().chain(waits_for));
            Some((modes, authorization))
        }
        PolicyInForce::Nothing { waits_for } => {
            why.push(format!(
                "No policy is in force for the destination yet, tunnels to it fail: {waits_for}."
            ));
            None
        }
    }
}

/// Returns audits, and the notes on the evaluated policies.
fn remarks(policies: &Policies, authorization: &Authorization, flow: &Flow) -> Vec<String> {
    let audits = authorization.audits(flow);
    let audits = audits.iter().map(|audit| format!("It is told to the log by {audit}."));
    let names: HashSet<&str> = authorization.names().collect();
    let is_of_these = |note: &&str| {
        let policy = note.strip_prefix("AuthorizationPolicy ").and_then(|rest| rest.split(": ").next());
        policy.is_some_and(|policy| names.contains(policy))
    };
    let notes = policies.notes().into_iter().filter(is_of_these);
    audits.chain(notes.map(|note| format!("Note: {note}."))).collect()
}

/// The verdict on connections of the node's own processes. The kernel admits them, and no policy is evaluated.
const OF_NODE: &str = "Allowed for connections of the node's own processes, such as probes. Pods with the node's network and \
                       masqueraded connections have the same address, and are plaintext.";

/// Returns the way by which the connection arrives at the destination's agent, with a sentence about it. `None` for a connection
/// of the node's own processes, which arrives at the pod without the agent.
fn arrival(
    known: ExplainContext<'_>,
    source: &Resolved<'_>,
    client: IpAddr,
    target: &Workload,
    mode: Mode,
) -> (Option<FlowSource>, String) {
    let (proof, why) = match source.workload.filter(|workload| workload.protocol.is_tunnelled()) {
        Some(workload) if workload.protocol == Protocol::Tacit && workload.node == target.node => {
            let identity = &workload.identity;
            (FlowSource::SameNode(identity.clone()), format!("It is handed over on one node, as {identity}."))
        }
        Some(_) if mode == Mode::Disable => (
            FlowSource::Plaintext,
            "It comes as plaintext, without an identity: the port does not tunnel.".to_owned(),
        ),
        Some(workload) => {
            let identity = &workload.identity;
            (FlowSource::Tunnel(identity.clone()), format!("It comes through a tunnel, as {identity}."))
        }
        None if *target.node == *known.node && (known.is_node)(client) => {
            return (None, "It comes from the destination's own node.".to_owned());
        }
        None => (
            FlowSource::Plaintext,
            "It comes as plaintext, without an identity: the source is not enrolled.".to_owned(),
        ),
    };
    (Some(proof), why)
}

fn reason(decision: &PolicyVerdict<'_>, unselected: bool, ruling: &AuthorizationDecision<'_>) -> String {
    match decision {
        PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict) => {
            "Denied: STRICT takes no plaintext. No AuthorizationPolicy is asked.".to_owned()
        }
        PolicyVerdict::Deny(PolicyDenial::DeniedBy(by)) => format!("Denied by {by}."),
        PolicyVerdict::Deny(PolicyDenial::NotAllowed(policies)) => {
            format!("Denied: ALLOW policies select the destination, and no rule of ALLOW {policies} matches.")
        }
        PolicyVerdict::Allow => match ruling {
            AuthorizationDecision::Allowed(by) => format!("Allowed by {by}."),
            _ if unselected => "Allowed: No AuthorizationPolicy selects the destination.".to_owned(),
            _ => {
                "Allowed: no ALLOW policy selects the destination, and no other policy denies it.".to_owned()
            }
        },
    }
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for PathVerdict { from, to, port, allow, why, .. } in &self.paths {
            let verdict = if *allow { "ALLOW" } else { "DENY" };
            writeln!(f, "{verdict}  {from} -> {to}, port {port}")?;
            for sentence in why {
                writeln!(f, "  {sentence}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
