//! Real programs as their users see them: with Tacit they print the same and exit as without.
//!
//! Each line of the table is a program, its options and an event, and what the program then shows. All lines run in a mesh
//! without agents and in one with agents, and the outputs are compared. A difference that is meant stands in the table with
//! its reason. The suite `transparency` is the same for single system calls.
//!
//! | module | content |
//! |---|---|
//! | `table` | [`Line`](table::Line), and the comparison of both runs |
//! | `stage` | a mesh, its addresses, and programs in its pods |
//! | `clients.py` | the clients and servers of Python's lines |
//! | others | the lines of each program |
//!
//! `cargo xtask setup` fetches the programs. A program that is not there fails its lines.

mod curl;
mod haproxy;
mod netcat;
mod nginx;
mod postgres;
mod python;
mod redis;
mod stage;
mod table;
mod wrk;

use anyhow::Result;

#[test]
#[ignore = "needs root"]
fn haproxy_takes_servers_out_and_in_as_without() -> Result<()> {
    table::compare(&haproxy::lines(), stage::web)
}

#[test]
#[ignore = "needs root"]
fn nginx_goes_to_the_next_upstream_as_without() -> Result<()> {
    table::compare(&nginx::lines(), stage::web)
}

#[test]
#[ignore = "needs root"]
fn curl_ends_as_without() -> Result<()> {
    table::compare(&curl::lines(), stage::web)
}

#[test]
#[ignore = "needs root"]
fn load_of_wrk_fails_nowhere() -> Result<()> {
    table::compare(&wrk::lines(), stage::web)
}

#[test]
#[ignore = "needs root"]
fn netcat_ends_as_without() -> Result<()> {
    table::compare(&netcat::lines(), stage::web)
}

#[test]
#[ignore = "needs root"]
fn python_sees_what_it_sees_without() -> Result<()> {
    table::compare(&python::lines(), python::servers)
}

#[test]
#[ignore = "needs root"]
fn redis_serves_and_replicates_as_without() -> Result<()> {
    table::compare(&redis::lines(), redis::servers)
}

#[test]
#[ignore = "needs root"]
fn postgres_is_found_and_queried_as_without() -> Result<()> {
    table::compare(&postgres::lines(), postgres::servers)
}
