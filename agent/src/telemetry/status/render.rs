//! A status as text for a terminal. Colour repeats what the words say, it never says it alone.

use super::{
    AgentState, AnnounceStatus, CertificateStatus, CniStatus, ConnectionStatus, HookProgramStatus,
    NodeStateStatus, NodesStatus, PartyStatus, PodState, PodStatus, RejectionStatus, ResourcesStatus,
    ShareStatus, Status, UnnamedStatus,
};
use crate::telemetry::table::{Cell, Colour, Style, Table};

/// A certificate with less than this part of its life left is overdue for renewal, which begins much earlier.
const LIFE_LEFT_LOW: u64 = 4;

/// A clock this far from the authority's is shown; certificates allow 60 s.
const SKEW_SHOWN_MS: i64 = 5000;

/// The whole status as tables. What needs the operator stands in a line that begins with `!`.
#[must_use]
pub fn render(status: &Status, colour: bool) -> String {
    let mut page = Page { out: String::new(), colour: if colour { Colour::On } else { Colour::Off } };
    page.summary(status);
    page.pods(status);
    page.programs(status);
    page.kernel(status);
    page.guard(status);
    page.certificates(status);
    page.revocation_lists(status);
    page.sources(status);
    page.shares(status);
    page.flows(status);
    page.out
}

struct Page {
    out: String,
    colour: Colour,
}

impl Page {
    fn summary(&mut self, status: &Status) {
        let style = if status.state == AgentState::Ready { Style::Good } else { Style::Caution };
        let state = style.paint(&status.state.to_string(), self.colour);
        let uptime = duration(status.uptime_seconds);
        let who = format!("tacit {} on node {} ({})", status.version, status.node, status.trust_domain);
        let who = Style::Plain.paint(&who, self.colour);
        self.line(&format!("{who}: {state}, up {uptime}, pid {}", status.pid));
    }

    fn pods(&mut self, status: &Status) {
        let mut table = Table::new([
            "POD",
            "STATE",
            "MODE",
            "POLICIES",
            "PLAINTEXT",
            "LINKS",
            "ADDRESSES",
            "IDENTITY",
            "CGROUP",
            "FLOWS",
        ]);
        for pod in &status.pods {
            let state = match &pod.state {
                PodState::Enrolled => Cell::styled("enrolled", Style::Good),
                PodState::Waiting(_) => Cell::styled("waiting", Style::Caution),
                PodState::LeftAlone(_) => "left alone".into(),
            };
            table.row([
                pod_name(pod).into(),
                state,
                modes(pod).into(),
                joined(&pod.policies).into(),
                (&pod.in_clear).into(),
                joined(&pod.guarded_links).into(),
                joined(&pod.addresses).into(),
                (&pod.identity).into(),
                (&pod.cgroup).into(),
                pod.flows.into(),
            ]);
        }
        self.section("PODS", &table);
        for pod in &status.pods {
            let state = match &pod.state {
                PodState::Enrolled => None,
                PodState::Waiting(reason) => Some(("waits", reason)),
                PodState::LeftAlone(reason) => Some(("is left alone", reason)),
            };
            if let Some((state, reason)) = state {
                self.note(Style::Caution, &format!("{} {state}: {reason}", pod_name(pod)));
            }
            if pod.rewrites_arrivals {
                let text = "rules of the pod (REDIRECT, DNAT) rewrite what arrives, and do not run for tunnels: peers reach it as plaintext \
                            where its mode and policies admit that";
                self.note(Style::Caution, &format!("{}: {text}", pod_name(pod)));
            }
            if pod.raised_by_minimum {
                self.note(Style::Caution, &format!("{}: mode raised by minimumMode", pod_name(pod)));
            }
            if let Some(error) = &pod.policy_not_applied {
                let text = format!("{}: policy not applied, STRICT until it is: {error}", pod_name(pod));
                self.note(Style::Bad, &text);
            }
        }
    }

