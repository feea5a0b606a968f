//! What ends the program, and the exit code that says what to do about it.

use std::fmt;
use std::process::ExitCode;

/// Interrupted and resumable, as in sysexits.h (EX_TEMPFAIL).
pub(crate) const INTERRUPTED: u8 = 75;

/// What went wrong, by who can mend it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The spec or the arguments.
    Spec(String),
    /// The input data.
    Input(String),
    /// The run.
    Run(String),
}

impl Failure {
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Spec(_) => 2,
            Failure::Input(_) => 3,
            Failure::Run(_) => 4,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Spec(text) | Failure::Input(text) | Failure::Run(text)) = self;
        f.write_str(text)
    }
}

impl From<spec::Errors> for Failure {
    fn from(e: spec::Errors) -> Self {
        Failure::Spec(e.to_string())
    }
}

impl From<train::Error> for Failure {
    fn from(e: train::Error) -> Self {
        use train::Error;
        let text = e.to_string();
        match e {
            Error::Different { .. }
            | Error::NoCheckpoint { .. }
            | Error::Store(store::Error::Unsupported { .. })
            | Error::Shards {
                source: store::Error::Pattern { .. } | store::Error::Unsupported { .. },
                ..
            } => Failure::Spec(text),
            e if e.is_of_input() => Failure::Input(text),
            _ => Failure::Run(text),
        }
    }
}

impl From<engine::Error> for Failure {
    fn from(e: engine::Error) -> Self {
        train::Error::from(e).into()
    }
}

impl From<store::Error> for Failure {
    fn from(e: store::Error) -> Self {
        match e {
            // Of shards that a command was given.
            store::Error::NoMatch { .. } | store::Error::Corrupt { .. } => {
                Failure::Input(e.to_string())
            }
            e => train::Error::from(e).into(),
        }
    }
}
