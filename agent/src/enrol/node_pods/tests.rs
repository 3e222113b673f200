//! Tests of the pods of a node. Costs are counted in looks.

use tacit_core::{
    directory::{AddressConflict, Connect, Labels},
    spiffe::{SpiffeId, TrustDomain},
};

use super::*;

const DEAD: usize = 10_000;

fn pod(namespace: &str, name: &str) -> Workload {
    let domain = TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: name.into(),
        namespace: namespace.into(),
        identity: SpiffeId::new(&domain, namespace, name).expect("valid"),
        addresses: Vec::new(),
        node: "a".into(),
        labels: Labels::default(),
        cgroup: format!("burstable/pod-{namespace}-{name}").into(),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Connect::default(),
    }
}

/// A node, its directory and its cgroups.
#[derive(Default)]
struct Node {
    directory: Directory,
    cgroups: BTreeSet<PathBuf>,
    pods: NodePods,
}

impl Node {
    /// A node with dead pods of one namespace, which were all looked at.
    fn with_dead_pods() -> Self {
        let mut node = Self::default();
        (0..DEAD).for_each(|i| node.insert(pod("dead", &format!("p{i}"))));
        assert!(node.follow());
        while node.look() {}
        assert_eq!(node.pods.looks, DEAD);
        node
    }

    fn insert(&mut self, workload: Workload) {
        self.directory.insert(workload, AddressConflict::Replace);
    }

    fn follow(&mut self) -> bool {
        self.pods.follow(&Arc::new(self.directory.clone()), "a")
    }

    fn look(&mut self) -> bool {
        self.pods.look(|cgroup| self.cgroups.contains(cgroup))
    }

    fn create(&mut self, workload: &Workload) {
        self.cgroups.insert(workload.cgroup.clone());
        self.pods.created(&workload.cgroup);
    }

    fn wanted(&self) -> Vec<String> {
        self.pods.wanted().pods.iter().map(|workload| workload.full_name()).collect()
    }
}

#[test]
fn pods_without_a_cgroup_cost_nothing_until_they_change() {
    let mut node = Node::with_dead_pods();
    assert!(node.wanted().is_empty());
    assert!(!node.look() && !node.follow(), "nothing has changed");
    assert_eq!(node.pods.looks, DEAD);
    // Another node's pod is no change of this node's.
    node.insert(Workload { node: "b".into(), ..pod("shop", "web") });
    assert!(!node.follow() && !node.look());
    assert_eq!(node.pods.looks, DEAD);
    node.insert(pod("dead", "one-more"));
    assert!(node.follow() && !node.look());
    assert_eq!(node.pods.looks, DEAD + 1);
    node.pods.rescan_some();
    assert!(!node.look());
    assert_eq!(node.pods.looks, DEAD + 1 + RESCANNED);
}

#[test]
fn a_pod_of_another_namespace_is_looked_at_in_the_first_pass() {
    let mut node = Node::default();
    (0..DEAD).for_each(|i| node.insert(pod("dead", &format!("p{i}"))));
    let web = pod("shop", "web");
    node.insert(web.clone());
    node.create(&web);
    node.follow();
    assert!(node.look(), "more are left");
    assert_eq!(node.wanted(), ["shop/web"]);
}

#[test]
fn a_pod_whose_cgroup_is_created_is_looked_at_alone() {
    let mut node = Node::with_dead_pods();
    let alive = pod("dead", "p4711");
    node.create(&alive);
    assert!(!node.look());
    assert_eq!((node.wanted(), node.pods.looks), (vec!["dead/p4711".to_owned()], DEAD + 1));
    assert!(!node.pods.created(Path::new("elsewhere")));
    assert!(!node.look());
    assert_eq!(node.pods.looks, DEAD + 1);
    // The parent of all pods is created once, and what is below it may have been before the watch.
    assert!(node.pods.created(Path::new("burstable")));
    while node.look() {}
    assert_eq!(node.pods.looks, DEAD + 1 + DEAD - 1);
}

#[test]
fn a_pod_whose_cgroup_goes_waits_again() {
    let mut node = Node::default();
    let web = pod("shop", "web");
    node.insert(web.clone());
    node.create(&web);
    node.follow();
    node.look();
    assert!(node.pods.waiting(Path::new("/cgroup")).listed.is_empty());
    node.pods.keep_present([].iter());
    assert!(node.wanted().is_empty());
    let waiting = node.pods.waiting(Path::new("/cgroup"));
    assert_eq!(waiting.listed[0].reason, "its cgroup /cgroup/burstable/pod-shop-web does not exist yet");
    node.pods.created(&web.cgroup);
    node.look();
    assert_eq!(node.wanted(), ["shop/web"]);
    node.directory.remove("shop", "web");
    assert!(node.follow());
    assert!(node.wanted().is_empty() && node.pods.waiting(Path::new("/cgroup")).listed.is_empty());
}

