//! The choice of an endpoint of a service for a connection: how many flows of this node each endpoint has, and which client affinities
//! with which.
//!
//! A client's pod is on one node only, so what this node knows about its clients is all there is to know.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::directory::{Affinity, EndpointQuery, NoEndpoint, Service, choose};

/// Maximum number of remembered endpoints (some 10 MB): a node's pods, each with hundreds of services.
const AFFINITY_ENTRIES_MAX: usize = 65_536;
/// Maximum number of remembered endpoints of one client, so that a client cannot use up the entries of others. Clients have
/// tens of services with an affinity.
const AFFINITY_PER_CLIENT_MAX: usize = 1024;

/// Time for which an endpoint that did not answer is chosen only if there is no other. Its readiness has been probed again by then.
const AVOIDED: Duration = Duration::from_secs(10);
/// Maximum number of endpoints that one client avoids: those of some nodes that are gone. Clients are pods of this node.
const AVOIDED_PER_CLIENT_MAX: usize = 64;

/// A connection that wants an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct EndpointRequest<'a> {
    /// The service.
    pub service: &'a Service,
    /// The chosen address, and the port.
    pub address: SocketAddr,
    /// Address of the client.
    pub client: IpAddr,
    /// The client's node.
    pub node: &'a str,
}

/// The flows and affinities of endpoints. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Balancer(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Flows of this node; an endpoint without one has no entry.
    flows: HashMap<SocketAddr, usize>,
    /// Affinities of each client, by address of the service.
    affinities: HashMap<IpAddr, HashMap<SocketAddr, AffinityEntry>>,
    /// Number of entries in `affinities`.
    affinity_count: usize,
    /// Endpoints that did not answer a client, and the time until which the client avoids them. A client whose own rules drop its
    /// packets misleads no other.
    avoided: HashMap<IpAddr, HashMap<SocketAddr, Instant>>,
    /// Earliest time of the next removal of expired entries of all clients.
    next_sweep: Option<Instant>,
}

#[derive(Debug)]
struct AffinityEntry {
    endpoint: SocketAddr,
    until: Instant,
}

/// An endpoint that counts one flow more as long as this lives.
#[derive(Debug)]
pub struct PickedEndpoint {
    balancer: Balancer,
    endpoint: SocketAddr,
}

impl PickedEndpoint {
    /// Notes that it does not answer `client` any more, see [`Balancer::avoid`].
    pub fn avoid(&self, client: IpAddr, now: Instant) {
        self.balancer.avoid(client, self.endpoint, now);
    }

    /// Returns its address.
    #[must_use]
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }
}

impl Drop for PickedEndpoint {
    fn drop(&mut self) {
        let mut state = self.balancer.state();
        if let Some(flows) = state.flows.get_mut(&self.endpoint) {
            *flows -= 1;
            if *flows == 0 {
                state.flows.remove(&self.endpoint);
            }
        }
    }
}

impl Balancer {
    /// Chooses an endpoint and counts the flow.
    ///
    /// # Errors
    /// [`NoEndpoint`].
    pub fn pick(
        &self,
        request: &EndpointRequest<'_>,
        tried: &[SocketAddr],
        now: Instant,
    ) -> Result<PickedEndpoint, NoEndpoint> {
        let mut state = self.state();
        let sticky = match request.service.affinity {
            Affinity::None => None,
            Affinity::ClientIp(_) => state.sticky(request, now),
        };
        let avoided = state.avoided_beside(request.client, tried, now);
        let load = |endpoint| state.flows.get(&endpoint).copied().unwrap_or(0);
        let query = EndpointQuery { node: request.node, sticky, tried, random: random() };
        let preferred = avoided.and_then(|avoided| {
            choose(request.service, request.address, &EndpointQuery { tried: &avoided, ..query }, load).ok()
        });
        let endpoint = match preferred {
            Some(endpoint) => endpoint,
            None => choose(request.service, request.address, &query, load)?,
        };
        let endpoint = endpoint.address;
        *state.flows.entry(endpoint).or_default() += 1;
        Ok(PickedEndpoint { balancer: self.clone(), endpoint })
    }

    /// Returns true if there is an endpoint besides those `tried`.
    #[must_use]
    pub fn has_more(&self, request: &EndpointRequest<'_>, tried: &[SocketAddr]) -> bool {
        let query = EndpointQuery { node: request.node, sticky: None, tried, random: 0 };
        choose(request.service, request.address, &query, |_| 0).is_ok()
    }

    /// Remembers where the client got, if the service wants that.
    pub fn record_affinity(&self, request: &EndpointRequest<'_>, endpoint: SocketAddr, now: Instant) {
        let Affinity::ClientIp(time) = request.service.affinity else { return };
        self.state().record_affinity((request.client, request.address), endpoint, now, time);
    }

