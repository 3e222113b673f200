//! `tacit`: the node agent, the certificate authority and the operator's commands.
#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsStr,
    io::{IsTerminal as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};
use tacit::{
    app::{self, AppError, Ended},
    authority,
    cni::{self, Removed},
    config::{self, Config},
    telemetry::{admin, doctor, log, status},
};
use tacit_kernel::{KernelError, VerifierLog, cgroup, connect_programs, probe};
use tokio::signal::unix::{SignalKind, signal};

/// Encrypts and authenticates pod-to-pod traffic of this node, without sidecars.
#[derive(Debug, Parser)]
#[command(name = "tacit", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node agent until SIGTERM or SIGINT.
    Agent {
        /// Configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// When an agent serves this node already, wait for its end and take over from it, so that no connection notices;
        /// else that is an error.
        #[arg(long)]
        stand_by: bool,
        /// Log more, and write the whole verifier log of a refused program to a file in the temporary folder;
        /// TACIT_LOG takes a filter such as `info,tacit::proxy::outbound=trace`.
        #[arg(short, long)]
        verbose: bool,
        /// Format of log lines.
        #[arg(long, value_enum, default_value_t = LogFormat::Text)]
        log_format: LogFormat,
    },
    /// Run the certificate authority of a mesh until SIGTERM or SIGINT.
    Authority {
        /// Configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Log more; TACIT_LOG takes a filter such as `info,tacit_authority=trace`.
        #[arg(short, long)]
        verbose: bool,
        /// Format of log lines.
        #[arg(long, value_enum, default_value_t = LogFormat::Text)]
        log_format: LogFormat,
    },
    /// Show what the running agent does.
    Status {
        /// The agent's operator socket.
        #[arg(long, value_name = "PATH", default_value = "/run/tacit/agent.sock")]
        socket: PathBuf,
        /// Output format.
        #[arg(short, long, value_enum, default_value_t = Output::Pods)]
        output: Output,
    },
    /// Ask the agent whether it is well, for the probes of a kubelet; ends with 1 and says why when it is not.
    Probe {
        /// The question.
        #[arg(value_enum)]
        what: Health,
        /// The agent's operator socket.
        #[arg(long, value_name = "PATH", default_value = "/run/tacit/agent.sock")]
        socket: PathBuf,
    },
    /// Try what this kernel can do; ends with 78 when the agent cannot run on it.
    Doctor {
        /// Pin path of the agent, which need not run.
        #[arg(long, value_name = "PATH", default_value = config::PIN_PATH)]
        pin_path: PathBuf,
        /// Output format.
        #[arg(short, long, value_enum, default_value_t = Output::Pods)]
        output: Output,
        /// Attack two nodes made in namespaces here, with and without Tacit; ends with 1 unless every attack was held
        /// that succeeds without it. Starts the program tacit-attack, from the folder of this program or from PATH.
        #[arg(long)]
        attack: bool,
        /// With --attack: only attacks whose GROUP::NAME contains this.
        #[arg(long, value_name = "NAME", requires = "attack")]
        only: Option<String>,
        /// With --attack: only this family: v4, v6 or mapped.
        #[arg(long, value_name = "FAMILY", requires = "attack", value_parser = ["v4", "v6", "mapped"])]
        family: Option<String>,
    },
    /// Ask about policies.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Detach and remove everything that an agent left pinned in the kernel.
    Uninstall {
        /// Configuration file of that agent.
        #[arg(long, value_name = "FILE", required_unless_present = "pin_path")]
        config: Option<PathBuf>,
        /// Pin path of that agent, if its configuration file no longer exists.
        #[arg(long, value_name = "PATH", conflicts_with = "config")]
        pin_path: Option<PathBuf>,
        /// Also remove the CNI plugin from the configurations in this folder. Default: the folder of the configuration file.
        #[arg(long, value_name = "PATH", requires = "cni_program_folder")]
        cni_config_folder: Option<PathBuf>,
        /// The folder of the plugin's program.
        #[arg(long, value_name = "PATH", requires = "cni_config_folder")]
        cni_program_folder: Option<PathBuf>,
        /// Then stay until SIGTERM or SIGINT: what a DaemonSet runs has to.
        #[arg(long)]
        stay: bool,
    },
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Say whether a connection is allowed, which rule decides, and why; ends with 0 when it is, 1 when it is not, 2 when
    /// that cannot be told.
    Explain {
        /// Client: namespace/name of a workload, or an IP address.
        from: String,
        /// Server: namespace/name of a workload, or an IP address.
        to: String,
        /// Port the destination listens on.
        port: String,
        /// The agent's operator socket; every agent knows all workloads.
        #[arg(long, value_name = "PATH", default_value = "/run/tacit/agent.sock")]
        socket: PathBuf,
        /// Output format.
        #[arg(short, long, value_enum, default_value_t = Output::Pods)]
        output: Output,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Health {
    /// It answers.
    Live,
    /// It takes flows, or stands by to take over.
    Ready,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Pods,
    Json,
}

fn main() -> ExitCode {
    let command = Args::parse().command;
    let no_answer = matches!(command, Command::Policy(_)).then_some(NO_ANSWER);
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tacit: {error:#}");
            ExitCode::from(no_answer.unwrap_or_else(|| exit_code(&error)))
        }
    }
}

