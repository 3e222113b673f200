//! Tests of the plan: a table of cases, each from one state of a node with the pod `web` in cgroup 7.

use tacit_core::directory::Connect;

use super::*;
use crate::enrol::testing::workload;

const PATH: &str = "burstable/pod1";

/// A node on which the pod runs, has a certificate, and is wanted.
struct Node {
    observed: Observed,
    wanted: Wanted,
}

impl Node {
    fn with_a_running_pod() -> Self {
        let ranges = ["10.77.0.0/16"].map(|text| text.parse().expect("a range"));
        let mut node = Self { observed: Observed::default(), wanted: Wanted::default() };
        node.observed.pods_cgroup = "/cgroup".into();
        node.observed.ranges = Arc::new(Ranges::configured(&ranges));
        node.cgroup(7, true);
        node.wanted.pods = vec![Arc::new(workload("web", &["10.77.1.2"]))];
        node
    }

    /// The pod is served, and the kernel has its entry.
    fn with_a_served_pod() -> Self {
        let mut node = Self::with_a_running_pod();
        node.serve(PATH, 7, workload("web", &["10.77.1.2"]));
        node
    }

    fn serve(&mut self, path: &str, cgroup: u64, workload: Workload) {
        self.observed.covered.insert(cgroup);
        self.observed.served.insert(path.into(), Served { cgroup, workload: Arc::new(workload) });
    }

    fn cgroup(&mut self, id: u64, populated: bool) {
        let cgroup = ObservedCgroup { id, level: Level::Hooked, populated };
        self.observed.cgroups.insert(PATH.into(), cgroup);
    }

    fn want(&mut self, workload: Workload) {
        self.wanted.pods = vec![Arc::new(workload)];
    }

    /// The plan, a word and a cgroup or reason for each step.
    fn steps(&self) -> Vec<String> {
        let step = |action| match action {
            Action::Release(path) => format!("release {}", path.display()),
            Action::Remove(cgroup) => format!("remove {cgroup}"),
            Action::Cover(_, cgroup) => format!("cover {cgroup}"),
            Action::Wait(_, reason) => format!("wait: {reason}"),
            Action::Exempt(_, cgroup) => format!("exempt {cgroup}"),
            Action::LeaveUnnamed(cgroup) => format!("leave unnamed {cgroup}"),
            Action::Guard(_, cgroup) => format!("guard {cgroup}"),
            Action::Enrol(_, cgroup) => format!("enrol {cgroup}"),
        };
        plan(&self.observed, &self.wanted).into_iter().map(step).collect()
    }
}

/// Plans for `node` after `change`.
fn steps(mut node: Node, change: impl FnOnce(&mut Node)) -> Vec<String> {
    change(&mut node);
    node.steps()
}

#[test]
fn a_pod_that_appears_is_covered_and_enrolled_when_it_has_all_it_needs() {
    let after = |change: fn(&mut Node)| steps(Node::with_a_running_pod(), change);
    assert_eq!(after(|_| ()), ["cover 7", "enrol 7"]);
    assert_eq!(after(|node| node.observed.covered = [7].into()), ["enrol 7"]);
    assert_eq!(
        after(|node| node.observed.cgroups.clear()),
        ["wait: its cgroup /cgroup/burstable/pod1 does not exist yet"]
    );
    assert_eq!(after(|node| node.cgroup(7, false)), ["cover 7", "wait: no process in its cgroup"]);
    assert_eq!(
        after(|node| {
            let identity = node.wanted.pods[0].identity.clone();
            node.observed.uncertified.insert(identity, IssueError::Awaited);
        }),
        [
            "cover 7".to_owned(),
            "guard 7".to_owned(),
            format!("wait: no certificate: {}", IssueError::Awaited)
        ]
    );
    assert_eq!(after(|node| node.want(workload("web", &[]))), ["cover 7", "enrol 7"]);
}

#[test]
fn a_pod_at_another_level_or_outside_the_mesh_is_not_enrolled() {
    let after = |change: fn(&mut Node)| steps(Node::with_a_running_pod(), change);
    let third = ObservedCgroup { id: 7, level: Level::Other(3), populated: true };
    assert_eq!(
        steps(Node::with_a_running_pod(), |node| node.observed.cgroups = [(PATH.into(), third)].into()),
        ["wait: its cgroup is 3 levels below podsCgroup; pods are looked for 1 or 2 levels below"]
    );
    let outside = after(|node| node.want(workload("web", &["10.78.1.2"])));
    assert_eq!(outside[0], "cover 7");
    assert!(outside[1].starts_with("wait: its address 10.78.1.2 is in no range of the mesh"), "{outside:?}");
}

