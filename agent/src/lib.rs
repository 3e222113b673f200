//! Tacit's node agent. This page is the map.
//!
//! ```text
//!  app in pod A ── connect() ──(eBPF)──> outbound ── route ──┬─ tunnel ════ mTLS ════ inbound ── policy ──> app in pod B
//!                                            │               ├─ same node ── policy ──> app in a pod here
//!                                            │               ├─ clear (allowed by mode)
//!                                            │               └─ refuse (reset)
//!  directory and policy files ── reload ───────────────┬──> snapshots read by every decision
//!  Kubernetes API ── directory::kubernetes, policy::kubernetes ┘
//!  issuer ── identity::manager ──> credentials        cgroups ── enrol ──> pods, listeners, kernel maps
//! ```
//!
//! | module | job |
//! |---|---|
//! | `app` | puts everything together, runs it, takes it down |
//! | `config`, `yaml` | the configuration; every mistake with line and field |
//! | `directory` | which workload or service has an address; which endpoint a client gets |
//! | `mesh` | the ranges of the mesh, in the kernel first |
//! | `balance` | how loaded endpoints are, and who stays with which |
//! | `policy` | modes, authorization, and the verdict on an inbound flow |
//! | `causes` | an error with what caused it, in one line |
//! | `files` | small files, whole or not at all |
//! | `reload` | watched files: the last good version stays |
//! | `kubernetes` | the Kubernetes API, followed: what is known stays |
//! | `identity` | SPIFFE ids, credentials, renewal, issuers: embedded, or Istio's CA API |
//! | `authority` | the certificate authority: who may have which certificate, root rotation |
//! | `enrol` | a pod appears or goes |
//! | `kernel` | eBPF programs and maps, cgroups, namespaces, sockets in pods |
//! | `outbound`, `route` | captured connections and where they go |
//! | `inbound` | tunnel sessions, and plaintext that needs a verdict |
//! | `datapath` | what those two share |
//! | `admission` | asks `policy` about a flow, when it opens and when policy changes |
//! | `tunnel` | TLS, frames, sessions, the pool |
//! | `relay` | moves the bytes of a flow |
//! | `workers` | the threads that carry flows |
//! | `drain` | ending in good order |
//! | `fuzz` | what the fuzz targets call, built for them and for tests alone |
//! | `telemetry` | metrics, access log, status, admin doors |
//!
//! Rules of dependency, checked by `cargo xtask tidy`: only `kernel` uses aya, libc and `unsafe`; only `tunnel` (tls,
//! verify, session), `identity` and `authority` use rustls; only `kubernetes`, the sources of that name, `identity` and `authority` use
//! kube; `policy`, `directory` (but not their drivers), `route`, wire formats, pool and renewal are pure (no tokio, no clock, no logging),
//! as are the authority's decisions (`request`, `rotation`, `bucket`); `outbound` and `inbound` never import each other; the data path reads control
//! snapshots and never awaits a control task, except `outbound` for the bounded discovery of an unknown address;
//! nobody imports `app` but `main`.
#![deny(missing_docs)]

pub mod admission;
pub mod app;
pub mod authority;
pub mod balance;
mod causes;
pub mod config;
pub mod datapath;
pub mod directory;
pub mod drain;
pub mod enrol;
pub mod files;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod identity;
pub mod inbound;
pub mod kernel;
pub mod kubernetes;
pub mod mesh;
pub mod outbound;
pub mod policy;
pub mod relay;
pub mod reload;
pub mod route;
pub mod telemetry;
pub mod tunnel;
pub mod workers;
pub mod yaml;
