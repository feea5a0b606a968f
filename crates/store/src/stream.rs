//! The bytes of a shard in order: of a file or an object, as they are stored or inflated.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};

use crate::bucket::{self, Blocks, Failure};
use crate::inflate::{Compression, Inflate};
use crate::{Cache, Error};

/// Small samples come many at a time, and what is larger goes past it: an image is copied once. Every open stream of a
/// file holds one.
pub(crate) const BUFFER: usize = 16 << 10;
/// What shows how a shard is compressed.
const HEAD: u64 = 12;

/// A shard that is being read. Positions are those of the bytes that it stands for.
pub(crate) struct Stream {
    path: PathBuf,
    input: Input,
    at: u64,
    /// Whether ZLIB is looked for; a tar archive begins with a name, which may look like it.
    may_be_zlib: bool,
}

/// Where the bytes come from.
enum Input {
    /// Not looked into yet. Objects are asked for ahead, so looking waits until the first byte is wanted.
    New(Raw),
    /// As they are stored.
    Plain {
        raw: Raw,
        /// Length when it was opened.
        end: u64,
    },
    /// Compressed; how much there is shows at the end.
    Inflated(Inflate<Raw>),
    /// Opening failed.
    Lost(io::Empty),
}

enum Raw {
    File(BufReader<File>),
    Bucket(Blocks),
}

/// Why no bytes come.
pub(crate) enum Fault {
    /// What is there is not what it should be.
    Damaged(String),
    /// What is there cannot be reached.
    Error(Error),
}

impl Read for Raw {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(out),
            Self::Bucket(blocks) => blocks.read(out),
        }
    }
}

impl Raw {
    fn seek(&mut self, at: u64) -> io::Result<()> {
        match self {
            Self::File(file) => {
                // Leaves the buffer alone where it reaches so far.
                let from = file.stream_position()?;
                file.seek_relative(at as i64 - from as i64)
            }
            Self::Bucket(blocks) => {
                blocks.seek(at);
                Ok(())
            }
        }
    }
}

impl Stream {
    /// Opens a shard at a position. Of a file, what [`Stream::start`] finds is found here.
    pub(crate) fn open(
        path: &Path,
        at: u64,
        cache: Option<&Cache>,
        buffer: usize,
        may_be_zlib: bool,
    ) -> Result<Self, Fault> {
        let is_url = crate::is_url(path);
        let raw = if is_url {
            let object = bucket::object(path).map_err(Fault::Error)?;
            let blocks = Blocks::open(object, at, cache.cloned());
            let blocks = blocks.map_err(|failure| failure.into_error("read", path));
            Raw::Bucket(blocks.map_err(Fault::Error)?)
        } else {
            let file = File::open(path).map_err(|e| Fault::Error(Error::io("open", path, e)))?;
            Raw::File(BufReader::with_capacity(buffer, file))
        };
        let mut stream = Self {
            path: path.into(),
            input: Input::New(raw),
            at,
            may_be_zlib,
        };
        if !is_url {
            stream.start()?;
        }
        Ok(stream)
    }

    /// Where the next byte is.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Whether what is left is on its way, of an object.
    pub(crate) fn is_ending(&self) -> bool {
        let raw = match &self.input {
            Input::Plain { raw, .. } => raw,
            Input::Inflated(inflate) => inflate.get_ref(),
            Input::New(_) | Input::Lost(_) => return false,
        };
        match raw {
            Raw::Bucket(blocks) => blocks.is_ending(),
            Raw::File(_) => false,
        }
    }

    /// How many bytes are left, where that is known: not of a compressed shard.
    pub(crate) fn remaining(&mut self) -> Result<Option<u64>, Fault> {
        self.start()?;
        Ok(match self.input {
            Input::Plain { end, .. } => Some(end - self.at),
            _ => None,
        })
    }

