//! Lines of nginx as a proxy, in pod `client`: the next upstream, and errors where there is none.

use anyhow::Result;

use crate::{haproxy::tally, stage::Scene, table::Line};

pub(crate) fn lines() -> Vec<Line> {
    let mut lines = next_upstream();
    lines.extend(alone());
    lines
}

fn next_upstream() -> Vec<Line> {
    vec![
        Line::scene("nginx, two upstreams", "one closed port, GET", "40 x 200", |scene| {
            requests(scene, "server {far4}:{web}; server {far4}:{closed};", "", GET)
        }),
        Line::scene("nginx, two upstreams", "one closed port, POST", "40 x 200", |scene| {
            requests(scene, "server {far4}:{web}; server {far4}:{closed};", "", POST)
        }),
        Line::scene("nginx, max_fails=0", "one closed port, POST", "40 x 200", |scene| {
            requests(scene, "server {far4}:{web} max_fails=0; server {far4}:{closed} max_fails=0;", "", POST)
        }),
        Line::scene("nginx, max_fails=0", "one closed port of IPv6, GET", "40 x 200", |scene| {
            requests(
                scene,
                "server [{far6}]:{web} max_fails=0; server [{far6}]:{closed} max_fails=0;",
                "",
                GET,
            )
        }),
        Line::scene(
            "nginx, max_fails=0",
            "a closed port of a pod of the same node, POST",
            "40 x 200",
            |scene| {
                requests(
                    scene,
                    "server {near4}:{web} max_fails=0; server {near4}:{closed} max_fails=0;",
                    "",
                    POST,
                )
            },
        ),
        Line::scene("nginx, backup", "the first upstream is closed", "40 x 200", |scene| {
            requests(scene, "server {far4}:{closed}; server {near4}:{web} backup;", "", GET)
        }),
        Line::scene("nginx, proxy_connect_timeout 2s", "one address does not answer", "40 x 200", |scene| {
            requests(scene, "server {silent4}:{web}; server {far4}:{web};", "proxy_connect_timeout 2s;", GET)
        }),
        Line::scene(
            "nginx, keepalive 1",
            "requests on one connection to the upstream",
            "exit 0\n5",
            |scene| {
                let location = "proxy_http_version 1.1; proxy_set_header Connection '';";
                let _proxy = start(scene, "server {far4}:{web}; keepalive 1;", location)?;
                let url = "http://127.0.0.1:{p1}/count";
                let _first = scene.shown("client", &["curl", "-s", url, url, url, url])?;
                scene.shown("client", &["curl", "-s", url])
            },
        ),
    ]
}

fn alone() -> Vec<Line> {
    vec![
        Line::scene("nginx, one upstream", "a closed port", "4 x 502", |scene| {
            requests(scene, "server {far4}:{closed};", "", &["http://127.0.0.1:{p1}/[1-4]"])
        }),
        Line::scene("nginx, one upstream", "an address that a router rejects", "1 x 502", |scene| {
            requests(scene, "server {unreachable4}:{web};", "", &["http://127.0.0.1:{p1}/"])
        }),
        Line::scene(
            "nginx, proxy_connect_timeout 1s",
            "an address that does not answer",
            "1 x 504",
            |scene| {
                let location = "proxy_connect_timeout 1s;";
                requests(scene, "server {silent4}:{web};", location, &["http://127.0.0.1:{p1}/"])
            },
        ),
        Line::scene(
            "nginx, one upstream",
            "the upstream asks for the client",
            "10.77.1.2 10.77.2.2 80",
            |scene| {
                let _proxy = start(scene, "server {far4}:{web};", "")?;
                scene.shown("client", &["curl", "-sS", "http://127.0.0.1:{p1}/who"])
            },
        ),
        Line::scene("nginx, one upstream", "a body of 8 MiB", "1 x 200", |scene| {
            let body = scene.folder().join("body");
            std::fs::write(&body, vec![b'y'; 8 << 20])?;
            let body = format!("@{}", body.display());
            let url = ["--data-binary", &body, "http://127.0.0.1:{p1}/"];
            requests(scene, "server {far4}:{web};", "proxy_request_buffering off;", &url)
        }),
    ]
}

const GET: &[&str] = &["http://127.0.0.1:{p1}/[1-40]"];
const POST: &[&str] = &["-d", "text", "http://127.0.0.1:{p1}/[1-40]"];

/// Makes requests through nginx and returns how many got which code.
fn requests(scene: &Scene<'_>, upstream: &str, location: &str, request: &[&str]) -> Result<String> {
    let _proxy = start(scene, upstream, location)?;
    tally(scene, &[&["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}\n"], request].concat())
}

fn start(scene: &Scene<'_>, upstream: &str, location: &str) -> Result<tacit_topology::Process> {
    let http = format!(
        "upstream servers {{ {upstream} }}\n\
         server {{ listen 127.0.0.1:{{p1}}; location / {{ proxy_pass http://servers; {location} }} }}"
    );
    scene.nginx("client", &http, scene.port("p1")?)
}
