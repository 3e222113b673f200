//! Lines of curl: exit codes, messages, chosen addresses and reused connections.

use crate::table::Line;

/// Prints what is compared, and no body.
const SHOW: &str =
    "%{http_code} by %{remote_ip}:%{remote_port} from %{local_ip}, connections %{num_connects} %{errormsg}\n";

pub(crate) fn lines() -> Vec<Line> {
    let mut lines = open();
    lines.extend(refused());
    lines.extend(eyeballs());
    lines.extend(options());
    lines
}

fn open() -> Vec<Line> {
    vec![
        Line::command(
            "a pod of another node",
            "exit 0\n200 by 10.77.2.2:80 from 10.77.1.2",
            &["curl", "-so", "/dev/null", "-w", SHOW, "http://{far4}:{web}/"],
        ),
        Line::command(
            "a pod of the same node",
            "exit 0\n200 by 10.77.1.3:80",
            &["curl", "-so", "/dev/null", "-w", SHOW, "http://{near4}:{web}/"],
        ),
        Line::command(
            "IPv6",
            "exit 0\n200 by fd77:2::2:80 from fd77:1::2",
            &["curl", "-so", "/dev/null", "-w", SHOW, "http://[{far6}]:{web}/"],
        ),
        Line::command(
            "its own pod, a closed port",
            "exit 7\n",
            &["curl", "-sS", "http://{client4}:{closed}/"],
        ),
        Line::command(
            "a server with deferred accept",
            "exit 0\npage",
            &["curl", "-sS", "http://{far4}:{deferred}/"],
        ),
        Line::command(
            "a v4-mapped address",
            "exit 0\n200",
            &["curl", "-so", "/dev/null", "-w", SHOW, "http://[::ffff:{far4}]:{web}/"],
        ),
        Line::command(
            "the server asks for the client",
            "10.77.1.2 10.77.2.2 80",
            &["curl", "-sS", "http://{far4}:{web}/who"],
        ),
        Line::command(
            "the server asks for the client, IPv6",
            "fd77:1::2 fd77:2::2 80",
            &["curl", "-sS", "http://[{far6}]:{web}/who"],
        ),
        Line::command(
            "keep-alive",
            "exit 0\n1\n2\n3",
            &[
                "curl",
                "-sS",
                "http://{far4}:{web}/count",
                "http://{far4}:{web}/count",
                "http://{far4}:{web}/count",
            ],
        ),
        Line::command(
            "HTTP/2",
            "exit 0\n2 200",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                "%{http_version} %{http_code}\n",
                "--http2-prior-knowledge",
                "http://{far4}:{two}/",
            ],
        ),
        Line::command(
            "a download of 4 MiB",
            "exit 0\n4194304",
            &["curl", "-so", "/dev/null", "-w", "%{size_download}\n", "http://{far4}:{web}/big"],
        ),
        Line::command(
            "a part of a file",
            "exit 0\n206 1000",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-r",
                "1000000-1000999",
                "-w",
                "%{http_code} %{size_download}\n",
                "http://{far4}:{web}/big",
            ],
        ),
        Line::command(
            "parallel downloads",
            "exit 0\n4194304\n4194304",
            &[
                "sh",
                "-c",
                "curl -sZ -o /dev/null -o /dev/null -w '%{size_download}\n' http://{far4}:{web}/big http://[{far6}]:{web}/big 2>/dev/null",
            ],
        ),
    ]
}

fn refused() -> Vec<Line> {
    vec![
        Line::command("a closed port", "exit 7\n", &["curl", "-sS", "http://{far4}:{closed}/"]),
        Line::command("a closed port, IPv6", "exit 7\n", &["curl", "-sS", "http://[{far6}]:{closed}/"]),
        Line::command(
            "a closed port of a pod of the same node",
            "exit 7\n",
            &["curl", "-sS", "http://{near4}:{closed}/"],
        ),
        Line::command(
            "an address that a router rejects",
            "exit 7\n",
            &["curl", "-sS", "http://{unreachable4}:{web}/"],
        ),
        Line::command(
            "an address that does not answer",
            "exit 28\n",
            &["curl", "-sS", "--connect-timeout", "1", "http://{silent4}:{web}/"],
        ),
        Line::command(
            "an address that does not answer, IPv6",
            "exit 28\n",
            &["curl", "-sS", "--max-time", "1", "http://[{silent6}]:{web}/"],
        ),
        Line::command(
            "an address that does not answer, until the kernel gives up",
            "exit 28\n",
            &["curl", "-sS", "http://{silent4}:{web}/"],
        ),
        Line::command(
            "a closed port, tried again",
            "exit 7\n",
            &[
                "curl",
                "--no-progress-meter",
                "--retry",
                "1",
                "--retry-delay",
                "1",
                "--retry-connrefused",
                "http://{far4}:{closed}/",
            ],
        ),
        Line::command(
            "a port that policy denies",
            "exit 0\npage",
            &["curl", "-sS", "http://{far4}:{denied}/"],
        )
        .but("exit 7\n", "without Tacit there is no policy"),
    ]
}

