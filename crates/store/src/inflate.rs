//! Shards that are compressed as a whole.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};

use flate2::bufread::MultiGzDecoder;
use flate2::{Decompress, FlushDecompress, Status};

use crate::tfrecord;

/// How a shard is compressed, by TensorFlow's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// RFC 1952, one member or several.
    Gzip,
    /// RFC 1950.
    Zlib,
}

impl Compression {
    /// What the first twelve bytes of a shard show. A record's header could begin as a compressed stream does, but a
    /// stream does not hold a header's checksum.
    pub(crate) fn of(head: &[u8]) -> Option<Self> {
        if let Ok(header) = head.try_into()
            && tfrecord::length(header).is_some()
        {
            return None;
        }
        match *head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            // Method 8, a window of at most 32 KiB, no dictionary, and a multiple of 31.
            [a, b, ..] if a & 15 == 8 && a >> 4 <= 7 && b & 32 == 0 => u16::from_be_bytes([a, b])
                .is_multiple_of(31)
                .then_some(Self::Zlib),
            _ => None,
        }
    }
}

/// The bytes that a compressed stream stands for. Damage, a stream that is cut off and bytes after its end are errors
/// of the kind [`ErrorKind::InvalidData`].
pub(crate) enum Inflate<R> {
    Gzip(Box<MultiGzDecoder<BufReader<R>>>),
    Zlib(Box<Zlib<R>>),
}

/// flate2's own reader of ZLIB takes a stream that is cut off for one that ends.
pub(crate) struct Zlib<R> {
    input: BufReader<R>,
    state: Decompress,
    has_ended: bool,
}

impl<R: Read> Inflate<R> {
    pub(crate) fn new(input: R, compression: Compression) -> Self {
        let input = BufReader::with_capacity(64 << 10, input);
        match compression {
            Compression::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(input))),
            Compression::Zlib => Self::Zlib(Box::new(Zlib {
                input,
                state: Decompress::new(true),
                has_ended: false,
            })),
        }
    }

    pub(crate) fn get_ref(&self) -> &R {
        match self {
            Self::Gzip(gzip) => gzip.get_ref().get_ref(),
            Self::Zlib(zlib) => zlib.input.get_ref(),
        }
    }
}

impl<R: Read> Read for Inflate<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(gzip) => gzip.read(out).map_err(|e| match e.kind() {
                ErrorKind::InvalidInput | ErrorKind::UnexpectedEof => damaged(&e.to_string()),
                _ => e,
            }),
            Self::Zlib(zlib) => zlib.read(out),
        }
    }
}

impl<R: Read> Read for Zlib<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let input = self.input.fill_buf()?;
            if self.has_ended {
                return match input {
                    [] => Ok(0),
                    _ => Err(damaged("bytes follow its end")),
                };
            }
            if out.is_empty() {
                return Ok(0);
            }
            // With no input left there may still be output.
            let is_last = input.is_empty();
            let (before_in, before_out) = (self.state.total_in(), self.state.total_out());
            let status = self
                .state
                .decompress(input, out, FlushDecompress::None)
                .map_err(|e| damaged(&e.to_string()))?;
            let used = (self.state.total_in() - before_in) as usize;
            let made = (self.state.total_out() - before_out) as usize;
            self.input.consume(used);
            self.has_ended = status == Status::StreamEnd;
            if made > 0 {
                return Ok(made);
            }
            if !self.has_ended && (is_last || used == 0) {
                return Err(damaged("it is cut off"));
            }
        }
    }
}

fn damaged(what: &str) -> io::Error {
    let what = format!("the compressed data is damaged: {what}");
    io::Error::new(ErrorKind::InvalidData, what)
}