/// Exit code of `policy explain` without an answer: 0 and 1 are answers.
const NO_ANSWER: u8 = 2;

/// Returns the exit code of the process: the error's own, or 1.
fn exit_code(error: &anyhow::Error) -> u8 {
    let app = error.downcast_ref::<AppError>().map(AppError::exit_code);
    let kernel = error.downcast_ref::<KernelError>().map(KernelError::exit_code);
    app.or(kernel).unwrap_or(1)
}

fn run(command: Command) -> Result<ExitCode> {
    let done = match command {
        Command::Agent { config, stand_by, verbose, log_format } => {
            agent(&config, stand_by, verbose, log_format)
        }
        Command::Authority { config, verbose, log_format } => run_authority(&config, verbose, log_format),
        Command::Status { socket, output } => show_status(&socket, output),
        Command::Probe { what, socket } => probe(what, &socket),
        Command::Policy(PolicyCommand::Explain { from, to, port, socket, output }) => {
            return explain(&socket, [&from, &to, &port], output);
        }
        Command::Doctor { attack: true, output, only, family, .. } => attack(output, only, family),
        Command::Doctor { pin_path, output, .. } => show_doctor(&pin_path, output),
        Command::Uninstall { config, pin_path, cni_config_folder, cni_program_folder, stay } => {
            uninstall(config, pin_path, cni_config_folder.zip(cni_program_folder), stay)
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn uninstall(
    config: Option<PathBuf>,
    pin_path: Option<PathBuf>,
    cni_folders: Option<(PathBuf, PathBuf)>,
    stay: bool,
) -> Result<()> {
    let config = config.map(|file| Config::read(&file)).transpose()?;
    let configured = config.as_ref().and_then(|config| config.cni.clone());
    let cni_folders = cni_folders.or(configured.map(|cni| (cni.config_folder, cni.program_folder)));
    let pin_path = config.map(|config| config.pin_path).or(pin_path);
    let pin_path = pin_path.context("name the configuration file or the pin path")?;
    let removed = tacit_kernel::uninstall(&pin_path)?;
    println!("removed {removed} pins under {}", pin_path.display());
    // After the pins: that fails while an agent runs, which would install the plugin again.
    if let Some((configurations, programs)) = cni_folders {
        match cni::remove(&configurations, &programs)? {
            Removed::Nothing => {}
            Removed::All => {
                println!(
                    "removed the CNI plugin from {} and {}",
                    configurations.display(),
                    programs.display()
                );
            }
            Removed::ProgramInUse(results) => println!(
                "removed the CNI plugin from {}; its program stays in {}, because {} names it: run this again when all \
                 pods of the node were made anew",
                configurations.display(),
                programs.display(),
                results.display()
            ),
        }
    }
    if !stay {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted.context("listen for SIGINT"),
        }
    })
}

fn agent(config: &std::path::Path, stand_by: bool, verbose: bool, format: LogFormat) -> Result<()> {
    let lines = start_log(verbose, format)?;
    let config = Config::read(config)?;
    // For control alone; flows have threads of their own.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().context("start the runtime")?;
    let verifier_log = if verbose { VerifierLog::Folder(std::env::temp_dir()) } else { VerifierLog::Tail };
    match runtime.block_on(app::run(config, verifier_log, stand_by))? {
        Ended::ByRequest => Ok(()),
        Ended::StartAgain => {
            // Writes the last ones.
            drop(lines);
            Err(start_again()).context("start again")
        }
    }
}

/// Replaces this process by a new one with the same arguments. Returns only when that fails.
fn start_again() -> std::io::Error {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    // The file may have been replaced.
    let own = env::current_exe().ok().filter(|path| path.exists());
    let program = own.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    std::process::Command::new(program).arg0(name).args(arguments).exec()
}

fn run_authority(config: &std::path::Path, verbose: bool, format: LogFormat) -> Result<()> {
    let _lines = start_log(verbose, format)?;
    let config = tacit_authority::config::Config::read(config)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(authority::run(config))?;
    Ok(())
}

fn start_log(verbose: bool, format: LogFormat) -> Result<impl Drop> {
    let format = match format {
        LogFormat::Text => log::Format::Human,
        LogFormat::Json => log::Format::Json,
    };
    Ok(log::init(format, verbose.then_some("debug"))?)
}

/// The attack suite, a program of its own: the agent holds no code that attacks.
const ATTACK: &str = "tacit-attack";

/// Replaces this process by the attack suite, which attacks this program. Returns only when that fails.
fn attack(output: Output, only: Option<String>, family: Option<String>) -> Result<()> {
    let own = env::current_exe().context("path of this program")?;
    let path = env::var_os("PATH").unwrap_or_default();
    let suite = find_attack(&own, &path).with_context(|| {
        format!(
            "cannot attack: {ATTACK} is neither in the folder of {} nor on PATH. Put it there: the container image has it in \
             /usr/bin, and `cargo build --release --package {ATTACK}` builds it",
            own.display()
        )
    })?;
    let mut command = std::process::Command::new(&suite);
    command.arg("--agent").arg(&own);
    command.args(["-o", if matches!(output, Output::Json) { "json" } else { "table" }]);
    let choices = [("--only", only), ("--family", family)];
    command.args(choices.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?])).flatten());
    Err(command.exec()).with_context(|| format!("start {}", suite.display()))
}

