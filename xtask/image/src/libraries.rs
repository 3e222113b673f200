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

/// Parses the output of `ldd`: `name => path (address)`, or `path (address)` for the loader, of which an emulator has another path
/// behind the arrow. The kernel's own library has no file, and no name under an emulator.
fn parse(listing: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let is_kernels = line.starts_with("linux-vdso") || line.starts_with('(');
        if STATIC.iter().any(|said| line.contains(said)) || is_kernels {
            continue;
        }
        let target = match line.split_once(" => ") {
            Some((name, target)) if !name.starts_with('/') => target,
            Some((loader, _)) => loader,
            None => line,
        };
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
    fn the_loader_is_named_by_the_program_under_an_emulator() {
        let listing = "\t (0x0000005502850000)\n\tlibc.so.6 => /lib/aarch64-linux-gnu/libc.so.6 (0x55)\n\
            \t/lib/ld-linux-aarch64.so.1 => /cache/arm64/lib/ld-linux-aarch64.so.1 (0x56)\n";
        let found = parse(listing).expect("libraries");
        assert_eq!(
            found,
            ["/lib/aarch64-linux-gnu/libc.so.6", "/lib/ld-linux-aarch64.so.1"].map(PathBuf::from)
        );
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
