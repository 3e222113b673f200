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
    app,
    config::Config,
    kernel,
    telemetry::{admin, log, status},
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
        /// Log more; TACIT_LOG takes a filter such as `info,tacit::outbound=trace`.
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
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Agent { config, verbose, log_format } => agent(&config, verbose, log_format),
        Command::Status { socket, output } => show_status(&socket, output),
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
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(app::run(config))?;
    Ok(())
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
