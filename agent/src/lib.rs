//! Tacit's node agent. This page is the map.
//!
//! ```text
//!  app in pod A ── connect() ──(eBPF)──> outbound ── route ──┬─ tunnel ════ mTLS ════ inbound ── policy ──> app in pod B
//!                                            │               ├─ same node ── policy ──> app in a pod here
//!                                            │               ├─ clear (allowed by mode)
//!                                            │               └─ refuse (reset)
//!  directory and policy files, Kubernetes API ── tacit-sources ──> snapshots read by every decision
//!  issuer ── tacit-identity ──> credentials        cgroups ── enrol ──> pods, listeners, kernel maps
//! ```
//!
//! | module | job |
//! |---|---|
//! | `app` | puts everything together, runs it, takes it down |
//! | `mesh` | the ranges of the mesh, in the kernel first |
//! | `config` | the configuration; every mistake with line and field |
//! | `authority` | the certificate authority: who may have which certificate, root rotation |
//! | `enrol` | a pod appears or goes |
//! | `outbound` | captured connections |
//! | `inbound` | tunnel sessions, and plaintext that needs a verdict |
//! | `datapath` | what those two share |
//! | `admission` | asks policy about a flow, when it opens and when policy changes |
//! | `workers` | the threads that carry flows |
//! | `drain` | ending in good order |
//! | `fuzz` | what the fuzz targets call, built for them and for tests alone |
//! | `telemetry` | metrics, access log, status, admin doors |
//!
//! The pure decisions are in `tacit-core`; eBPF programs, maps, namespaces and sockets in
//! `tacit-kernel`; certificates in `tacit-identity`; TLS sessions and the relay in `tacit-tunnel`; watched
//! files and the Kubernetes API in `tacit-sources`. `cargo xtask tidy` checks the rest: `outbound` and `inbound` never import each
//! other, and only `main` imports `app`.
#![deny(missing_docs)]

pub mod admission;
pub mod app;
pub mod authority;
pub mod config;
pub mod datapath;
pub mod drain;
pub mod enrol;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod inbound;
pub mod mesh;
pub mod outbound;
pub mod telemetry;
pub mod workers;