    /// Looks whether the shard is compressed, and goes to the position.
    fn start(&mut self) -> Result<(), Fault> {
        let mut raw = match std::mem::replace(&mut self.input, Input::Lost(io::empty())) {
            Input::New(raw) => raw,
            Input::Lost(_) => {
                return Err(Fault::Damaged("it could not be opened before".into()));
            }
            started => {
                self.input = started;
                return Ok(());
            }
        };
        let at = self.at;
        let (end, compression) = self.look(&mut raw).map_err(|e| self.failed(e))?;
        let Some(compression) = compression else {
            if at > end {
                return Err(Fault::Damaged(format!("the file has only {end} bytes")));
            }
            self.input = Input::Plain { raw, end };
            return Ok(());
        };
        self.input = Input::Inflated(Inflate::new(raw, compression));
        let passed = io::copy(&mut self.input().take(at), &mut io::sink());
        let passed = passed.map_err(|e| self.failed(e))?;
        if passed != at {
            return Err(Fault::Damaged(format!(
                "the file inflates to only {passed} bytes"
            )));
        }
        Ok(())
    }

    fn input(&mut self) -> &mut dyn Read {
        match &mut self.input {
            Input::Plain { raw, .. } | Input::New(raw) => raw,
            Input::Inflated(inflate) => inflate,
            Input::Lost(empty) => empty,
        }
    }

    /// Reads as many bytes as there are, at most so many.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, Fault> {
        self.start()?;
        let mut got = 0;
        while got < bytes.len() {
            match self.input().read(&mut bytes[got..]) {
                Ok(0) => break,
                Ok(count) => got += count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        self.at += got as u64;
        Ok(got)
    }

    /// Reads so many bytes, or those that are left. Memory grows with what comes, unless it is known to come.
    pub(crate) fn take(&mut self, length: u64) -> Result<Vec<u8>, Fault> {
        let room = self.remaining()?.unwrap_or(BUFFER as u64).min(length);
        let mut bytes = Vec::with_capacity(room as usize);
        let read = match &mut self.input {
            // Not through `dyn Read`, for which the memory would be filled with zeros first.
            Input::Plain {
                raw: Raw::File(file),
                ..
            } => file.take(length).read_to_end(&mut bytes),
            _ => self.input().take(length).read_to_end(&mut bytes),
        };
        read.map_err(|e| self.failed(e))?;
        self.at += bytes.len() as u64;
        Ok(bytes)
    }

    /// Steps over so many bytes, without reading them if it can, and says over how many there were.
    pub(crate) fn skip(&mut self, length: u64) -> Result<u64, Fault> {
        let to = self.at.saturating_add(length);
        self.start()?;
        let passed = match &mut self.input {
            Input::Plain { raw, end } => {
                let to = to.min(*end);
                raw.seek(to).map(|()| to - self.at)
            }
            _ => io::copy(&mut self.input().take(length), &mut io::sink()),
        };
        let passed = passed.map_err(|e| self.failed(e))?;
        self.at += passed;
        Ok(passed)
    }

    /// What it means that fewer bytes came than there should be.
    pub(crate) fn short(&self, of: &str) -> String {
        match self.input {
            Input::Inflated(_) => format!("the file inflates to too few bytes for {of}"),
            _ => "the file became shorter while it was read".into(),
        }
    }

    /// What a failed read means.
    fn failed(&self, error: io::Error) -> Fault {
        if matches!(self.input, Input::Inflated(_)) && error.kind() == ErrorKind::InvalidData {
            return Fault::Damaged(error.to_string());
        }
        Fault::Error(match error.downcast::<Failure>() {
            Ok(failure) => failure.into_error("read", &self.path),
            Err(error) => Error::io("read", &self.path, error),
        })
    }

    /// The length of what is stored and how it is compressed; then the input stands at the position, or at the beginning
    /// if it is compressed.
    fn look(&self, raw: &mut Raw) -> io::Result<(u64, Option<Compression>)> {
        let end = match raw {
            Raw::File(file) => file.get_ref().metadata()?.len(),
            Raw::Bucket(blocks) => blocks.size(),
        };
        let compression = match raw {
            Raw::Bucket(blocks) => blocks.compression()?,
            Raw::File(file) => {
                let mut head = Vec::new();
                file.by_ref().take(HEAD).read_to_end(&mut head)?;
                Compression::of(&head)
            }
        };
        let compression = compression.filter(|kind| self.may_be_zlib || *kind == Compression::Gzip);
        raw.seek(if compression.is_some() { 0 } else { self.at })?;
        Ok((end, compression))
    }
}
