//! A flow as telemetry describes it: its two ends, its protection, its trace id.

use std::{fmt, net::SocketAddr, sync::Arc};

use tacit_core::{directory::Workload, spiffe::SpiffeId};

/// The end of a flow that this agent looks after. Both agents report the same flow, each from its side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The workload here opened the connection.
    Source,
    /// The workload here accepted it.
    Destination,
}

impl Reporter {
    /// Istio's label value.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The direction as seen from the workload here, as ztunnel logs it.
    #[must_use]
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone)]
pub struct Party {
    /// Its address as the applications see it.
    pub address: SocketAddr,
    /// The workload that has this address in the directory; `None` if there is none.
    pub workload: Option<Arc<Workload>>,
    /// The identity proven for this flow (certificate, or the kernel for a pod of this node); `None` when
    /// none was. A plaintext flow is reported without, whatever stands here.
    pub identity: Option<SpiffeId>,
}

/// Both ends of a connection, and which of them is here.
#[derive(Debug, Clone)]
pub struct Ends {
    /// The end that is here.
    pub reporter: Reporter,
    /// The client of the connection.
    pub source: Party,
    /// The server of the connection.
    pub destination: Party,
}

/// The protection of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// Both ends authenticated by TLS.
    MutualTls {
        /// Protocol version, such as `TLSv1.3`.
        version: &'static str,
        /// Cipher suite, such as `TLS13_AES_256_GCM_SHA384`.
        cipher: &'static str,
        /// Key exchange group, such as `X25519MLKEM768`.
        key_exchange: &'static str,
        /// Wire format by its ALPN name, such as `tacit/1.1` or `h2`.
        alpn: &'static str,
    },
    /// Handed over inside this agent: identities hold, nothing touches a wire.
    SameNode,
    /// Plaintext, without authentication.
    Plaintext,
}

impl Security {
    /// A stable name for logs and status.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::MutualTls { .. } => "mutual_tls",
            Self::SameNode => "same_node",
            Self::Plaintext => "plaintext",
        }
    }
}

/// The facts of a flow when it opens.
#[derive(Debug, Clone)]
pub struct FlowSpec {
    /// Its two ends.
    pub ends: Ends,
    /// Its protection.
    pub security: Security,
    /// The trace id both agents log; all zero when the flow crossed no tunnel.
    pub trace: [u8; 16],
}

impl FlowSpec {
    /// The trace id in lower-case hex; `None` when the flow has none.
    #[must_use]
    pub fn trace_text(&self) -> Option<Hex> {
        (self.trace != [0; 16]).then_some(Hex(self.trace))
    }

    /// The ends on this node.
    pub(super) fn here(&self) -> impl Iterator<Item = &Party> {
        let both = self.security == Security::SameNode;
        let Ends { reporter, source, destination } = &self.ends;
        let source = (both || *reporter == Reporter::Source).then_some(source);
        let destination = (both || *reporter == Reporter::Destination).then_some(destination);
        source.into_iter().chain(destination)
    }

    /// Removes the identities of a plaintext flow, because plaintext proves none.
    pub(super) fn without_unproven(mut self) -> Self {
        if self.security == Security::Plaintext {
            self.ends.source.identity = None;
            self.ends.destination.identity = None;
        }
        self
    }
}

/// Sixteen bytes, printed as lower-case hex.
#[derive(Debug, Clone, Copy)]
pub struct Hex([u8; 16]);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

#[cfg(test)]
pub(super) mod tests;
