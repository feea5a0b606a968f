//! The front door: arguments in, exit code out.

mod cli;
mod evaluate;
mod failure;
mod network;
mod output;
mod plan;
mod run;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (cli.command, cli.config) {
        (Some(Command::Plan(args)), _) => plan::plan(&args),
        (Some(Command::Config(args)), _) => plan::config(&args),
        (Some(Command::Eval(args)), _) => evaluate::evaluate(&args),
        (None, Some(config)) => run::run(
            &cli::Spec {
                config,
                set: cli.set,
            },
            cli.fresh,
        ),
        (None, None) => unreachable!("clap asks for a spec where there is no command"),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{failure}");
            failure.code()
        }
    }
}
