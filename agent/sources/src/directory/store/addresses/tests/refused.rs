//! Addresses that no client may connect to directly.

use super::*;

fn detour(store: &mut DirectoryStore, at: &str) -> Option<Detour> {
    drop(store.take_changed());
    store.directory.detour(at.parse().expect("an address"))
}

#[test]
fn no_address_of_a_service_leads_around_its_waypoint() {
    let entry = |has_waypoint, mode| {
        service(|s| {
            s.hostname = "x.example".to_owned();
            s.has_waypoint = has_waypoint;
            s.addresses = (0..70).map(|i| [198, 51, 100, i].into()).collect();
            s.ranges = vec!["203.0.113.0/24".parse().expect("a range")];
            s.balancing.mode = mode;
        })
    };
    let all = ["198.51.100.0:80", "198.51.100.69:80", "203.0.113.7:443"];
    for mode in [Distribution::Even, Distribution::Passthrough] {
        let mut store = store();
        send_service(&mut store, entry(true, mode));
        for at in all {
            assert_eq!(detour(&mut store, at), Some(Detour::Waypoint), "{at}");
        }
        assert!(store.invalid_objects().list.is_empty());
        send_service(&mut store, entry(false, mode));
        for at in all {
            assert_eq!(detour(&mut store, at), None, "{at}");
        }
        let shown = store.invalid_objects().list.join("\n");
        assert!(shown.contains("has 70 addresses") && shown.contains("range 203.0.113.0/24"), "{shown}");
        send_service(&mut store, entry(true, mode));
        remove(&mut store, "shop/x.example");
        for at in all {
            assert_eq!(detour(&mut store, at), None, "{at}");
        }
    }
}

#[test]
fn a_workload_of_another_network_is_refused_unless_somebody_here_has_its_address() {
    let mut store = store();
    send_workload(&mut store, pod("other", "10.77.2.2", |w| w.network = "n2".to_owned()));
    assert_eq!(detour(&mut store, "10.77.2.2:8080"), Some(Detour::Gateway));
    send_workload(&mut store, pod("near", "10.77.2.2", |_| {}));
    assert_eq!(detour(&mut store, "10.77.2.2:8080"), None, "an address means another pod here");
    assert!(!store.directory.is_unclear([10, 77, 2, 2].into()));
    remove(&mut store, "c//Pod/shop/near");
    assert_eq!(detour(&mut store, "10.77.2.2:8080"), Some(Detour::Gateway));
    remove(&mut store, "c//Pod/shop/other");
    assert_eq!(detour(&mut store, "10.77.2.2:8080"), None);
}

#[test]
fn a_workload_without_a_readable_identity_is_refused_and_shown() {
    let ip = "10.77.2.2:8080";
    let address: std::net::IpAddr = [10, 77, 2, 2].into();
    let broken: [fn(&mut WorkloadRecord); 2] =
        [|w| w.trust_domain = Some("No Domain".to_owned()), |w| w.service_account = "a/b".to_owned()];
    let mut store = store();
    for change in broken {
        send_workload(&mut store, pod("far", "10.77.2.2", |_| {}));
        assert_eq!(detour(&mut store, ip), None);
        send_workload(&mut store, pod("far", "10.77.2.2", change));
        assert_eq!(detour(&mut store, ip), Some(Detour::Unidentified));
        assert!(store.directory.at(address).is_none() && store.directory.ranges().contains(address));
        let shown = store.invalid_objects().list;
        assert!(shown.len() == 1 && shown[0].contains("form no identity"), "{shown:?}");
        send_workload(&mut store, pod("far", "10.77.2.2", |_| {}));
        assert_eq!((detour(&mut store, ip), store.invalid_objects().list.len()), (None, 0));
        send_workload(&mut store, pod("far", "10.77.2.2", change));
        remove(&mut store, "c//Pod/shop/far");
        assert_eq!((detour(&mut store, ip), store.invalid_objects().list.len()), (None, 0));
    }
}

