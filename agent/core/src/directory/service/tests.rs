//! Tests of the choice: a table of who gets which endpoint, and how load spreads.

use std::collections::HashMap;

use super::*;

fn endpoint(address: &str, node: &str) -> Endpoint {
    Endpoint { address: address.parse().expect("an address"), node: node.into() }
}

/// 10.0.0.1 on a, .2 and .3 on b, .4 on c is ending, .5 on d is not ready; of IPv6 one, on a.
fn service(traffic: InternalTrafficPolicy) -> Service {
    use EndpointCondition::{NotReady, Ready, Terminating};
    let ipv4 = Endpoints::new([
        (endpoint("10.0.0.1:8080", "a"), Ready),
        (endpoint("10.0.0.2:8080", "b"), Ready),
        (endpoint("10.0.0.3:8081", "b"), Ready),
        (endpoint("10.0.0.4:8080", "c"), Terminating),
        (endpoint("10.0.0.5:8080", "d"), NotReady),
    ]);
    let ipv6 = Endpoints::new([(endpoint("[fd00::1]:8080", "a"), Ready)]);
    let ending = Endpoints::new([(endpoint("10.0.0.4:9090", "c"), Terminating)]);
    let down = Endpoints::new([(endpoint("10.0.0.5:9091", "d"), NotReady)]);
    Service {
        name: "web".into(),
        namespace: "shop".into(),
        addresses: vec!["10.96.0.1".parse().expect("an address"), "fd96::1".parse().expect("an address")],
        external_ips: Vec::new(),
        ingress_ips: Vec::new(),
        udp_ports: Vec::new(),
        ports: vec![
            ServicePort { port: 80, node_port: Some(30_080), ipv4, ipv6 },
            ServicePort { port: 81, node_port: None, ipv4: ending, ipv6: Endpoints::default() },
            ServicePort { port: 82, node_port: None, ipv4: down, ipv6: Endpoints::default() },
        ],
        traffic,
        affinity: Affinity::None,
    }
}

/// The endpoints that clients of `node` get for `address`, over many random numbers.
fn chosen(
    traffic: InternalTrafficPolicy,
    address: &str,
    (node, sticky, tried): (&str, Option<&str>, &[&str]),
    load: impl Fn(SocketAddr) -> usize,
) -> Result<Vec<String>, NoEndpoint> {
    let service = service(traffic);
    let parse = |text: &&str| text.parse::<SocketAddr>().expect("an address");
    let tried: Vec<SocketAddr> = tried.iter().map(parse).collect();
    let mut seen = HashMap::new();
    for random in spread(200) {
        let query = EndpointQuery { node, sticky: sticky.as_ref().map(parse), tried: &tried, random };
        let endpoint = choose(&service, parse(&address), &query, &load)?;
        *seen.entry(endpoint.address.to_string()).or_insert(0) += 1;
    }
    let mut seen: Vec<String> = seen.into_keys().collect();
    seen.sort();
    Ok(seen)
}

/// Numbers whose halves are spread well (multiples of the golden ratio).
fn spread(count: u64) -> impl Iterator<Item = u64> {
    (1..=count)
        .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17).wrapping_mul(0xbf58_476d_1ce4_e5b9))
}

