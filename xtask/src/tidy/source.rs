//! The files the rules look at: everything git tracks or would track.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};
use xtask_support::command::stdout;

use super::scan::{self, Line};

/// One file, read once.
pub(super) struct Source {
    /// Relative to the repository, with `/`.
    pub(super) path: String,
    /// `None`: not UTF-8 or with a NUL byte, so not text.
    pub(super) text: Option<String>,
    /// Scanned lines of a Rust file; empty for others.
    pub(super) lines: Vec<Line>,
}

impl Source {
    pub(super) fn new(path: &str, bytes: Vec<u8>) -> Self {
        let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
        let lines = match &text {
            Some(text) if path.ends_with(".rs") => scan::lines(text),
            _ => Vec::new(),
        };
        Self { path: path.to_owned(), text, lines }
    }

    /// A file of a test.
    #[cfg(test)]
    pub(super) fn sample(path: &str, text: &str) -> Self {
        Self::new(path, text.as_bytes().to_vec())
    }

    pub(super) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Lines of text with their 1-based numbers; none for what is not text.
    pub(super) fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.as_deref().unwrap_or_default().lines().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// The part before the unit tests, which end a file by convention; tests may use what they like.
    pub(super) fn product_lines(&self) -> &[Line] {
        let tests = self.lines.iter().position(|line| line.code.trim() == "#[cfg(test)]");
        &self.lines[..tests.unwrap_or(self.lines.len())]
    }
}

/// All files of the repository in the order of their paths.
pub(super) fn all(root: &Path) -> Result<Vec<Source>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root);
    let mut paths = match stdout(&mut git) {
        Some(listed) => listed.split('\0').filter(|path| !path.is_empty()).map(str::to_owned).collect(),
        // An unpacked archive of the sources is no git repository.
        None => walk(root, "")?,
    };
    paths.sort();
    paths.dedup();
    let read = |path: &String| match fs::read(root.join(path)) {
        Ok(bytes) => Some(Ok(Source::new(path, bytes))),
        // Deleted but not yet committed.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(error).with_context(|| format!("cannot read {path}"))),
    };
    paths.iter().filter_map(read).collect()
}

fn walk(root: &Path, folder: &str) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(root.join(folder)).with_context(|| format!("cannot read {folder}"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        match entry.file_type()? {
            kind if kind.is_dir() && !["target", ".git"].contains(&name.as_str()) => {
                paths.extend(walk(root, &path)?)
            }
            kind if kind.is_file() => paths.push(path),
            _ => {}
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_tests_are_no_product_lines() {
        let source = Source::sample("a.rs", "//! doc\nuse a;\n\n#[cfg(test)]\nmod tests {}\n");
        assert_eq!(source.product_lines().len(), 3);
    }

    #[test]
    fn a_file_with_a_nul_byte_is_no_text() {
        assert!(Source::new("a.o", b"\x7fELF\0".to_vec()).text.is_none());
        assert!(Source::new("a.md", b"text".to_vec()).text.is_some());
    }
}
