//! Two machines with different kernels on one wire: a pod of each, an agent on each, and what the wire carried.
//!
//! The wire is a pair of Unix datagram sockets, so nothing of the host's network is touched.

use std::{path::Path, time::Instant};

use anyhow::Result;
use xtask_support::report::Report;

use super::{
    Payload, Work,
    initramfs::Initramfs,
    kernels::{Kernel, Unpacked},
    machine::{Machine, Wire},
    outcome::Outcome,
};

const SCRIPT: &str = include_str!("pair.sh");

/// Boots both and reports the one test; node 1 has the first kernel.
pub(super) fn run(
    kernels: [(&Kernel, &Unpacked); 2],
    payload: &Payload,
    report: &mut Report,
) -> Result<Outcome> {
    let (begin, before) = (Instant::now(), report.totals());
    let label = format!("{}+{}", kernels[0].0.label, kernels[1].0.label);
    let works = [Work::new(&format!("{label}-1"))?, Work::new(&format!("{label}-2"))?];
    let ends = [works[0].0.join("wire"), works[1].0.join("wire")];
    report.begin();
    let results = std::thread::scope(|scope| {
        let (sender, lines) = std::sync::mpsc::channel();
        let boots = [0, 1].map(|at| {
            let (kernel, work, ends, label) = (kernels[at].1, &works[at].0, &ends, &label);
            let sender = sender.clone();
            scope.spawn(move || {
                let wire = Wire { local: &ends[at], remote: &ends[1 - at], number: at + 1 };
                node(kernel, payload, work, label, wire, |line| drop(sender.send((at, line.to_owned()))))
            })
        });
        drop(sender);
        for (at, line) in lines {
            println!("{label:>11} {} | {line}", at + 1);
            if at == 0 {
                report.line(&line);
            }
        }
        boots.map(|boot| boot.join().map_err(|_| anyhow::anyhow!("a machine's thread panicked")))
    });
    let ended = results.into_iter().try_fold(true, |all, code| anyhow::Ok(all & (code?? == 0)));
    report.end(&format!("two machines {label}"), matches!(ended, Ok(true)));
    let note = ended.as_ref().err().map_or_else(|| "two machines".to_owned(), |error| format!("{error:#}"));
    let release = format!("{} + {}", kernels[0].1.release, kernels[1].1.release);
    let counted = Outcome::counted(before, report.totals());
    Ok(Outcome { label, release, boot: "-".to_owned(), note, took: begin.elapsed(), ..counted })
}

fn node(
    kernel: &Unpacked,
    payload: &Payload,
    work: &Path,
    label: &str,
    wire: Wire<'_>,
    line: impl FnMut(&str),
) -> Result<i32> {
    let root = Initramfs::new(work, kernel)?;
    root.stripped(&payload.agent, "t/tacit")?;
    let (number, other) = (wire.number.to_string(), (3 - wire.number).to_string());
    let script = SCRIPT.replace("@NUMBER@", &number).replace("@OTHER@", &other).replace("@LABEL@", label);
    root.text("payload/run", &script)?;
    let image = work.join("initramfs");
    root.pack(&image)?;
    let vmlinuz = kernel.folder.join("vmlinuz");
    Machine { kernel: &vmlinuz, initramfs: &image, work, wire: Some(wire) }.run(line)
}
