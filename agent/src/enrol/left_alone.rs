//! Pods with a proxy of their own, such as the sidecar of another mesh: another program listens at a port of proxies, or at the
//! agent's own ports.
//!
//! | the pod | what happens |
//! |---|---|
//! | may send and take plaintext, and no authorization policy selects it | is left alone, as without Tacit |
//! | any other | is not enrolled; the kernel refuses its connections at once |
//! | its ports are free again for [`FREE_FOR`] | is enrolled |
//!
//! Peers of a pod that is left alone ask for the tunnel. The agent answers them in the pod, with the pod's certificate, so nobody else
//! can send them to plaintext.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tacit_abi::tcp_port;
use tacit_core::{
    directory::{Directory, Workload},
    policy::{Mode, Policies},
};
use tacit_kernel::{
    PlaintextEgress, cgroup,
    netns::Netns,
    socket::{self, Listeners},
};
use tokio_util::sync::CancellationToken;

use crate::enrol::{
    Enroller, NotYet, Pod, PodPolicy, RESCAN, State, kernel_state::entry, observe::is_given_away,
    plan::Wanted, policy_publisher::put_in_force,
};

/// Pods whose ports, rules and links are looked at in each [`RESCAN`]. Each takes some 0.2 ms, so that this stays below one percent of a
/// CPU. With more pods each is looked at less often.
const LOOKS_MAX: usize = 32;
/// Time after its enrolment in which a pod is looked at each time: a proxy of the pod starts after its sandbox.
const NEW_FOR: Duration = Duration::from_secs(60);
/// Time for which the ports of a pod must be free before the pod is enrolled. It is longer than the restart of a container.
const FREE_FOR: Duration = Duration::from_secs(5);

/// Starts answering the peers of a pod that is left alone until the pod's `closed` token is cancelled.
pub type Answer = Arc<dyn Fn(Arc<Pod>, TcpListener) + Send + Sync>;

/// A pod that is left alone because it has a proxy of its own.
#[derive(Debug, Clone)]
pub struct LeftAlone {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The reason, for the operator.
    pub reason: String,
    /// The policy that would be in force.
    pub policy: Arc<PodPolicy>,
    /// The pod whose peers are answered; `None` while they cannot be.
    pub pod: Option<Arc<Pod>>,
}

/// The pods with a port that another program has.
#[derive(Debug, Default)]
pub(super) struct TakenPorts {
    /// By cgroup id.
    pods: HashMap<u64, Taken>,
    looked_at: Option<Instant>,
    /// The pod, by cgroup id, that was looked at last.
    last: u64,
}

/// A port of one pod that another program has.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) netns: Netns,
    pub(super) addresses: Vec<IpAddr>,
    port: u16,
    last_seen: Instant,
}

impl TakenPorts {
    /// Returns the reason for which each pod cannot be enrolled, by cgroup id.
    pub(super) fn reasons(&self) -> BTreeMap<u64, String> {
        self.pods.iter().map(|(cgroup, taken)| (*cgroup, reason(taken.port))).collect()
    }

    /// The pods, by cgroup id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Taken)> {
        self.pods.iter().map(|(cgroup, taken)| (*cgroup, taken))
    }

    pub(super) fn retain(&mut self, is_present: impl Fn(u64) -> bool) {
        self.pods.retain(|cgroup, _| is_present(*cgroup));
    }

    fn add(&mut self, cgroup: u64, netns: Netns, addresses: &[IpAddr], port: u16) {
        let taken = Taken { netns, addresses: addresses.to_vec(), port, last_seen: Instant::now() };
        self.pods.insert(cgroup, taken);
    }
}

fn reason(port: u16) -> String {
    match tcp_port::is_listener(port) {
        false => format!("another program of the pod listens on port {port}, which proxies in pods use"),
        true => format!("another program of the pod has port {port}, which the agent needs"),
    }
}