    fn programs(&mut self, status: &Status) {
        let mut table = Table::new(["PROGRAM", "ID", "ATTACHED TO", "PINNED"]);
        for program in &status.programs {
            let pinned = program.pinned.as_deref().unwrap_or("no");
            table.row([
                (&program.name).into(),
                program.id.into(),
                (&program.attached_to).into(),
                pinned.into(),
            ]);
        }
        self.section("KERNEL PROGRAMS", &table);
        self.connect_hooks(&status.connect_hooks);
    }

    /// Names the programs of others, which may translate services before Tacit's program sees them, or after it.
    fn connect_hooks(&mut self, programs: &[HookProgramStatus]) {
        for hook in ["connect4", "connect6"] {
            let order = programs.iter().filter(|program| program.hook == hook);
            let Some(own) = order.clone().position(|program| program.is_tacit) else { continue };
            for (index, other) in order.enumerate().filter(|(_, program)| !program.is_tacit) {
                let when = if index < own { "before" } else { "after" };
                let HookProgramStatus { name, id, .. } = other;
                self.note(
                    Style::Caution,
                    &format!("{hook}: program {name:?} (id {id}) of others runs {when} Tacit's"),
                );
            }
        }
    }

    fn kernel(&mut self, status: &Status) {
        let mut table = Table::new(["VERDICT", "COUNT", "MEANING"]);
        for counter in &status.kernel {
            table.row([(&counter.name).into(), counter.value.into(), (&counter.help).into()]);
        }
        self.section("KERNEL VERDICTS", &table);
        let mut table = Table::new(["EXCEPTION", "HOOK", "COUNT", "MEANING"]);
        for exception in &status.exceptions {
            table.row([
                (&exception.name).into(),
                (&exception.hook).into(),
                exception.value.into(),
                (&exception.help).into(),
            ]);
        }
        self.section("PLAINTEXT OF HELD PODS THAT PASSED", &table);
    }

    fn guard(&mut self, status: &Status) {
        let mut table = Table::new(["DROPPED OF", "OTHER END", "PROTOCOL", "VERDICT", "PACKETS"]);
        for drop in &status.guard.drops {
            table.row([
                (&drop.pod).into(),
                drop.remote.to_string().into(),
                drop.protocol.to_string().into(),
                (&drop.reason).into(),
                drop.packets.into(),
            ]);
        }
        self.section("GUARD", &table);
        if status.guard.resets_at_enrolment > 0 {
            let text =
                format!("{} connections from before enrolment were reset", status.guard.resets_at_enrolment);
            self.note(Style::Caution, &text);
        }
        let mesh = &status.mesh;
        let (configured, detected) = (mesh.configured, mesh.detected);
        let ranges = mesh.ranges.join(" ");
        self.line(&format!("  ranges of the mesh ({configured} configured, {detected} detected): {ranges}"));
        if status.uncovered.example.is_some() {
            self.note(Style::Caution, &status.uncovered.to_string());
        }
        self.nodes(&status.nodes);
        self.unnamed(&status.unnamed);
        self.node_state(&status.node_state);
        if let Some(cni) = &status.cni {
            self.cni(cni);
        }
        if let Some(announced) = &status.announced {
            self.announced(announced);
        }
    }

    fn announced(&mut self, AnnounceStatus { pods, pending, failures, last_error, .. }: &AnnounceStatus) {
        self.line(&format!("  announced for HBONE: {pods} pods, {pending} pending"));
        if let Some(error) = last_error {
            self.note(
                Style::Bad,
                &format!("announcements failed {failures} times and are repeated: {error}"),
            );
        }
    }

    fn cni(&mut self, CniStatus { is_enabled, configuration, error }: &CniStatus) {
        match configuration {
            _ if !is_enabled => self.line("  pods do not wait for this agent: cni.enabled is false"),
            Some(configuration) => {
                self.line(&format!("  pods wait for this agent: CNI plugin in {configuration}"))
            }
            None => self.note(
                Style::Caution,
                "pods do not wait for this agent: no CNI configuration names its plugin",
            ),
        }
        if let Some(error) = error {
            self.note(Style::Bad, &format!("CNI plugin: {error}"));
        }
    }

