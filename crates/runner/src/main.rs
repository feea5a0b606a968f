//! The front door: arguments in, exit code out.

mod bench;
mod bench_cuda;
mod cli;
mod config;
mod data;
mod doctor;
mod evaluate;
mod failure;
mod network;
mod output;
mod plan;
mod predict;
mod report;
mod run;
mod sweep;
mod tracking;
mod verify;
mod weights;

use std::process::ExitCode;

use clap::Parser;

use cli::{BenchArgs, Cli, Command, DataArgs, TrackArgs};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (cli.command, cli.config) {
        (Some(Command::Plan(args)), _) => plan::plan(&args),
        (Some(Command::Config(args)), _) => config::config(&args),
        (Some(Command::Eval(args)), _) => evaluate::evaluate(&args),
        (Some(Command::Predict(args)), _) => predict::predict(&args),
        (Some(Command::Import(args)), _) => weights::import(&args),
        (Some(Command::Export(args)), _) => weights::export(&args),
        (Some(Command::VerifyResume(args)), _) => verify::verify(&args),
        (Some(Command::Doctor(args)), _) => doctor::doctor(&args),
        (Some(Command::Data(DataArgs::Fake(args))), _) => data::fake(&args),
        (Some(Command::Data(DataArgs::Convert(args))), _) => data::convert(&args),
        (Some(Command::Data(DataArgs::LoadBigtable(args))), _) => data::load_bigtable(&args),
        (Some(Command::Data(DataArgs::Check(args))), _) => data::check(&args),
        (Some(Command::Data(DataArgs::Index(args))), _) => data::index(&args),
        (Some(Command::Bench(BenchArgs::Engine(args))), _) => bench::engine(&args),
        (Some(Command::Bench(BenchArgs::Input(args))), _) => bench::input(&args),
        (Some(Command::Bench(BenchArgs::Cuda(args))), _) => bench_cuda::cuda(&args),
        (Some(Command::Runs(args)), _) => report::runs(&args),
        (Some(Command::Report(args)), _) => report::report(&args),
        (Some(Command::Sweep(args)), _) => sweep::sweep(&args),
        (Some(Command::Track(TrackArgs::Sync(args))), _) => tracking::sync(&args),
        (None, Some(config)) => run::run(
            &cli::Spec {
                config,
                changes: cli.changes,
            },
            &run::How {
                fresh: cli.fresh,
                until: cli.until,
                tui: cli.tui,
            },
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
