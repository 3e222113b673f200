//! Kernel state of Tacit on the nodes. All of it must be gone after the uninstall.

use std::{fs, os::unix::fs::MetadataExt as _};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tacit_topology::run;

use super::{cluster::Cluster, node::Node};

/// A line for each pin, program, link, filter, process and rule, on all nodes.
pub(super) fn found(cluster: &Cluster) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for node in &cluster.nodes {
        let all = [
            pins(node)?,
            cgroup_programs(node)?,
            links(node)?,
            filters(node)?,
            processes(node)?,
            rules(node)?,
            configurations(node)?,
        ];
        let name = node.plan.name;
        found.extend(all.into_iter().flatten().map(|line| format!("{name}: {line}")));
    }
    Ok(found)
}

fn lines(node: &Node, script: &str) -> Result<Vec<String>> {
    let text = run(node.command("sh").args(["-c", script]))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn json(node: &Node, arguments: &[&str]) -> Result<Value> {
    let text = run(node.command("bpftool").arg("-j").args(arguments))?;
    serde_json::from_str(&text).with_context(|| format!("bpftool {}", arguments.join(" ")))
}

/// The kernel puts two iterators there itself.
fn pins(node: &Node) -> Result<Vec<String>> {
    let listed = lines(node, "find /sys/fs/bpf -mindepth 1")?;
    Ok(listed.into_iter().filter(|pin| !pin.ends_with(".debug")).map(|pin| format!("pin {pin}")).collect())
}

fn cgroup_programs(node: &Node) -> Result<Vec<String>> {
    let tree = json(node, &["cgroup", "tree", "/sys/fs/cgroup/kubepods"])?;
    let groups = tree.as_array().cloned().unwrap_or_default();
    let programs = groups.iter().flat_map(|group| group["programs"].as_array().cloned().unwrap_or_default());
    // runc attaches device programs itself.
    let ours = programs
        .filter(|program| program["attach_type"] != "cgroup_device" && program["attach_type"] != "device");
    Ok(ours.map(|program| format!("program {program}")).collect())
}

/// Links to the network namespaces of the node's pods. The list is the whole machine's.
fn links(node: &Node) -> Result<Vec<String>> {
    let pods = lines(node, "stat -Lc %i /run/netns/* 2>/dev/null || true")?;
    let own = fs::metadata(format!("/proc/{}/ns/net", node.pid))?.ino().to_string();
    let all = json(node, &["link", "show"])?;
    let is_here = |link: &&Value| {
        link["netns_ino"]
            .as_u64()
            .is_some_and(|inode| pods.contains(&inode.to_string()) || own == inode.to_string())
    };
    Ok(all.as_array().into_iter().flatten().filter(is_here).map(|link| format!("link {link}")).collect())
}

fn filters(node: &Node) -> Result<Vec<String>> {
    let net = json(node, &["net", "show"])?;
    let of = |kind: &str| net[0][kind].as_array().cloned().unwrap_or_default();
    Ok(["xdp", "tc"].into_iter().flat_map(of).map(|filter| format!("filter {filter}")).collect())
}

fn configurations(node: &Node) -> Result<Vec<String>> {
    let named = lines(node, "grep -l tacit-cni /etc/cni/net.d/* || true")?;
    Ok(named.into_iter().map(|file| format!("CNI plugin in {file}")).collect())
}

fn processes(node: &Node) -> Result<Vec<String>> {
    let script = "for p in /proc/[0-9]*; do [ \"$(readlink $p/exe)\" != /usr/bin/tacit ] || tr '\\0' ' ' <$p/cmdline; done";
    Ok(lines(node, script)?.into_iter().map(|line| format!("process {line}")).collect())
}

/// Routing and packet filter rules that name Tacit or one of its ports. Those of kube-proxy name services, and it removes
/// nftables chains of deleted ones only when another service changes.
fn rules(node: &Node) -> Result<Vec<String>> {
    let script = "{ ip rule; ip -6 rule; iptables-save; ip6tables-save; nft list tables | grep -v ' kube-proxy$' | \
                  while read -r _ table; do nft list table $table; done; } 2>/dev/null | \
                  grep -iE 'tacit|150(08|09|5[6-9]|6[01])' | grep -v KUBE- || true";
    Ok(lines(node, script)?.into_iter().map(|line| format!("rule {line}")).collect())
}
