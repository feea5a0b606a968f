//! A TOML file becomes a checked [`Run`].
//!
//! Layers, weakest first: defaults, the files that the file `extends`, the file, a `[profile.NAME]` in them,
//! `RUNNER__A__B` environment variables, `--set a.b=value`. What a run says is found wrong here, all of it at once,
//! each problem with the file, line and column of the key that said it ([`Errors`]).
//!
//! This crate reads those files and nothing else: it opens no data, asks for no environment, knows no device and turns no length into steps but
//! on request ([`Length::steps`]).

mod check;
mod device;
mod explain;
mod flags;
mod length;
mod load;
mod problem;
mod run;
mod schema;
mod sweep;
mod value;

pub use device::{Cards, Device};
pub use length::{Length, LengthError, Unit};
pub use load::{Layers, Loaded, load, parse, parse_over};
pub use problem::{Errors, Problem};
pub use run::{
    Augment, BestMetric, Checkpoint, Convolutions, Crop, Data, Decay, Decode, Ema, EmaEval, Eval,
    Instructions, Loss, Mixup, Mlflow, Mode, Model, Optimizer, OptimizerKind, Precision,
    Progressive, Recipe, Resize, Run, Schedule, ScheduleKind, Shortcut, Source, Stem, StemPool,
    Track, Train,
};
pub use schema::schema;
pub use sweep::{Cell, Halving, Sweep, sweep};
