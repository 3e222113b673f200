//! `tacit doctor`, and an agent whose node lacks a requirement: it names the requirement, exits with code 78 and leaves
//! no files.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tacit_tests::agent_program;
use tacit_topology::Topology;

/// `EX_CONFIG`: a restart does not help.
const CANNOT_RUN: i32 = 78;

#[test]
#[ignore = "needs root"]
fn this_machine_is_found_fit() -> Result<()> {
    // The topology mounts the bpffs that doctor checks.
    let _topology = Topology::new("doctor")?;
    let output = Command::new(agent_program()?).args(["doctor", "-o", "json"]).output()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["supported"], true);
    let features = report["features"].as_array().context("a list")?;
    let required: Vec<&Value> = features.iter().filter(|f| f["required"] == true).collect();
    assert!(required.len() > 20, "{report:#}");
    for feature in required {
        assert_eq!(feature["present"], true, "{feature:#}");
        assert_eq!(feature["fallback"], Value::Null, "{feature:#}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn the_table_names_what_is_missing_and_the_exit_code_says_so() -> Result<()> {
    let output = Command::new(agent_program()?).args(["doctor", "--pin-path", "/proc/none"]).output()?;
    assert_eq!(output.status.code(), Some(CANNOT_RUN));
    let table = text(&output.stdout);
    let row = table.lines().find(|line| line.trim_start().starts_with("bpffs ")).context("a row")?;
    assert!(row.contains(" no ") && row.ends_with("none"), "{table}");
    assert!(text(&output.stderr).contains("mount -t bpf bpf /sys/fs/bpf"), "{output:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_cannot_run_here_ends_before_it_does_anything() -> Result<()> {
    let folder = Folder::new("unsupported")?;
    let output = agent_in(&folder.0)?;
    assert_eq!(output.status.code(), Some(CANNOT_RUN), "{}", text(&output.stderr));

    let stderr = text(&output.stderr);
    assert!(stderr.contains("bpffs") && stderr.contains("mount -t bpf bpf /sys/fs/bpf"), "{stderr}");
    let mut left: Vec<_> = fs::read_dir(&folder.0)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    left.sort();
    assert_eq!(left, ["directory.yaml", "policy.yaml", "tacit.yaml"], "no pins, no socket, no issuer");
    Ok(())
}

#[test]
#[ignore = "needs the agent's program"]
fn without_the_attack_suite_the_error_names_it_and_the_places_looked_at() -> Result<()> {
    let folder = Folder::new("alone")?;
    let alone = folder.0.join("tacit");
    fs::copy(agent_program()?, &alone)?;
    let output = Command::new(&alone).args(["doctor", "--attack"]).env("PATH", &folder.0).output()?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stderr = text(&output.stderr);
    let path = alone.display().to_string();
    let wanted = ["tacit-attack", path.as_str(), "PATH", "cargo build"];
    assert!(wanted.iter().all(|word| stderr.contains(*word)), "{stderr}");
    Ok(())
}

/// Runs an agent with all paths in `folder`, which is not on a bpffs.
fn agent_in(folder: &Path) -> Result<Output> {
    let config = format!(
        "trustDomain: cluster.local\nnode: a\npodsCgroup: /sys/fs/cgroup\nmeshRanges: [10.77.0.0/16]\n\
         directory: {{file: directory.yaml}}\npolicy: {{file: policy.yaml}}\nissuer: {{embedded: {{directory: issuer}}}}\n\
         pinPath: {0}/pins\nsocket: {0}/agent.sock\n",
        folder.display()
    );
    fs::write(folder.join("tacit.yaml"), config)?;
    fs::write(folder.join("directory.yaml"), "workloads: []\n")?;
    fs::write(folder.join("policy.yaml"), "")?;
    let program = agent_program()?;
    Ok(Command::new(program).arg("agent").arg("--config").arg(folder.join("tacit.yaml")).output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tacit-doctor-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
