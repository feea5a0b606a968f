//! A directory with one folder of image files for each class: what torchvision's `ImageFolder` reads.
//!
//! An epoch is a permutation of all files, of seed and epoch alone; evaluation takes them sorted by class and name. So a
//! position is a count of files, and a resume needs nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use store::tfrecord::Record;

use crate::order::{Content, Cursor, Sample, Step};
use crate::random::{Purpose, Random};
use crate::{Error, Reason};

/// The files of such a directory, as it was looked into. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Folder(Arc<Files>);

#[derive(Debug)]
struct Files {
    root: PathBuf,
    /// Names of the classes' folders, sorted: a class is an index here.
    classes: Vec<String>,
    /// Class, name and length, sorted by class and name.
    files: Vec<(u32, String, u64)>,
}

impl Folder {
    /// Looks into the directory. Files whose names begin with a dot are no images; files beside the folders, and folders
    /// in folders, are errors, because nothing is left out silently.
    ///
    /// # Errors
    /// A directory cannot be read, holds what it should not, or holds no image.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let mut files = Vec::new();
        let mut classes = Vec::new();
        for (name, path) in entries(root)? {
            if !path.is_dir() {
                return Err(misplaced(&path, "a file beside the classes' folders"));
            }
            let class = classes.len() as u32;
            for (file, path) in entries(&path)? {
                let metadata = std::fs::metadata(&path).map_err(|e| failed("read", &path, e))?;
                if !metadata.is_file() {
                    return Err(misplaced(&path, "not a file, in a class's folder"));
                }
                files.push((class, file, metadata.len()));
            }
            classes.push(name);
        }
        if files.is_empty() {
            return Err(Error::NoRecords {
                shards: vec![root.into()],
            });
        }
        Ok(Self(Arc::new(Files {
            root: root.into(),
            classes,
            files,
        })))
    }

    /// How many images there are.
    pub fn len(&self) -> u64 {
        self.0.files.len() as u64
    }

    /// Whether there are none, which [`Folder::open`] does not allow.
    pub fn is_empty(&self) -> bool {
        self.0.files.is_empty()
    }

    /// Names of the classes, in their order.
    pub fn classes(&self) -> &[String] {
        &self.0.classes
    }

    /// Length of all files together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.0.files.iter().map(|(.., length)| length).sum()
    }

    /// Sixteen hexadecimal digits that stand for classes, names and lengths.
    pub fn fingerprint(&self) -> String {
        let mut hash = crate::Fingerprint::default();
        for (class, name, length) in &self.0.files {
            hash.add(&format!(
                "{}/{name} {length}\n",
                self.0.classes[*class as usize]
            ));
        }
        hash.to_string()
    }

    /// The paths of some files by their numbers, a line for each.
    pub(crate) fn describe(&self, files: impl Iterator<Item = u64>) -> Vec<String> {
        let path = |file: u64| self.path(file as usize).display().to_string();
        files.map(path).collect()
    }

    fn path(&self, index: usize) -> PathBuf {
        let (class, name, _) = &self.0.files[index];
        self.0
            .root
            .join(&self.0.classes[*class as usize])
            .join(name)
    }
}

/// Names and paths, sorted by name.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let read = || -> std::io::Result<Vec<_>> {
        std::fs::read_dir(dir)?
            .map(|entry| {
                let entry = entry?;
                let name = entry.file_name().into_string();
                let name = name.map_err(|_| std::io::Error::other("a name is no UTF-8"))?;
                Ok((name, entry.path()))
            })
            .collect()
    };
    let mut entries = read().map_err(|e| failed("read", dir, e))?;
    entries.retain(|(name, _)| !name.starts_with('.'));
    entries.sort();
    Ok(entries)
}

pub(crate) fn failed(action: &'static str, path: &Path, source: std::io::Error) -> Error {
    let path = path.into();
    Error::Store(store::Error::Io {
        action,
        path,
        source,
    })
}

fn misplaced(path: &Path, what: &'static str) -> Error {
    Error::Misplaced {
        path: path.into(),
        what,
    }
}

/// The stream of files.
pub(crate) struct FileOrder {
    folder: Folder,
    /// None for evaluation: one epoch, nothing shuffled.
    seed: Option<u64>,
    epoch: u64,
    next: usize,
    order: Vec<u32>,
}

impl FileOrder {
    pub(crate) fn new(folder: &Folder, seed: Option<u64>, cursor: Cursor) -> Result<Self, Error> {
        let count = folder.len();
        let (epoch, next) = cursor.single(count)?;
        let mut order = Self {
            folder: folder.clone(),
            seed,
            epoch,
            next: next as usize,
            order: Vec::new(),
        };
        order.begin(epoch);
        Ok(order)
    }

    fn begin(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.order = (0..self.folder.len() as u32).collect();
        if let Some(seed) = self.seed {
            Random::new(seed, epoch, Purpose::Shards).shuffle(&mut self.order);
        }
    }

    pub(crate) fn next(&mut self) -> Result<Option<Sample>, Error> {
        if self.next == self.order.len() {
            if self.seed.is_none() {
                return Ok(None);
            }
            self.begin(self.epoch.wrapping_add(1));
            self.next = 0;
        }
        let index = self.order[self.next] as usize;
        self.next += 1;
        let path = self.folder.path(index);
        let bytes = std::fs::read(&path).map_err(|e| failed("read", &path, e))?;
        Ok(Some(Sample {
            epoch: self.epoch,
            content: Content::File {
                class: self.folder.0.files[index].0,
                record: Record {
                    offset: 0,
                    index: index as u64,
                    bytes,
                    crc: 0,
                },
            },
            step: Step::single(self.epoch, self.next as u64),
        }))
    }

    pub(crate) fn cursor(&self) -> Cursor {
        Cursor::at(self.epoch, self.next as u64)
    }

    /// The file of this index, which says more than its directory.
    pub(crate) fn path(&self, index: u64) -> PathBuf {
        self.folder.path(index as usize)
    }
}

/// The class, if the network has it.
pub(crate) fn label(class: u32, classes: usize) -> Result<u32, Reason> {
    if (class as usize) < classes {
        return Ok(class);
    }
    Err(Reason::Label {
        stored: class.into(),
        offset: 0,
        classes,
    })
}
