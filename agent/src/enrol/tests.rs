//! Tests of what makes two entries one pod, and of addresses that a pod has before the directory knows them.

use super::{testing::workload, *};

#[test]
fn a_pod_stays_the_same_while_its_addresses_become_known() {
    let enrolled = workload("web", &["10.77.1.2", "fd77::2"]);
    for (wanted, same) in [
        (workload("web", &["10.77.1.2", "fd77::2"]), true),
        (workload("web", &["fd77::2", "10.77.1.2"]), true),
        (workload("web", &[]), true),
        (workload("web", &["10.77.1.2"]), false),
        (workload("web", &["10.77.1.3", "fd77::2"]), false),
        (workload("api", &["10.77.1.2", "fd77::2"]), false),
        (Workload { cgroup: "burstable/pod2".into(), ..workload("web", &[]) }, false),
    ] {
        assert_eq!(is_same(&wanted, &enrolled), same, "{wanted:?}");
    }
}

#[test]
fn of_a_pods_interfaces_the_mesh_addresses_count() {
    let parse = |text: &&str| text.parse::<IpAddr>().expect("an address");
    let ranges = ["10.77.0.0/16", "fd77::/16"].map(|text| text.parse().expect("a range"));
    let ranges = Ranges::configured(&ranges);
    for (listed, found) in [
        (&["127.0.0.1", "::1", "fe80::1", "10.77.1.2", "fd77::2"][..], &["10.77.1.2", "fd77::2"][..]),
        (&["fd77::2", "10.77.1.2", "10.77.1.3"], &["10.77.1.2", "fd77::2"]),
        (&["10.78.1.2", "fd77::2"], &["fd77::2"]),
        (&["127.0.0.1", "fe80::1"], &[]),
    ] {
        let listed: Vec<IpAddr> = listed.iter().map(parse).collect();
        assert_eq!(
            mesh_addresses(&listed, &ranges),
            found.iter().map(parse).collect::<Vec<_>>(),
            "{listed:?}"
        );
    }
}

#[test]
fn a_pod_that_waits_is_looked_at_again_after_half_as_long() {
    let ms = Duration::from_millis;
    for (waiting, expected) in [
        (&[][..], RESCAN),
        (&[0], ms(5)),
        (&[9], ms(5)),
        (&[40], ms(20)),
        (&[3_600_000], RESCAN),
        (&[3_600_000, 100], ms(50)),
    ] {
        assert_eq!(pause(waiting.iter().copied().map(ms)), expected, "{waiting:?}");
    }
}