    fn nodes(&mut self, nodes: &NodesStatus) {
        let NodesStatus { addresses_not_applied, ports_not_applied } = nodes;
        for (error, what, lost) in [
            (addresses_not_applied, "addresses of nodes", "port from 30000 to 32767 outside the mesh"),
            (ports_not_applied, "ports of load balancers at nodes", "port of a node"),
        ] {
            if let Some(error) = error {
                let text = format!("{what} not applied, STRICT pods reach no {lost} until they are: {error}");
                self.note(Style::Bad, &text);
            }
        }
    }

    fn unnamed(&mut self, unnamed: &UnnamedStatus) {
        let UnnamedStatus { held, left_alone, limit_seconds, example } = unnamed;
        if let Some(example) = example {
            let text = format!(
                "no source names {} cgroups of pods, for example {example}: {held} are held, {left_alone} are left alone \
                 after {limit_seconds} s",
                held + left_alone
            );
            self.note(Style::Caution, &text);
        }
    }

    fn node_state(&mut self, state: &NodeStateStatus) {
        if state.folder.is_empty() {
            return;
        }
        self.line(&format!("  before the sources answered: {} (kept in {})", state.origin, state.folder));
        for error in [&state.read_error, &state.write_error].into_iter().flatten() {
            for line in error.lines() {
                self.note(Style::Bad, &format!("{}: {line}", state.folder));
            }
        }
    }

    fn certificates(&mut self, status: &Status) {
        let mut table = Table::new(["IDENTITY", "SERIAL", "EXPIRES", "LEFT", "LAST RENEWAL", "FAILURES"]);
        for certificate in &status.certificates {
            let renewed =
                certificate.last_renewal.map_or_else(|| "never".to_owned(), |time| time.to_string());
            let failing = certificate.last_error.is_some();
            table.row([
                (&certificate.identity).into(),
                (&certificate.serial).into(),
                certificate.not_after.into(),
                left(certificate),
                renewed.into(),
                Cell::styled(
                    certificate.renewal_failures.to_string(),
                    if failing { Style::Bad } else { Style::Plain },
                ),
            ]);
        }
        self.section("CERTIFICATES", &table);
        let skew = status.issuer.clock_ahead_ms.filter(|ahead| ahead.abs() >= SKEW_SHOWN_MS);
        if let Some(ahead) = skew {
            let (seconds, way) = (ahead.abs() / 1000, if ahead > 0 { "ahead of" } else { "behind" });
            let text = format!("this node's clock is {seconds} s {way} that of {}", status.issuer.address);
            self.note(Style::Bad, &text);
        }
        for certificate in &status.certificates {
            if let Some(error) = &certificate.last_error {
                self.note(Style::Bad, &format!("{}: renewal failed: {error}", certificate.identity));
            }
        }
    }

    fn revocation_lists(&mut self, status: &Status) {
        if status.revocation_lists.is_empty() {
            return;
        }
        let mut table = Table::new(["ISSUER", "REVOKED", "MADE", "EXPIRES", "SIGNED"]);
        for list in &status.revocation_lists {
            let signed = match list.is_signed {
                Some(true) => Cell::styled("yes", Style::Good),
                Some(false) => Cell::styled("no", Style::Bad),
                None => "no certificate seen".into(),
            };
            let (made, expires) = (list.this_update.into(), list.next_update.into());
            table.row([(&list.issuer).into(), list.revoked.into(), made, expires, signed]);
        }
        self.section("REVOCATION LISTS", &table);
        for list in &status.revocation_lists {
            if list.seconds_left < 0 {
                self.note(Style::Bad, &format!("the list of {} has expired", list.issuer));
            }
            if list.is_signed == Some(false) {
                let text = format!("the list of {} is not signed by its key, and is not used", list.issuer);
                self.note(Style::Bad, &text);
            }
        }
    }