/// Returns the attack suite that stands beside the program `own`, or else the first one on `path`.
fn find_attack(own: &Path, path: &OsStr) -> Option<PathBuf> {
    let beside = own.with_file_name(ATTACK);
    let on_path = env::split_paths(path).map(|folder| folder.join(ATTACK));
    std::iter::once(beside).chain(on_path).find(|file| file.is_file())
}

fn show_doctor(pin_path: &std::path::Path, output: Output) -> Result<()> {
    let report = probe::everything(pin_path);
    // Without cgroup v2 the report says so.
    let at_root =
        cgroup::mount_point().ok().and_then(|root| connect_programs(&root).ok()).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&doctor::json(&report, &at_root))?)?,
        Output::Pods => write!(out, "{}", doctor::render(&report, &at_root, out.is_terminal()))?,
    }
    Ok(report.verdict().map_err(KernelError::from)?)
}

fn show_status(socket: &std::path::Path, output: Output) -> Result<()> {
    let status = client_runtime()?.block_on(admin::fetch_status(socket))?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?,
        Output::Pods => write!(out, "{}", status::render(&status, out.is_terminal()))?,
    }
    Ok(())
}

fn probe(what: Health, socket: &std::path::Path) -> Result<()> {
    let health = match what {
        Health::Live => admin::Health::Live,
        Health::Ready => admin::Health::Ready,
    };
    Ok(client_runtime()?.block_on(admin::fetch_health(socket, health))?)
}

/// The exit code is the verdict: 0 allows, 1 denies.
fn explain(socket: &std::path::Path, [from, to, port]: [&str; 3], output: Output) -> Result<ExitCode> {
    let asked = admin::fetch_explanation(socket, from, to, port);
    let explanation = client_runtime()?.block_on(asked)?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&explanation)?)?,
        Output::Pods => write!(out, "{explanation}")?,
    }
    Ok(ExitCode::from(u8::from(!explanation.allow)))
}

fn client_runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn each_command_explains_itself() {
        let mut command = Args::command().term_width(100);
        command.build();
        assert_help(&mut command);
    }

    /// Compares the output of `--help`, and that of all commands below.
    fn assert_help(command: &mut clap::Command) {
        let name = command.get_bin_name().unwrap_or(command.get_name()).replace(' ', "_");
        insta::with_settings!({ omit_expression => true }, {
            insta::assert_snapshot!(format!("help_{name}"), command.render_long_help());
        });
        command.get_subcommands_mut().filter(|command| command.get_name() != "help").for_each(assert_help);
    }

    #[test]
    fn the_attack_suite_is_looked_for_beside_the_program_and_then_on_the_path() {
        let folder = env::temp_dir().join(format!("tacit-find-attack-{}", std::process::id()));
        let (beside, on_path) = (folder.join("a"), folder.join("b"));
        for folder in [&beside, &on_path] {
            std::fs::create_dir_all(folder).expect("created");
        }
        let (own, path) = (beside.join("tacit"), on_path.as_os_str());
        assert_eq!(find_attack(&own, path), None);
        std::fs::write(on_path.join(ATTACK), "").expect("written");
        assert_eq!(find_attack(&own, path), Some(on_path.join(ATTACK)));
        std::fs::write(beside.join(ATTACK), "").expect("written");
        assert_eq!(find_attack(&own, path), Some(beside.join(ATTACK)));
        std::fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_kernel_that_cannot_do_it_ends_with_78_and_anything_else_with_1() {
        let unsupported =
            || KernelError::from(probe::Unsupported { kernel: "5.10.0".to_owned(), missing: Vec::new() });
        assert_eq!(exit_code(&unsupported().into()), 78);
        assert_eq!(exit_code(&AppError::from(unsupported()).into()), 78);
        assert_eq!(exit_code(&anyhow::Error::from(AppError::from(unsupported())).context("start")), 78);
        assert_eq!(exit_code(&KernelError::NoObject.into()), 1);
        assert_eq!(exit_code(&anyhow::anyhow!("something else")), 1);
    }
}
