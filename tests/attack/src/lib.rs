//! Attacks on Tacit's promise: what should be encrypted does not leave in clear. Run by `tacit doctor --attack`.
//!
//! ```text
//! two worlds of two nodes each (namespaces): without Tacit (control), and with an agent on each node, all STRICT
//! catalogue: attack x family --driver--> step (a child process inside a pod) sends a marker of its own
//! wire:      every packet of both nodes is searched for markers; a fence packet says that all before it was seen
//! judge:     control leaked and protected did not: held;  protected leaked: leaked;  control did not: not proven
//! ```
//! An attack whose control does not leak proves nothing and fails the run. Nothing outside the namespaces made here is
//! touched or sent to.
//!
//! | file | what |
//! |---|---|
//! | `catalogue` | the attacks: name, group, families, how they are driven |
//! | `driver` | the attacker's side: from where a step is started, and what is done around it |
//! | `kernel` | a program beside ours, a map filled up |
//! | `lifecycle` | attacks on agents that stop, die, or come late |
//! | `step` | what runs inside a pod: one system call after the other |
//! | `world` | nodes, pods, agents, the victim's server |
//! | `wire` | the recorder |
//! | `judge` | verdicts and their texts |

mod catalogue;
mod driver;
mod judge;
mod kernel;
mod lifecycle;
pub mod step;
mod wire;
mod world;

use std::{io::Write as _, path::PathBuf};

use anyhow::{Context as _, Result, ensure};

use catalogue::{ATTACKS, Attack};
use judge::{Judged, Verdict};
use world::World;

/// Which address family a victim is attacked over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// IPv4 through an IPv6 socket.
    Mapped,
}

impl Family {
    const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// Its name, for people and for `--family`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }

    /// From its name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.label() == text)
    }
}

/// What to run, and with which program.
#[derive(Debug, Clone)]
pub struct Options {
    /// The `tacit` program: agents and steps are started from it.
    pub program: PathBuf,
    /// Only attacks whose name contains this.
    pub only: Option<String>,
    /// Only this family.
    pub family: Option<Family>,
    /// JSON instead of lines.
    pub json: bool,
}

/// Runs the suite and prints what became of each attack. Returns whether all that ran held.
///
/// # Errors
/// When a world cannot be built or a recording has holes: then nothing is proven.
pub fn run(options: &Options) -> Result<bool> {
    tacit_topology::cleanup_stale()?;
    let chosen: Vec<(&Attack, Family)> = ATTACKS
        .iter()
        .filter(|attack| options.only.as_ref().is_none_or(|part| attack.name.contains(part)))
        .flat_map(|attack| attack.families.iter().map(move |family| (attack, *family)))
        .filter(|(_, family)| options.family.is_none_or(|wanted| wanted == *family))
        .collect();
    ensure!(!chosen.is_empty(), "no attack of that name and family");
    let mut control = World::without_tacit(&options.program).context("the world without Tacit")?;
    let mut protected = World::with_tacit(&options.program).context("the world with Tacit")?;
    let mut results = Vec::new();
    for (attack, family) in chosen {
        let judged = judge(attack, family, &mut control, &mut protected)?;
        // Beside JSON, the lines are for whoever watches.
        if options.json {
            eprintln!("{}", judged.line());
        } else {
            println!("{}", judged.line());
            std::io::stdout().flush()?;
        }
        results.push(judged);
    }
    control.finish()?;
    protected.finish()?;
    if options.json {
        println!("{}", judge::json(&results));
    } else {
        println!("\n{}", judge::summary(&results));
    }
    Ok(results.iter().all(|judged| matches!(judged.verdict, Verdict::Held | Verdict::Absent)))
}

fn judge(attack: &Attack, family: Family, control: &mut World, protected: &mut World) -> Result<Judged> {
    let without = control.attack(attack, family).with_context(|| format!("{} without Tacit", attack.name))?;
    let with = protected.attack(attack, family).with_context(|| format!("{} with Tacit", attack.name))?;
    Ok(Judged::of(attack, family, &without, &with))
}
