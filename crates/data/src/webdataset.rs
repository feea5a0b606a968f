//! WebDataset shards: tar archives in which files of one name, next to each other, are a sample
//! (`000017.jpg` and `000017.cls`).
//!
//! A name ends at the first dot of its last part, as in the Python library. The image has the ending jpg, jpeg, png or
//! webp, the label cls: a whole number in digits. Other endings are passed over.

use std::path::Path;

use store::Cache;
use store::tar::{Member, Reader};
use store::tfrecord::Record;

use crate::Error;

/// Reads the samples of one shard in order.
#[derive(Debug)]
pub(crate) struct Samples {
    reader: Reader,
    /// The first file of the next sample, which had to be read to see that the one before has ended.
    pending: Option<Member>,
    index: u64,
}

/// An image file as a record, and its label or what is wrong with it.
pub(crate) type Labelled = (Record, Result<i64, String>);

const IMAGES: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// The name of a sample, and the rest of the path behind the dot.
fn split(path: &str) -> (&str, &str) {
    let last = path.rfind('/').map_or(0, |slash| slash + 1);
    match path[last..].find('.') {
        Some(dot) => (&path[..last + dot], &path[last + dot + 1..]),
        None => (path, ""),
    }
}

impl Samples {
    pub(crate) fn open_at(
        path: &Path,
        offset: u64,
        index: u64,
        cache: Option<&Cache>,
    ) -> Result<Self, Error> {
        Ok(Self {
            reader: Reader::open_at(path, offset, cache)?,
            pending: None,
            index,
        })
    }

    /// Where the next sample starts, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        match &self.pending {
            Some(member) => member.offset,
            None => self.reader.offset(),
        }
    }

    /// Its index in the shard, from 0.
    pub(crate) fn index(&self) -> u64 {
        self.index
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.reader.is_ending()
    }

    pub(crate) fn next(&mut self) -> Result<Option<Labelled>, Error> {
        let first = match self.pending.take() {
            Some(member) => member,
            None => match self.reader.next()? {
                Some(member) => member,
                None => return Ok(None),
            },
        };
        let offset = first.offset;
        let name = split(&first.name).0.to_string();
        let (mut image, mut label) = (None, None);
        let mut next = Some(first);
        while let Some(member) = next.take() {
            let (of, ending) = split(&member.name);
            if of != name {
                self.pending = Some(member);
                break;
            }
            let ending = ending.to_ascii_lowercase();
            if IMAGES.contains(&ending.as_str()) {
                image = Some(member.bytes);
            } else if ending == "cls" {
                label = Some(number(&member.bytes));
            }
            next = self.reader.next()?;
        }
        let label = match (&image, label) {
            (None, _) => Err(format!("{name} has no jpg, jpeg, png or webp")),
            (_, None) => Err(format!("{name} has no cls")),
            (_, Some(label)) => label.map_err(|what| format!("{name}.cls: {what}")),
        };
        // An archive has no checksums of its own; this one only tells images apart.
        let bytes = image.unwrap_or_default();
        let record = Record {
            offset,
            index: self.index,
            crc: store::crc32c(&bytes),
            bytes,
        };
        self.index += 1;
        Ok(Some((record, label)))
    }
}

fn number(bytes: &[u8]) -> Result<i64, String> {
    let text = std::str::from_utf8(bytes).ok();
    text.and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| "not a whole number in digits".into())
}

/// Counts the samples of a shard by its headers.
pub(crate) fn count(path: &Path, cache: Option<&Cache>) -> Result<u64, Error> {
    let mut reader = Reader::open_for_names(path, cache)?;
    let (mut count, mut last) = (0, None);
    while let Some(member) = reader.next_name()? {
        let name = split(&member.name).0.to_string();
        if last.as_ref() != Some(&name) {
            count += 1;
            last = Some(name);
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_at_the_first_dot_of_their_last_part() {
        assert_eq!(split("a/b.c/n01.left.jpg"), ("a/b.c/n01", "left.jpg"));
        assert_eq!(split("17.cls"), ("17", "cls"));
        assert_eq!(split("dir.d/README"), ("dir.d/README", ""));
    }
}
