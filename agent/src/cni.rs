//! The CNI plugin of the node: with it a container runtime makes the sandbox of a pod only when the agent covers the pod.
//!
//! ```text
//! kubelet ─> container runtime ─> plugins of the CNI configuration, in turn ─> the pod's containers start
//!                                     the last one, tacit-cni ── asks ──> socket of the agent
//! ```
//! The plugin and its place in the configuration stay on the node when the agent ends, so they hold pods back after a reboot
//! until this boot's agent covers them. The agent puts the plugin back when others write the configuration anew.

mod conflist;
mod folder;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tacit_identity::atomic_file::{self, FileError};
use tacit_sources::reload::folder::Folder;
use tokio::{sync::watch, task::spawn_blocking, time::timeout};

use crate::telemetry::status::CniStatus;
use conflist::PLUGIN;

/// Time after which the folders are looked at without an event: a folder can be made later, and inotify can be missing.
const RESCAN: Duration = Duration::from_secs(10);
/// Permissions of the program.
const PROGRAM_MODE: u32 = 0o755;

/// The configuration of the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// False: the agent removes what it has installed before.
    pub is_enabled: bool,
    /// Folder of the node's CNI configurations.
    pub config_folder: PathBuf,
    /// Folder of the node's CNI plugins.
    pub program_folder: PathBuf,
    /// Namespaces whose pods do not wait for the agent.
    pub exempt_namespaces: Vec<String>,
    /// Time for which the plugin waits for the agent, 1 s to 2 min.
    pub timeout: Duration,
}

/// An error of the plugin's files.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A file or folder of the system.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// A file that is written whole.
    #[error(transparent)]
    Write(#[from] FileError),
    /// The program is not where the agent's is.
    #[error("{} is missing: build it with `cargo build -p tacit-cni`, or use the image of `cargo xtask image`", _0.display())]
    NoProgram(PathBuf),
}

impl CniError {
    fn file<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }
}

/// Keeps the plugin on the node, or removes it if it is not enabled, and reports both.
pub async fn keep(config: CniConfig, socket: PathBuf, status: watch::Sender<CniStatus>) {
    let mut changes = Folder::of(&config.config_folder.join("any"));
    loop {
        let (wanted, socket) = (config.clone(), socket.clone());
        let done = spawn_blocking(move || apply(&wanted, &socket)).await;
        let done = done.unwrap_or_else(|panic| {
            Err(CniError::file("look at", &config.config_folder)(io::Error::other(panic)))
        });
        report(&status, done);
        let _ = timeout(RESCAN, changes.changed()).await;
        changes.watch_again();
    }
}

/// Installs the plugin, or removes it. Returns the configuration that names it.
fn apply(config: &CniConfig, socket: &Path) -> Result<Option<PathBuf>, CniError> {
    if !config.is_enabled {
        remove(&config.config_folder, &config.program_folder)?;
        return Ok(None);
    }
    // The program first: a configuration that names a missing one lets no pod start.
    install(&config.program_folder)?;
    folder::chain(&config.config_folder, &entry(config, socket))
}

fn entry(config: &CniConfig, socket: &Path) -> Value {
    json!({
        "type": PLUGIN,
        "socket": socket,
        "timeoutSeconds": config.timeout.as_secs(),
        "exemptNamespaces": config.exempt_namespaces,
    })
}

/// Copies the program from beside the agent's, unless the same one is there.
fn install(program_folder: &Path) -> Result<(), CniError> {
    let own = std::env::current_exe().map_err(CniError::file("find", Path::new("/proc/self/exe")))?;
    let program = own.with_file_name(PLUGIN);
    let wanted = match fs::read(&program) {
        Ok(wanted) => wanted,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(CniError::NoProgram(program)),
        Err(error) => return Err(CniError::file("read", &program)(error)),
    };
    let installed = program_folder.join(PLUGIN);
    if fs::read(&installed).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    fs::create_dir_all(program_folder).map_err(CniError::file("make", program_folder))?;
    Ok(atomic_file::replace(&installed, PROGRAM_MODE, &wanted)?)
}

/// Removes the plugin from the node: from the configurations, then its program. Returns true if something was there.
///
/// # Errors
/// [`CniError`].
pub fn remove(config_folder: &Path, program_folder: &Path) -> Result<bool, CniError> {
    let changed = folder::unchain(config_folder)?;
    let program = program_folder.join(PLUGIN);
    match fs::remove_file(&program) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(changed > 0),
        Err(error) => Err(CniError::file("remove", &program)(error)),
    }
}

/// Logs a change once.
fn report(status: &watch::Sender<CniStatus>, done: Result<Option<PathBuf>, CniError>) {
    let now = match done {
        Ok(configuration) => {
            CniStatus { configuration: configuration.map(|path| path.display().to_string()), error: None }
        }
        Err(error) => CniStatus { configuration: None, error: Some(error.to_string()) },
    };
    status.send_if_modified(|status| {
        if *status == now {
            return false;
        }
        match (&now.configuration, &now.error) {
            (_, Some(error)) => {
                tracing::error!(
                    error,
                    "the CNI plugin is not installed: pods may start before the agent after a reboot"
                );
            }
            (Some(configuration), None) => tracing::info!(configuration, "the CNI plugin is installed"),
            (None, None) => tracing::info!("no CNI configuration names the plugin"),
        }
        *status = now;
        true
    });
}
