//! The shared libraries of a program, as its own loader finds them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use xtask_support::platform::Platform;

/// Output of `ldd` for a program that needs no libraries.
const STATIC: [&str; 2] = ["statically linked", "not a dynamic executable"];

/// Paths of all libraries and of the loader; none for a program that was linked statically.
pub(super) fn of(platform: &Platform, program: &Path) -> Result<Vec<PathBuf>> {
    ensure!(program.is_file(), "{} is not built: run `cargo xtask build`", program.display());
    let listing = platform.libraries_of(program)?;
    parse(&listing).with_context(|| format!("libraries of {}", program.display()))
}

/// Parses the output of `ldd`: `name => path (address)`, or `path (address)` for the loader. The kernel's own library
/// has no file.
fn parse(listing: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if STATIC.iter().any(|said| line.contains(said)) || line.starts_with("linux-vdso") {
            continue;
        }
        let target = line.split_once(" => ").map_or(line, |(_, target)| target);
        let path = target.split(" (").next().unwrap_or_default();
        if !path.starts_with('/') {
            bail!("no path in `{line}`: install the library");
        }
        found.push(PathBuf::from(path));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\tlinux-vdso.so.1 (0x00007ffd)\n\
        \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f1)\n\
        \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2)\n\
        \t/lib64/ld-linux-x86-64.so.2 (0x00007f3)\n";

    #[test]
    fn libraries_and_loader_are_found_where_the_program_looks() {
        let found = parse(LISTING).expect("libraries");
        let expected = [
            "/lib/x86_64-linux-gnu/libgcc_s.so.1",
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let error = parse("\tlibx.so.1 => not found\n").expect_err("refused").to_string();
        assert!(error.contains("libx.so.1"), "{error}");
    }

    #[test]
    fn a_static_program_has_none() {
        for said in ["\tstatically linked\n", "\tnot a dynamic executable\n"] {
            assert!(parse(said).expect("none").is_empty());
        }
    }
}
