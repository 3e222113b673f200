//! The question to the agent of the node: HTTP over a unix socket that only root can open.

use std::{
    io::{self, Read as _, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    pod::Pod,
    request::{Failure, Request},
};

/// Pause before the next request: there is no event for a socket that begins to listen.
const PAUSE: Duration = Duration::from_millis(50);
/// Most bytes of an answer.
const ANSWER_MAX_BYTES: u64 = 64 << 10;

/// Waits until the agent covers `pod`.
///
/// # Errors
/// [`Failure`] with the last reason, after the time of the configuration.
pub(crate) fn until_covered(request: &Request, pod: &Pod) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        let left = request.timeout.saturating_sub(begun.elapsed()).max(PAUSE);
        let reason = match ask(request, pod, left) {
            Ok(Answer::Covered) => return Ok(()),
            Ok(Answer::NotYet(reason)) => reason,
            Err(error) => format!(
                "no agent answers at {}: {error}. Look at the agent's pod on this node, or remove Tacit from it with `tacit uninstall`",
                request.socket.display()
            ),
        };
        if begun.elapsed() + PAUSE > request.timeout {
            let Pod { namespace, name, .. } = pod;
            return Err(Failure::try_again(format!(
                "pod {namespace}/{name} has to wait for the Tacit agent of its node: {reason}"
            )));
        }
        thread::sleep(PAUSE);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Covered,
    NotYet(String),
}

/// Asks once, for at most `limit`.
fn ask(request: &Request, pod: &Pod, limit: Duration) -> io::Result<Answer> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A connect() that blocks would wait without a limit for an agent that accepts nothing.
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(&request.socket)?)?;
    socket.set_nonblocking(false)?;
    let mut stream = UnixStream::from(OwnedFd::from(socket));
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let Pod { namespace, name, uid } = pod;
    let uid = uid.as_ref().map(|uid| format!("&uid={uid}")).unwrap_or_default();
    write!(
        stream,
        "GET /sandbox?namespace={namespace}&name={name}{uid} HTTP/1.1\r\nHost: tacit\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.take(ANSWER_MAX_BYTES).read_to_string(&mut text)?;
    answer(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP"))
}

fn answer(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    match head.strip_prefix("HTTP/1.1 ")?.get(..3)? {
        "200" => Some(Answer::Covered),
        _ => Some(Answer::NotYet(body.trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_200_lets_a_pod_pass() {
        let text = |status: &str| format!("HTTP/1.1 {status}\r\ncontent-length: 4\r\n\r\nwhy\n");
        assert_eq!(answer(&text("200 OK")), Some(Answer::Covered));
        for status in ["503 Service Unavailable", "404 Not Found", "400 Bad Request", "204 No Content", "20"]
        {
            assert_ne!(answer(&text(status)), Some(Answer::Covered), "{status}");
        }
        for text in ["", "200", "HTTP/1.1 200 OK", "HTTP/1.1 200 OK\r\n", "HTTP/2 200\r\n\r\n"] {
            assert_eq!(answer(text), None, "{text:?}");
        }
        assert_eq!(answer(&text("503 Service Unavailable")), Some(Answer::NotYet("why".to_owned())));
    }
}