    /// Notes that an endpoint does not answer a client: others are chosen for some seconds.
    pub fn avoid(&self, client: IpAddr, endpoint: SocketAddr, now: Instant) {
        let mut state = self.state();
        state.avoided.retain(|_, own| {
            own.retain(|_, until| now < *until);
            !own.is_empty()
        });
        let own = state.avoided.entry(client).or_default();
        if own.len() < AVOIDED_PER_CLIENT_MAX {
            own.insert(endpoint, now + AVOIDED);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the endpoints that the client avoids, and those `tried`; `None` if it avoids none.
    fn avoided_beside(&self, client: IpAddr, tried: &[SocketAddr], now: Instant) -> Option<Vec<SocketAddr>> {
        let own = self.avoided.get(&client)?;
        let avoided = own.iter().filter(|(_, until)| now < **until).map(|(endpoint, _)| *endpoint);
        Some(avoided.chain(tried.iter().copied()).collect())
    }

    fn sticky(&self, request: &EndpointRequest<'_>, now: Instant) -> Option<SocketAddr> {
        let entry = self.affinities.get(&request.client)?.get(&request.address)?;
        (now < entry.until).then_some(entry.endpoint)
    }

    /// Beyond a bound, new entries are not remembered, so these clients may change their endpoint.
    fn record_affinity(
        &mut self,
        (client, address): (IpAddr, SocketAddr),
        endpoint: SocketAddr,
        now: Instant,
        time: Duration,
    ) {
        let entry = AffinityEntry { endpoint, until: now + time };
        let own = self.affinities.get_mut(&client);
        if let Some(known) = own.and_then(|own| own.get_mut(&address)) {
            *known = entry;
            return;
        }
        if self.affinity_count >= AFFINITY_ENTRIES_MAX {
            self.sweep(now);
        }
        let own = self.affinities.entry(client).or_default();
        if own.len() >= AFFINITY_PER_CLIENT_MAX {
            own.retain(|_, entry| now < entry.until);
            self.affinity_count -= AFFINITY_PER_CLIENT_MAX - own.len();
        }
        if self.affinity_count < AFFINITY_ENTRIES_MAX && own.len() < AFFINITY_PER_CLIENT_MAX {
            own.insert(address, entry);
            self.affinity_count += 1;
        } else if own.is_empty() {
            self.affinities.remove(&client);
        }
    }

    /// Removes the expired entries of all clients, at most once a second, because it looks at all of them.
    fn sweep(&mut self, now: Instant) {
        if self.next_sweep.is_some_and(|next| now < next) {
            return;
        }
        self.next_sweep = Some(now + Duration::from_secs(1));
        self.affinities.retain(|_, own| {
            own.retain(|_, entry| now < entry.until);
            !own.is_empty()
        });
        self.affinity_count = self.affinities.values().map(HashMap::len).sum();
    }
}

/// Bits nobody has to be unable to guess; `RandomState` has other keys each time.
fn random() -> u64 {
    RandomState::new().hash_one(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{Endpoint, EndpointCondition, Endpoints, InternalTrafficPolicy, ServicePort};

    fn service(affinity: Affinity) -> Service {
        let endpoint = |i: u8| Endpoint { address: SocketAddr::from(([10, 0, 0, i], 80)), node: "b".into() };
        let ipv4 = Endpoints::new((1..=4).map(|i| (endpoint(i), EndpointCondition::Ready)));
        Service {
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec![IpAddr::from([10, 96, 0, 1])],
            external_ips: Vec::new(),
            ingress_ips: Vec::new(),
            udp_ports: Vec::new(),
            ports: vec![ServicePort { port: 80, node_port: None, ipv4, ipv6: Endpoints::default() }],
            traffic: InternalTrafficPolicy::Cluster,
            affinity,
        }
    }

    fn request(service: &Service, client: u8) -> EndpointRequest<'_> {
        let address = SocketAddr::from(([10, 96, 0, 1], 80));
        EndpointRequest { service, address, client: IpAddr::from([10, 77, 1, client]), node: "a" }
    }

    #[test]
    fn a_flow_counts_until_it_ends() {
        let (balancer, service) = (Balancer::default(), service(Affinity::None));
        let now = Instant::now();
        let picked: Vec<PickedEndpoint> =
            (0..400).map(|_| balancer.pick(&request(&service, 2), &[], now).expect("one")).collect();
        let flows: Vec<usize> = balancer.state().flows.values().copied().collect();
        assert_eq!((flows.len(), flows.iter().sum::<usize>()), (4, 400));
        // With one random choice they would lie some tens apart.
        assert!(flows.iter().all(|flows| (95..=105).contains(flows)), "{flows:?}");
        drop(picked);
        assert!(balancer.state().flows.is_empty());
    }

    #[test]
    fn a_client_stays_until_it_was_away_for_the_time() {
        let time = Duration::from_secs(60);
        let (balancer, service) = (Balancer::default(), service(Affinity::ClientIp(time)));
        let mut now = Instant::now();
        let first = balancer.pick(&request(&service, 2), &[], now).expect("one").endpoint();
        balancer.record_affinity(&request(&service, 2), first, now);
        let others =
            (0..200).map(|i| balancer.pick(&request(&service, 3), &[], now).map(|h| (i, h)).expect("one"));
        let others: Vec<_> = others.collect();
        assert!(others.iter().any(|(_, picked)| picked.endpoint() != first), "another client is free");
        for _ in 0..100 {
            now += Duration::from_secs(59);
            assert_eq!(balancer.pick(&request(&service, 2), &[], now).expect("one").endpoint(), first);
            balancer.record_affinity(&request(&service, 2), first, now);
        }
        // An endpoint that fails holds nobody.
        let other = balancer.pick(&request(&service, 2), &[first], now).expect("one");
        assert_ne!(other.endpoint(), first);
        let all: Vec<SocketAddr> = (1..=4).map(|i| SocketAddr::from(([10, 0, 0, i], 80))).collect();
        assert!(
            balancer.has_more(&request(&service, 2), &all[1..])
                && !balancer.has_more(&request(&service, 2), &all)
        );
        now += time;
        let picks: Vec<_> =
            (0..200).map(|_| balancer.pick(&request(&service, 2), &[], now).expect("one")).collect();
        assert!(picks.iter().any(|picked| picked.endpoint() != first), "free again after {time:?}");
    }

    #[test]
    fn an_endpoint_that_did_not_answer_is_avoided_by_its_client_for_a_while() {
        let (balancer, service) = (Balancer::default(), service(Affinity::None));
        let now = Instant::now();
        let gone = SocketAddr::from(([10, 0, 0, 1], 80));
        balancer.avoid(request(&service, 2).client, gone, now);
        let is_picked = |client, tried: &[SocketAddr], now| {
            let picks = (0..200).map(|_| balancer.pick(&request(&service, client), tried, now).expect("one"));
            picks.collect::<Vec<_>>().iter().any(|picked| picked.endpoint() == gone)
        };
        assert!(!is_picked(2, &[], now) && is_picked(3, &[], now));
        assert!(is_picked(2, &[], now + AVOIDED), "no longer avoided");
        let others: Vec<SocketAddr> = (2..=4).map(|i| SocketAddr::from(([10, 0, 0, i], 80))).collect();
        assert!(is_picked(2, &others, now), "the only one that is left");
        for port in 0..2 * AVOIDED_PER_CLIENT_MAX {
            let endpoint = SocketAddr::from(([10, 0, 0, 9], u16::try_from(port).expect("a port")));
            balancer.avoid(request(&service, 2).client, endpoint, now);
        }
        assert_eq!(
            balancer.state().avoided.values().map(HashMap::len).collect::<Vec<_>>(),
            [AVOIDED_PER_CLIENT_MAX]
        );
        balancer.avoid(request(&service, 3).client, gone, now + AVOIDED);
        assert_eq!(balancer.state().avoided.len(), 1, "expired ones are removed");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_expires() {
        let mut state = State::default();
        let (now, time) = (Instant::now(), Duration::from_secs(1));
        let at = SocketAddr::from(([10, 96, 0, 1], 80));
        let client = |i: usize| IpAddr::from(u32::try_from(i).expect("small").to_be_bytes());
        (0..AFFINITY_ENTRIES_MAX + 10).for_each(|i| state.record_affinity((client(i), at), at, now, time));
        let count = |state: &State| state.affinities.values().map(HashMap::len).sum::<usize>();
        assert_eq!((count(&state), state.affinity_count), (AFFINITY_ENTRIES_MAX, AFFINITY_ENTRIES_MAX));
        assert_eq!(state.affinities.len(), AFFINITY_ENTRIES_MAX, "no empty entry of a client");
        state.record_affinity((client(AFFINITY_ENTRIES_MAX + 10), at), at, now + time, time);
        assert_eq!((count(&state), state.affinity_count), (1, 1));
    }

    #[test]
    fn a_client_does_not_use_up_the_affinities_of_others() {
        let mut state = State::default();
        let (now, time) = (Instant::now(), Duration::from_secs(1));
        let at = |port: usize| SocketAddr::from(([10, 96, 0, 1], u16::try_from(port).expect("a port")));
        let [greedy, other] = [2, 3].map(|last| IpAddr::from([10, 77, 1, last]));
        (0..60_000).for_each(|port| state.record_affinity((greedy, at(port)), at(port), now, time));
        assert_eq!(state.affinity_count, AFFINITY_PER_CLIENT_MAX);
        state.record_affinity((other, at(80)), at(80), now, time);
        assert_eq!(state.affinities[&other].len(), 1);
        // Entries that have expired make room.
        state.record_affinity((greedy, at(60_001)), at(60_001), now + time, time);
        assert_eq!((state.affinities[&greedy].len(), state.affinity_count), (1, 2));
    }
}
