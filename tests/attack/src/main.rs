//! `tacit-attack`: attacks on Tacit's promise that what should be encrypted does not leave in clear. It starts the agent's
//! program, and `tacit doctor --attack` starts it.
//!
//! ```text
//! two worlds of two nodes each (namespaces): without Tacit (control), and with an agent on each node, all STRICT
//! catalogue: attack x family --driver--> step (a child process inside a pod) sends a marker of its own
//! wire:      every packet of both nodes is searched for markers; a fence packet says that all before it was seen
//! judge:     control leaked and protected did not: held;  protected leaked: leaked;  control did not: not proven
//!            of shares: the attacker was refused and the victim was not: held;  the victim lost: starved
//! ```
//! An attack on an application leaks where the application gets the marker, whatever links it was seen on.
//! An attack whose control does not leak proves nothing and fails the run. Nothing outside the namespaces made here is
//! touched or sent to.
//!
//! | file | what |
//! |---|---|
//! | `catalogue` | the attacks: name, group, families, how they are driven |
//! | `driver` | the attacker's side: from where a step is started, and what is done around it |
//! | `kernel` | a program beside Tacit's, a map filled up |
//! | `connect_hook` | loads such programs |
//! | `neighbours` | attacks of other tenants of a node, and flows of the node itself |
//! | `flood` | attacks under a flood of SYNs |
//! | `shares` | attacks on what pods share |
//! | `translation` | attacks by address translation; `nat` writes its rules |
//! | `boot` | attacks on pods that came before their agent |
//! | `lifecycle` | attacks on agents that stop, die, or come late |
//! | `step` | what runs inside a pod: one system call after the other |
//! | `step_process` | a step as the driver sees it |
//! | `world` | nodes, pods, agents, the victim's server |
//! | `wire` | the recorder |
//! | `judge` | verdicts and their texts |

mod boot;
mod catalogue;
mod connect_hook;
mod driver;
mod flood;
mod judge;
mod kernel;
mod lifecycle;
mod nat;
mod neighbours;
mod shares;
mod step;
mod step_process;
mod translation;
mod wire;
mod world;

use std::{
    env,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use catalogue::{ATTACKS, Attack};
use judge::{Judged, Outcome, Verdict};
use world::{Programs, World};

/// Attacks two nodes made in namespaces here, with and without Tacit. It needs root. It exits with 0 when every attack was
/// held that succeeds without Tacit, and else with 1.
#[derive(Debug, Parser)]
#[command(name = "tacit-attack", version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    step: Option<Hidden>,
    /// The agent's program [default: the file named by TACIT_BIN, else `tacit` in the folder of this program]
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Only attacks whose GROUP::NAME contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Only this family
    #[arg(long, value_enum)]
    family: Option<Family>,
}

#[derive(Debug, Subcommand)]
enum Hidden {
    /// One step of an attack; the suite starts it inside a pod of its own.
    #[command(hide = true)]
    Step {
        /// Name, target, marker, and what else the step takes.
        arguments: Vec<String>,
    },
}

/// The format of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// The address family over which a victim is attacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// IPv4 through an IPv6 socket.
    Mapped,
}

impl Family {
    /// Its name, for people and for `--family`.
    fn label(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.step {
        Some(Hidden::Step { arguments }) => step::run(arguments),
        None => attack(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tacit-attack: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn attack(args: &Args) -> Result<()> {
    let own = env::current_exe().context("path of this program")?;
    let agent = agent(args.agent.as_deref(), env::var_os("TACIT_BIN").map(PathBuf::from), &own);
    ensure!(
        agent.is_file(),
        "no agent at {}: name its program with --agent or in TACIT_BIN, or put it there",
        agent.display()
    );
    ensure!(
        run(args, &Programs { agent, own })?,
        "not every attack was held, or proven to leak without Tacit"
    );
    Ok(())
}

/// Returns the agent's program: the one that is named, or else the one beside this program.
fn agent(named: Option<&Path>, in_environment: Option<PathBuf>, own: &Path) -> PathBuf {
    named.map(Path::to_owned).or(in_environment).unwrap_or_else(|| own.with_file_name("tacit"))
}

/// Runs the suite and prints what became of each attack. Returns whether all that ran held.
///
/// # Errors
/// Fails if a world cannot be built or a recording has holes, because nothing is proven then.
fn run(args: &Args, programs: &Programs) -> Result<bool> {
    let is_json = args.output == Output::Json;
    tacit_topology::cleanup_stale()?;
    let chosen: Vec<(&Attack, Family)> = ATTACKS
        .iter()
        .filter(|attack| args.only.as_ref().is_none_or(|part| attack.full_name().contains(part)))
        .flat_map(|attack| attack.families.iter().map(move |family| (attack, *family)))
        .filter(|(_, family)| args.family.is_none_or(|wanted| wanted == *family))
        .collect();
    ensure!(!chosen.is_empty(), "no attack of that name and family");
    let mut control = World::without_tacit(programs).context("the world without Tacit")?;
    let mut protected = World::with_tacit(programs).context("the world with Tacit")?;
    let mut results = Vec::new();
    for (attack, family) in chosen {
        let judged = judge(attack, family, &mut control, &mut protected);
        // Beside JSON, the lines are for whoever watches.
        if is_json {
            eprintln!("{}", judged.line());
        } else {
            println!("{}", judged.line());
            std::io::stdout().flush()?;
        }
        results.push(judged);
    }
    control.finish()?;
    protected.finish()?;
    if is_json {
        println!("{}", judge::json(&results));
    } else {
        println!("\n{}", judge::summary(&results));
    }
    Ok(results.iter().all(|judged| matches!(judged.verdict, Verdict::Held | Verdict::Absent)))
}

/// Shortest wait of a step for what Tacit keeps from it: above the first repetition of a SYN, after a second.
const SHORTEST_WAIT: Duration = Duration::from_secs(2);
/// Nothing that takes so many times as long as without Tacit is still on its way.
const LONGER: u32 = 10;

/// An attack that cannot be run is not proven, and the others are run all the same.
fn judge(attack: &Attack, family: Family, control: &mut World, protected: &mut World) -> Judged {
    match run_both(attack, family, control, protected) {
        Ok((without, with)) => Judged::of(attack, family, &without, &with),
        Err(error) => Judged::not_run(attack, family, &error),
    }
}

fn run_both(
    attack: &Attack,
    family: Family,
    control: &mut World,
    protected: &mut World,
) -> Result<(Outcome, Outcome)> {
    let begin = Instant::now();
    let without = driver::attack(control, attack, family).context("without Tacit")?;
    protected.patience = SHORTEST_WAIT.max(begin.elapsed() * LONGER);
    let with = driver::attack(protected, attack, family).context("with Tacit")?;
    Ok((without, with))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_the_one_that_is_named_or_stands_beside() {
        let own = Path::new("/opt/bin/tacit-attack");
        let named = Path::new("/a/tacit");
        assert_eq!(agent(Some(named), Some("/b/tacit".into()), own), named);
        assert_eq!(agent(None, Some("/b/tacit".into()), own), Path::new("/b/tacit"));
        assert_eq!(agent(None, None, own), Path::new("/opt/bin/tacit"));
    }

    #[test]
    fn every_family_is_named_as_it_is_asked_for() {
        for family in Family::value_variants() {
            let args = Args::parse_from(["tacit-attack", "--family", family.label()]);
            assert_eq!(args.family, Some(*family));
        }
    }
}
