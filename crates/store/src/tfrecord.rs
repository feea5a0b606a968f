//! TFRecord framing: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload, all
//! little-endian, uncompressed (TensorFlow, `tensorflow/core/lib/io/record_writer.h`).

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::Error;

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
    /// Whether the payload is the one that was written. It is apart from reading so that many threads can do it.
    pub fn verify(&self) -> bool {
        masked_crc(&self.bytes) == self.crc
    }
}

/// Reads the records of one shard in order.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    /// Length of the file when it was opened.
    end: u64,
    offset: u64,
    record: u64,
}

impl Reader {
    /// Opens a shard at its beginning.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_at(path, 0, 0)
    }

    /// Opens a shard where [`Reader::offset`] and [`Reader::record`] once pointed.
    ///
    /// # Errors
    /// The file cannot be opened, or ends before `offset`, or so many records do not fit before it.
    pub fn open_at(path: &Path, offset: u64, record: u64) -> Result<Self, Error> {
        Self::open_with(path, offset, record, BUFFER)
    }

    fn open_with(path: &Path, offset: u64, record: u64, buffer: usize) -> Result<Self, Error> {
        let open = || {
            let mut file = File::open(path)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(offset))?;
            Ok((file, end))
        };
        let (file, end) = open().map_err(|e| Error::io("open", path, e))?;
        let reader = Self {
            path: path.into(),
            file: BufReader::with_capacity(buffer, file),
            end,
            offset,
            record,
        };
        if offset > end {
            return Err(reader.corrupt(format!("the file has only {end} bytes")));
        }
        if record > offset / (HEADER + FOOTER) {
            return Err(reader.corrupt("so many records do not fit before it".into()));
        }
        Ok(reader)
    }

    /// Where the next record starts, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Index of the next record, from 0.
    pub fn record(&self) -> u64 {
        self.record
    }

    /// Reads the next record, or `None` where the file ends cleanly. The length is checked against its CRC; the
    /// payload is not, see [`Record::verify`].
    ///
    /// # Errors
    /// The file cannot be read, or is not TFRecord framing from here on.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would go on after an error; a damaged shard cannot"
    )]
    pub fn next(&mut self) -> Result<Option<Record>, Error> {
        let Some(length) = self.header()? else {
            return Ok(None);
        };
        // `header` has compared the length with what the file holds, so this allocates nothing absurd.
        let mut bytes = Vec::with_capacity(length as usize);
        let mut crc = [0; FOOTER as usize];
        let payload = self.file.by_ref().take(length).read_to_end(&mut bytes);
        payload.map_err(|e| Error::io("read", &self.path, e))?;
        if bytes.len() as u64 != length {
            return Err(self.shrunk());
        }
        self.fill(&mut crc)?;
        let record = Record {
            offset: self.offset,
            index: self.record,
            bytes,
            crc: u32::from_le_bytes(crc),
        };
        self.advance(length);
        Ok(Some(record))
    }

    /// Steps over the next record without reading its payload; false where the file ends cleanly.
    fn skip(&mut self) -> Result<bool, Error> {
        let Some(length) = self.header()? else {
            return Ok(false);
        };
        self.file
            .seek_relative((length + FOOTER) as i64)
            .map_err(|e| Error::io("read", &self.path, e))?;
        self.advance(length);
        Ok(true)
    }

    /// Reads a header and returns the payload's length, which the file is long enough for.
    fn header(&mut self) -> Result<Option<u64>, Error> {
        let remaining = self.end - self.offset;
        if remaining == 0 {
            return Ok(None);
        }
        if remaining < HEADER {
            return Err(self.corrupt(format!(
                "the file ends with {remaining} bytes, too few for a record header"
            )));
        }
        let (mut length, mut crc) = ([0; 8], [0; 4]);
        self.fill(&mut length)?;
        self.fill(&mut crc)?;
        if masked_crc(&length) != u32::from_le_bytes(crc) {
            return Err(self.corrupt("the checksum of the length is wrong".into()));
        }
        let length = u64::from_le_bytes(length);
        if length > MAX_PAYLOAD {
            return Err(self.corrupt(format!("a payload of {length} bytes is over 1 GiB")));
        }
        let rest = remaining - HEADER;
        if length + FOOTER > rest {
            return Err(self.corrupt(format!(
                "a payload of {length} bytes and its checksum do not fit in the {rest} that follow"
            )));
        }
        Ok(Some(length))
    }

    fn advance(&mut self, length: u64) {
        self.offset += HEADER + length + FOOTER;
        self.record += 1;
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        self.file.read_exact(bytes).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.shrunk(),
            _ => Error::io("read", &self.path, e),
        })
    }

    fn shrunk(&self) -> Error {
        self.corrupt("the file became shorter while it was read".into())
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

/// Counts the records of a shard by walking its headers.
///
/// # Errors
/// The file cannot be read, a header is damaged, or bytes are left over at the end.
pub fn count(path: &Path) -> Result<u64, Error> {
    let mut reader = Reader::open_with(path, 0, 0, HEADER_BUFFER)?;
    while reader.skip()? {}
    Ok(reader.record())
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
        match (&records, count(&path)) {
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
        let mut second = Reader::open_at(&path, first.offset(), first.record()).unwrap();
        assert_eq!(second.next().unwrap(), first.next().unwrap());
        let past = Reader::open_at(&path, 1000, 7).unwrap_err().to_string();
        assert!(past.contains("only 55 bytes"), "{past}");
        let absurd = Reader::open_at(&path, 21, u64::MAX).unwrap_err();
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

    #[test]
    fn a_missing_file_is_an_io_error() {
        let error = count(Path::new("absent")).unwrap_err();
        assert!(matches!(error, Error::Io { action: "open", .. }), "{error}");
    }
}
