//! The front door: arguments in, exit code out.

mod bench;
mod cli;
mod config;
mod data;
mod doctor;
mod evaluate;
mod failure;
mod network;
mod output;
mod plan;
mod run;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use cli::{BenchArgs, Cli, Command, DataArgs};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (cli.command, cli.config) {
        (Some(Command::Plan(args)), _) => plan::plan(&args),
        (Some(Command::Config(args)), _) => config::config(&args),
        (Some(Command::Eval(args)), _) => evaluate::evaluate(&args),
        (Some(Command::VerifyResume(args)), _) => verify::verify(&args),
        (Some(Command::Doctor(args)), _) => doctor::doctor(&args),
        (Some(Command::Data(DataArgs::Fake(args))), _) => data::fake(&args),
        (Some(Command::Data(DataArgs::Convert(args))), _) => data::convert(&args),
        (Some(Command::Data(DataArgs::Check(args))), _) => data::check(&args),
        (Some(Command::Bench(BenchArgs::Engine(args))), _) => bench::engine(&args),
        (Some(Command::Bench(BenchArgs::Input(args))), _) => bench::input(&args),
        (None, Some(config)) => run::run(
            &cli::Spec {
                config,
                changes: cli.changes,
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
