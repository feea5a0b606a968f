//! Tar archives: the regular files of a shard in order, each with its name (POSIX.1-2001 `ustar` and `pax`, and GNU's long
//! names). Of links and special files there are none in a dataset: they are errors. A whole archive may be compressed
//! with GZIP.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::stream::{BUFFER, Fault, Stream};
use crate::tfrecord::corrupt;
use crate::{Cache, Error};

const BLOCK: u64 = 512;
/// No file of a dataset is longer.
const MAX_FILE: u64 = 1 << 30;
/// No name is longer.
const MAX_NAME: u64 = 64 << 10;
/// Counting reads headers only.
const HEADER_BUFFER: usize = 4 << 10;

/// A file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where its first header starts, in bytes from the start of the archive.
    pub offset: u64,
    /// Its path in the archive.
    pub name: String,
    /// What is in it; empty if it was skipped.
    pub bytes: Vec<u8>,
}

/// Reads the files of an archive in order.
pub struct Reader {
    path: PathBuf,
    stream: Stream,
    /// Files read before, for messages.
    files: u64,
}

/// What a header says.
struct Header {
    name: String,
    size: u64,
    kind: u8,
}

impl Reader {
    /// Opens an archive at a place where [`Member::offset`] or [`Reader::offset`] once pointed; an object is read through
    /// the cache.
    ///
    /// # Errors
    /// It cannot be opened, or ends before `offset`.
    pub fn open_at(path: &Path, offset: u64, cache: Option<&Cache>) -> Result<Self, Error> {
        Self::open_with(path, offset, cache, BUFFER)
    }

    /// Opens an archive at its beginning to read names only.
    ///
    /// # Errors
    /// As above.
    pub fn open_for_names(path: &Path, cache: Option<&Cache>) -> Result<Self, Error> {
        Self::open_with(path, 0, cache, HEADER_BUFFER)
    }

    fn open_with(
        path: &Path,
        offset: u64,
        cache: Option<&Cache>,
        buffer: usize,
    ) -> Result<Self, Error> {
        let stream = Stream::open(path, offset, cache, buffer, false);
        let stream = stream.map_err(|fault| corrupt(path, offset, 0, fault))?;
        Ok(Self {
            path: path.into(),
            stream,
            files: 0,
        })
    }

    /// Where the next header starts, in bytes; of a compressed archive, in what it inflates to.
    pub fn offset(&self) -> u64 {
        self.stream.at()
    }

    /// As [`tfrecord::Reader::is_ending`](crate::tfrecord::Reader::is_ending).
    pub fn is_ending(&self) -> bool {
        self.stream.is_ending()
    }