    fn sources(&mut self, status: &Status) {
        let mut table = Table::new(["SOURCE", "FILE", "LOADED", "LOADS", "REFUSED"]);
        for source in &status.sources {
            table.row([
                source.kind.label().into(),
                (&source.file).into(),
                source.loaded_at.into(),
                source.loads.into(),
                source.refusals.into(),
            ]);
        }
        self.section("CONFIGURATION", &table);
        for source in &status.sources {
            if let Some(error) = &source.last_error {
                let (file, age) = (&source.file, source.stale_seconds);
                let what = match source.loads {
                    0 => format!("{file} not read since {age} s, no pod is served before it was:"),
                    _ => format!("{file} not in use since {age} s, the last good one is in force:"),
                };
                self.note(Style::Bad, &what);
                for line in error.lines() {
                    self.note(Style::Bad, line);
                }
            }
            for problem in &source.unreadable {
                self.note(Style::Bad, &format!("not readable: {problem}"));
            }
            if let Some(connection) = &source.connection {
                self.connection(connection);
            }
        }
    }

    fn connection(&mut self, connection: &ConnectionStatus) {
        match connection.connected_since {
            Some(since) => {
                let reconnects = connection.connections.saturating_sub(1);
                self.note(Style::Plain, &format!("istiod: connected since {since}, {reconnects} reconnects"));
            }
            None => self.note(Style::Bad, "istiod: not connected"),
        }
        for ResourcesStatus { kind, count, services, version, nonce } in &connection.resources {
            let services = if *services > 0 { format!(" ({services} services)") } else { String::new() };
            self.note(
                Style::Plain,
                &format!("istiod: {count} {kind}{services}, version {version:?}, nonce {nonce:?}"),
            );
        }
        if let Some(RejectionStatus { at, error }) = &connection.last_rejection {
            let count = connection.rejections;
            self.note(Style::Bad, &format!("istiod: {count} responses rejected, the last at {at}: {error}"));
        }
    }

    fn shares(&mut self, status: &Status) {
        let mut table = Table::new(["SHARED", "USED", "LIMIT", "FULLEST", "USED", "LIMIT", "REFUSED"]);
        for share in &status.shares {
            let style = if share.full { Style::Caution } else { Style::Plain };
            table.row([
                (&share.resource).into(),
                share.used.into(),
                share.limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string()).into(),
                share.fullest.as_deref().unwrap_or("-").into(),
                Cell::styled(share.fullest_used.to_string(), style),
                share.holder_limit.into(),
                share.refused.into(),
            ]);
        }
        self.section("SHARES", &table);
        for share in status.shares.iter().filter(|share| share.full) {
            let ShareStatus { resource, fullest_used, holder_limit, .. } = share;
            let who = share.fullest.as_deref().unwrap_or("all holders");
            self.note(Style::Caution, &format!("{resource}: {who} has {fullest_used} of {holder_limit}"));
        }
    }

    fn flows(&mut self, status: &Status) {
        let mut table = Table::new(["SOURCE", "DESTINATION", "SECURITY", "AGE", "SENT", "RECEIVED"]);
        for flow in &status.flows.list {
            let security = match (&flow.key_exchange, flow.security.as_str()) {
                (Some(key_exchange), name) => Cell::styled(format!("{name} {key_exchange}"), Style::Good),
                (None, name @ "plaintext") => Cell::styled(name, Style::Caution),
                (None, name) => name.into(),
            };
            table.row([
                party(&flow.source).into(),
                party(&flow.destination).into(),
                security,
                duration(flow.age_seconds).into(),
                bytes(flow.sent_bytes).into(),
                bytes(flow.received_bytes).into(),
            ]);
        }
        let (live, listed) = (status.flows.live, status.flows.list.len());
        let idle = status.pool.idle_sessions;
        self.section(&format!("FLOWS ({live} live, {listed} listed; {idle} idle tunnel sessions)"), &table);
    }

    fn section<const COLUMNS: usize>(&mut self, title: &str, table: &Table<COLUMNS>) {
        let title = Style::Heading.paint(title, self.colour);
        if table.is_empty() {
            self.line(&format!("\n{title}: none"));
        } else {
            self.line(&format!("\n{title}"));
            table.write(&mut self.out, self.colour);
        }
    }

    fn note(&mut self, style: Style, text: &str) {
        let text = style.paint(&format!("! {text}"), self.colour);
        self.line(&format!("  {text}"));
    }

    fn line(&mut self, text: &str) {
        self.out.push_str(text);
        self.out.push('\n');
    }
}

