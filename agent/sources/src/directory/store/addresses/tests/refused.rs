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
