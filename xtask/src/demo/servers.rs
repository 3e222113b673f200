//! nginx, Apache and MariaDB, unmodified from their packages, each in a pod. None of them knows of TLS here.
//!
//! They get what any package user writes: a configuration file that names a port and a folder. Nothing is installed
//! as a service; each is a child of this process and ends with it.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use tacit_topology::{Pod, Process, run, until};

/// Port of HTTP.
pub(super) const HTTP: u16 = 80;
/// Port of MariaDB.
pub(super) const MARIADB: u16 = 3306;
/// The database user of the demo, who has nothing but the database `shop`.
pub(super) const USER: &str = "clerk";
/// Its password: the database is reachable from the demo's own namespaces only.
pub(super) const PASSWORD: &str = "till";

/// A running server.
pub(super) struct Server {
    /// Its description, for the reader.
    pub(super) name: &'static str,
    process: Process,
    log: PathBuf,
}

impl Server {
    /// nginx with one page that holds `page`.
    pub(super) fn nginx(program: &Path, pod: &Pod, folder: &Path, page: &str) -> Result<Self> {
        let folder = prepare(folder, page)?;
        let text = format!(
            "user root;\ndaemon off;\npid {0}/nginx.pid;\nerror_log stderr;\nevents {{}}\n\
             http {{ access_log off; client_body_temp_path {0}/body; proxy_temp_path {0}/proxy;\n\
             fastcgi_temp_path {0}/fastcgi; uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;\n\
             server {{ listen {HTTP}; listen [::]:{HTTP}; root {0}/site; }} }}\n",
            folder.display()
        );
        let file = write(&folder, "nginx.conf", &text)?;
        let mut command = pod.command(program);
        command.arg("-p").arg(&folder).arg("-c").arg(file).args(["-e", "stderr"]);
        Self::start("nginx", &mut command, pod, HTTP, &folder)
    }

    /// Apache with one page that holds `page`.
    pub(super) fn apache(pod: &Pod, folder: &Path, page: &str) -> Result<Self> {
        let folder = prepare(folder, page)?;
        let text = format!(
            "ServerRoot {0}\nServerName {1}\nListen {HTTP}\nPidFile {0}/apache.pid\nErrorLog /dev/stderr\n\
             LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so\n\
             LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so\n\
             LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so\n\
             Mutex file:{0}\nDocumentRoot {0}/site\nDirectoryIndex index.html\n",
            folder.display(),
            pod.name()
        );
        let file = write(&folder, "apache.conf", &text)?;
        let mut command = pod.command("apache2");
        command.arg("-f").arg(file).arg("-DFOREGROUND");
        Self::start("Apache", &mut command, pod, HTTP, &folder)
    }

    /// MariaDB with an empty database `shop`. It speaks first on every connection.
    pub(super) fn mariadb(pod: &Pod, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let data = folder.join("data");
        run(Command::new("mariadb-install-db")
            .args([
                "--no-defaults",
                "--user=root",
                "--skip-test-db",
                "--auth-root-authentication-method=normal",
            ])
            .arg(format!("--datadir={}", data.display())))
        .context("make an empty database")?;
        let grants = format!(
            "CREATE DATABASE IF NOT EXISTS shop;\nCREATE USER '{USER}'@'%' IDENTIFIED BY '{PASSWORD}';\n\
             GRANT ALL ON shop.* TO '{USER}'@'%';\n"
        );
        let grants = write(folder, "grants.sql", &grants)?;
        let mut command = pod.command("mariadbd");
        command
            .args(["--no-defaults", "--user=root", "--bind-address=*", "--skip-name-resolve"])
            .arg(format!("--datadir={}", data.display()))
            .arg(format!("--socket={}", folder.join("mariadb.sock").display()))
            .arg(format!("--init-file={}", grants.display()))
            .arg(format!("--port={MARIADB}"));
        Self::start("MariaDB", &mut command, pod, MARIADB, folder)
    }

    fn start(name: &'static str, command: &mut Command, pod: &Pod, port: u16, folder: &Path) -> Result<Self> {
        let log = folder.join("server.log");
        let file = fs::File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut server = Self { name, process: Process::spawn(command)?, log };
        let here = SocketAddr::from((pod.ipv4(), port));
        until(&format!("{name} takes connections"), || {
            if let Some(status) = server.process.ended()? {
                bail!("{name} ended: {status}");
            }
            Ok(pod.netns().enter(|| TcpStream::connect(here).is_ok())?.then_some(()))
        })
        .with_context(|| fs::read_to_string(&server.log).unwrap_or_default())?;
        Ok(server)
    }
}

fn prepare(folder: &Path, page: &str) -> Result<PathBuf> {
    let site = folder.join("site");
    fs::create_dir_all(&site)?;
    write(&site, "index.html", page)?;
    Ok(folder.to_owned())
}

fn write(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let file = folder.join(name);
    fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}