/// Returns the workload with its addresses: those of the directory, or those that were `found` in its namespace. The pod may have
/// written these itself, so none may be another's by now.
fn with_addresses(
    directory: &Directory,
    workload: &Arc<Workload>,
    found: &[IpAddr],
) -> Option<Arc<Workload>> {
    if !workload.addresses.is_empty() {
        return Some(Arc::clone(workload));
    }
    let is_taken = found.iter().any(|address| is_given_away(directory, *address, workload));
    (!is_taken).then(|| Arc::new(Workload { addresses: found.to_vec(), ..(**workload).clone() }))
}

/// Returns true if the policy lets the pod go on as without Tacit.
fn may_be_left_alone(policy: &PodPolicy, workload: &Workload) -> bool {
    let is_strict = policy.modes.default == Mode::Strict
        || policy.modes.exceptions().any(|(_, mode)| mode == Mode::Strict);
    !is_strict && !policy.authorizes_plaintext() && policy.plaintext_egress(workload) == PlaintextEgress::All
}

/// Returns the enrolled pods whose turn it is to be looked at, and new ones, in which a proxy may just start. Stores the last one of
/// the turn.
fn next_pods(state: &mut State) -> Vec<Arc<Pod>> {
    let by_cgroup: BTreeMap<u64, &Arc<Pod>> = state.current.values().map(|pod| (pod.cgroup, pod)).collect();
    let last = state.taken_ports.last;
    let is_new = |pod: &&Arc<Pod>| pod.since.elapsed() < NEW_FOR;
    let new: BTreeMap<u64, Arc<Pod>> = by_cgroup
        .values()
        .filter(|pod| is_new(pod))
        .take(LOOKS_MAX / 2)
        .map(|pod| (pod.cgroup, Arc::clone(pod)))
        .collect();
    let turn = by_cgroup.range(last + 1..).chain(by_cgroup.range(..=last));
    let turn: Vec<Arc<Pod>> = turn
        .map(|(_, pod)| Arc::clone(pod))
        .filter(|pod| !new.contains_key(&pod.cgroup))
        .take(LOOKS_MAX - new.len())
        .collect();
    state.taken_ports.last = turn.last().map_or(0, |pod| pod.cgroup);
    turn.into_iter().chain(new.into_values()).collect()
}

impl Enroller {
    /// Looks at the ports of the pods, at most once in [`RESCAN`].
    pub(super) fn look_for_taken_ports(&self, state: &mut State, wanted: &Wanted) {
        self.look_at_exempt(state, wanted);
        if state.taken_ports.looked_at.is_some_and(|at| at.elapsed() < RESCAN) {
            return;
        }
        state.taken_ports.looked_at = Some(Instant::now());
        let pods = next_pods(state);
        for pod in &pods {
            // Policies of others do not wait for what this pod has in its namespace.
            self.publish_new_policies(state);
            self.look_into(pod);
            let addresses = &pod.workload.addresses;
            if !state.taken_ports.pods.contains_key(&pod.cgroup)
                && let Some(port) = self.taken_port(&pod.netns, addresses)
                && let Ok(netns) = pod.netns.try_clone()
            {
                state.taken_ports.add(pod.cgroup, netns, addresses, port);
            }
        }
        state.taken_ports.pods.retain(|_, taken| {
            if self.is_taken(taken) {
                taken.last_seen = Instant::now();
            }
            taken.last_seen.elapsed() < FREE_FOR
        });
    }

    /// Looks at pods that an earlier agent left alone, before they are covered.
    fn look_at_exempt(&self, state: &mut State, wanted: &Wanted) {
        if state.exempt.is_empty() {
            return;
        }
        let root = self.pods_cgroup.path();
        for workload in &wanted.pods {
            let path = root.join(&workload.cgroup);
            let Some(id) = cgroup::id_at(&path)
                .filter(|id| state.exempt.contains_key(id) && !state.taken_ports.pods.contains_key(id))
            else {
                continue;
            };
            let processes = cgroup::processes(&path).unwrap_or_default();
            let Ok((netns, found)) = self.find_netns(processes, workload) else { continue };
            if let Some(port) = self.taken_port(&netns, &found.addresses) {
                state.taken_ports.add(id, netns, &found.addresses, port);
            }
        }
    }

