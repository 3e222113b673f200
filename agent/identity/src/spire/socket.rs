//! The socket of the SPIRE agent.

use std::{
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use tacit_grpc::{Channel, KeepAlive, Settings};
use tokio::net::UnixStream;

use super::{SpireError, api};

/// Connects to the socket at `path`. The caller sets the deadline.
///
/// The process behind the socket supplies keys and roots, so it has to be one of root or of the agent's own user. The kernel reports
/// its user, which no other process can forge.
pub(super) async fn connect(path: &Path) -> Result<Channel, SpireError> {
    let refuse = |problem: String| SpireError::Socket { path: PathBuf::from(path), problem };
    let found = std::fs::metadata(path).map_err(|e| refuse(absent(&e)))?;
    if !found.file_type().is_socket() {
        return Err(refuse("it is not a socket".to_owned()));
    }
    let stream = UnixStream::connect(path).await.map_err(|e| refuse(absent(&e)))?;
    let user = stream.peer_cred().map_err(|e| refuse(format!("the user behind it is unknown: {e}")))?.uid();
    let own = std::fs::metadata("/proc/self").map_err(|e| refuse(format!("/proc: {e}")))?.uid();
    check_user(user, own).map_err(refuse)?;
    let settings = Settings {
        origin: "http://localhost".to_owned(),
        message_max_bytes: api::MESSAGE_MAX_BYTES,
        // The kernel reports the end of the process at the other end at once.
        keep_alive: KeepAlive::Off,
    };
    let call = |source| SpireError::Call { path: PathBuf::from(path), source };
    Channel::open(stream, settings).await.map_err(call)
}

fn absent(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "it does not exist; is the SPIRE agent running on this node, and the folder of its socket mounted?".to_owned()
        }
        io::ErrorKind::ConnectionRefused => "nobody listens; is the SPIRE agent running on this node?".to_owned(),
        _ => format!("cannot connect: {error}"),
    }
}

/// Checks the user of the process behind the socket. `own` is the user of the agent.
fn check_user(user: u32, own: u32) -> Result<(), String> {
    if user == 0 || user == own {
        return Ok(());
    }
    Err(format!("the process behind it runs as user {user}, expected root or the agent's user {own}"))
}

#[cfg(test)]
mod tests {
    use super::check_user;

    #[test]
    fn only_root_and_the_agents_user_may_supply_keys() {
        for (user, own, is_trusted) in
            [(0, 0, true), (0, 7, true), (7, 7, true), (7, 0, false), (8, 7, false)]
        {
            assert_eq!(check_user(user, own).is_ok(), is_trusted, "{user} {own}");
        }
        assert!(check_user(7, 0).expect_err("refused").contains("user 7"));
    }
}
