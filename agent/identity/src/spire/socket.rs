//! The socket of the SPIRE agent.

use std::{
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use tacit_grpc::{Channel, KeepAlive, Settings};
use tokio::net::UnixStream;

use super::{SpireError, api};

/// Write permission of a folder, for group and others.
const WRITABLE_FOR_OTHERS: u32 = 0o022;
/// Only the owner of a file, or of the folder, may replace the file.
const STICKY: u32 = 0o1000;

/// Connects to the socket at `path`. The caller sets the deadline.
///
/// The process behind the socket supplies keys and roots, so it has to be one of root or of the agent's own user. The kernel reports
/// the user that the socket listens as. Root in a container without a user namespace is the same user, and passes. So the folder is
/// what keeps containers from making the socket: none but SPIRE's may have it mounted writable, which is not visible from here. Its
/// mode is.
pub(super) async fn connect(path: &Path) -> Result<Channel, SpireError> {
    let refuse = |problem: String| SpireError::Socket { path: PathBuf::from(path), problem };
    let found = std::fs::metadata(path).map_err(|e| refuse(absent(&e)))?;
    if !found.file_type().is_socket() {
        return Err(refuse("it is not a socket".to_owned()));
    }
    let real = std::fs::canonicalize(path).map_err(|e| refuse(absent(&e)))?;
    // A link could be replaced too.
    for folder in [path, &real].into_iter().filter_map(Path::parent) {
        let mode = std::fs::metadata(folder).map_err(|e| refuse(absent(&e)))?.mode();
        check_folder(folder, mode).map_err(refuse)?;
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

/// Checks that only the owner of the socket's folder can replace the socket. In a sticky folder others cannot replace it either, and one
/// that they make while there is none has their user behind it.
fn check_folder(folder: &Path, mode: u32) -> Result<(), String> {
    if mode & WRITABLE_FOR_OTHERS == 0 || mode & STICKY != 0 {
        return Ok(());
    }
    let (folder, mode) = (folder.display(), mode & 0o7777);
    Err(format!(
        "its folder {folder} is writable for group or others (mode {mode:04o}): run `chmod go-w` on it"
    ))
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
    use std::{
        fs::{Permissions, set_permissions},
        os::unix::{fs::PermissionsExt as _, net::UnixListener},
    };

    use tacit_testing::Scratch;

    use super::*;

    #[tokio::test]
    async fn a_folder_in_which_others_can_replace_the_socket_is_refused() {
        let scratch = Scratch::new();
        let folder = scratch.path().join("spire");
        std::fs::create_dir(&folder).expect("made");
        let (socket, link) = (folder.join("admin.sock"), scratch.path().join("link"));
        let _listener = UnixListener::bind(&socket).expect("bound");
        std::os::unix::fs::symlink(&socket, &link).expect("linked");
        for (mode, is_refused) in
            [(0o755, false), (0o750, false), (0o1777, false), (0o775, true), (0o757, true), (0o2770, true)]
        {
            set_permissions(&folder, Permissions::from_mode(mode)).expect("its owner");
            for path in [&socket, &link] {
                // The listener speaks no HTTP/2, and the preface is sent without an answer.
                let outcome = connect(path).await.map(drop).map_err(|error| error.to_string());
                let error = outcome.err().unwrap_or_default();
                let expected = format!("its folder {} is writable", folder.display());
                assert_eq!(error.contains(&expected), is_refused, "{mode:o}: {error}");
                assert_eq!(error.contains(&format!("(mode {mode:04o})")), is_refused, "{error}");
            }
        }
    }

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
