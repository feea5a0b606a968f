//! TFRecord framing: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload, all
//! little-endian (TensorFlow, `tensorflow/core/lib/io/record_writer.h`). A whole shard may be compressed with GZIP or
//! ZLIB, as TensorFlow's `TFRecordOptions` has it; which it is shows in its first bytes.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::bucket::{self, Blocks, Failure};
use crate::inflate::{Compression, Inflate};
use crate::{Cache, Error};

const HEADER: u64 = 12;
const FOOTER: u64 = 4;
/// No record is longer; TensorFlow's protocol buffers end at 2 GiB.
const MAX_PAYLOAD: u64 = 1 << 30;
/// A few images at a time; every open reader holds one.
const BUFFER: usize = 256 << 10;
/// Counting reads headers only, so filling a large buffer at each would be waste.
const HEADER_BUFFER: usize = 4 << 10;

/// CRC-32C, rotated and offset so that a checksum of bytes that hold checksums stays useful.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// One record of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where its header starts, in bytes from the start of the shard.
    pub offset: u64,
    /// Its index in the shard, from 0.
    pub index: u64,
    /// The payload.
    pub bytes: Vec<u8>,
    /// The payload's masked CRC-32C as stored.
    pub crc: u32,
}

impl Record {
    /// Whether the payload is the one that was written. It is apart from reading so that many threads can do it.
    pub fn verify(&self) -> bool {
        masked_crc(&self.bytes) == self.crc
    }
}

/// Reads the records of one shard in order: a file or an object, as it is or compressed as a whole.
pub struct Reader {
    path: PathBuf,
    input: Input,
    offset: u64,
    record: u64,
}

/// Where the bytes come from.
enum Input {
    /// Not looked into yet. Objects are asked for ahead, so looking waits until the first record is wanted.
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

impl Reader {
    /// Opens a shard at its beginning.
    ///
    /// # Errors
    /// The shard cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_at(path, 0, 0, None)
    }

    /// Opens a shard where [`Reader::offset`] and [`Reader::record`] once pointed; an object is read through the cache.
    ///
    /// # Errors
    /// The shard cannot be opened, or ends before `offset`, or so many records do not fit before it. Of an object, some
    /// of this is told by [`Reader::next`] only.
    pub fn open_at(
        path: &Path,
        offset: u64,
        record: u64,
        cache: Option<&Cache>,
    ) -> Result<Self, Error> {
        Self::open_with(path, offset, record, cache, BUFFER)
    }

    fn open_with(
        path: &Path,
        offset: u64,
        record: u64,
        cache: Option<&Cache>,
        buffer: usize,
    ) -> Result<Self, Error> {
        let raw = if crate::is_url(path) {
            let object = bucket::object(path)?;
            let blocks = Blocks::open(object, offset, cache.cloned());
            Raw::Bucket(blocks.map_err(|failure| failure.into_error("read", path))?)
        } else {
            let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
            Raw::File(BufReader::with_capacity(buffer, file))
        };
        let mut reader = Self {
            path: path.into(),
            input: Input::New(raw),
            offset,
            record,
        };
        if record > offset / (HEADER + FOOTER) {
            return Err(reader.corrupt("so many records do not fit before it".into()));
        }
        if !crate::is_url(path) {
            reader.start()?;
        }
        Ok(reader)
    }

    /// Where the next record starts, in bytes; of a compressed shard, in what it inflates to.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Index of the next record, from 0.
    pub fn record(&self) -> u64 {
        self.record
    }

    /// Whether what is left of the shard is on its way, so that it is time to open the one after it. Never true of a
    /// file, which can be opened when it is needed.
    pub fn is_ending(&self) -> bool {
        match &self.input {
            Input::Plain {
                raw: Raw::Bucket(blocks),
                ..
            } => blocks.is_ending(),
            Input::Inflated(inflate) => match inflate.get_ref() {
                Raw::Bucket(blocks) => blocks.is_ending(),
                Raw::File(_) => false,
            },
            _ => false,
        }
    }