fn eyeballs() -> Vec<Line> {
    vec![
        Line::command(
            "IPv6 refuses, IPv4 accepts",
            "exit 0\n200 by 10.77.2.2:84",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                SHOW,
                "--resolve",
                "web:{v4}:[{far6}],{far4}",
                "http://web:{v4}/",
            ],
        ),
        Line::command(
            "IPv4 refuses, IPv6 accepts",
            "exit 0\n200 by fd77:2::2:85",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                SHOW,
                "--resolve",
                "web:{v6}:[{far6}],{far4}",
                "http://web:{v6}/",
            ],
        ),
        Line::command(
            "IPv6 does not answer",
            "exit 0\n200 by 10.77.2.2:80",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                SHOW,
                "--resolve",
                "web:{web}:[{silent6}],{far4}",
                "http://web:{web}/",
            ],
        ),
        Line::command(
            "both refuse",
            "exit 7\n",
            &["curl", "-sS", "--resolve", "web:{closed}:[{far6}],{far4}", "http://web:{closed}/"],
        ),
        Line::command(
            "IPv4 does not answer, IPv6 refuses",
            "exit 28\n",
            &[
                "curl",
                "-sS",
                "--connect-timeout",
                "1",
                "--resolve",
                "web:{closed}:[{far6}],{silent4}",
                "http://web:{closed}/",
            ],
        ),
        Line::command(
            "the first of two addresses refuses",
            "exit 0\n200 by 10.77.2.2:84",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                SHOW,
                "--resolve",
                "web:{v4}:{client4},{far4}",
                "http://web:{v4}/",
            ],
        ),
        Line::command(
            "two addresses do not answer",
            "exit 28\n",
            &[
                "curl",
                "-sS",
                "--connect-timeout",
                "1",
                "--resolve",
                "web:{web}:{silent4},{silent6}",
                "http://web:{web}/",
            ],
        ),
        Line::command(
            "the first of two addresses is rejected by a router",
            "exit 0\n200 by 10.77.2.2:80",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                SHOW,
                "--resolve",
                "web:{web}:{unreachable4},{far4}",
                "http://web:{web}/",
            ],
        ),
    ]
}

fn options() -> Vec<Line> {
    vec![
        Line::command(
            "bound to an address",
            "exit 0\n200 by 10.77.2.2:80 from 10.77.1.2",
            &["curl", "-so", "/dev/null", "-w", SHOW, "--interface", "{client4}", "http://{far4}:{web}/"],
        ),
        Line::command(
            "bound to an address, a closed port",
            "exit 7\n",
            &["curl", "-sS", "--interface", "{client4}", "http://{far4}:{closed}/"],
        ),
        Line::command(
            "bound to an IPv6 address",
            "exit 0\n200 by fd77:2::2:80 from fd77:1::2",
            &["curl", "-so", "/dev/null", "-w", SHOW, "--interface", "{client6}", "http://[{far6}]:{web}/"],
        ),
        Line::command(
            "bound to a device",
            "exit 0\n200 by 10.77.2.2:80 from 10.77.1.2",
            &["curl", "-so", "/dev/null", "-w", SHOW, "--interface", "eth0", "http://{far4}:{web}/"],
        ),
        Line::command(
            "bound to a device, a closed port of a pod without policies",
            "exit 7\n",
            &["curl", "-sS", "--interface", "eth0", "http://{near4}:{closed}/"],
        ),
        Line::command(
            "bound to a port",
            "exit 0\n2",
            &[
                "curl",
                "-so",
                "/dev/null",
                "-w",
                "%{local_port}\n",
                "--local-port",
                "{p1}",
                "http://{far4}:{web}/",
            ],
        ),
        Line::command(
            "TCP Fast Open",
            "exit 0\n200 by 10.77.2.2:80",
            &["curl", "-so", "/dev/null", "-w", SHOW, "--tcp-fastopen", "http://{far4}:{web}/"],
        ),
        Line::command(
            "TCP Fast Open, a closed port",
            "exit ",
            &["curl", "-sS", "--tcp-fastopen", "http://{far4}:{closed}/"],
        ),
        Line::command(
            "keep-alive probes each second",
            "exit 0\n200 by 10.77.2.2:80",
            &["curl", "-so", "/dev/null", "-w", SHOW, "--keepalive-time", "1", "http://{far4}:{web}/"],
        ),
        Line::command(
            "TELNET",
            "exit 0\nHTTP/1.1 400",
            &["sh", "-c", "printf 'text\n\n' | curl -sS telnet://{far4}:{web} | head -1"],
        ),
    ]
}
