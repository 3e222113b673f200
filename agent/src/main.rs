//! `tacit`: the node agent and the operator's commands.
#![forbid(unsafe_code)]

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};
use tacit::{
    app::{self, AppError},
    config::{self, Config},
    kernel::{self, KernelError, VerifierLog, probe},
    telemetry::{admin, doctor, log, status},
};

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
        /// Log more, and write the whole verifier log of a refused program to a file in the temporary folder;
        /// TACIT_LOG takes a filter such as `info,tacit::outbound=trace`.
        #[arg(short, long)]
        verbose: bool,
        /// How log lines look.
        #[arg(long, value_enum, default_value_t = LogFormat::Text)]
        log_format: LogFormat,
    },
    /// Show what the running agent does.
    Status {
        /// The agent's operator socket.
        #[arg(long, value_name = "PATH", default_value = "/run/tacit/agent.sock")]
        socket: PathBuf,
        /// Output format.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Try what this kernel can do; ends with 78 when the agent cannot run on it.
    Doctor {
        /// Where the agent would pin.
        #[arg(long, value_name = "PATH", default_value = config::PIN_PATH)]
        pin_path: PathBuf,
        /// Output format.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
        /// Attack two nodes made in namespaces here, with and without Tacit; ends with 1 unless every attack was held
        /// that succeeds without it.
        #[arg(long)]
        attack: bool,
        /// With --attack: only attacks whose name contains this.
        #[arg(long, value_name = "NAME", requires = "attack")]
        only: Option<String>,
        /// With --attack: only this family: v4, v6 or mapped.
        #[arg(long, value_name = "FAMILY", requires = "attack", value_parser = family)]
        family: Option<tacit_attack::Family>,
    },
    /// One step of an attack; started by `doctor --attack` inside a pod of its own.
    #[command(hide = true)]
    AttackStep {
        /// Name, target, marker, and what else the step takes.
        arguments: Vec<String>,
    },
    /// Detach and remove everything that an agent left pinned in the kernel.
    Uninstall {
        /// Configuration file of that agent.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tacit: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// What the process ends with: the errors that know better than 1 say so.
fn exit_code(error: &anyhow::Error) -> u8 {
    let app = error.downcast_ref::<AppError>().map(AppError::exit_code);
    let kernel = error.downcast_ref::<KernelError>().map(KernelError::exit_code);
    app.or(kernel).unwrap_or(1)
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Agent { config, verbose, log_format } => agent(&config, verbose, log_format),
        Command::Status { socket, output } => show_status(&socket, output),
        Command::Doctor { attack: true, output, only, family, .. } => attack(output, only, family),
        Command::Doctor { pin_path, output, .. } => show_doctor(&pin_path, output),
        Command::AttackStep { arguments } => tacit_attack::step::run(&arguments),
        Command::Uninstall { config } => {
            let config = Config::read(&config)?;
            let removed = kernel::uninstall(&config.pin_path)?;
            println!("removed {removed} pins under {}", config.pin_path.display());
            Ok(())
        }
    }
}

fn agent(config: &std::path::Path, verbose: bool, format: LogFormat) -> Result<()> {
    let format = match format {
        LogFormat::Text => log::Format::Human,
        LogFormat::Json => log::Format::Json,
    };
    log::init(format, verbose.then_some("debug"))?;
    let config = Config::read(config)?;
    // For control alone; flows have threads of their own.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().context("start the runtime")?;
    let verifier_log = if verbose { VerifierLog::Folder(std::env::temp_dir()) } else { VerifierLog::Tail };
    runtime.block_on(app::run(config, verifier_log))?;
    Ok(())
}

fn family(text: &str) -> Result<tacit_attack::Family, String> {
    tacit_attack::Family::parse(text).ok_or_else(|| format!("{text:?} is no family: write v4, v6 or mapped"))
}

fn attack(output: Output, only: Option<String>, family: Option<tacit_attack::Family>) -> Result<()> {
    let program = std::env::current_exe().context("path of this program")?;
    let json = matches!(output, Output::Json);
    let held = tacit_attack::run(&tacit_attack::Options { program, only, family, json })?;
    anyhow::ensure!(held, "not every attack was held, or proven to leak without Tacit");
    Ok(())
}

fn show_doctor(pin_path: &std::path::Path, output: Output) -> Result<()> {
    let report = probe::everything(pin_path);
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&doctor::json(&report))?)?,
        Output::Table => write!(out, "{}", doctor::render(&report, out.is_terminal()))?,
    }
    Ok(report.verdict().map_err(KernelError::from)?)
}

fn show_status(socket: &std::path::Path, output: Output) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let status = runtime.block_on(admin::fetch_status(socket))?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?,
        Output::Table => write!(out, "{}", status::render(&status, out.is_terminal()))?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
