//! Credentials of the workloads of a node, and their issuers.
//!
//! | module | content |
//! |---|---|
//! | `certificate` | the identity and the validity of a certificate |
//! | `credentials` | a key with its certificate, and the roots to trust |
//! | `issuer`, `root` | the embedded issuer, and its root on disk |
//! | `template` | the template of a leaf certificate, serial numbers |
//! | `istio` | a client of Istio's CA API: Tacit's authority, istiod, istio-csr |
//! | `spire` | a client of SPIRE: the Delegated Identity API and the Workload API |
//! | `manager` | keeps the credentials of every workload of the node current |
//! | `peer_trust` | the peers that are trusted beside the roots of the credentials |
//! | `revocation` | revocation lists, and the certificates of a peer that they may name |
//! | `atomic_file` | small files that are written whole or not at all |
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod atomic_file;
pub mod certificate;
pub mod credentials;
pub mod issuer;
pub mod istio;
pub mod manager;
pub mod peer_trust;
pub mod revocation;
pub mod root;
pub mod spire;
pub mod template;