    /// Reads the next file, or `None` at the end of the archive.
    ///
    /// # Errors
    /// The archive cannot be read, is damaged, or holds a link or a special file.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would go on after an error; a damaged archive cannot"
    )]
    pub fn next(&mut self) -> Result<Option<Member>, Error> {
        self.file(true)
    }

    /// Steps over the next file and gives its name, as [`Reader::next`].
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub fn next_name(&mut self) -> Result<Option<Member>, Error> {
        self.file(false)
    }

    fn file(&mut self, is_read: bool) -> Result<Option<Member>, Error> {
        let offset = self.stream.at();
        let member = self.member(is_read);
        let member = member.map_err(|fault| corrupt(&self.path, offset, self.files, fault))?;
        if member.is_some() {
            self.files += 1;
        }
        Ok(member)
    }

    fn member(&mut self, is_read: bool) -> Result<Option<Member>, Fault> {
        let mut offset = self.stream.at();
        let (mut long_name, mut long_size) = (None, None);
        loop {
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            match header.kind {
                b'L' => {
                    let name = self.content(header.size, MAX_NAME)?;
                    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
                    long_name = Some(text(&name[..end])?);
                }
                b'x' => {
                    let records = self.content(header.size, MAX_NAME)?;
                    (long_name, long_size) = extended(&records)?;
                }
                // Remarks on the whole archive, and directories.
                b'g' | b'5' => {
                    self.content(header.size, MAX_NAME)?;
                    if header.kind == b'5' {
                        (long_name, long_size) = (None, None);
                        offset = self.stream.at();
                    }
                }
                b'0' | 0 | b'7' => {
                    let name = long_name.unwrap_or(header.name);
                    let size = long_size.unwrap_or(header.size);
                    let bytes = match is_read {
                        true => self.content(size, MAX_FILE)?,
                        false => {
                            self.pass(size)?;
                            Vec::new()
                        }
                    };
                    return Ok(Some(Member {
                        offset,
                        name,
                        bytes,
                    }));
                }
                _ => {
                    let name = long_name.unwrap_or(header.name);
                    return Err(Fault::Damaged(format!(
                        "{name} is a link or a special file, which are not supported"
                    )));
                }
            }
        }
    }

    /// The next header; none at the end, which is a block of zeros or the end of the file.
    fn header(&mut self) -> Result<Option<Header>, Fault> {
        let mut block = [0; BLOCK as usize];
        let got = self.stream.fill(&mut block)?;
        if got == 0 {
            return Ok(None);
        }
        if got < block.len() {
            return Err(Fault::Damaged(format!(
                "the file ends with {got} bytes, too few for a header"
            )));
        }
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        // The checksum counts itself as spaces.
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
        let own: u64 = block[148..156].iter().map(|&b| u64::from(b)).sum();
        if number(&block[148..156]) != Some(sum - own + 8 * u64::from(b' ')) {
            return Err(Fault::Damaged(
                "the checksum of a header is wrong, or this is no tar archive".into(),
            ));
        }
        let field = |range: std::ops::Range<usize>| {
            let field = &block[range];
            &field[..field.iter().position(|&b| b == 0).unwrap_or(field.len())]
        };
        let mut name = text(field(0..100))?;
        if &block[257..263] == b"ustar\0" && block[345] != 0 {
            name = format!("{}/{name}", text(field(345..500))?);
        }
        let size = number(&block[124..136])
            .ok_or_else(|| Fault::Damaged("a header's size is no number".into()))?;
        Ok(Some(Header {
            name,
            size,
            kind: block[156],
        }))
    }

    fn check(&mut self, size: u64, most: u64) -> Result<(), Fault> {
        if size > most {
            return Err(Fault::Damaged(format!(
                "a file of {size} bytes is over {most}"
            )));
        }
        match self.stream.remaining()? {
            Some(rest) if size > rest => Err(Fault::Damaged(format!(
                "a file of {size} bytes does not fit in the {rest} that follow"
            ))),
            _ => Ok(()),
        }
    }

    fn content(&mut self, size: u64, most: u64) -> Result<Vec<u8>, Fault> {
        self.check(size, most)?;
        let bytes = self.stream.take(size)?;
        let padding = size.next_multiple_of(BLOCK) - size;
        if bytes.len() as u64 != size || self.stream.skip(padding)? != padding {
            return Err(self.short(size));
        }
        Ok(bytes)
    }

    fn pass(&mut self, size: u64) -> Result<(), Fault> {
        self.check(size, MAX_FILE)?;
        let padded = size.next_multiple_of(BLOCK);
        match self.stream.skip(padded)? == padded {
            true => Ok(()),
            false => Err(self.short(size)),
        }
    }

    fn short(&self, size: u64) -> Fault {
        Fault::Damaged(format!(
            "the archive ends inside a file of {size} bytes or the zeros after it"
        ))
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("path", &self.path)
            .field("offset", &self.offset())
            .finish_non_exhaustive()
    }
}

fn text(bytes: &[u8]) -> Result<String, Fault> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Fault::Damaged("a name is no UTF-8".into()))
}

/// Octal digits between spaces or zeros; or, where the first bit is set, GNU's big-endian bytes.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        // The first byte is a mark; fields have 8 or 12.
        let (mark, number) = field.split_first()?;
        let (zeros, last) = number.split_at(number.len().saturating_sub(8));
        let is_small = *mark == 0x80 && zeros.iter().all(|&b| b == 0);
        return is_small.then(|| last.iter().fold(0, |n, &byte| n << 8 | u64::from(byte)));
    }
    let digits = field.trim_ascii();
    let end = digits.iter().position(|&b| b == 0 || b == b' ');
    let digits = std::str::from_utf8(&digits[..end.unwrap_or(digits.len())]).ok()?;
    match digits {
        "" => Some(0),
        digits => u64::from_str_radix(digits, 8).ok(),
    }
}