fn pod_name(pod: &PodStatus) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

/// Items of a cell that are listed, a number; beyond it they are counted only. A cell widens its column in every row.
const LISTED_MAX: usize = 8;

/// The mode, then the ports that differ: `strict 9090=permissive`.
fn modes(pod: &PodStatus) -> String {
    let ports = pod.port_modes.iter().map(|(port, mode)| format!("{port}={mode}"));
    std::iter::once(pod.mode.clone()).chain(listed(ports)).collect::<Vec<_>>().join(" ")
}

/// The first items, then the number of the others.
fn listed(items: impl ExactSizeIterator<Item = String>) -> impl Iterator<Item = String> {
    let rest = items.len().saturating_sub(LISTED_MAX);
    items.take(LISTED_MAX).chain((rest > 0).then(|| format!("and {rest} more")))
}

fn joined<T: ToString>(items: &[T]) -> String {
    listed(items.iter().map(ToString::to_string)).collect::<Vec<_>>().join(" ")
}

fn party(party: &PartyStatus) -> String {
    match &party.workload {
        Some(workload) => format!("{workload} ({})", party.address),
        None => party.address.to_string(),
    }
}

/// Returns the remaining lifetime of a certificate, marked if it has expired or will soon.
fn left(certificate: &CertificateStatus) -> Cell {
    let life = certificate.not_after.unix_seconds().saturating_sub(certificate.not_before.unix_seconds());
    match u64::try_from(certificate.seconds_left) {
        Err(_) | Ok(0) => Cell::styled("EXPIRED", Style::Bad),
        Ok(seconds) if seconds < life / LIFE_LEFT_LOW => {
            Cell::styled(format!("{} (soon)", duration(seconds)), Style::Caution)
        }
        Ok(seconds) => duration(seconds).into(),
    }
}

/// The two largest units: `3d 4h`, `1h 1m`, `12s`.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// In the largest binary unit: `12 B`, `1.5 KiB`.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let step = count.ilog2() / 10;
    // Tenths by integers: a count near 2^64 has more digits than a float.
    let tenths = (u128::from(count) * 10) >> (10 * step);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[step as usize - 1])
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn every_part_is_shown_in_aligned_columns() {
        insta::with_settings!({ omit_expression => true }, {
            insta::assert_snapshot!("table", render(&sample(), false));
        });
    }

    #[test]
    fn trouble_with_certificates_stands_out_in_colour() {
        let coloured = render(&sample(), true);
        assert!(coloured.contains("\u{1b}[33m10m 0s (soon)\u{1b}[0m"), "{coloured}");
        assert!(
            coloured.contains("\u{1b}[31m! spiffe://cluster.local/ns/shop/sa/api: renewal failed"),
            "{coloured}"
        );
        let mut expired = sample();
        expired.certificates[0].seconds_left = -1;
        assert!(render(&expired, false).contains("EXPIRED"));
    }

    #[test]
    fn a_pod_with_many_ports_and_policies_takes_one_short_line() {
        let mut status = sample();
        let pod = &mut status.pods[0];
        pod.port_modes = (1..=16_384).map(|port| (port, "STRICT".to_owned())).collect();
        pod.policies = (0..16_384).map(|number| format!("shop/policy-{number}")).collect();
        let text = render(&status, false);
        assert!(text.contains(" 8=STRICT and 16376 more"), "{text}");
        let longest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        assert!(longest < 1000, "a line of {longest} characters");
    }

    #[test]
    fn no_value_reaches_the_terminal_as_a_control_sequence() {
        assert!(!render(&sample(), false).contains('\u{1b}'));
    }

    #[test]
    fn an_empty_status_says_none() {
        let mut status = sample();
        status.pods.clear();
        assert!(render(&status, false).contains("PODS: none\n"));
    }

    #[test]
    fn durations_and_bytes_are_short() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (60, "1m 0s"), (3661, "1h 1m"), (100_000, "1d 3h")] {
            assert_eq!(duration(seconds), text);
        }
        for (count, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (u64::MAX, "15.9 EiB")]
        {
            assert_eq!(bytes(count), text);
        }
    }
}
