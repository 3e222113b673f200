//! Which endpoint of a service a connection gets: how many flows of this node each endpoint has, and which client stays
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

use crate::directory::{Affinity, Asks, NoEndpoint, Service, choose};

/// Most clients and services whose endpoint is remembered (some 10 MB): a node's pods, each with hundreds of services.
const STAYS_MAX: usize = 65_536;

/// A connection that wants an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The service.
    pub service: &'a Service,
    /// Which of its addresses, and the port.
    pub address: SocketAddr,
    /// Who asks.
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
    stays: HashMap<(IpAddr, SocketAddr), Stay>,
}

#[derive(Debug)]
struct Stay {
    endpoint: SocketAddr,
    until: Instant,
}

/// An endpoint that counts one flow more as long as this lives.
#[derive(Debug)]
pub struct Held {
    balancer: Balancer,
    endpoint: SocketAddr,
}

impl Held {
    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }
}

impl Drop for Held {
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
    pub fn pick(&self, wish: &Wish<'_>, tried: &[SocketAddr], now: Instant) -> Result<Held, NoEndpoint> {
        let mut state = self.state();
        let sticky = match wish.service.affinity {
            Affinity::None => None,
            Affinity::ClientIp(_) => state.sticky(wish, now),
        };
        let asks = Asks { node: wish.node, sticky, tried, random: random() };
        let load = |endpoint| state.flows.get(&endpoint).copied().unwrap_or(0);
        let endpoint = choose(wish.service, wish.address, &asks, load)?.address;
        *state.flows.entry(endpoint).or_default() += 1;
        Ok(Held { balancer: self.clone(), endpoint })
    }

    /// Whether there is an endpoint beside those `tried`.
    #[must_use]
    pub fn has_more(&self, wish: &Wish<'_>, tried: &[SocketAddr]) -> bool {
        let asks = Asks { node: wish.node, sticky: None, tried, random: 0 };
        choose(wish.service, wish.address, &asks, |_| 0).is_ok()
    }

    /// Remembers where the client got, if the service wants that.
    pub fn stay(&self, wish: &Wish<'_>, endpoint: SocketAddr, now: Instant) {
        let Affinity::ClientIp(time) = wish.service.affinity else { return };
        self.state().stay((wish.client, wish.address), endpoint, now, time);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn sticky(&self, wish: &Wish<'_>, now: Instant) -> Option<SocketAddr> {
        let stay = self.stays.get(&(wish.client, wish.address))?;
        (now < stay.until).then_some(stay.endpoint)
    }

    /// Of more than can be remembered the newest are not: they may change their endpoint.
    fn stay(&mut self, who: (IpAddr, SocketAddr), endpoint: SocketAddr, now: Instant, time: Duration) {
        if self.stays.len() >= STAYS_MAX && !self.stays.contains_key(&who) {
            self.stays.retain(|_, stay| now < stay.until);
            if self.stays.len() >= STAYS_MAX {
                return;
            }
        }
        self.stays.insert(who, Stay { endpoint, until: now + time });
    }
}

/// Bits nobody has to be unable to guess; `RandomState` has other keys each time.
fn random() -> u64 {
    RandomState::new().hash_one(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{Condition, Endpoint, Endpoints, ServicePort, Traffic};

    fn service(affinity: Affinity) -> Service {
        let endpoint = |i: u8| Endpoint { address: SocketAddr::from(([10, 0, 0, i], 80)), node: "b".into() };
        let ipv4 = Endpoints::new((1..=4).map(|i| (endpoint(i), Condition::Ready)));
        Service {
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec![IpAddr::from([10, 96, 0, 1])],
            ports: vec![ServicePort { port: 80, ipv4, ipv6: Endpoints::default() }],
            traffic: Traffic::Cluster,
            affinity,
        }
    }

    fn wish(service: &Service, client: u8) -> Wish<'_> {
        let address = SocketAddr::from(([10, 96, 0, 1], 80));
        Wish { service, address, client: IpAddr::from([10, 77, 1, client]), node: "a" }
    }

    #[test]
    fn a_flow_counts_until_it_ends() {
        let (balancer, service) = (Balancer::default(), service(Affinity::None));
        let now = Instant::now();
        let held: Vec<Held> =
            (0..400).map(|_| balancer.pick(&wish(&service, 2), &[], now).expect("one")).collect();
        let flows: Vec<usize> = balancer.state().flows.values().copied().collect();
        assert_eq!((flows.len(), flows.iter().sum::<usize>()), (4, 400));
        // With one random choice they would lie some tens apart.
        assert!(flows.iter().all(|flows| (95..=105).contains(flows)), "{flows:?}");
        drop(held);
        assert!(balancer.state().flows.is_empty());
    }

    #[test]
    fn a_client_stays_until_it_was_away_for_the_time() {
        let time = Duration::from_secs(60);
        let (balancer, service) = (Balancer::default(), service(Affinity::ClientIp(time)));
        let mut now = Instant::now();
        let first = balancer.pick(&wish(&service, 2), &[], now).expect("one").endpoint();
        balancer.stay(&wish(&service, 2), first, now);
        let others =
            (0..200).map(|i| balancer.pick(&wish(&service, 3), &[], now).map(|h| (i, h)).expect("one"));
        let others: Vec<_> = others.collect();
        assert!(others.iter().any(|(_, held)| held.endpoint() != first), "another client is free");
        for _ in 0..100 {
            now += Duration::from_secs(59);
            assert_eq!(balancer.pick(&wish(&service, 2), &[], now).expect("one").endpoint(), first);
            balancer.stay(&wish(&service, 2), first, now);
        }
        // An endpoint that fails holds nobody.
        let other = balancer.pick(&wish(&service, 2), &[first], now).expect("one");
        assert_ne!(other.endpoint(), first);
        let all: Vec<SocketAddr> = (1..=4).map(|i| SocketAddr::from(([10, 0, 0, i], 80))).collect();
        assert!(
            balancer.has_more(&wish(&service, 2), &all[1..]) && !balancer.has_more(&wish(&service, 2), &all)
        );
        now += time;
        let picks: Vec<_> =
            (0..200).map(|_| balancer.pick(&wish(&service, 2), &[], now).expect("one")).collect();
        assert!(picks.iter().any(|held| held.endpoint() != first), "free again after {time:?}");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_expires() {
        let mut state = State::default();
        let (now, time) = (Instant::now(), Duration::from_secs(1));
        let at = SocketAddr::from(([10, 96, 0, 1], 80));
        let client = |i: usize| IpAddr::from(u32::try_from(i).expect("small").to_be_bytes());
        (0..STAYS_MAX + 10).for_each(|i| state.stay((client(i), at), at, now, time));
        assert_eq!(state.stays.len(), STAYS_MAX);
        state.stay((client(STAYS_MAX + 10), at), at, now + time, time);
        assert_eq!(state.stays.len(), 1);
    }
}
