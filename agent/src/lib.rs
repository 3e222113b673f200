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
//! | `app` | starts everything, runs it, takes it down |
//! | `cni` | the CNI plugin of the node, with which pods wait for the agent |
//! | `config` | the configuration; every mistake with line and field |
//! | `control_state` | the snapshots that flows and enrolment read |
//! | `enrol` | enrols a pod that appears, and removes one that goes |
//! | `mesh` | the ranges of the mesh, in the kernel first |
//! | `proxy` | captured connections, tunnel sessions, and plaintext that needs a verdict |
//! | `recheck` | decides again on live flows, on a thread of its own |
//! | `telemetry` | metrics, access log, status, admin servers |
//! | `authority` | the certificate authority as a command |
//!
//! The crates below:
//!
//! ```text
//!                      tacit
//!          ┌─────────┬───┴──────┬───────────┐
//!      authority     │       tunnel         │
//!       │     └──> sources    │  └──┐       │
//!       └──────> identity <───┘    kernel <─┘
//!                    └───> core <───┘
//! ```
//!
//! | crate | content |
//! |---|---|
//! | `tacit-core` | pure decisions: identities, directory, policy, routes, wire format, YAML |
//! | `tacit-kernel` | eBPF programs and maps, cgroups, namespaces, sockets; the only `unsafe` |
//! | `tacit-grpc` | gRPC on any byte stream; `identity` and `authority` use it |
//! | `tacit-identity` | credentials of workloads and their issuers |
//! | `tacit-tunnel` | TLS sessions, the record layer, the relay of a flow |
//! | `tacit-sources` | watched files and the Kubernetes API, as snapshots |
//! | `tacit-authority` | the certificate authority |
//! | `tacit-testing` | helpers of unit tests |
//!
//! cargo keeps these crates apart. `cargo xtask tidy` checks three rules that cargo cannot: `tacit-core` depends on nothing
//! that acts, `proxy::outbound` and `proxy::inbound` never import each other, and only `main` imports `app`. The proxy reads
//! control snapshots and never awaits a control task, except for the bounded discovery of an unknown address.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod app;
pub mod authority;
pub mod cni;
pub mod config;
pub mod control_state;
pub mod enrol;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod mesh;
pub mod proxy;
pub mod recheck;
pub mod telemetry;
