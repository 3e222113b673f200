//! Which endpoint of a service a connection gets: how many flows of this node each endpoint has, and which client affinities
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

/// Most clients and services whose endpoint is remembered (some 10 MB): a node's pods, each with hundreds of services.
const AFFINITY_ENTRIES_MAX: usize = 65_536;

/// A connection that wants an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct EndpointRequest<'a> {
    /// The service.
    pub service: &'a Service,
    /// Which of its addresses, and the port.
    pub address: SocketAddr,
    /// Who query.
    pub client: IpAddr,
    /// The client's node.
    pub node: &'a str,
}

/// What is known about endpoints. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Balancer(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Flows of this node; an endpoint without one has no entry.
    flows: HashMap<SocketAddr, usize>,
    affinities: HashMap<(IpAddr, SocketAddr), AffinityEntry>,
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
    /// Where it is.
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
        let query = EndpointQuery { node: request.node, sticky, tried, random: random() };
        let load = |endpoint| state.flows.get(&endpoint).copied().unwrap_or(0);
        let endpoint = choose(request.service, request.address, &query, load)?.address;
        *state.flows.entry(endpoint).or_default() += 1;
        Ok(PickedEndpoint { balancer: self.clone(), endpoint })
    }

    /// Whether there is an endpoint beside those `tried`.
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn sticky(&self, request: &EndpointRequest<'_>, now: Instant) -> Option<SocketAddr> {
        let entry = self.affinities.get(&(request.client, request.address))?;
        (now < entry.until).then_some(entry.endpoint)
    }

    /// Of more than can be remembered the newest are not: they may change their endpoint.
    fn record_affinity(
        &mut self,
        who: (IpAddr, SocketAddr),
        endpoint: SocketAddr,
        now: Instant,
        time: Duration,
    ) {
        if self.affinities.len() >= AFFINITY_ENTRIES_MAX && !self.affinities.contains_key(&who) {
            self.affinities.retain(|_, entry| now < entry.until);
            if self.affinities.len() >= AFFINITY_ENTRIES_MAX {
                return;
            }
        }
        self.affinities.insert(who, AffinityEntry { endpoint, until: now + time });
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
            ports: vec![ServicePort { port: 80, ipv4, ipv6: Endpoints::default() }],
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
    fn what_is_remembered_is_bounded_and_expires() {
        let mut state = State::default();
        let (now, time) = (Instant::now(), Duration::from_secs(1));
        let at = SocketAddr::from(([10, 96, 0, 1], 80));
        let client = |i: usize| IpAddr::from(u32::try_from(i).expect("small").to_be_bytes());
        (0..AFFINITY_ENTRIES_MAX + 10).for_each(|i| state.record_affinity((client(i), at), at, now, time));
        assert_eq!(state.affinities.len(), AFFINITY_ENTRIES_MAX);
        state.record_affinity((client(AFFINITY_ENTRIES_MAX + 10), at), at, now + time, time);
        assert_eq!(state.affinities.len(), 1);
    }
}
