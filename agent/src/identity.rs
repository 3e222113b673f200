//! Credentials of the node's workloads. The content of a certificate is in `certificate`, a key with its certificate in
//! `credentials`, the signers in `issuer` (its root on disk in `root`, an authority over the network in `istio`). `manager`
//! keeps the credentials of every workload of the node current.

pub mod certificate;
pub mod credentials;
pub mod issuer;
pub mod istio;
pub mod manager;
pub mod root;