#[test]
fn a_pod_here_in_another_network_than_the_configured_one_is_shown() {
    let mut store = store();
    store.apply_change(Change::Applied(own_pod("here", "10.77.1.2")));
    let here = |network: &str| {
        pod("here", "10.77.1.2", |w| (w.node, w.network) = ("a".to_owned(), network.to_owned()))
    };
    send_workload(&mut store, here("n2"));
    let shown = store.invalid_objects().list;
    assert!(shown.len() == 1 && shown[0].contains("network \"n2\": expected \"\""), "{shown:?}");
    assert_eq!(detour(&mut store, "10.77.1.2:8080"), None, "the API has it");
    send_workload(&mut store, here(""));
    assert!(store.invalid_objects().list.is_empty());
}

#[test]
fn a_service_of_one_namespace_has_no_addresses_of_its_own() {
    let entry = |is_public, has_waypoint| {
        service(|s| {
            s.hostname = "x.example".to_owned();
            (s.is_public, s.has_waypoint) = (is_public, has_waypoint);
            s.addresses = vec![[198, 51, 100, 1].into()];
        })
    };
    let at = "198.51.100.1:80";
    let mut store = store();
    send_service(&mut store, entry(true, false));
    assert_eq!(detour(&mut store, at), None);
    let is_known = |store: &DirectoryStore| store.directory.service_for(at.parse().expect("valid")).is_some();
    assert!(is_known(&store) && store.invalid_objects().list.is_empty());
    send_service(&mut store, entry(false, false));
    assert_eq!(detour(&mut store, at), None);
    assert!(!is_known(&store));
    let shown = store.invalid_objects().list;
    assert!(shown.len() == 1 && shown[0].contains("not visible in all namespaces"), "{shown:?}");
    send_service(&mut store, entry(false, true));
    assert_eq!(detour(&mut store, at), Some(Detour::Waypoint));
}

#[test]
fn a_pod_here_may_have_a_waypoint_until_istiod_names_it() {
    let ip = "10.77.1.2:8080";
    let here = |ip: &str, has_waypoint| {
        pod("here", ip, |w| (w.node, w.has_waypoint) = ("a".to_owned(), has_waypoint))
    };
    let mut store = store();
    store.apply_change(Change::Applied(own_pod("here", "10.77.1.2")));
    assert_eq!(detour(&mut store, ip), Some(Detour::Unnamed));
    send_workload(&mut store, here("10.77.1.2", false));
    assert_eq!(detour(&mut store, ip), None);
    remove(&mut store, "c//Pod/shop/here");
    assert_eq!(detour(&mut store, ip), Some(Detour::Unnamed), "the API has it");
    send_workload(&mut store, here("10.77.1.9", false));
    assert_eq!(detour(&mut store, ip), Some(Detour::Unnamed), "an earlier pod of the same name");
    send_workload(&mut store, here("10.77.1.2", true));
    assert_eq!(detour(&mut store, ip), Some(Detour::Waypoint));
    send_workload(&mut store, here("10.77.1.2", false));
    store.apply_change(Change::Applied(own_pod("here", "10.77.1.3")));
    assert_eq!(detour(&mut store, "10.77.1.3:8080"), Some(Detour::Unnamed), "created again");
    remove(&mut store, "c//Pod/shop/here");
    store.apply_change(Change::Deleted(own_pod("here", "10.77.1.3")));
    // A pod outside the mesh may be one of a namespace that istiod does not watch.
    let Object::Pod(mut outside) = own_pod("outside", "10.77.1.4") else { panic!("a pod") };
    outside.metadata.labels.clear();
    store.apply_change(Change::Applied(Object::Pod(outside)));
    assert_eq!(detour(&mut store, "10.77.1.4:8080"), None);
    let gone = DetourOf::Workload("shop", "here");
    assert!(!store.directory.set_detour(gone, None), "nothing stays");
}
