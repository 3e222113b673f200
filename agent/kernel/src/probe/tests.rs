//! Tests of the decision and its words, and of the table against the programs themselves.

use std::time::{Duration, Instant};

use super::{
    super::{object, programs::OBJECT},
    *,
};

fn finding(feature: &'static str, since: Release, presence: Presence) -> ProbeFinding {
    ProbeFinding {
        feature,
        needed_for: "something",
        since,
        need: Need::Required,
        remedy: Remedy::Kernel("CONFIG_X"),
        presence,
    }
}

fn report(kernel: &str, findings: Vec<ProbeFinding>) -> ProbeReport {
    ProbeReport { kernel: kernel.to_owned(), findings }
}

fn absent() -> Presence {
    Presence::Absent("Invalid argument".to_owned())
}

#[test]
fn a_release_is_read_from_what_distributions_write() {
    assert_eq!(Release::parse("5.10.0-46-cloud-amd64"), Some(Release(5, 10)));
    assert_eq!(Release::parse("7.3-rc1"), Some(Release(7, 3)));
    assert_eq!(Release::parse("?"), None);
    assert!(Release(5, 9) < Release(5, 15) && Release(5, 15) < Release(6, 1));
}

#[test]
fn what_has_a_fallback_does_not_stop_the_agent() {
    let mut optional = finding("tcx", Release(6, 6), absent());
    optional.need = Need::Fallback("something else");
    let present = finding("sk_lookup", Release(5, 9), Presence::Present);
    assert!(report("6.1.0", vec![optional, present]).verdict().is_ok());
}

#[test]
fn what_could_not_be_tried_counts_as_missing() {
    let unknown =
        finding("sk_lookup", Release(5, 9), Presence::Unknown("Operation not permitted".to_owned()));
    let refusal = report("6.1.0", vec![unknown]).verdict().expect_err("not known to work");
    assert_eq!(refusal.exit_code(), 78);
}

#[test]
fn an_old_kernel_is_told_which_one_to_boot() {
    let findings = vec![
        finding("sk_lookup", Release(5, 9), Presence::Present),
        finding("SO_NETNS_COOKIE", Release(5, 14), absent()),
        finding("a newer thing", Release(6, 3), absent()),
    ];
    let refusal = report("5.10.0-46-cloud-amd64", findings).verdict().expect_err("two are missing");
    let text = refusal.to_string();
    assert_eq!(
        text.lines().collect::<Vec<_>>(),
        [
            "kernel 5.10.0-46-cloud-amd64 cannot run the agent; missing:",
            "  SO_NETNS_COOKIE (something): in Linux since 5.14; boot Linux 5.15 or newer",
            "  a newer thing (something): in Linux since 6.3; boot Linux 6.3 or newer",
            "`tacit doctor` shows every feature; nothing was attached or pinned",
        ]
    );
}

#[test]
fn a_new_kernel_without_a_feature_is_told_the_build_option() {
    let refusal = report("6.12.0", vec![finding("sk_lookup", Release(5, 9), absent())]).verdict();
    let text = refusal.expect_err("missing").to_string();
    assert!(
        text.contains("this kernel says: Invalid argument; boot one that is built with CONFIG_X"),
        "{text}"
    );
}

#[test]
fn what_the_node_lacks_says_how_to_set_it_up() {
    let mut bpffs =
        finding("bpffs", Release(4, 4), Presence::Absent("/x is not on a BPF file system".to_owned()));
    bpffs.remedy = Remedy::Node("mount it");
    let text = report("6.12.0", vec![bpffs]).verdict().expect_err("missing").to_string();
    assert!(text.contains("/x is not on a BPF file system; mount it"), "{text}");
}

#[test]
fn features_that_lack_rights_share_a_line() {
    let denied = || Presence::Unknown("Operation not permitted".to_owned());
    let findings = vec![finding("a", Release(5, 9), denied()), finding("b", Release(5, 9), denied())];
    let text = report("6.12.0", findings).verdict().expect_err("missing").to_string();
    assert!(text.contains("could not be tried (Operation not permitted): a, b\n"), "{text}");
}

#[test]
fn every_feature_is_listed_once_and_none_is_required_that_the_minimum_lacks() {
    for (index, feature) in FEATURES.iter().enumerate() {
        assert!(FEATURES[..index].iter().all(|other| other.name != feature.name), "{} twice", feature.name);
        if feature.need == Need::Required {
            assert!(feature.since <= Release::MINIMUM, "{} is newer than the minimum", feature.name);
        }
    }
}

#[test]
fn every_helper_the_programs_call_is_in_the_table() {
    use aya::programs::ProgramType;
    use features::Trial;

    let tried = |kind: ProgramType, helper: i32| {
        FEATURES.iter().any(|f| matches!(f.trial, Trial::Helper(k, h) | Trial::HelperOfType(k, h) if k == kind && h as i32 == helper))
    };
    let tried_anywhere = |helper: i32| {
        FEATURES
            .iter()
            .any(|f| matches!(f.trial, Trial::Helper(_, h) | Trial::HelperOfType(_, h) if h as i32 == helper))
    };
    for (section, helper) in object::helper_calls(OBJECT) {
        let kind = match section.as_str() {
            // Functions that programs of several types share.
            ".text" => {
                let known = BASE_HELPERS.contains(&helper) || tried_anywhere(helper);
                assert!(known, "a function calls helper {helper}, which no row of the table tries");
                continue;
            }
            "sockops" => ProgramType::SockOps,
            "sk_lookup" => ProgramType::SkLookup,
            "cgroup_skb/egress" | "cgroup_skb/ingress" => ProgramType::CgroupSkb,
            "classifier" => ProgramType::SchedClassifier,
            _ => ProgramType::CgroupSockAddr,
        };
        let known = BASE_HELPERS.contains(&helper) || tried(kind, helper);
        assert!(known, "{section} calls helper {helper}, which no row of the table tries");
    }
}

/// Map look-up, update and removal, and the clock: as old as the oldest program type here. Submitting and discarding
/// came with reserving.
const BASE_HELPERS: [i32; 6] = [1, 2, 3, 5, 132, 133];

#[test]
#[ignore = "needs root"]
fn this_machine_has_everything_required() {
    for finding in required().findings {
        // bpffs is the node's affair: the machine that tests need not have it mounted.
        assert!(finding.presence == Presence::Present || finding.feature == "bpffs", "{finding:?}");
    }
}

#[test]
#[ignore = "needs root"]
fn trials_take_no_longer_than_a_start_may() {
    /// A start has 50 ms on a node; ten times that for an unoptimised build on an emulated machine.
    const LIMIT: Duration = Duration::from_millis(500);
    // The fastest of some: others work on this machine too.
    let taken = (0..5).map(|_| {
        let begin = Instant::now();
        required();
        begin.elapsed()
    });
    let fastest = taken.min().expect("five");
    assert!(fastest < LIMIT, "{fastest:?}");
}

fn required() -> ProbeReport {
    run(Path::new("/sys/fs/bpf/tacit"), |feature| feature.need == Need::Required)
}
