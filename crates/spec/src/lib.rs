//! A TOML file becomes a checked [`Run`].
//!
//! Layers, weakest first: defaults, the file, `--set a.b=value`. What a run says is found wrong here, all of it at
//! once, each problem with the file, line and column of the key that said it ([`Errors`]).
//!
//! This crate reads the file and nothing else: it opens no data, knows no device and turns no length into steps but
//! on request ([`Length::steps`]).

mod check;
mod length;
mod load;
mod problem;
mod run;

pub use length::{Length, LengthError, Unit};
pub use load::{load, parse};
pub use problem::{Errors, Problem};
pub use run::{
    Checkpoint, Crop, Data, Decay, Device, Eval, Loss, Mlflow, Mode, Model, Optimizer,
    OptimizerKind, Precision, Recipe, Resize, Run, Schedule, ScheduleKind, Source, Track, Train,
};
