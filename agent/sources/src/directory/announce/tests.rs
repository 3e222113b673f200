//! Tests of the plan of annotations, and of the pauses between patches.

use std::path::Path;

use super::{plan::change, *};

fn pod(uid: &str, (is_enrolled, is_redirected, is_marked): (bool, bool, bool)) -> OwnPod {
    OwnPod {
        namespace: "shop".to_owned(),
        name: uid.to_owned(),
        uid: uid.to_owned(),
        cgroup: format!("pod{uid}").into(),
        is_enrolled,
        is_redirected,
        is_marked,
    }
}

#[test]
fn the_change_of_every_state_of_a_pod() {
    #[derive(Clone, Copy, Debug)]
    enum Enrolment {
        Tunnelled,
        PlaintextAlone,
        NotYet,
    }
    use Enrolment::{NotYet, PlaintextAlone, Tunnelled};
    let (announce, withdraw, unmark) = (Some(Change::Announce), Some(Change::Withdraw), Some(Change::Unmark));
    // Label, redirected, marked: the change if the pod takes tunnels, takes plaintext alone, takes none yet.
    for ((label, redirected, marked), expected) in [
        ((true, false, false), [announce, None, None]),
        ((true, false, true), [announce, unmark, None]),
        // istio-cni wrote it before; the pod is this mesh's now.
        ((true, true, false), [announce, None, None]),
        // "Not yet" is an agent that starts again too.
        ((true, true, true), [None, withdraw, None]),
        ((false, false, false), [None, None, None]),
        ((false, false, true), [unmark, unmark, unmark]),
        ((false, true, false), [None, None, None]),
        ((false, true, true), [withdraw, withdraw, withdraw]),
    ] {
        let pod = pod("1", (label, redirected, marked));
        for (enrolment, expected) in [Tunnelled, PlaintextAlone, NotYet].into_iter().zip(expected) {
            let mut serving = Serving::default();
            match enrolment {
                Tunnelled => _ = serving.tunnelled.insert(pod.cgroup.clone()),
                PlaintextAlone => _ = serving.plaintext_alone.insert(pod.cgroup.clone()),
                NotYet => {}
            }
            assert_eq!(change(&pod, &serving), expected, "{enrolment:?} {pod:?}");
        }
    }
}

#[test]
fn a_later_pod_of_the_name_is_not_announced_before_it_is_enrolled() {
    let later = pod("2", (true, false, false));
    let serving = Serving { tunnelled: [Path::new("pod1").to_owned()].into(), ..Serving::default() };
    assert_eq!(change(&later, &serving), None);
}

#[test]
fn enrolled_pods_come_before_many_marked_ones() {
    let marked = (0..1000).map(|i| pod(&format!("0{i}"), (false, true, true)));
    let pods: Vec<OwnPod> = marked.chain([pod("1", (true, false, false))]).collect();
    let serving = Serving { tunnelled: [Path::new("pod1").to_owned()].into(), ..Serving::default() };
    let changes = changes(&pods, &serving);
    assert_eq!((changes.len(), &*changes[0].0.uid, changes[0].1), (1001, "1", Change::Announce));
    assert!(changes[1..].iter().all(|(_, change)| *change == Change::Withdraw));
}

#[test]
fn one_pod_that_fails_holds_up_no_other_and_pauses_are_bounded() {
    let (mut attempts, mut now) = (Attempts::default(), Instant::now());
    let refused = Failure::Pod("denied".to_owned());
    assert_eq!(attempts.next(["1", "2"].into_iter(), now), Next::Now(0));
    for _ in 0..20 {
        attempts.done("1", Some(&refused), now);
        assert_eq!(attempts.next(["1", "2"].into_iter(), now), Next::Now(1), "the other one is due");
        let pause = attempts.longest(now);
        assert!(!pause.is_zero() && pause <= Duration::from_secs(30), "{pause:?}");
        assert_eq!(attempts.next(["1"].into_iter(), now), Next::At(Some(now + pause)));
        now += pause;
    }
    assert!(
        attempts.longest(now - Duration::from_secs(15)) >= Duration::from_secs(15),
        "doubled to the bound"
    );
    attempts.keep(|_| false, now);
    assert_eq!(attempts.next(["1"].into_iter(), now), Next::Now(0), "forgotten");
    assert_eq!(attempts.next([].into_iter(), now), Next::At(None));
}

#[test]
fn an_api_that_refuses_is_asked_for_one_pod_at_a_time() {
    let (mut attempts, mut now) = (Attempts::default(), Instant::now());
    let refused = Failure::Api("forbidden".to_owned());
    for _ in 0..20 {
        let Next::Now(index) = attempts.next(["1", "2", "3"].into_iter(), now) else {
            panic!("the pause has ended")
        };
        attempts.done(["1", "2", "3"][index], Some(&refused), now);
        let Next::At(Some(due)) = attempts.next(["1", "2", "3"].into_iter(), now) else {
            panic!("all of them pause")
        };
        assert!(due > now);
        // The pauses of all pods have ended too.
        now += Duration::from_secs(31);
    }
    attempts.done("1", None, now);
    assert_eq!(attempts.next(["2"].into_iter(), now), Next::Now(0), "the API answers again");
}

#[test]
fn a_writer_that_undoes_each_patch_is_answered_ever_more_slowly() {
    let (mut attempts, mut now) = (Attempts::default(), Instant::now());
    let mut patches = 0;
    let end = now + Duration::from_secs(600);
    while now < end {
        match attempts.next(["1"].into_iter(), now) {
            Next::Now(_) => {
                attempts.done("1", None, now);
                patches += 1;
            }
            Next::At(due) => now = due.expect("one is wanted"),
        }
    }
    assert!((20..60).contains(&patches), "{patches} in 10 minutes");
}
