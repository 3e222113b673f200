//! `tacit-cni`: a chained CNI plugin that lets a container runtime make the sandbox of a pod only when the agent of this node
//! knows the pod, and covers it.
//!
//! It follows the CNI specification: the command and its arguments are in the environment, the configuration is on stdin, and
//! the result or the error is on stdout. It changes no interface and no address, so only `ADD` does anything.

#![forbid(unsafe_code)]

mod ask;
mod pod;
mod request;

use std::{
    env,
    io::{self, Read as _},
    process::ExitCode,
};

use request::{Failure, Request};

/// Most bytes of a configuration. The result of the plugins before this one is part of it.
const CONFIGURATION_MAX_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let mut text = String::new();
    let read = io::stdin().take(CONFIGURATION_MAX_BYTES).read_to_string(&mut text);
    let done = match read {
        Ok(_) => run(&variable("CNI_COMMAND"), &variable("CNI_ARGS"), &text),
        Err(error) => {
            Err(Failure::configuration(format!("cannot read the configuration from stdin: {error}")))
        }
    };
    match done {
        Ok(result) => {
            print!("{result}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("{}", failure.json(&text));
            ExitCode::FAILURE
        }
    }
}

/// Runs a command. Returns what is to be printed.
fn run(command: &str, arguments: &str, text: &str) -> Result<String, Failure> {
    match command {
        "ADD" => {
            let request = Request::parse(text)?;
            if let Some(pod) = pod::of_arguments(arguments)?
                && !request.is_exempt(&pod)
            {
                ask::until_covered(&request, &pod)?;
            }
            Ok(request.result)
        }
        // Nothing was made, so nothing is to be removed or checked. A pod must be removable without an agent.
        "DEL" | "CHECK" | "GC" | "STATUS" => Ok(String::new()),
        "VERSION" => Ok(request::versions()),
        other => Err(Failure::environment(format!(
            "unknown CNI_COMMAND {other:?}: expected ADD, DEL, CHECK, GC, STATUS or VERSION"
        ))),
    }
}

#[cfg(test)]
mod tests;
