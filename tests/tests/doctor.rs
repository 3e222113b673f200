//! `tacit doctor`, and an agent that cannot run where it is: says why, ends with 78, leaves nothing.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tacit_tests::agent_program;
use tacit_topology::Topology;

/// `EX_CONFIG`: no restart can help.
const CANNOT_RUN: i32 = 78;

#[test]
#[ignore = "needs root"]
fn this_machine_is_found_fit() -> Result<()> {
    // For its bpffs.
    let _ground = Topology::new("doctor")?;
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
    let folder = Folder::new("unfit")?;
    let output = agent_in(&folder.0)?;
    assert_eq!(output.status.code(), Some(CANNOT_RUN), "{}", text(&output.stderr));

    let said = text(&output.stderr);
    assert!(said.contains("bpffs") && said.contains("mount -t bpf bpf /sys/fs/bpf"), "{said}");
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
    let said = text(&output.stderr);
    let place = alone.display().to_string();
    let wanted = ["tacit-attack", place.as_str(), "PATH", "cargo build"];
    assert!(wanted.iter().all(|word| said.contains(*word)), "{said}");
    Ok(())
}

/// Runs an agent that would keep everything in `folder`, which is no place to pin in.
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