    /// Returns a port of proxies at which another program than the agent listens. What the kernel does not show is free.
    fn taken_port(&self, netns: &Netns, addresses: &[IpAddr]) -> Option<u16> {
        let is_agent = |cgroup| self.kernel.maps.is_agent(cgroup);
        socket::foreign_listener(netns, &self.host, (addresses, &tcp_port::OF_PROXIES), is_agent)
            .unwrap_or_default()
    }

    fn is_taken(&self, taken: &Taken) -> bool {
        if self.taken_port(&taken.netns, &taken.addresses).is_some() {
            return true;
        }
        // The kernel does not list all that can have a port. Opening the listeners shows it.
        tcp_port::is_listener(taken.port)
            && Listeners::open(&taken.netns, &self.host).is_err_and(|error| error.taken_port().is_some())
    }

    /// Remembers that the pod cannot be enrolled if another program has one of its ports.
    ///
    /// # Errors
    /// [`NotYet::PortTaken`] if so.
    pub(super) fn check_ports(
        &self,
        state: &mut State,
        cgroup: u64,
        netns: &Netns,
        addresses: &[IpAddr],
    ) -> Result<(), NotYet> {
        match self.taken_port(netns, addresses) {
            None => Ok(()),
            Some(port) => Err(Self::note_taken(state, cgroup, netns, addresses, port)),
        }
    }

    pub(super) fn note_taken(
        state: &mut State,
        cgroup: u64,
        netns: &Netns,
        addresses: &[IpAddr],
        port: u16,
    ) -> NotYet {
        match netns.try_clone() {
            Ok(netns) => state.taken_ports.add(cgroup, netns, addresses, port),
            Err(error) => return NotYet::Kernel(error.to_string()),
        }
        NotYet::PortTaken(reason(port))
    }

    /// Has the pods left alone that have a proxy of their own and whose policies allow it, and returns them.
    pub(super) fn leave_alone(
        &self,
        state: &State,
        policies: &Policies,
        wanted: &mut Wanted,
    ) -> HashMap<PathBuf, LeftAlone> {
        if state.taken_ports.pods.is_empty() {
            return HashMap::new();
        }
        let root = self.pods_cgroup.path();
        let directory = self.snapshots.directory.current();
        let mut left = HashMap::new();
        wanted.pods.retain(|workload| {
            let taken =
                cgroup::id_at(&root.join(&workload.cgroup)).and_then(|id| state.taken_ports.pods.get(&id));
            let Some(taken) = taken else { return true };
            let policy = PodPolicy::configured(policies, workload);
            if !may_be_left_alone(&policy, workload) {
                return true;
            }
            let Some(workload) = with_addresses(&directory, workload, &taken.addresses) else { return true };
            let reason = reason(taken.port);
            let one =
                LeftAlone { workload: Arc::clone(&workload), reason, policy: Arc::new(policy), pod: None };
            left.insert(workload.cgroup.clone(), one);
            false
        });
        wanted.bystanders.extend(left.values().map(|one| Arc::clone(&one.workload)));
        left
    }

    /// Answers the peers of the pods in `left`, and of no others.
    pub(super) fn answer_peers(&self, state: &mut State, mut left: HashMap<PathBuf, LeftAlone>) {
        let still = |path: &PathBuf, pod: &Pod| {
            left.get(path).is_some_and(|one| super::plan::is_same(&one.workload, &pod.workload))
                && cgroup::id_at(&self.pods_cgroup.path().join(path)) == Some(pod.cgroup)
        };
        let before = std::mem::take(&mut state.left_alone);
        let known: HashSet<PathBuf> = before.keys().cloned().collect();
        let mut answered = HashMap::new();
        for (path, pod) in before.into_iter().filter_map(|(path, one)| Some((path, one.pod?))) {
            if still(&path, &pod) {
                answered.insert(path, pod);
            } else {
                pod.closed.cancel();
            }
        }
        for (path, one) in &mut left {
            one.pod =
                answered.remove(path).or_else(|| self.start_answering(state, one, known.contains(path)));
        }
        state.left_alone = left;
    }