#[test]
fn a_cgroup_that_no_source_names_is_left_alone_until_one_does() {
    let after = |change: fn(&mut Node)| steps(Node::with_a_running_pod(), change);
    let others = ["cover 7", "enrol 7"];
    let leave = ["leave unnamed 9", "cover 7", "enrol 7"];
    assert_eq!(after(|node| node.observed.unnamed = [9].into()), leave);
    let known = |node: &mut Node| {
        node.observed.unnamed = [9].into();
        node.observed.exempt = [(9, Vec::new())].into();
    };
    assert_eq!(after(known), others);
    let with_former_addresses = |node: &mut Node| {
        node.observed.unnamed = [9].into();
        node.observed.exempt = [(9, vec![[10, 77, 1, 9].into()])].into();
    };
    assert_eq!(after(with_former_addresses), leave);
    let enrolled_before = |node: &mut Node| {
        node.observed.unnamed = [9].into();
        node.observed.covered = [9].into();
    };
    assert_eq!(after(enrolled_before), ["remove 9", "cover 7", "enrol 7"], "held first, as it was a pod's");
    let named_since = |node: &mut Node| {
        node.observed.unnamed = [7].into();
        node.observed.exempt = [(7, Vec::new())].into();
    };
    assert_eq!(after(named_since), others, "the look at the cgroups may be older than the directory");
    let held_again = |node: &mut Node| node.observed.exempt = [(9, Vec::new())].into();
    assert_eq!(after(held_again), ["remove 9", "cover 7", "enrol 7"]);
}

#[test]
fn entries_of_an_earlier_agent_stay_until_each_pod_was_looked_at() {
    for is_partial in [true, false] {
        let after = steps(Node::with_a_running_pod(), |node| {
            node.observed.is_partial = is_partial;
            node.observed.covered = [7, 8].into();
            node.observed.attached = [9].into();
            node.observed.exempt = [(10, Vec::new())].into();
        });
        let removed = ["remove 8", "remove 9", "remove 10"];
        let removed = if is_partial { &[][..] } else { &removed[..] };
        assert_eq!(after, [removed, &["enrol 7"]].concat());
    }
}

#[test]
fn a_served_pod_that_stays_the_same_needs_nothing() {
    let after = |change: fn(&mut Node)| steps(Node::with_a_served_pod(), change);
    let nothing: [&str; 0] = [];
    assert_eq!(after(|_| ()), nothing);
    assert_eq!(after(|node| node.want(workload("web", &[]))), nothing, "addresses found in the pod");
    assert_eq!(
        after(|node| node.wanted.departed = std::mem::take(&mut node.wanted.pods)),
        nothing,
        "departed, but alive"
    );
}

#[test]
fn a_served_pod_that_changes_is_released_before_anything_else() {
    let after = |change: fn(&mut Node)| steps(Node::with_a_served_pod(), change);
    let release = "release burstable/pod1";
    let lost = [release, "wait: no process in its cgroup"];
    assert_eq!(after(|node| node.cgroup(7, false)), lost, "the kernel keeps its entry");
    for changed in [workload("api", &["10.77.1.2"]), workload("web", &["10.77.1.3"])] {
        assert_eq!(steps(Node::with_a_served_pod(), |node| node.want(changed)), [release, "enrol 7"]);
    }
    let uncertified = |node: &mut Node| {
        let api = workload("api", &["10.77.1.2"]);
        node.observed.uncertified.insert(api.identity.clone(), IssueError::Awaited);
        node.want(api);
    };
    assert_eq!(
        after(uncertified),
        [release.to_owned(), "guard 7".to_owned(), format!("wait: no certificate: {}", IssueError::Awaited)]
    );
    assert_eq!(after(|node| node.cgroup(8, true)), [release, "remove 7", "cover 8", "enrol 8"], "replaced");
    assert_eq!(
        after(|node| node.observed.cgroups.clear()),
        [release, "remove 7", "wait: its cgroup /cgroup/burstable/pod1 does not exist yet"]
    );
    assert_eq!(after(|node| node.wanted.pods.clear()), [release, "remove 7"], "no longer of the mesh");
    let departed = |node: &mut Node| {
        node.wanted.departed = std::mem::take(&mut node.wanted.pods);
        node.cgroup(7, false);
    };
    assert_eq!(after(departed), [release], "departed and ended: a process could still appear");
}

#[test]
fn the_address_of_another_pod_is_not_given_to_a_second_one() {
    let taken = "wait: the address 10.77.1.2 that its network namespace has is another pod's";
    let mut node = Node::with_a_running_pod();
    let other = Workload { cgroup: "burstable/pod2".into(), ..workload("api", &["10.77.1.2"]) };
    let cgroup = ObservedCgroup { id: 9, level: Level::Hooked, populated: true };
    node.observed.cgroups.insert("burstable/pod2".into(), cgroup);
    node.serve("burstable/pod2", 9, other.clone());
    node.wanted.pods.push(Arc::new(other));
    assert_eq!(node.steps(), ["cover 7", taken]);
    node.wanted.pods.pop();
    assert_eq!(
        node.steps(),
        ["release burstable/pod2", "remove 9", "cover 7", "enrol 7"],
        "free once the other is gone"
    );
}