#[test]
fn a_cgroup_that_passes_to_another_object_stays_planned_whatever_waits() {
    let mut node = Node::default();
    let (web, heir) =
        (pod("shop", "web"), Workload { cgroup: pod("shop", "web").cgroup, ..pod("shop", "heir") });
    node.insert(web.clone());
    node.create(&web);
    node.follow();
    node.look();
    node.pods.keep_present(node.cgroups.iter());
    // More namespaces than a pass has looks.
    (0..2 * LOOKS_MAX).for_each(|i| node.insert(pod(&format!("ns-{i}"), "dead")));
    node.follow();
    node.directory.remove("shop", "web");
    node.insert(heir);
    assert!(node.follow() && node.look(), "more are left");
    assert_eq!(node.wanted(), ["shop/heir"]);
    // A pod that the source had lost, and has again.
    node.directory.remove("shop", "heir");
    node.directory.set_departed(vec![Arc::new(web.clone())]);
    node.follow();
    node.pods.keep_present(node.cgroups.iter());
    (0..2 * LOOKS_MAX).for_each(|i| node.insert(pod(&format!("other-{i}"), "dead")));
    node.follow();
    node.directory.set_departed(Vec::new());
    node.insert(web);
    assert!(node.follow() && node.look(), "more are left");
    assert_eq!(node.wanted(), ["shop/web"]);
    node.pods.keep_present([].iter());
    assert!(node.wanted().is_empty(), "its cgroup is gone");
}

#[test]
fn a_namespace_has_a_share_of_the_waiting_pods_that_are_listed() {
    let mut node = Node::with_dead_pods();
    node.insert(pod("shop", "web"));
    node.follow();
    node.look();
    let waiting = node.pods.waiting(Path::new("/cgroup"));
    let of = |namespace: &str| waiting.listed.iter().filter(|w| *w.workload.namespace == *namespace).count();
    assert_eq!((of("dead"), of("shop")), (128, 1));
    let usage = waiting.share_use();
    assert!(usage.is_full() && usage.fullest == Some(("dead".to_owned(), DEAD as u64)), "{usage:?}");
    assert!(Arc::ptr_eq(&waiting, &node.pods.waiting(Path::new("/cgroup"))), "made once for each change");
}

#[test]
fn changed_labels_need_no_look_and_another_cgroup_does() {
    let mut node = Node::default();
    let web = pod("shop", "web");
    node.insert(web.clone());
    node.create(&web);
    node.follow();
    node.look();
    let labelled = Workload { labels: [("app", "web")].into_iter().collect(), ..web.clone() };
    node.insert(labelled.clone());
    assert!(node.follow() && !node.look());
    assert_eq!((node.pods.looks, node.pods.entry(&web.cgroup).map(|w| &**w)), (1, Some(&labelled)));
    node.insert(Workload { cgroup: "burstable/other".into(), ..web });
    assert!(node.follow() && !node.look());
    assert_eq!((node.pods.looks, node.wanted().len()), (2, 0));
}

#[test]
fn all_roles_of_pods_are_kept_apart() {
    let mut node = Node::default();
    let (web, alone) = (pod("shop", "web"), Workload { protocol: Protocol::None, ..pod("shop", "alone") });
    let host = Workload { addresses: vec![[192, 0, 2, 1].into()], ..pod("shop", "host") };
    for workload in [&web, &alone, &host] {
        node.create(workload);
    }
    node.insert(web);
    node.insert(alone);
    node.directory.set_host_network(host);
    node.follow();
    node.look();
    let wanted = node.pods.wanted();
    assert_eq!(node.wanted(), ["shop/web"]);
    let bystanders: Vec<_> = wanted.bystanders.iter().map(|w| (&*w.name, w.addresses.len())).collect();
    assert_eq!(bystanders, [("alone", 0), ("host", 0)], "the addresses of the last are the node's");
    // The same pod without the node's network.
    node.directory.unset_host_network("shop", "host");
    node.insert(pod("shop", "host"));
    node.follow();
    node.look();
    assert_eq!(node.wanted(), ["shop/host", "shop/web"]);
    assert_eq!(node.pods.wanted().bystanders.len(), 1);
}
