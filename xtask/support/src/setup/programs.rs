//! Programs that tests and the demo run: servers, clients, and the tools that make and watch the network.
//!
//! Looked for by name, not by package, so that a system without apt works as well when the programs are there.

use std::process::Command;

use anyhow::{Result, bail, ensure};

use super::{apt::Apt, arm64};
use crate::command::{find_program, succeeds};

/// A program and the Debian package that has it. None of the packages brings a service.
const PROGRAMS: [(&str, &str); 12] = [
    ("apache2", "apache2-bin"),
    ("mariadbd", "mariadb-server-core"),
    ("mariadb-install-db", "mariadb-server-core"),
    ("mariadb", "mariadb-client-core"),
    ("tcpdump", "tcpdump"),
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("openssl", "openssl"),
    ("ss", "iproute2"),
    ("nsenter", "util-linux"),
    ("sysctl", "procps"),
    // aws-lc, the cryptography below rustls, is C.
    ("cc", "gcc libc6-dev"),
];

/// Further programs for virtual machines.
const VM_PROGRAMS: [(&str, &str); 9] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("modprobe", "kmod"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
    ("dash", "dash"),
];

/// Further programs for a cluster. Kubernetes itself is built.
const KUBE_PROGRAMS: [(&str, &str); 14] = [
    ("busybox", "busybox-static"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("bpftool", "bpftool"),
    ("openssl", "openssl"),
    ("tcpdump", "tcpdump"),
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("timeout", "coreutils"),
    ("pkg-config", "pkg-config"),
    ("cc", "gcc libc6-dev"),
];

/// Further programs for the tests. `nc` alone may be one of several programs with other options.
const TEST_PROGRAMS: [(&str, &str); 5] = [
    ("wrk", "wrk"),
    ("nc.openbsd", "netcat-openbsd"),
    ("python3", "python3"),
    ("timeout", "coreutils"),
    ("setpriv", "util-linux"),
];

/// Further programs for the bench: real load generators.
const BENCH_PROGRAMS: [(&str, &str); 3] = [("iperf3", "iperf3"), ("wrk", "wrk"), ("taskset", "util-linux")];

/// Installs the packages of programs that are not there.
pub(super) fn ensure(apt: &mut Apt) -> Result<()> {
    ensure_these(apt, "programs of the tests and the demo", &PROGRAMS)
}

/// Installs what builds for arm64 and runs it.
pub(super) fn ensure_arm64(apt: &mut Apt) -> Result<()> {
    ensure_these(apt, "build for arm64", &arm64::PROGRAMS)
}

/// As [`ensure`], for the programs that only tests run.
pub(super) fn ensure_tests(apt: &mut Apt) -> Result<()> {
    ensure_these(apt, "programs of the tests", &TEST_PROGRAMS)
}

/// As [`ensure`], for virtual machines.
pub(super) fn ensure_vm(apt: &mut Apt) -> Result<()> {
    ensure_these(apt, "programs for virtual machines", &VM_PROGRAMS)
}

/// As [`ensure`], for a cluster.
pub(super) fn ensure_kube(apt: &mut Apt) -> Result<()> {
    ensure_these(apt, "programs for a cluster", &KUBE_PROGRAMS)?;
    // runc is linked with the library.
    let has_library = || succeeds(Command::new("pkg-config").args(["--exists", "libseccomp"]));
    if !has_library() && Apt::is_here() {
        apt.install("a library of runc", &["libseccomp-dev"])?;
    }
    ensure!(has_library(), "pkg-config does not find libseccomp: install its development files");
    Ok(())
}

/// As [`ensure`], for the bench.
pub(super) fn ensure_bench(apt: &mut Apt) -> Result<()> {
    ensure_these(apt, "load generators of the bench", &BENCH_PROGRAMS)
}

fn ensure_these(apt: &mut Apt, what: &str, programs: &[(&'static str, &'static str)]) -> Result<()> {
    let is_here = |program: &str| find_program(program).is_some();
    if missing(programs, is_here).is_empty() {
        return Ok(());
    }
    if Apt::is_here() {
        apt.install(what, &missing_packages(programs, is_here))?;
    }
    match missing(programs, is_here).as_slice() {
        [] => Ok(()),
        left => bail!("not on PATH, and not installed by apt: {}. Install them", left.join(", ")),
    }
}

fn missing(programs: &[(&'static str, &'static str)], is_here: impl Fn(&str) -> bool) -> Vec<&'static str> {
    programs.iter().map(|(program, _)| *program).filter(|program| !is_here(program)).collect()
}

fn missing_packages(
    programs: &[(&'static str, &'static str)],
    is_here: impl Fn(&str) -> bool,
) -> Vec<&'static str> {
    let absent = programs.iter().filter(|(program, _)| !is_here(program));
    let mut packages: Vec<&str> = absent.flat_map(|(_, packages)| packages.split(' ')).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_installed_when_all_programs_are_there() {
        assert!(missing_packages(&PROGRAMS, |_| true).is_empty());
    }

    #[test]
    fn a_package_is_named_once_however_many_programs_it_has() {
        let gone = ["mariadbd", "mariadb-install-db", "cc"];
        assert_eq!(
            missing_packages(&PROGRAMS, |program| !gone.contains(&program)),
            ["gcc", "libc6-dev", "mariadb-server-core"]
        );
    }
}