/// Path and size, where the records "length key=value\n" of an extended header name them.
fn extended(mut records: &[u8]) -> Result<(Option<String>, Option<u64>), Fault> {
    let damaged = || Fault::Damaged("an extended header is damaged".into());
    let (mut path, mut size) = (None, None);
    while !records.is_empty() {
        let space = records
            .iter()
            .position(|&b| b == b' ')
            .ok_or_else(damaged)?;
        let length = std::str::from_utf8(&records[..space]).ok();
        let length: usize = length.and_then(|n| n.parse().ok()).ok_or_else(damaged)?;
        let (record, rest) = records.split_at_checked(length).ok_or_else(damaged)?;
        let record = record.get(space + 1..).ok_or_else(damaged)?;
        let record = record.strip_suffix(b"\n").ok_or_else(damaged)?;
        if let Some(value) = record.strip_prefix(b"path=") {
            path = Some(text(value)?);
        } else if let Some(value) = record.strip_prefix(b"size=") {
            let value = std::str::from_utf8(value).ok();
            size = Some(value.and_then(|n| n.parse().ok()).ok_or_else(damaged)?);
        }
        records = rest;
    }
    Ok((path, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_atomic;

    fn header(name: &str, size: usize, kind: u8) -> Vec<u8> {
        let mut block = vec![0; BLOCK as usize];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        seal(block)
    }

    fn seal(mut block: Vec<u8>) -> Vec<u8> {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn file(name: &str, bytes: &[u8], kind: u8) -> Vec<u8> {
        let mut out = header(name, bytes.len(), kind);
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        out
    }

    fn end() -> Vec<u8> {
        vec![0; 2 * BLOCK as usize]
    }

    /// Reads a file of these bytes, from the start and from every offset; skipping must agree.
    fn check(bytes: &[u8]) -> Result<Vec<Member>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard.tar");
        write_atomic(&path, &[bytes]).unwrap();
        let mut reader = Reader::open_at(&path, 0, None)?;
        let mut members = vec![];
        while let Some(member) = reader.next()? {
            members.push(member);
        }
        let mut names = Reader::open_for_names(&path, None)?;
        for member in &members {
            let name = names.next_name()?.unwrap();
            assert_eq!((name.offset, &name.name), (member.offset, &member.name));
            let mut there = Reader::open_at(&path, member.offset, None)?;
            assert_eq!(there.next()?.as_ref(), Some(member));
        }
        assert_eq!(names.next_name()?, None);
        Ok(members)
    }

    fn check_corrupt(bytes: &[u8], what: &str) {
        let error = check(bytes).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }

    fn shown(members: &[Member]) -> Vec<(u64, &str, usize)> {
        let show = |m: &'_ Member| (m.offset, m.bytes.len());
        let names = members.iter().map(|m| m.name.as_str());
        let shown = members.iter().map(show).zip(names);
        shown.map(|((at, size), name)| (at, name, size)).collect()
    }

    #[test]
    fn files_come_in_order_and_directories_are_passed() {
        let bytes = [
            file("d/", b"", b'5'),
            file("d/a.jpg", &[7; 700], b'0'),
            file("d/a.cls", b"3", 0),
            file("empty", b"", b'0'),
            end(),
        ]
        .concat();
        let members = check(&bytes).unwrap();
        let expected = [
            (512, "d/a.jpg", 700),
            (2048, "d/a.cls", 1),
            (3072, "empty", 0),
        ];
        assert_eq!(shown(&members), expected);
        // Without the zeros at the end, as after `cat`.
        assert_eq!(check(&bytes[..bytes.len() - 1024]).unwrap(), members);
        assert_eq!(check(&[]).unwrap(), []);
    }

    #[test]
    fn long_names_of_three_kinds() {
        let long = "x".repeat(150) + ".jpg";
        let gnu = [
            file("././@LongLink", long.as_bytes(), b'L'),
            file("short", b"1", b'0'),
        ]
        .concat();
        let record = |text: &str| format!("{} {text}\n", text.len() + 2 + 3);
        let pax = record(&format!("path={long}"));
        assert_eq!(pax.len().to_string().len(), 3);
        let pax = [file("pax", pax.as_bytes(), b'x'), file("short", b"2", b'0')].concat();
        let mut ustar = header("name.jpg", 0, b'0');
        ustar[345..351].copy_from_slice(b"prefix");
        let bytes = [gnu, pax, seal(ustar), end()].concat();
        let members = check(&bytes).unwrap();
        let names: Vec<_> = members.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, [long.as_str(), &long, "prefix/name.jpg"]);
        assert_eq!((members[0].offset, members[1].offset), (0, 2048));
    }

    #[test]
    fn sizes_of_more_than_eight_gigabytes_are_numbers() {
        assert_eq!(number(b"00000000017\0"), Some(15));
        assert_eq!(number(b"      17 \0\0\0"), Some(15));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\0"), Some(1 << 33));
        assert_eq!(number(b"\x80\x01\0\0\0\0\0\x02\0\0\0\0"), None);
        assert_eq!(number(b"0000000001x\0"), None);
        // Fields of eight bytes, such as the checksum's: fuzzing found a panic.
        assert_eq!(number(b"\x80\0\0\0\0\0\x01\x02"), Some(258));
        assert_eq!(number(&[0xff; 8]), None);
    }

    #[test]
    fn damaged_archives() {
        let good = [file("a.jpg", &[7; 700], b'0'), end()].concat();
        let mut bad = good.clone();
        bad[0] ^= 1;
        check_corrupt(&bad, "the checksum of a header is wrong");
        check_corrupt(&good[..300], "too few for a header");
        check_corrupt(&good[..900], "does not fit in the 388 that follow");
        // The zeros after a file are a part of it.
        check_corrupt(&good[..512 + 800], "ends inside a file of 700 bytes");
        check_corrupt(&header("a", (1 << 30) + 1, b'0'), "is over 1073741824");
        check_corrupt(&file("a", b"b", b'2'), "a is a link or a special file");
        let pax = file("pax", b"999 path=x\n", b'x');
        check_corrupt(&pax, "an extended header is damaged");
    }

    #[test]
    fn an_offset_behind_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard.tar");
        write_atomic(&path, &[&end()]).unwrap();
        let error = Reader::open_at(&path, 9999, None).unwrap_err().to_string();
        assert!(error.contains("only 1024 bytes"), "{error}");
    }
}