/// Its node, the endpoint it stays with, and what it tried.
type Client<'a> = (&'a str, Option<&'a str>, &'a [&'a str]);

type Expected<'a> = Result<&'a [&'a str], NoEndpoint>;

#[test]
fn who_gets_which_endpoint() {
    use InternalTrafficPolicy::{Cluster, Local};
    let all: &[&str] = &["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8081"];
    let far = ("x", None, [].as_slice());
    let table: [(InternalTrafficPolicy, &str, Client<'_>, Expected<'_>); 17] = [
        (Cluster, "10.96.0.1:80", far, Ok(all)),
        (Cluster, "[::ffff:10.96.0.1]:80", far, Ok(all)),
        (Cluster, "192.0.2.1:30080", far, Ok(all)),
        (Local, "192.0.2.1:30080", far, Ok(all)),
        (Cluster, "10.96.0.1:30080", far, Err(NoEndpoint::UnknownPort(30_080))),
        (Cluster, "[fd96::1]:80", far, Ok(&["[fd00::1]:8080"])),
        (Cluster, "10.96.0.1:81", far, Ok(&["10.0.0.4:9090"])),
        (Cluster, "10.96.0.1:82", far, Err(NoEndpoint::NoneReady)),
        (Cluster, "10.96.0.1:83", far, Err(NoEndpoint::UnknownPort(83))),
        (Cluster, "10.96.0.1:80", ("x", None, &["10.0.0.1:8080"]), Ok(&all[1..])),
        (Cluster, "10.96.0.1:80", ("x", None, &all[..2]), Ok(&all[2..])),
        (Cluster, "10.96.0.1:80", ("x", None, all), Err(NoEndpoint::AllTried)),
        (Cluster, "10.96.0.1:80", ("x", Some("10.0.0.2:8080"), &[]), Ok(&all[1..2])),
        // One that is ending, or to which connecting failed, holds nobody.
        (Cluster, "10.96.0.1:80", ("x", Some("10.0.0.4:8080"), &[]), Ok(all)),
        (Cluster, "10.96.0.1:80", ("x", Some("10.0.0.2:8080"), &["10.0.0.2:8080"]), Ok(&[all[0], all[2]])),
        (Local, "10.96.0.1:80", ("b", None, &[]), Ok(&all[1..])),
        (Local, "10.96.0.1:80", ("d", None, &[]), Err(NoEndpoint::NoneOnNode)),
    ];
    for (traffic, address, query, expected) in table {
        let expected = expected.map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(chosen(traffic, address, query, |_| 0), expected, "{traffic:?} {address} {query:?}");
    }
}

/// The near ones of endpoints with these conditions and hints for nodes and zones, by place in the list.
fn near(listed: &[(EndpointCondition, Hint, Hint)]) -> Vec<usize> {
    let endpoints = Endpoints::listed(listed.iter().zip(0_u8..).map(|((condition, nodes, zones), place)| {
        let endpoint = endpoint(&format!("10.0.0.{place}:80"), "b");
        ListedEndpoint { endpoint, condition: *condition, for_nodes: *nodes, for_zones: *zones }
    }));
    let place = |endpoint: &Endpoint| match endpoint.address.ip() {
        IpAddr::V4(ip) => usize::from(ip.octets()[3]),
        IpAddr::V6(_) => unreachable!("only IPv4 was listed"),
    };
    endpoints.usable().iter().map(place).collect()
}

#[test]
fn hints_for_nodes_count_before_those_for_zones_and_only_if_all_have_them() {
    use EndpointCondition::{NotReady, Ready, Terminating};
    use Hint::{Absent, Elsewhere, Here};
    for (listed, expected) in [
        (vec![(Ready, Absent, Absent), (Ready, Absent, Absent)], vec![0, 1]),
        (vec![(Ready, Absent, Elsewhere), (Ready, Absent, Here), (Ready, Absent, Here)], vec![1, 2]),
        (vec![(Ready, Elsewhere, Here), (Ready, Here, Here), (Ready, Elsewhere, Elsewhere)], vec![1]),
        // None for this node: the zone decides, and without one all are used.
        (vec![(Ready, Elsewhere, Here), (Ready, Elsewhere, Elsewhere)], vec![0]),
        (vec![(Ready, Elsewhere, Elsewhere), (Ready, Elsewhere, Elsewhere)], vec![0, 1]),
        // One without a hint: the slices are being changed, and the hints do not divide the load as they should.
        (vec![(Ready, Here, Here), (Ready, Absent, Absent)], vec![0, 1]),
        (vec![(Ready, Here, Here), (Ready, Absent, Elsewhere)], vec![0]),
        // Only the ready ones count.
        (vec![(NotReady, Absent, Absent), (Ready, Elsewhere, Here), (Ready, Here, Elsewhere)], vec![2]),
        (vec![(Terminating, Here, Here), (Ready, Elsewhere, Elsewhere)], vec![1]),
        (vec![(Terminating, Elsewhere, Elsewhere), (NotReady, Here, Here)], vec![0]),
        (Vec::new(), Vec::new()),
    ] {
        assert_eq!(near(&listed), expected, "{listed:?}");
    }
}

#[test]
fn endpoints_that_hints_keep_for_other_nodes_are_tried_last() {
    let mut service = service(InternalTrafficPolicy::Cluster);
    let hinted = |address: &str, for_zones| ListedEndpoint {
        endpoint: endpoint(address, "b"),
        condition: EndpointCondition::Ready,
        for_nodes: Hint::Absent,
        for_zones,
    };
    service.ports[0].ipv4 =
        Endpoints::listed([hinted("10.0.0.1:80", Hint::Elsewhere), hinted("10.0.0.2:80", Hint::Here)]);
    let parse = |text: &str| text.parse::<SocketAddr>().expect("an address");
    for random in spread(50) {
        let mut tried = Vec::new();
        for expected in ["10.0.0.2:80", "10.0.0.1:80"] {
            let query = EndpointQuery { node: "a", sticky: None, tried: &tried, random };
            let chosen = choose(&service, parse("10.96.0.1:80"), &query, |_| 0).expect("one is left");
            assert_eq!(chosen.address, parse(expected));
            tried.push(chosen.address);
        }
        let query = EndpointQuery { node: "a", sticky: None, tried: &tried, random };
        assert_eq!(choose(&service, parse("10.96.0.1:80"), &query, |_| 0), Err(NoEndpoint::AllTried));
    }
}

#[test]
fn local_traffic_falls_back_to_what_is_ending_here() {
    let ending = chosen(InternalTrafficPolicy::Local, "10.96.0.1:80", ("c", None, &[]), |_| 0);
    assert_eq!(ending, Ok(vec!["10.0.0.4:8080".to_owned()]));
    let tried = chosen(InternalTrafficPolicy::Local, "10.96.0.1:80", ("a", None, &["10.0.0.1:8080"]), |_| 0);
    assert_eq!(tried, Err(NoEndpoint::AllTried));
}

#[test]
fn the_most_loaded_is_never_chosen_and_the_nearer_wins_a_tie() {
    let address = "10.0.0.1:8080".parse().expect("an address");
    let busy = |endpoint: SocketAddr| usize::from(endpoint == address);
    let chosen_far = chosen(InternalTrafficPolicy::Cluster, "10.96.0.1:80", ("a", None, &[]), busy);
    assert_eq!(chosen_far, Ok(vec!["10.0.0.2:8080".to_owned(), "10.0.0.3:8081".to_owned()]));
    // On a the two choices hold 10.0.0.1 in two of three cases, and then it wins.
    let service = service(InternalTrafficPolicy::Cluster);
    let near = spread(3000).filter(|random| {
        let query = EndpointQuery { node: "a", sticky: None, tried: &[], random: *random };
        let vip = "10.96.0.1:80".parse().expect("an address");
        choose(&service, vip, &query, |_| 0).expect("one").address == address
    });
    let share = near.count();
    assert!((1900..=2100).contains(&share), "{share} of 3000");
}

#[test]
fn load_spreads_over_a_hundred_endpoints() {
    let all = (0..100_u8).map(|i| (endpoint(&format!("10.0.0.{i}:80"), "b"), EndpointCondition::Ready));
    let mut service = service(InternalTrafficPolicy::Cluster);
    service.ports[0].ipv4 = Endpoints::new(all);
    let mut load: HashMap<SocketAddr, usize> = HashMap::new();
    for random in spread(10_000) {
        let query = EndpointQuery { node: "a", sticky: None, tried: &[], random };
        let vip = "10.96.0.1:80".parse().expect("an address");
        let least = choose(&service, vip, &query, |at| load.get(&at).copied().unwrap_or(0)).expect("one");
        *load.entry(least.address).or_default() += 1;
    }
    let most = load.values().max().copied().unwrap_or(0);
    assert_eq!(load.len(), 100);
    // One choice at random would give some 128 at the most loaded.
    assert!(most <= 104, "{most} flows at one endpoint, 100 on average");
}
