//! One line for each closed flow, on the target `access`, with the fields ztunnel's access log has and the
//! TLS parameters beside them. `bytes_sent` and `bytes_recv` are as the workload on this agent's side sees
//! them.
//!
//! Silence it with `TACIT_LOG=info,access=off`.

use std::time::Duration;

use tracing::{
    Level,
    field::{DisplayValue, display},
};

use super::flows::{Ends, FlowSpec, Party, Reporter, Security};

/// A flow at its end.
#[derive(Debug)]
pub(super) struct Closed<'a> {
    pub(super) spec: &'a FlowSpec,
    /// From source to destination.
    pub(super) sent_bytes: u64,
    /// From destination to source.
    pub(super) received_bytes: u64,
    pub(super) duration: Duration,
    /// A stable label that says how it ended.
    pub(super) end: &'static str,
}

/// Writes the line.
pub(super) fn closed(flow: &Closed<'_>) {
    let spec = flow.spec;
    let Ends { reporter, source: src, destination: dst } = &spec.ends;
    let (bytes_sent, bytes_recv) = match reporter {
        Reporter::Source => (flow.sent_bytes, flow.received_bytes),
        Reporter::Destination => (flow.received_bytes, flow.sent_bytes),
    };
    let tls = tls(&spec.security);
    tracing::event!(
        target: "access",
        parent: None,
        Level::INFO,
        src.addr = %src.address,
        src.workload = workload(src),
        src.namespace = namespace(src),
        src.identity = identity(src),
        dst.addr = %dst.address,
        dst.workload = workload(dst),
        dst.namespace = namespace(dst),
        dst.identity = identity(dst),
        direction = reporter.direction(),
        security = spec.security.label(),
        tls.version = tls.map(|[version, ..]| version),
        tls.cipher = tls.map(|[_, cipher, ..]| cipher),
        tls.key_exchange = tls.map(|[_, _, key_exchange, _]| key_exchange),
        tls.alpn = tls.map(|[.., alpn]| alpn),
        trace = spec.trace_text().map(display),
        bytes_sent,
        bytes_recv,
        duration_ms = u64::try_from(flow.duration.as_millis()).unwrap_or(u64::MAX),
        result = flow.end,
        "connection complete"
    );
}

/// Version, cipher suite, key exchange and wire format.
fn tls(security: &Security) -> Option<[&'static str; 4]> {
    match *security {
        Security::MutualTls { version, cipher, key_exchange, alpn } => {
            Some([version, cipher, key_exchange, alpn])
        }
        Security::SameNode | Security::Plaintext => None,
    }
}

/// The workload's name, as a log field that is absent when nobody is known.
pub(super) fn workload(party: &Party) -> Option<&str> {
    party.workload.as_ref().map(|workload| &*workload.name)
}

/// The workload's namespace, as a log field.
pub(super) fn namespace(party: &Party) -> Option<&str> {
    party.workload.as_ref().map(|workload| &*workload.namespace)
}

/// The proven identity, as a log field.
pub(super) fn identity(party: &Party) -> Option<DisplayValue<&tacit_core::spiffe::SpiffeId>> {
    party.identity.as_ref().map(display)
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc, sync::Mutex};

    use serde_json::json;

    use super::*;
    use crate::telemetry::flows::tests::{ends, mutual_tls, spec};

    #[test]
    fn the_line_says_who_talked_to_whom_and_how() {
        let line = logged(&spec(mutual_tls()));
        for (field, value) in [
            ("src.addr", json!("10.77.1.2:40000")),
            ("src.workload", json!("web")),
            ("src.namespace", json!("shop")),
            ("src.identity", json!("spiffe://cluster.local/ns/shop/sa/web")),
            ("dst.addr", json!("10.77.2.3:80")),
            ("dst.identity", json!("spiffe://cluster.local/ns/shop/sa/api")),
            ("direction", json!("outbound")),
            ("tls.version", json!("TLSv1.3")),
            ("tls.cipher", json!("TLS13_AES_256_GCM_SHA384")),
            ("tls.key_exchange", json!("X25519MLKEM768")),
            ("tls.alpn", json!("tacit/1.1")),
            ("trace", json!("ab".repeat(16))),
            ("bytes_sent", json!(10)),
            ("bytes_recv", json!(20)),
            ("duration_ms", json!(12)),
            ("result", json!("clean")),
        ] {
            assert_eq!(line[field], value, "{field}");
        }
    }

    #[test]
    fn the_far_side_sends_what_the_near_side_receives() {
        let line = logged(&FlowSpec { ends: ends(Reporter::Destination), ..spec(mutual_tls()) });
        assert_eq!((&line["bytes_sent"], &line["bytes_recv"]), (&json!(20), &json!(10)));
        assert_eq!(line["direction"], "inbound");
    }

    #[test]
    fn a_flow_in_clear_has_no_tls_fields() {
        let line = logged(&FlowSpec { trace: [0; 16], ..spec(Security::Plaintext) });
        assert_eq!(line["security"], "plaintext");
        assert!(line.get("tls.version").is_none() && line.get("trace").is_none(), "{line}");
    }

    fn logged(spec: &FlowSpec) -> serde_json::Value {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber =
            tracing_subscriber::fmt().json().flatten_event(true).with_writer(move || writer.clone()).finish();
        let flow = Closed {
            spec,
            sent_bytes: 10,
            received_bytes: 20,
            duration: Duration::from_millis(12),
            end: "clean",
        };
        tracing::subscriber::with_default(subscriber, || closed(&flow));
        let bytes = lines.0.lock().expect("no writer panicked");
        serde_json::from_slice(&bytes).expect("one JSON line")
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no writer panicked").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
