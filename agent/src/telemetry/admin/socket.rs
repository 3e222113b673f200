//! The operator's socket: made by the agent so that only its user can open it, and the client that asks it.

use std::{
    fs::{DirBuilder, File, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::{UnixListener, UnixStream},
    time,
};

use crate::telemetry::status::Status;

/// Connections that the kernel queues while all places are taken.
const BACKLOG: i32 = 16;
/// The same for the CNI plugin: as many sandboxes as a node starts at once.
const SANDBOXES_BACKLOG: i32 = 512;
/// Longest wait for an answer, from connecting to the last byte.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// Largest answer read, in bytes: a thousand flows and some thousand pods take a tenth of it.
const STATUS_MAX_BYTES: usize = 16 << 20;

/// A failure to make the operator's socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Its directory cannot be made or looked at.
    #[error("cannot make the directory {} of the operator's socket", .directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Somebody else could replace the socket there.
    #[error(
        "the directory {} of the operator's socket can be written by others (owner {owner}, mode {mode:o}); give it to the agent's user and take away the write permission of group and others",
        .directory.display()
    )]
    Exposed {
        /// The directory.
        directory: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// Something that is no socket has the name.
    #[error("{} is not a socket; remove it or configure another path", .path.display())]
    Occupied {
        /// The socket's path.
        path: PathBuf,
    },
    /// An agent answers there.
    #[error("an agent is already running: {} is answered; stop it first", .path.display())]
    Running {
        /// The socket's path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {}", .path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Makes the operator's socket with mode 0600, in a directory that is made with mode 0700 when there is none.
/// A socket that a dead agent left behind is replaced. Must be called inside a runtime.
///
/// # Errors
/// [`BindError`], also when another agent answers on that path.
pub fn bind_operator(path: &Path) -> Result<UnixListener, BindError> {
    let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    make_directory(directory)?;
    let listen = |source| BindError::Listen { path: path.to_owned(), source };
    let socket = private_socket().map_err(listen)?;
    let address = SockAddr::unix(path).map_err(listen)?;
    remove_stale(path, &address)?;
    socket.bind(&address).and_then(|()| socket.listen(BACKLOG)).map_err(listen)?;
    UnixListener::from_std(OwnedFd::from(socket).into()).map_err(listen)
}

/// Makes a socket with mode 0600 in place of whatever has the name, also of one that another agent still listens on. Must be called
/// inside a runtime.
///
/// # Errors
/// The system's.
pub fn bind_replacing(path: &Path) -> io::Result<UnixListener> {
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = private_socket()?;
    socket.bind(&SockAddr::unix(&temporary)?)?;
    socket.listen(SANDBOXES_BACKLOG)?;
    std::fs::rename(&temporary, path)?;
    UnixListener::from_std(OwnedFd::from(socket).into())
}

/// Makes the socket's directory. An existing directory keeps its owner and mode, because it may hold more than the socket.
/// Returns an error if others may write to it.
fn make_directory(directory: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Directory { directory: directory.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let metadata = directory.metadata().map_err(failed)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let ours = owner == 0 || owner == nix::unistd::geteuid().as_raw();
    if ours && mode & 0o022 == 0 {
        Ok(())
    } else {
        Err(BindError::Exposed { directory: directory.to_owned(), owner, mode })
    }
}

/// A socket whose file will have mode 0600 from its first moment: Linux takes the mode of the file from the
/// socket (`unix_bind_bsd` in net/unix/af_unix.c), so nothing depends on the process's umask.
fn private_socket() -> io::Result<Socket> {
    let file = File::from(OwnedFd::from(Socket::new(Domain::UNIX, Type::STREAM, None)?));
    file.set_permissions(Permissions::from_mode(0o600))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Removes the socket of an agent that is gone: one nobody accepts connections on.
fn remove_stale(path: &Path, address: &SockAddr) -> Result<(), BindError> {
    let failed = |source| BindError::Listen { path: path.to_owned(), source };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::Occupied { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    let probe = private_socket().map_err(failed)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // A full queue (EAGAIN) is an agent too.
        Ok(()) => Err(BindError::Running { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(BindError::Running { path: path.to_owned() })
        }
        Err(error) => Err(failed(error)),
    }
}

/// A failure to fetch the agent's status.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Nobody answers there.
    #[error("no agent is running here: nobody answers on {}; start it, or name its socket", .socket.display())]
    NotRunning {
        /// The socket's path.
        socket: PathBuf,
    },
    /// Only the agent's user may ask.
    #[error("no permission to open {}; run the command as root", .socket.display())]
    Permission {
        /// The socket's path.
        socket: PathBuf,
    },
    /// The system refused.
    #[error("cannot connect to {}", .socket.display())]
    Connect {
        /// The socket's path.
        socket: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The agent is there but does not answer.
    #[error("the agent did not answer within {FETCH_MAX:?}; its log may say why")]
    Timeout,
    /// The conversation broke off.
    #[error("the agent's answer broke off")]
    Broken(#[source] hyper::Error),
    /// It refused.
    #[error("the agent answered {0} to a request it should know; it may be of another version")]
    Refused(StatusCode),
    /// The agent has no answer. The text gives the agent's reason.
    #[error("{0}")]
    Question(String),
    /// Too long, or broken off.
    #[error("the agent's answer could not be read to its end")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Not a status.
    #[error("the agent's answer is not understood; it may be of another version")]
    Format(#[source] serde_json::Error),
}

/// Asks the agent behind `socket` for its status. Takes at most ten seconds.
///
/// # Errors
/// [`FetchError`]; its text says what the operator can do.
pub async fn fetch_status(socket: &Path) -> Result<Status, FetchError> {
    fetch_json(socket, Uri::from_static("/status")).await
}

/// The question of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// True if the agent answers.
    Live,
    /// True if the agent takes flows, or would as soon as another agent ends.
    Ready,
}

/// Asks the agent behind `socket`; an error when it is not so, or as [`fetch_status`].
///
/// # Errors
/// [`FetchError`]; its text says why.
pub async fn fetch_health(socket: &Path, health: Health) -> Result<(), FetchError> {
    let uri = Uri::from_static(match health {
        Health::Live => "/healthz/live",
        Health::Ready => "/healthz/ready",
    });
    time::timeout(FETCH_MAX, fetch(socket, uri)).await.map_err(|_| FetchError::Timeout)?.map(drop)
}

/// Asks the agent behind `socket` for the JSON at `uri`.
pub(super) async fn fetch_json<T: DeserializeOwned>(socket: &Path, uri: Uri) -> Result<T, FetchError> {
    let body = time::timeout(FETCH_MAX, fetch(socket, uri)).await.map_err(|_| FetchError::Timeout)??;
    serde_json::from_slice(&body).map_err(FetchError::Format)
}

async fn fetch(socket: &Path, uri: Uri) -> Result<Bytes, FetchError> {
    let stream = UnixStream::connect(socket).await.map_err(|error| connect_error(socket, error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(FetchError::Broken)?;
    let exchange = async move {
        // HTTP/1.1 wants a Host header; a Unix socket has no name to put there.
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = uri;
        request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("agent"));
        let response = sender.send_request(request).await.map_err(FetchError::Broken)?;
        let status = response.status();
        // The last two with why.
        if ![StatusCode::OK, StatusCode::BAD_REQUEST, StatusCode::SERVICE_UNAVAILABLE].contains(&status) {
            return Err(FetchError::Refused(status));
        }
        let body = Limited::new(response.into_body(), STATUS_MAX_BYTES);
        let body = body.collect().await.map_err(FetchError::Body)?.to_bytes();
        if status != StatusCode::OK {
            return Err(FetchError::Question(String::from_utf8_lossy(&body).trim_end().to_owned()));
        }
        Ok(body)
    };
    // A connection that breaks shows in the exchange; its own result says nothing more.
    let (body, _) = tokio::join!(exchange, connection);
    body
}

fn connect_error(socket: &Path, source: io::Error) -> FetchError {
    let socket = socket.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => FetchError::NotRunning { socket },
        io::ErrorKind::PermissionDenied => FetchError::Permission { socket },
        _ => FetchError::Connect { socket, source },
    }
}