    /// Opens the listener that answers peers. Without it they are refused, and it is tried again with the next look.
    fn start_answering(&self, state: &State, left: &LeftAlone, is_known: bool) -> Option<Arc<Pod>> {
        let LeftAlone { workload, reason, policy, .. } = left;
        let cgroup = cgroup::id_at(&self.pods_cgroup.path().join(&workload.cgroup))?;
        let netns = state.taken_ports.pods.get(&cgroup)?.netns.try_clone().ok()?;
        if !is_known {
            tracing::info!(pod = %workload.name, namespace = %workload.namespace, reason, "left alone, as without Tacit");
        }
        let opened = socket::answering_listener(&netns, &self.host);
        // Logged once.
        if let (Err(error), false) = (&opened, is_known) {
            tracing::warn!(pod = %workload.name, namespace = %workload.namespace, %error,
                "peers are not answered, and do not reach a pod that is left alone");
        }
        let listener = opened.ok()?;
        let pod = Arc::new(Pod {
            workload: Arc::clone(workload),
            cgroup,
            netns,
            links: Vec::new(),
            closed: CancellationToken::new(),
            policy: Arc::new(ArcSwap::new(Arc::clone(policy))),
            since: Instant::now(),
            // The kernel has no slot for it. This only chooses the thread that accepts.
            slot: 0,
            capture_port: 0,
            not_tunnelled: ArcSwapOption::from_pointee(reason.clone()),
            rewrites_arrivals: AtomicBool::new(false),
            inner_ranges: ArcSwap::default(),
        });
        (self.answer)(Arc::clone(&pod), listener);
        Some(pod)
    }

    /// Has the kernel refuse the connections of a pod that was served, because its ports are taken.
    pub(super) fn refuse_connections(&self, state: &mut State, cgroup: u64, workload: &Arc<Workload>) {
        let Some(slot) = state.known.get(&cgroup).copied() else { return };
        if self.kernel.maps.pod_place(cgroup).is_none_or(|(cookie, _)| cookie == 0) {
            return;
        }
        let policy = PodPolicy::configured(&self.snapshots.policies.current(), workload);
        let entry = |policy: &PodPolicy| entry(workload, cgroup, slot, (0, 0), policy);
        // What the kernel rejects is tried again with the next look.
        let _ = put_in_force(&self.kernel.maps, entry, policy);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::enrol::testing::workload;

    #[test]
    fn only_a_pod_that_may_send_and_take_plaintext_is_left_alone() {
        let mode = |mode: &str, ports: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: own, namespace: shop}}\n\
                 spec: {{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{{ports}}}}}\n"
            )
        };
        let allowed = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                       metadata: {name: all, namespace: shop}\nspec: {rules: [{}]}\n";
        let strict_egress =
            |workload: Workload| Workload { egress: Some(tacit_core::directory::Egress::Strict), ..workload };
        let no_udp =
            |workload: Workload| Workload { udp: Some(tacit_core::directory::Udp::Deny), ..workload };
        let same = |workload: Workload| workload;
        type Change = fn(Workload) -> Workload;
        for (text, change, expected) in [
            (String::new(), same as Change, true),
            (mode("PERMISSIVE", "1: {mode: PERMISSIVE}"), same, true),
            (mode("DISABLE", "1: {mode: DISABLE}"), same, true),
            (mode("STRICT", "1: {mode: STRICT}"), same, false),
            (mode("PERMISSIVE", "8080: {mode: STRICT}"), same, false),
            (mode("STRICT", "8080: {mode: PERMISSIVE}"), same, false),
            (allowed.to_owned(), same, false),
            (String::new(), strict_egress, false),
            (String::new(), no_udp, false),
        ] {
            let policies = Policies::parse(&text, Path::new("policy.yaml"), "istio-system").expect("valid");
            let mut web = workload("web", &["10.77.1.2"]);
            web.labels = [("app", "web")].into_iter().collect();
            let web = change(web);
            let policy = PodPolicy::configured(&policies, &web);
            assert_eq!(may_be_left_alone(&policy, &web), expected, "{text}");
        }
    }
}
