//! Results of the demo: a table for people, one JSON object for machines.

use xtask_support::progress::{Style, Tone};

use super::traffic::Request;

/// Everything the demo measured.
pub(super) struct Verdict {
    pub(super) marker_without_tacit: usize,
    pub(super) marker_with_tacit: usize,
    pub(super) bytes_without_tacit: u64,
    pub(super) bytes_with_tacit: u64,
    pub(super) tunnel_bytes: u64,
    pub(super) tunnel_is_tls: bool,
    pub(super) clear_bytes: u64,
    pub(super) clear_bytes_without_tacit: u64,
    pub(super) requests: Vec<Request>,
    pub(super) flows: u64,
    pub(super) servers: Vec<&'static str>,
    pub(super) plaintext_under_permissive: bool,
    pub(super) plaintext_under_strict: bool,
}

impl Verdict {
    /// Did it show what it is there to show? Without a control in which the marker is found, nothing is shown.
    pub(super) fn ok(&self) -> bool {
        self.marker_without_tacit > 0
            && self.marker_with_tacit == 0
            && self.tunnel_bytes > 0
            && self.tunnel_is_tls
            && self.clear_bytes == 0
            && self.flows >= self.requests.len() as u64
            && self.plaintext_under_permissive
            && !self.plaintext_under_strict
    }

    /// The table.
    pub(super) fn table(&self, style: Style) -> String {
        let good = |yes: bool, text: String| style.paint(if yes { Tone::Good } else { Tone::Bad }, &text);
        let mut out =
            format!("\n{}\n", style.paint(Tone::Strong, "Requests, each answered correctly with Tacit"));
        for request in &self.requests {
            let place = if request.crosses { "crosses the wire" } else { "stays on its node" };
            out += &format!("  {:<46} {}\n", request.what, style.paint(Tone::Faint, place));
        }
        out += &format!(
            "\n{}\n",
            style.paint(
                Tone::Strong,
                &format!(
                    "{:<46} {:>14} {:>14}",
                    "On the wire between the nodes", "without Tacit", "with Tacit"
                )
            )
        );
        // Padded before it is painted: escapes have no width.
        let rows = [
            (
                "bytes, all packets",
                self.bytes_without_tacit.to_string(),
                format!("{:>14}", self.bytes_with_tacit),
            ),
            (
                "payload as plaintext, bytes",
                self.clear_bytes_without_tacit.to_string(),
                good(self.clear_bytes == 0, format!("{:>14}", self.clear_bytes)),
            ),
            (
                "payload as TLS to port 15008, bytes",
                "0".to_owned(),
                good(self.tunnel_is_tls && self.tunnel_bytes > 0, format!("{:>14}", self.tunnel_bytes)),
            ),
            (
                "times the applications' marker was read",
                self.marker_without_tacit.to_string(),
                good(self.marker_with_tacit == 0, format!("{:>14}", self.marker_with_tacit)),
            ),
        ];
        for (what, without, with) in rows {
            out += &format!("  {what:<44} {without:>14} {with}\n");
        }
        let passes = |yes: bool| if yes { "answered" } else { "refused" };
        out += &format!("\n{}\n", style.paint(Tone::Strong, "Plaintext from a pod outside the mesh"));
        out += &format!(
            "  PERMISSIVE  {}\n",
            good(self.plaintext_under_permissive, passes(self.plaintext_under_permissive).to_owned())
        );
        out += &format!(
            "  STRICT      {}\n",
            good(!self.plaintext_under_strict, passes(self.plaintext_under_strict).to_owned())
        );
        let end = if self.ok() { "All as promised." } else { "NOT as promised: see the red lines." };
        out + &format!("\n{}\n", good(self.ok(), end.to_owned()))
    }

    /// One line of JSON. Names and server names are literals without characters that need escaping.
    pub(super) fn json(&self) -> String {
        let servers: Vec<String> = self.servers.iter().map(|s| format!("\"{s}\"")).collect();
        format!(
            "{{\"ok\":{},\"marker_without_tacit\":{},\"marker_with_tacit\":{},\"tunnel_bytes\":{},\"clear_bytes\":{},\
             \"flows\":{},\"servers\":[{}]}}",
            self.ok(),
            self.marker_without_tacit,
            self.marker_with_tacit,
            self.tunnel_bytes,
            self.clear_bytes,
            self.flows,
            servers.join(",")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Verdict {
        Verdict {
            marker_without_tacit: 3,
            marker_with_tacit: 0,
            bytes_without_tacit: 10,
            bytes_with_tacit: 20,
            tunnel_bytes: 15,
            tunnel_is_tls: true,
            clear_bytes: 0,
            clear_bytes_without_tacit: 10,
            requests: vec![Request { what: "a -> b", crosses: true }],
            flows: 1,
            servers: vec!["nginx"],
            plaintext_under_permissive: true,
            plaintext_under_strict: false,
        }
    }

    #[test]
    fn a_control_that_finds_no_marker_shows_nothing() {
        assert!(good().ok());
        assert!(!Verdict { marker_without_tacit: 0, ..good() }.ok());
    }

    #[test]
    fn any_leak_or_open_door_is_not_ok() {
        assert!(!Verdict { marker_with_tacit: 1, ..good() }.ok());
        assert!(!Verdict { clear_bytes: 1, ..good() }.ok());
        assert!(!Verdict { tunnel_is_tls: false, ..good() }.ok());
        assert!(!Verdict { plaintext_under_strict: true, ..good() }.ok());
        assert!(!Verdict { flows: 0, ..good() }.ok());
    }
}