#[test]
fn what_an_earlier_agent_left_is_removed_unless_a_pod_of_the_directory_has_it() {
    let mut node = Node::with_a_running_pod();
    node.observed.covered = [5, 7].into();
    node.observed.attached = [4, 5, 7].into();
    assert_eq!(node.steps(), ["remove 4", "remove 5", "enrol 7"]);
    node.observed.covered = [5].into();
    assert_eq!(node.steps(), ["remove 4", "remove 5", "cover 7", "enrol 7"], "steered without an entry");
}

#[test]
fn all_pods_are_covered_before_the_first_is_enrolled() {
    let mut node = Node::with_a_running_pod();
    let second = Workload { cgroup: "burstable/pod2".into(), ..workload("api", &["10.77.1.3"]) };
    let cgroup = ObservedCgroup { id: 8, level: Level::Hooked, populated: true };
    node.observed.cgroups.insert("burstable/pod2".into(), cgroup);
    node.wanted.pods.push(Arc::new(second));
    assert_eq!(node.steps(), ["cover 7", "cover 8", "enrol 7", "enrol 8"]);
    let again = Arc::clone(&node.wanted.pods[0]);
    node.wanted.pods.push(again);
    assert_eq!(node.steps().len(), 4, "two entries of one cgroup are one pod");
}

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
        (Workload { connect: Connect::Early, ..workload("web", &[]) }, false),
    ] {
        assert_eq!(is_same(&wanted, &enrolled), same, "{wanted:?}");
    }
}

#[test]
fn a_pod_that_is_not_to_be_enrolled_is_left_alone_and_held_to_its_addresses() {
    let bystander = |change: fn(&mut Node)| {
        steps(Node::with_a_running_pod(), |node| {
            node.wanted.bystanders = std::mem::take(&mut node.wanted.pods);
            change(node);
        })
    };
    assert_eq!(bystander(|_| ()), ["exempt 7", "guard 7"]);
    assert_eq!(bystander(|node| node.cgroup(7, false)), ["exempt 7"]);
    let known = |node: &mut Node| {
        node.observed.exempt.insert(7, vec!["10.77.1.2".parse().expect("an address")]);
        node.observed.guarded.insert(7);
    };
    assert!(bystander(known).is_empty());
    assert_eq!(
        bystander(|node| {
            node.observed.exempt.insert(7, Vec::new());
            node.observed.guarded.insert(7);
        }),
        ["exempt 7"]
    );
    // An entry above the pods' level would speak for all pods.
    assert!(
        bystander(|node| {
            let above = ObservedCgroup { id: 7, level: Level::Other(0), populated: true };
            node.observed.cgroups.insert(PATH.into(), above);
        })
        .is_empty()
    );
}

#[test]
fn a_pod_that_leaves_the_mesh_is_removed_before_it_is_left_alone() {
    let left = steps(Node::with_a_served_pod(), |node| {
        node.wanted.bystanders = std::mem::take(&mut node.wanted.pods);
    });
    assert_eq!(left, [format!("release {PATH}"), "remove 7".into(), "exempt 7".into(), "guard 7".into()]);
    let joined = steps(Node::with_a_running_pod(), |node| {
        node.observed.exempt.insert(7, Vec::new());
    });
    assert_eq!(joined, ["cover 7", "enrol 7"]);
    let gone = steps(Node::with_a_running_pod(), |node| {
        node.observed.exempt.insert(9, Vec::new());
        node.wanted.pods.clear();
    });
    assert_eq!(gone, ["remove 9"]);
}

#[test]
fn a_pod_with_a_port_that_another_program_has_is_released_and_refused() {
    let taken = |node: &mut Node| {
        node.observed.taken_ports.insert(7, "port 15001".to_owned());
    };
    let waits = ["guard 7", "wait: port 15001"];
    assert_eq!(steps(Node::with_a_served_pod(), taken), [&["release burstable/pod1"], &waits[..]].concat());
    assert_eq!(steps(Node::with_a_running_pod(), taken), [&["cover 7"], &waits[..]].concat());
    let guarded = |node: &mut Node| {
        taken(node);
        node.observed.guarded = [7].into();
        node.observed.covered = [7].into();
    };
    assert_eq!(steps(Node::with_a_running_pod(), guarded), ["wait: port 15001"]);
}
