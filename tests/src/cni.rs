//! The CNI folders of a node, and the part of a container runtime that calls their plugins.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tacit_topology::{Process, until};

/// The agent's plugin.
const PLUGIN: &str = "tacit-cni";
/// The network of another plugin, which is never called here.
const NETWORK: &str =
    r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "isGateway": true}]}"#;

/// The folders of a node. They are removed on drop.
#[derive(Debug)]
pub struct CniFolders(PathBuf);

/// A call of the plugin, which may wait for the agent.
#[derive(Debug)]
pub struct CniCall(Process);

/// The end of a call.
#[derive(Debug)]
pub struct CniEnd {
    /// True if the container runtime would go on.
    pub is_passed: bool,
    /// Output of the plugin.
    pub printed: Value,
}

impl CniFolders {
    /// Makes the folders with the configuration of one network.
    ///
    /// # Errors
    /// The system's.
    pub fn new(tag: &str) -> Result<Self> {
        let folders = Self(std::env::temp_dir().join(format!("tacit-cni-{}-{tag}", std::process::id())));
        fs::create_dir_all(folders.configurations())?;
        fs::create_dir_all(folders.programs())?;
        fs::write(folders.programs().join("bridge"), "")?;
        folders.write("10-pods.conflist")?;
        Ok(folders)
    }

    /// The folder of configurations.
    #[must_use]
    pub fn configurations(&self) -> PathBuf {
        self.0.join("net.d")
    }

    /// The folder of plugins.
    #[must_use]
    pub fn programs(&self) -> PathBuf {
        self.0.join("bin")
    }

    /// The lines of an agent's configuration that name the folders.
    #[must_use]
    pub fn section(&self, more: &str) -> String {
        let (configurations, programs) = (self.configurations(), self.programs());
        format!("cni: {{configFolder: {configurations:?}, programFolder: {programs:?}{more}}}\n")
    }

    /// Writes a configuration as its owner does, without the agent's plugin.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, name: &str) -> Result<()> {
        let path = self.configurations().join(name);
        fs::write(&path, NETWORK).with_context(|| format!("write {}", path.display()))
    }

    /// Returns what the configuration in use has for the agent's plugin: the first by name counts.
    ///
    /// # Errors
    /// The system's, or no configuration.
    pub fn entry(&self) -> Result<Option<Value>> {
        let entries: std::io::Result<Vec<_>> = fs::read_dir(self.configurations())?.collect();
        let mut paths: Vec<_> = entries?.into_iter().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "conflist"));
        paths.sort();
        let first = paths.first().context("no configuration")?;
        let root: Value = serde_json::from_str(&fs::read_to_string(first)?)?;
        let plugins = root["plugins"].as_array().context("no list of plugins")?;
        ensure!(plugins[0] == json!({"type": "bridge", "isGateway": true}), "{root}");
        Ok(plugins.iter().find(|plugin| plugin["type"] == PLUGIN).cloned())
    }

    /// Waits until the configuration in use names the plugin.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_chained(&self) -> Result<Value> {
        until("the plugin in the CNI configuration", || self.entry())
    }

    /// Returns true if the program is there.
    #[must_use]
    pub fn has_program(&self) -> bool {
        self.programs().join(PLUGIN).exists()
    }

    /// Calls the plugin as the configuration has it, for a pod of namespace shop. It gives up after `timeout` seconds, if that is given.
    ///
    /// # Errors
    /// No plugin, or the system's.
    pub fn call(&self, command: &str, pod: &str, timeout: Option<u32>) -> Result<CniCall> {
        let mut text = self.entry()?.context("the plugin is not in the CNI configuration")?;
        text["cniVersion"] = json!("1.0.0");
        text["name"] = json!("pods");
        text["prevResult"] = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.77.0.9/24"}]});
        if let Some(timeout) = timeout {
            text["timeoutSeconds"] = json!(timeout);
        }
        let mut plugin = Command::new(self.programs().join(PLUGIN));
        plugin.env_clear().env("CNI_COMMAND", command);
        plugin.env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod}"));
        let mut process = Process::spawn(plugin.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let mut stdin = process.take_stdin().context("stdin")?;
        stdin.write_all(text.to_string().as_bytes())?;
        Ok(CniCall(process))
    }

    /// Returns the path of the folders.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl CniCall {
    /// Returns true if the plugin has ended.
    ///
    /// # Errors
    /// The system's.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.ended()?.is_some())
    }

    /// Waits for the end of the plugin.
    ///
    /// # Errors
    /// It does not end.
    pub fn finish(mut self) -> Result<CniEnd> {
        let status: ExitStatus = self.0.wait()?;
        let stdout = self.0.take_stdout().context("stdout")?;
        let text = std::io::read_to_string(stdout)?;
        let printed = if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? };
        Ok(CniEnd { is_passed: status.success(), printed })
    }
}

impl Drop for CniFolders {
    fn drop(&mut self) {
        // They are in the folder of temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}