    /// Reads the next record, or `None` where the shard ends cleanly. The length is checked against its CRC; the
    /// payload is not, see [`Record::verify`].
    ///
    /// # Errors
    /// The shard cannot be read, or is not TFRecord framing from here on.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would go on after an error; a damaged shard cannot"
    )]
    pub fn next(&mut self) -> Result<Option<Record>, Error> {
        let Some(length) = self.header()? else {
            return Ok(None);
        };
        // `header` has compared the length with what the shard holds, unless that is not known.
        let room = match self.input {
            Input::Plain { .. } => length,
            _ => length.min(BUFFER as u64),
        };
        let mut bytes = Vec::with_capacity(room as usize);
        let payload = self.by_ref().take(length).read_to_end(&mut bytes);
        payload.map_err(|e| self.failed(e))?;
        let mut crc = [0; FOOTER as usize];
        if bytes.len() as u64 != length || self.fill(&mut crc)? != crc.len() {
            return Err(self.short(length));
        }
        let record = Record {
            offset: self.offset,
            index: self.record,
            bytes,
            crc: u32::from_le_bytes(crc),
        };
        self.advance(length);
        Ok(Some(record))
    }

    /// Steps over the next record, without reading its payload if it can; false where the shard ends cleanly.
    fn skip(&mut self) -> Result<bool, Error> {
        let Some(length) = self.header()? else {
            return Ok(false);
        };
        let rest = length + FOOTER;
        let to = self.offset + HEADER + rest;
        let passed = match &mut self.input {
            Input::Plain { raw, .. } => raw.seek(to).map(|()| rest),
            _ => io::copy(&mut self.by_ref().take(rest), &mut io::sink()),
        };
        if passed.map_err(|e| self.failed(e))? != rest {
            return Err(self.short(length));
        }
        self.advance(length);
        Ok(true)
    }

    /// Reads a header and returns the payload's length, which a shard that is not compressed is long enough for.
    fn header(&mut self) -> Result<Option<u64>, Error> {
        self.start()?;
        let mut header = [0; HEADER as usize];
        let mut rest = None;
        if let Input::Plain { end, .. } = self.input {
            let remaining = end - self.offset;
            if remaining == 0 {
                return Ok(None);
            }
            if remaining < HEADER {
                return Err(self.corrupt(tail(remaining)));
            }
            rest = Some(remaining - HEADER);
        }
        let got = self.fill(&mut header)?;
        if got < header.len() {
            return match rest {
                Some(_) => Err(self.shrunk()),
                None if got == 0 => Ok(None),
                None => Err(self.corrupt(tail(got as u64))),
            };
        }
        let Some(length) = length(&header) else {
            return Err(self.corrupt("the checksum of the length is wrong".into()));
        };
        if length > MAX_PAYLOAD {
            return Err(self.corrupt(format!("a payload of {length} bytes is over 1 GiB")));
        }
        if let Some(rest) = rest
            && length + FOOTER > rest
        {
            return Err(self.corrupt(format!(
                "a payload of {length} bytes and its checksum do not fit in the {rest} that follow"
            )));
        }
        Ok(Some(length))
    }

    /// Looks whether the shard is compressed, and goes to the offset.
    fn start(&mut self) -> Result<(), Error> {
        let mut raw = match std::mem::replace(&mut self.input, Input::Lost(io::empty())) {
            Input::New(raw) => raw,
            Input::Lost(_) => return Err(self.corrupt("it could not be opened before".into())),
            started => {
                self.input = started;
                return Ok(());
            }
        };
        let offset = self.offset;
        let (end, compression) = look(&mut raw, offset).map_err(|e| self.failed(e))?;
        let Some(compression) = compression else {
            if offset > end {
                return Err(self.corrupt(format!("the file has only {end} bytes")));
            }
            self.input = Input::Plain { raw, end };
            return Ok(());
        };
        self.input = Input::Inflated(Inflate::new(raw, compression));
        let passed = io::copy(&mut self.by_ref().take(offset), &mut io::sink());
        let passed = passed.map_err(|e| self.failed(e))?;
        if passed != offset {
            return Err(self.corrupt(format!("the file inflates to only {passed} bytes")));
        }
        Ok(())
    }

    fn advance(&mut self, length: u64) {
        self.offset += HEADER + length + FOOTER;
        self.record += 1;
    }

    fn by_ref(&mut self) -> &mut dyn Read {
        match &mut self.input {
            Input::Plain { raw, .. } | Input::New(raw) => raw,
            Input::Inflated(inflate) => inflate,
            Input::Lost(empty) => empty,
        }
    }

    /// Reads as many bytes as there are, at most so many.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, Error> {
        let mut got = 0;
        while got < bytes.len() {
            match self.by_ref().read(&mut bytes[got..]) {
                Ok(0) => break,
                Ok(count) => got += count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(got)
    }

    /// The end came inside a payload or its checksum.
    fn short(&self, length: u64) -> Error {
        match self.input {
            Input::Inflated(_) => self.corrupt(format!(
                "the file inflates to too few bytes for a payload of {length} and its checksum"
            )),
            _ => self.shrunk(),
        }
    }

    fn shrunk(&self) -> Error {
        self.corrupt("the file became shorter while it was read".into())
    }

    /// What a failed read means.
    fn failed(&self, error: io::Error) -> Error {
        if matches!(self.input, Input::Inflated(_)) && error.kind() == ErrorKind::InvalidData {
            return self.corrupt(error.to_string());
        }
        match error.downcast::<Failure>() {
            Ok(failure) => failure.into_error("read", &self.path),
            Err(error) => Error::io("read", &self.path, error),
        }
    }

    fn corrupt(&self, what: String) -> Error {
        Error::Corrupt {
            path: self.path.clone(),
            offset: self.offset,
            record: self.record,
            what,
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("path", &self.path)
            .field("offset", &self.offset)
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

/// The length of what is stored and how it is compressed; then the input stands at the offset, or at the beginning if it
/// is compressed.
fn look(raw: &mut Raw, offset: u64) -> io::Result<(u64, Option<Compression>)> {
    let end = match raw {
        Raw::File(file) => file.get_ref().metadata()?.len(),
        Raw::Bucket(blocks) => blocks.size(),
    };
    let compression = match raw {
        Raw::Bucket(blocks) => blocks.compression()?,
        Raw::File(file) => {
            let mut head = Vec::new();
            file.by_ref().take(HEADER).read_to_end(&mut head)?;
            Compression::of(&head)
        }
    };
    raw.seek(if compression.is_some() { 0 } else { offset })?;
    Ok((end, compression))
}

fn tail(bytes: u64) -> String {
    format!("the file ends with {bytes} bytes, too few for a record header")
}

/// What a header says, unless its checksum is wrong.
pub(crate) fn length(header: &[u8; HEADER as usize]) -> Option<u64> {
    let (length, crc) = header.split_first_chunk::<8>()?;
    (masked_crc(length).to_le_bytes() == crc).then(|| u64::from_le_bytes(*length))
}

/// Counts the records of a shard by walking its headers. Of an object, the number is kept in the cache.
///
/// # Errors
/// The shard cannot be read, a header is damaged, or bytes are left over at the end.
pub fn count(path: &Path, cache: Option<&Cache>) -> Result<u64, Error> {
    // No part of the object has this number.
    const COUNT: u64 = u64::MAX;
    let known = match cache {
        Some(cache) if crate::is_url(path) => Some((cache, bucket::object(path)?.identity())),
        _ => None,
    };
    if let Some((cache, identity)) = &known
        && let Some(bytes) = cache.get(identity, COUNT)
        && let Ok(bytes) = bytes.try_into()
    {
        return Ok(u64::from_le_bytes(bytes));
    }
    let mut reader = Reader::open_with(path, 0, 0, cache, HEADER_BUFFER)?;
    while reader.skip()? {}
    let count = reader.record();
    if let Some((cache, identity)) = &known {
        cache
            .put(identity, COUNT, &count.to_le_bytes())
            .map_err(|e| Error::io("write", cache.dir(), e))?;
    }
    Ok(count)
}

/// Writes one record.
///
/// # Errors
/// Whatever the writer says.
pub fn write(out: &mut impl Write, payload: &[u8]) -> io::Result<()> {
    let length = (payload.len() as u64).to_le_bytes();
    out.write_all(&length)?;
    out.write_all(&masked_crc(&length).to_le_bytes())?;
    out.write_all(payload)?;
    out.write_all(&masked_crc(payload).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(payloads: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for payload in payloads {
            write(&mut bytes, payload).unwrap();
        }
        bytes
    }

    /// Reads and counts a file of these bytes; both must agree.
    fn check(bytes: &[u8]) -> Result<Vec<Record>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        crate::write_atomic(&path, &[bytes]).unwrap();
        let read = || {
            let mut reader = Reader::open(&path)?;
            let mut records = Vec::new();
            while let Some(record) = reader.next()? {
                records.push(record);
            }
            assert_eq!(reader.offset(), bytes.len() as u64);
            Ok(records)
        };
        let records: Result<Vec<Record>, Error> = read();
        match (&records, count(&path, None)) {
            (Ok(records), Ok(counted)) => assert_eq!(records.len() as u64, counted),
            (Err(read), Err(counted)) => assert_eq!(read.to_string(), counted.to_string()),
            (read, counted) => panic!("read {read:?}, counted {counted:?}"),
        }
        records
    }

    fn check_corrupt(bytes: &[u8], record: u64, offset: u64, what: &str) {
        match check(bytes).unwrap_err() {
            Error::Corrupt {
                offset: o,
                record: r,
                what: w,
                ..
            } => {
                assert_eq!((r, o), (record, offset), "{w}");
                assert!(w.contains(what), "{w}");
            }
            other => panic!("{other}"),
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// notes/reference-vectors.json, `crc32c_123456789` and `tfrecord`.
    #[test]
    fn bytes_are_the_reference_vectors() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
        for (payload, expected) in [
            ("", "000000000000000029039807d8ea82a2"),
            ("a", "01000000000000000175de4161786ee428"),
            ("hello", "0500000000000000eab2043e68656c6c6fbb1f1c19"),
        ] {
            assert_eq!(hex(&framed(&[payload.as_bytes()])), expected);
        }
    }

    #[test]
    fn records_come_back_with_offset_and_index() {
        let records = check(&framed(&[b"hello", b"", b"a"])).unwrap();
        let seen: Vec<_> = records
            .iter()
            .map(|r| (r.offset, r.index, &r.bytes[..], r.verify()))
            .collect();
        assert_eq!(
            seen,
            [
                (0, 0, &b"hello"[..], true),
                (21, 1, b"", true),
                (37, 2, b"a", true)
            ]
        );
    }

    #[test]
    fn reading_goes_on_where_an_earlier_reader_stood() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        crate::write_atomic(&path, &[&framed(&[b"hello", b"a", b"b"])]).unwrap();
        let mut first = Reader::open(&path).unwrap();
        first.next().unwrap();
        let mut second = Reader::open_at(&path, first.offset(), first.record(), None).unwrap();
        assert_eq!(second.next().unwrap(), first.next().unwrap());
        let past = Reader::open_at(&path, 1000, 7, None)
            .unwrap_err()
            .to_string();
        assert!(past.contains("only 55 bytes"), "{past}");
        let absurd = Reader::open_at(&path, 21, u64::MAX, None).unwrap_err();
        assert!(absurd.to_string().contains("do not fit before it"));
    }

    #[test]
    fn an_empty_file_has_no_records() {
        assert_eq!(check(&[]).unwrap(), []);
    }

    #[test]
    fn short_header() {
        check_corrupt(&framed(&[b"a"])[..11], 0, 0, "too few for a record header");
    }

    #[test]
    fn trailing_bytes() {
        let mut bytes = framed(&[b"hello", b"a"]);
        let end = bytes.len() as u64;
        bytes.extend(b"tail");
        check_corrupt(&bytes, 2, end, "ends with 4 bytes");
    }

    #[test]
    fn bad_length_crc() {
        let mut bytes = framed(&[b"hello", b"a"]);
        bytes[21 + 8] ^= 1;
        check_corrupt(&bytes, 1, 21, "checksum of the length");
    }

    #[test]
    fn bad_data_crc() {
        let mut bytes = framed(&[b"hello", b"a"]);
        bytes[12] ^= 1;
        let verified: Vec<_> = check(&bytes).unwrap().iter().map(Record::verify).collect();
        assert_eq!(verified, [false, true]);
    }

    fn header(length: u64) -> Vec<u8> {
        let length = length.to_le_bytes();
        [&length[..], &masked_crc(&length).to_le_bytes()].concat()
    }

    #[test]
    fn absurd_length() {
        check_corrupt(&header(u64::MAX), 0, 0, "over 1 GiB");
        check_corrupt(&header(1 << 30), 0, 0, "do not fit");
    }

    #[test]
    fn truncated_payload() {
        let bytes = framed(&[b"a", b"hello"]);
        check_corrupt(&bytes[..bytes.len() - 5], 1, 17, "do not fit in the 4");
        // Only the checksum is cut.
        check_corrupt(&bytes[..bytes.len() - 1], 1, 17, "do not fit in the 8");
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    /// As [`check`], without its question where the reader stands: that is a place in the inflated bytes.
    fn check_compressed(bytes: &[u8]) -> Result<Vec<Record>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        crate::write_atomic(&path, &[bytes]).unwrap();
        let mut reader = Reader::open(&path)?;
        let mut records = Vec::new();
        while let Some(record) = reader.next()? {
            records.push(record);
        }
        assert_eq!(count(&path, None)?, records.len() as u64);
        for record in &records {
            let mut there = Reader::open_at(&path, record.offset, record.index, None)?;
            assert_eq!(there.next()?.as_ref(), Some(record));
        }
        Ok(records)
    }

    /// Larger than every buffer, and not all alike.
    fn large() -> Vec<u8> {
        let payloads: Vec<Vec<u8>> = (0..40u32)
            .map(|i| (0..i * 997).map(|j| (j * j >> (i % 7)) as u8).collect())
            .collect();
        let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
        framed(&payloads)
    }

    #[test]
    fn compressed_shards_hold_the_same_records() {
        let plain = large();
        let expected = check(&plain).unwrap();
        assert_eq!(check_compressed(&gzip(&plain)).unwrap(), expected);
        assert_eq!(check_compressed(&zlib(&plain)).unwrap(), expected);
        // Files that were joined, cut anywhere.
        let (head, tail) = plain.split_at(12_345);
        let joined = [gzip(head), gzip(tail)].concat();
        assert_eq!(check_compressed(&joined).unwrap(), expected);
        assert_eq!(check_compressed(&gzip(&[])).unwrap(), []);
    }

    #[test]
    fn compressed_shards_that_are_cut_off_or_changed_are_damaged() {
        let plain = large();
        let expected = check(&plain).unwrap();
        for whole in [gzip(&plain), zlib(&plain)] {
            for end in [whole.len() - 1, whole.len() - 5, whole.len() / 2, 20] {
                let error = check_compressed(&whole[..end]).unwrap_err().to_string();
                assert!(error.contains("the compressed data is damaged"), "{error}");
            }
            let longer = [&whole[..], b"tail"].concat();
            let error = check_compressed(&longer).unwrap_err().to_string();
            assert!(error.contains("the compressed data is damaged"), "{error}");
            let mut changed = whole.clone();
            changed[whole.len() / 2] ^= 0x10;
            match check_compressed(&changed) {
                Err(Error::Corrupt { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        // Records that are cut off inside are found as in a plain shard.
        let cut = &plain[..plain.len() - 5];
        let error = check_compressed(&gzip(cut)).unwrap_err();
        assert!(
            error.to_string().contains("inflates to too few bytes"),
            "{error}"
        );
        let tail = [&plain[..], b"tail"].concat();
        let error = check_compressed(&gzip(&tail)).unwrap_err();
        assert!(error.to_string().contains("ends with 4 bytes"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        crate::write_atomic(&path, &[&gzip(&plain)]).unwrap();
        let past = Reader::open_at(&path, 1 << 30, expected.len() as u64, None).unwrap_err();
        assert!(past.to_string().contains("inflates to only"), "{past}");
    }

    /// The low bytes of a length may be those that GZIP begins with.
    #[test]
    fn a_record_whose_length_looks_like_gzip_is_a_record() {
        let payload = vec![7; 0x08_8b1f];
        assert_eq!(framed(&[&payload])[..3], [0x1f, 0x8b, 8]);
        assert_eq!(check(&framed(&[&payload])).unwrap()[0].bytes, payload);
    }

    #[test]
    fn a_missing_file_is_an_io_error() {
        let error = count(Path::new("absent"), None).unwrap_err();
        assert!(matches!(error, Error::Io { action: "open", .. }), "{error}");
    }
}
