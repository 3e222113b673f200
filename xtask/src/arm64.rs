//! `cargo xtask arm64`: the agent's parts built for arm64, and their unit tests.
//!
//! On another machine the tests run under QEMU's user emulation, on this machine's kernel. Tests that need root are not run: they
//! load programs into that kernel, and QEMU does not pass the system call on.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use xtask_support::{
    ebpf,
    platform::Platform,
    progress::{self, Progress},
    report::Report,
    setup,
    test_programs::{self, TestProgram},
    workspace::{Profile, Workspace},
};

use crate::test::{conclude, running, stream};

/// The packages of what runs on a node, each with its unit tests and properties.
const PACKAGES: [&str; 10] = [
    "tacit",
    "tacit-abi",
    "tacit-authority",
    "tacit-cni",
    "tacit-core",
    "tacit-grpc",
    "tacit-identity",
    "tacit-kernel",
    "tacit-sources",
    "tacit-tunnel",
];

/// Unit tests that need what QEMU's user emulation does not pass on: `sock_diag` requests, and all of TCP_INFO.
const NOT_EMULATED: [&str; 8] = [
    "netlink::sockets::tests::a_listener_is_found_by_its_address_and_by_any",
    "netlink::sockets::tests::an_open_connection_is_listed_with_both_ends",
    "relay::plain::tests::an_answer_that_ends_while_the_peer_acknowledges_nothing_arrives_whole",
    "relay::tunnelled::tests::an_answer_that_ends_while_the_peer_acknowledges_nothing_arrives_whole",
    "session::tests::an_answer_after_a_silence_is_taken",
    "session::tests::an_open_that_is_given_up_does_not_arrive_later",
    "session::tests::open_is_given_up_only_if_the_peer_does_not_acknowledge_it",
    "socket::peer::tests::a_connection_that_stops_to_receive_leaves_its_peer_without_answers",
];

/// Builds and tests; no success when anything failed or nothing ran. The count is the last line that is printed.
pub(crate) fn run(workspace: &Workspace) -> ExitCode {
    let mut report = Report::default();
    if let Err(error) = build_and_test(workspace, &mut report) {
        progress::error(&error);
        report.failed_check("build for arm64");
    }
    conclude(report)
}

fn build_and_test(workspace: &Workspace, report: &mut Report) -> Result<()> {
    let mut progress = Progress::new(5);
    let platform = progress.step("what is needed", || {
        setup::ensure_ebpf(workspace)?;
        Platform::arm64(workspace)
    })?;
    // Its instructions are the same for every architecture of this byte order.
    progress.step("kernel side", || ebpf::build(workspace))?;
    progress.step("agent, attack suite, CNI plugin", || {
        workspace.build_for(&platform, Profile::Fast, &["tacit", "tacit-attack"])?;
        workspace.build_cni_for(&platform, Profile::Fast)
    })?;
    let tests = progress.step("build the tests", || {
        let packages = PACKAGES.iter().flat_map(|package| ["--package", package]);
        test_programs::build_for(workspace, &platform, &packages.collect::<Vec<_>>())
    })?;
    if platform.is_emulated() {
        report.note(format!("not run under emulation: {}", NOT_EMULATED.join(", ")));
    }
    report.begin();
    let outcome = progress.step("unit tests", || run_tests(&platform, workspace, &tests, report));
    report.end("unit tests", outcome.is_ok());
    if let Err(error) = outcome {
        progress::error(&error);
    }
    Ok(())
}

fn run_tests(
    platform: &Platform,
    workspace: &Workspace,
    tests: &[TestProgram],
    report: &mut Report,
) -> Result<()> {
    let mut failed = 0;
    for test in tests {
        let shown = running(test);
        println!("{shown}");
        report.line(&shown);
        let mut command = platform.start(&test.path);
        command.arg("--color=never").current_dir(workspace.root().join(&test.package));
        if platform.is_emulated() {
            command.arg("--exact").args(NOT_EMULATED.iter().flat_map(|name| ["--skip", name]));
        }
        let status = stream::run(&mut command, |line| report.line(line))?;
        failed += u32::from(!status.success());
    }
    ensure!(failed == 0, "test programs that failed: {failed}");
    Ok(())
}
