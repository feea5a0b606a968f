//! TFRecord framing: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload, all
//! little-endian (TensorFlow, `tensorflow/core/lib/io/record_writer.h`). A whole shard may be compressed with GZIP or
//! ZLIB, as TensorFlow's `TFRecordOptions` has it; which it is shows in its first bytes.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::bucket;
use crate::stream::{BUFFER, Fault, Stream};
use crate::{Cache, Error};

const HEADER: u64 = 12;
const FOOTER: u64 = 4;
/// No record is longer; TensorFlow's protocol buffers end at 2 GiB.
const MAX_PAYLOAD: u64 = 1 << 30;
/// Counting reads headers only, so filling a large buffer at each would be waste.
const HEADER_BUFFER: usize = 4 << 10;

/// CRC-32C, rotated and offset so that a checksum of bytes that hold checksums stays useful.
fn masked_crc(bytes: &[u8]) -> u32 {
    crate::crc32c(bytes)
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
    /// A record that came without framing, from where what comes is right; its offset is its number.
    pub(crate) fn unframed(index: u64, bytes: Vec<u8>) -> Self {
        Self {
            offset: index,
            index,
            crc: masked_crc(&bytes),
            bytes,
        }
    }

    /// Whether the payload is the one that was written. It is apart from reading so that many threads can do it.
    pub fn verify(&self) -> bool {
        masked_crc(&self.bytes) == self.crc
    }
}

/// Reads the records of one shard in order: a file or an object, as it is or compressed as a whole.
pub struct Reader {
    path: PathBuf,
    stream: Stream,
    /// Where the next record starts.
    offset: u64,
    record: u64,
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
        let corrupt = |fault| corrupt(path, offset, record, fault);
        if record > offset / (HEADER + FOOTER) {
            let what = "so many records do not fit before it";
            return Err(corrupt(Fault::Damaged(what.into())));
        }
        let stream = Stream::open(path, offset, cache, buffer, true).map_err(corrupt)?;
        Ok(Self {
            path: path.into(),
            stream,
            offset,
            record,
        })
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
        self.stream.is_ending()
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
        let record = self.read();
        record.map_err(|fault| corrupt(&self.path, self.offset, self.record, fault))
    }

    fn read(&mut self) -> Result<Option<Record>, Fault> {
        let Some(length) = self.header()? else {
            return Ok(None);
        };
        let bytes = self.stream.take(length)?;
        let mut crc = [0; FOOTER as usize];
        if bytes.len() as u64 != length || self.stream.fill(&mut crc)? != crc.len() {
            return Err(self.short(length));
        }
        let record = Record {
            offset: self.offset,
            index: self.record,
            bytes,
            crc: u32::from_le_bytes(crc),
        };
        self.advance();
        Ok(Some(record))
    }

    /// Steps over the next record, without reading its payload if it can; false where the shard ends cleanly.
    fn skip(&mut self) -> Result<bool, Error> {
        let passed = self.pass();
        passed.map_err(|fault| corrupt(&self.path, self.offset, self.record, fault))
    }

    fn pass(&mut self) -> Result<bool, Fault> {
        let Some(length) = self.header()? else {
            return Ok(false);
        };
        let rest = length + FOOTER;
        if self.stream.skip(rest)? != rest {
            return Err(self.short(length));
        }
        self.advance();
        Ok(true)
    }

    /// Reads a header and returns the payload's length, which a shard that is not compressed is long enough for.
    fn header(&mut self) -> Result<Option<u64>, Fault> {
        let remaining = self.stream.remaining()?;
        match remaining {
            Some(0) => return Ok(None),
            Some(rest @ 1..HEADER) => return Err(tail(rest)),
            _ => {}
        }
        let mut header = [0; HEADER as usize];
        let got = self.stream.fill(&mut header)?;
        if got < header.len() {
            return match remaining {
                Some(_) => Err(Fault::Damaged(self.stream.short("a header"))),
                None if got == 0 => Ok(None),
                None => Err(tail(got as u64)),
            };
        }
        let Some(length) = length(&header) else {
            return Err(Fault::Damaged("the checksum of the length is wrong".into()));
        };
        if length > MAX_PAYLOAD {
            return Err(Fault::Damaged(format!(
                "a payload of {length} bytes is over 1 GiB"
            )));
        }
        if let Some(rest) = remaining.map(|remaining| remaining - HEADER)
            && length + FOOTER > rest
        {
            return Err(Fault::Damaged(format!(
                "a payload of {length} bytes and its checksum do not fit in the {rest} that follow"
            )));
        }
        Ok(Some(length))
    }

    /// The end came inside a payload or its checksum.
    fn short(&self, length: u64) -> Fault {
        let of = format!("a payload of {length} and its checksum");
        Fault::Damaged(self.stream.short(&of))
    }

    fn advance(&mut self) {
        self.offset = self.stream.at();
        self.record += 1;
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

fn tail(bytes: u64) -> Fault {
    Fault::Damaged(format!(
        "the file ends with {bytes} bytes, too few for a record header"
    ))
}

/// What is wrong with a shard, at the record that starts there.
pub(crate) fn corrupt(path: &Path, offset: u64, record: u64, fault: Fault) -> Error {
    match fault {
        Fault::Error(error) => error,
        Fault::Damaged(what) => Error::Corrupt {
            path: path.into(),
            offset,
            record,
            what,
        },
    }
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
            .map(|i| (0..i * 997).map(|j| ((j * j) >> (i % 7)) as u8).collect())
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
