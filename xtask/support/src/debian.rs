//! Debian's archive, by an apt with a configuration and a state of its own, from the mirror that this machine's is set up
//! with. It looks at the suites that it is given alone, and installs nothing.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::command::stdout;

/// apt with a state of its own.
pub struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Its state stands in `folder`.
    pub fn new(folder: &Path, suites: &[&str]) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
        }
        let sources = folder.join("sources.list");
        fs::write(&sources, sources_list(&mirror(&sites()?)?, suites))?;
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        let options = [
            option("Dir::Etc::sourcelist", &sources),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            option("Dir::State::Lists", &folder.join("lists")),
            option("Dir::Cache", &folder.join("cache")),
            "Acquire::Languages=none".to_owned(),
            // Suites whose lists are no longer renewed still have their packages.
            "Acquire::Check-Valid-Until=false".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Self { options: options.into_iter().flat_map(|o| ["-o".to_owned(), o]).collect() })
    }

    /// A program of apt, with this state.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// Returns the sites of this machine's apt, one a line.
fn sites() -> Result<String> {
    let sites = stdout(Command::new("apt-get").args(["indextargets", "--format", "$(SITE)"]));
    sites.context("apt-get indextargets: is this Debian?")
}

/// The address of the Debian mirror among them.
fn mirror(sites: &str) -> Result<String> {
    let mirror = sites.lines().find_map(|site| site.split_once("/debian").map(|(base, _)| base));
    let mirror = mirror.filter(|base| !base.is_empty());
    mirror.map(str::to_owned).context("apt has no Debian mirror configured: add one to its sources")
}

fn sources_list(mirror: &str, suites: &[&str]) -> String {
    let key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
    let line = |suite: &&str| {
        let archive = if suite.ends_with("-security") { "debian-security" } else { "debian" };
        format!("deb {key} {mirror}/{archive} {suite} main\n")
    };
    suites.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_come_from_the_machines_own_mirror() {
        let sites = "http://other.example/x/\nhttp://mirror.example/debian/\n";
        assert_eq!(mirror(sites).expect("a mirror"), "http://mirror.example");
        assert!(mirror("http://other.example/x/\n").is_err());
        assert!(mirror("/debian/\n").is_err());
    }

    #[test]
    fn security_suites_come_from_their_own_archive() {
        let list = sources_list("http://mirror.example", &["bookworm-security", "trixie-backports"]);
        assert!(list.contains("http://mirror.example/debian-security bookworm-security main\n"), "{list}");
        assert!(list.contains("http://mirror.example/debian trixie-backports main\n"), "{list}");
    }
}
