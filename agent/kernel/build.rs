//! Embeds the eBPF object that `cargo xtask build-ebpf` makes. Without it the crate still builds, and loading fails at
//! run time with a message that says how to make it.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=TACIT_EBPF_OBJ");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("cargo sets CARGO_MANIFEST_DIR")?);
    let built = manifest.join("../../target/ebpf/tacit-ebpf.o");
    let object = env::var_os("TACIT_EBPF_OBJ").map_or(built, PathBuf::from);
    println!("cargo:rerun-if-changed={}", object.display());
    let embedded = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("tacit-ebpf.o");
    let bytes = fs::read(&object).unwrap_or_else(|error| {
        println!("cargo:warning=no eBPF object ({error}): run `cargo xtask build-ebpf`");
        Vec::new()
    });
    fs::write(embedded, bytes)?;
    Ok(())
}
