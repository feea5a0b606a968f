//! Standard output.

use std::io::Write;

/// Prints text. A reader that has gone away (`runner plan .. | head`) is no failure.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    if let Err(error) = written
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        eprintln!("standard output: cannot write: {error}");
    }
}
