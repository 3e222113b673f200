//! The image as the OCI image specification describes it (image-spec 1.1: `image-layout.md`, `manifest.md`,
//! `config.md`), and in the same archive Docker's older `manifest.json`, which names the same blobs.
//!
//! One layer, not compressed: registries and runtimes compress on the way when they want to, and an uncompressed layer
//! needs no agreement about compressors to be the same everywhere.

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::archive::{Entry, tar};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Images are as old as the epoch: when they were built says nothing about what is in them.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// The name and entry point of an image.
pub(super) struct Description<'a> {
    /// Name and tag.
    pub(super) name: &'a str,
    /// Path of the program, without a slash in front, and its arguments.
    pub(super) entrypoint: &'a [&'a str],
    pub(super) version: &'a str,
    /// Go's name of the architecture.
    pub(super) architecture: &'static str,
}

/// The archive, and the digest of the image's manifest.
pub(super) fn archive(description: &Description<'_>, files: &[Entry]) -> Result<(Vec<u8>, String)> {
    let layer = Blob::new(tar(files)?);
    let config = Blob::json(&config(description, &layer));
    let manifest = Blob::json(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(CONFIG),
        "layers": [layer.descriptor(LAYER)],
        "annotations": labels(description),
    }));
    let mut entries = vec![
        Entry::data("oci-layout", json!({"imageLayoutVersion": "1.0.0"}).to_string()),
        Entry::data("index.json", index(description, &manifest).to_string()),
        Entry::data("manifest.json", docker(description, &config, &layer).to_string()),
    ];
    let digest = manifest.digest();
    entries.extend([config, manifest, layer].map(Blob::entry));
    Ok((tar(&entries)?, digest))
}

fn config(description: &Description<'_>, layer: &Blob) -> Value {
    let mut entrypoint: Vec<String> = description.entrypoint.iter().map(|&word| word.to_owned()).collect();
    if let Some(program) = entrypoint.first_mut() {
        program.insert(0, '/');
    }
    json!({
        "created": CREATED,
        "architecture": description.architecture,
        "os": "linux",
        "config": {
            "Entrypoint": entrypoint,
            "Env": ["PATH=/usr/bin"],
            "WorkingDir": "/",
            "Labels": labels(description),
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
        "history": [{"created": CREATED, "created_by": "cargo xtask image"}],
    })
}

fn index(description: &Description<'_>, manifest: &Blob) -> Value {
    let mut entry = manifest.descriptor(MANIFEST);
    entry["platform"] = json!({"os": "linux", "architecture": description.architecture});
    entry["annotations"] = json!({
        // containerd uses the first as the image's name. The second is the specification's, which has only the tag.
        "io.containerd.image.name": description.name,
        "org.opencontainers.image.ref.name": tag(description.name),
    });
    json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]})
}

fn docker(description: &Description<'_>, config: &Blob, layer: &Blob) -> Value {
    json!([{"Config": config.path(), "RepoTags": [description.name], "Layers": [layer.path()]}])
}

fn labels(description: &Description<'_>) -> Value {
    json!({
        "org.opencontainers.image.title": "tacit",
        "org.opencontainers.image.description":
            "Node agent: encrypts and authenticates pod-to-pod traffic without sidecars",
        "org.opencontainers.image.version": description.version,
        // The C library and the compiler's runtime stand beside the program.
        "org.opencontainers.image.licenses":
            "Apache-2.0 AND LGPL-2.1-or-later AND GPL-3.0-or-later WITH GCC-exception-3.1",
    })
}

/// The tag of `name:tag`; a port of a registry is none.
fn tag(name: &str) -> &str {
    let last = name.rsplit('/').next().unwrap_or(name);
    last.split_once(':').map_or("latest", |(_, tag)| tag)
}

/// Bytes that are found by their digest.
struct Blob {
    hex: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let hex = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { hex, bytes }
    }

    fn json(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex)
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.hex)
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest(), "size": self.bytes.len()})
    }

    fn entry(self) -> Entry {
        Entry::data(self.path(), self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use super::*;

    const DESCRIPTION: Description<'_> = Description {
        name: "localhost:5000/tacit:1.2",
        entrypoint: &["usr/bin/tacit"],
        version: "1.2",
        architecture: "arm64",
    };

    fn unpacked(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        let entries = archive.entries().expect("entries").map(|entry| {
            let mut entry = entry.expect("entry");
            let path = entry.path().expect("path").to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("bytes");
            (path, bytes)
        });
        entries.collect()
    }

    fn json_at(files: &BTreeMap<String, Vec<u8>>, path: &str) -> Value {
        serde_json::from_slice(&files[path]).expect("json")
    }

    fn blob_of(descriptor: &Value) -> String {
        let digest = descriptor["digest"].as_str().expect("digest");
        format!("blobs/sha256/{}", digest.strip_prefix("sha256:").expect("sha256"))
    }

    #[test]
    fn every_descriptor_leads_to_a_blob_of_its_digest_and_size() {
        let (bytes, digest) =
            archive(&DESCRIPTION, &[Entry::data("usr/bin/tacit", "program")]).expect("archive");
        let files = unpacked(&bytes);
        let entry = json_at(&files, "index.json")["manifests"][0].clone();
        assert_eq!(entry["digest"], json!(digest));
        let manifest = json_at(&files, &blob_of(&entry));
        for descriptor in [&entry, &manifest["config"], &manifest["layers"][0]] {
            let blob = Blob::new(files[&blob_of(descriptor)].clone());
            assert_eq!(descriptor["digest"], json!(blob.digest()));
            assert_eq!(descriptor["size"], json!(blob.bytes.len()));
        }
        let config = json_at(&files, &blob_of(&manifest["config"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"], "not compressed");
        assert_eq!(config["config"]["Entrypoint"], json!(["/usr/bin/tacit"]));
        let layer = unpacked(&files[&blob_of(&manifest["layers"][0])]);
        assert_eq!(layer["usr/bin/tacit"], b"program");
    }

    #[test]
    fn docker_finds_the_same_blobs() {
        let (bytes, _) = archive(&DESCRIPTION, &[Entry::data("x", "y")]).expect("archive");
        let files = unpacked(&bytes);
        let entry = json_at(&files, "manifest.json")[0].clone();
        assert_eq!(entry["RepoTags"], json!([DESCRIPTION.name]));
        for path in [&entry["Config"], &entry["Layers"][0]] {
            assert!(files.contains_key(path.as_str().expect("path")), "{path}");
        }
    }

    #[test]
    fn the_same_files_make_the_same_archive() {
        let make = || archive(&DESCRIPTION, &[Entry::data("x", "y")]).expect("archive");
        assert_eq!(make(), make());
    }

    #[test]
    fn a_port_is_no_tag() {
        assert_eq!(tag("localhost:5000/tacit"), "latest");
        assert_eq!(tag("localhost:5000/tacit:1.2"), "1.2");
        assert_eq!(tag("localhost/tacit:0.1.0"), "0.1.0");
    }
}
