//! Objects in buckets (gs://, s3://, az://), behind a blocking door: nothing outside this module is asynchronous.
//!
//! An object is read in blocks of 1 MiB. A reader asks for some blocks beyond the one it stands in, so that many requests
//! are under way at a time and the distance of the store costs little. A request that fails or is cut off is made again
//! for the rest, later and later, for three minutes; all requests name the version that was listed, so an object that is
//! replaced in the meantime is an error and never a mixture. Blocks go through the [`Cache`], if there is one.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder};
use object_store::path::Path as Key;
use object_store::{
    ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, StaticCredentialProvider,
};
use tokio::runtime::{Builder, Handle};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, spawn_blocking};

use crate::inflate::Compression;
use crate::{Cache, Error};

/// Bytes that one request asks for.
const BLOCK: u64 = 1 << 20;
/// Blocks that all readers together hold ahead, unless each holding [`LEAST_AHEAD`] is more.
const AHEAD: usize = 64;
/// Blocks that a reader holds ahead at least: one that arrives while the other is waited for.
const LEAST_AHEAD: usize = 2;
/// Blocks that a reader holds ahead at most.
const MOST_AHEAD: usize = 16;
/// Requests under way at a time.
const REQUESTS: usize = 64;

const SCHEMES: [&str; 3] = ["gs", "s3", "az"];

/// Whether this names an object in a bucket.
pub(crate) fn is_object(path: &str) -> bool {
    split(path).is_some()
}

/// Scheme, bucket and key.
fn split(url: &str) -> Option<(&str, &str, &str)> {
    let (scheme, rest) = url.split_once("://")?;
    let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
    SCHEMES.contains(&scheme).then_some((scheme, bucket, key))
}

/// Bytes that so many open readers of objects hold, at most: the block that each stands in, and those ahead.
pub fn held_bytes(readers: usize) -> usize {
    readers * (1 + depth(readers)) * BLOCK as usize
}

/// Blocks that each of so many readers holds ahead.
fn depth(readers: usize) -> usize {
    (AHEAD / readers.max(1)).clamp(LEAST_AHEAD, MOST_AHEAD)
}

/// Why a request came to nothing; travels inside an [`io::Error`].
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    hint: &'static str,
}

impl Failure {
    pub(crate) fn into_error(self, action: &'static str, url: &Path) -> Error {
        Error::Bucket {
            action,
            url: url.to_string_lossy().into_owned(),
            what: self.what,
            hint: self.hint,
        }
    }

    pub(crate) fn own(what: impl Into<String>, hint: &'static str) -> Self {
        Self {
            what: what.into(),
            hint,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        use object_store::Error;
        let hint = match &error {
            Error::NotFound { .. } => "check the names of the bucket and the object",
            Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => {
                "docs/BUCKETS.md names the variables that credentials come from"
            }
            Error::Precondition { .. } => {
                "the object was replaced since it was listed; start again, and leave the shards of a run alone"
            }
            _ => {
                "check the network, the names of the bucket and the object, and the credentials (docs/BUCKETS.md)"
            }
        };
        Self::own(error.to_string(), hint)
    }
}

/// Runs the work on the thread of all requests and waits for it.
pub(crate) fn wait<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    let (sender, receiver) = mpsc::sync_channel(1);
    runtime()?.spawn(async move {
        // Nobody listens any more if the caller has gone.
        let _ = sender.send(work.await);
    });
    receiver.recv().unwrap_or_else(|_| Err(stopped()))
}

fn stopped() -> Failure {
    Failure::own("the thread of the requests has stopped", "this is a bug")
}

pub(crate) fn runtime() -> Result<&'static Handle, Failure> {
    static RUNTIME: OnceLock<Result<Handle, String>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| {
        // TLS without a choice of provider would panic; another one that is installed already serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(4)
            .thread_name("cache")
            .build()
            .map_err(|e| e.to_string())?;
        let handle = runtime.handle().clone();
        thread::Builder::new()
            .name("buckets".into())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))
            .map_err(|e| e.to_string())?;
        Ok(handle)
    });
    made.as_ref()
        .map_err(|e| Failure::own(format!("cannot start threads: {e}"), "end other programs"))
}

type Client = Arc<dyn ObjectStore>;

/// A poisoned lock guards plain maps, which no panic leaves half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection pool of a bucket; there is one in a process.
fn client(scheme: &str, bucket: &str) -> Result<Client, Failure> {
    static CLIENTS: Mutex<BTreeMap<String, Client>> = Mutex::new(BTreeMap::new());
    runtime()?;
    let name = format!("{scheme}://{bucket}");
    let mut clients = lock(&CLIENTS);
    if let Some(client) = clients.get(&name) {
        return Ok(client.clone());
    }
    let client = connect(scheme, bucket)?;
    clients.insert(name, client.clone());
    Ok(client)
}

/// Credentials and endpoints come from the environment, under the names that the providers' own tools use.
fn connect(scheme: &str, bucket: &str) -> Result<Client, Failure> {
    Ok(match scheme {
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
            let builder = match std::env::var("STORAGE_EMULATOR_HOST") {
                Ok(host) if !host.is_empty() => {
                    // To leave signatures out is not enough: writing asks for credentials all the same.
                    let bearer = "emulator".into();
                    let emulator = StaticCredentialProvider::new(GcpCredential { bearer });
                    let emulator = Arc::new(emulator);
                    let url = match host.contains("://") {
                        true => host,
                        false => format!("http://{host}"),
                    };
                    builder
                        .with_base_url(&url)
                        .with_credentials(emulator)
                        .with_client_options(ClientOptions::new().with_allow_http(true))
                }
                _ => builder,
            };
            Arc::new(builder.build()?)
        }
        "s3" => Arc::new(
            AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .build()?,
        ),
        _ => Arc::new(
            MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .build()?,
        ),
    })
}

/// One version of an object.
pub(crate) struct Object {
    client: Client,
    key: Key,
    url: PathBuf,
    size: u64,
    /// Present where the store can be asked for this version and no other.
    etag: Option<String>,
    /// How it is compressed, once somebody has looked.
    compression: OnceLock<Option<Compression>>,
}

impl Object {
    fn new(client: &Client, url: PathBuf, meta: ObjectMeta) -> Self {
        Self {
            client: client.clone(),
            key: meta.location,
            url,
            size: meta.size,
            // A weak tag never matches (RFC 9110, section 13.1.1).
            etag: meta.e_tag.filter(|tag| !tag.starts_with("W/")),
            compression: OnceLock::new(),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What distinguishes this version from every other object.
    pub(crate) fn identity(&self) -> String {
        let tag = self.etag.as_deref().unwrap_or_default();
        format!("{} {} {tag}", self.url.display(), self.size)
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    fn range(&self, block: u64) -> Range<u64> {
        block * BLOCK..((block + 1) * BLOCK).min(self.size)
    }
}

/// What the listings of this process have found, so that opening needs no request.
static KNOWN: Mutex<Option<HashMap<PathBuf, Arc<Object>>>> = Mutex::new(None);

fn remember(object: Object) -> Arc<Object> {
    let object = Arc::new(object);
    lock(&KNOWN)
        .get_or_insert_default()
        .insert(object.url.clone(), object.clone());
    object
}

/// The object of this URL, as it was listed last.
pub(crate) fn object(url: &Path) -> Result<Arc<Object>, Error> {
    if let Some(known) = lock(&KNOWN).as_ref().and_then(|known| known.get(url)) {
        return Ok(known.clone());
    }
    let found = || {
        let (client, key) = locate(url)?;
        let meta = wait({
            let client = client.clone();
            async move { Ok(client.head(&key).await?) }
        })?;
        Ok(remember(Object::new(&client, url.into(), meta)))
    };
    found().map_err(|failure: Failure| failure.into_error("open", url))
}

/// The bucket's connections, and the key in it.
fn locate(url: &Path) -> Result<(Client, Key), Failure> {
    let text = url.to_string_lossy();
    let Some((scheme, bucket, key)) = split(&text) else {
        let hint = "name an object: gs://, s3:// or az://";
        return Err(Failure::own("rows of a table are no file", hint));
    };
    Ok((client(scheme, bucket)?, parse(key)?))
}

fn parse(key: &str) -> Result<Key, Failure> {
    Key::parse(key).map_err(|e| {
        Failure::own(
            e.to_string(),
            "a key has no empty parts, no . and no .. between its slashes",
        )
    })
}

/// Bytes of one part of a large object that is written.
const PART: usize = 8 << 20;

/// Writes the parts one after another as one object. Nobody sees it before all of it is there.
pub(crate) fn put(url: &Path, parts: &[&[u8]]) -> Result<(), Error> {
    let bytes: bytes::Bytes = parts.concat().into();
    let write = || {
        let (client, key) = locate(url)?;
        wait(async move {
            if bytes.len() <= PART {
                client.put(&key, bytes.into()).await?;
                return Ok(());
            }
            let mut upload = client.put_multipart(&key).await?;
            let mut rest = bytes;
            while !rest.is_empty() {
                let part = rest.split_to(rest.len().min(PART));
                if let Err(error) = upload.put_part(part.into()).await {
                    // What is left behind costs money; that it could not be removed says less than why.
                    let _ = upload.abort().await;
                    return Err(error.into());
                }
            }
            upload.complete().await?;
            Ok(())
        })
    };
    write().map_err(|failure: Failure| failure.into_error("write", url))?;
    if let Some(known) = lock(&KNOWN).as_mut() {
        known.remove(url);
    }
    Ok(())
}

/// Removes an object, if it is there.
pub(crate) fn remove(url: &Path) -> Result<(), Error> {
    let remove = || {
        let (client, key) = locate(url)?;
        wait(async move {
            match client.delete(&key).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            }
        })
    };
    remove().map_err(|failure: Failure| failure.into_error("remove", url))?;
    if let Some(known) = lock(&KNOWN).as_mut() {
        known.remove(url);
    }
    Ok(())
}

/// All bytes of an object; none if it is not there.
pub(crate) fn read(url: &Path) -> Result<Option<Vec<u8>>, Error> {
    let read = || {
        let (client, key) = locate(url)?;
        wait(async move {
            match client.get(&key).await {
                Ok(answer) => Ok(Some(answer.bytes().await?.to_vec())),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    };
    read().map_err(|failure: Failure| failure.into_error("read", url))
}

/// Whether there is such an object.
pub(crate) fn exists(url: &Path) -> Result<bool, Error> {
    let ask = || {
        let (client, key) = locate(url)?;
        wait(async move {
            match client.head(&key).await {
                Ok(_) => Ok(true),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(error.into()),
            }
        })
    };
    ask().map_err(|failure: Failure| failure.into_error("open", url))
}

/// Finds the objects whose URLs match a shell pattern, sorted.
///
/// A star does not match a slash, as with files.
pub(crate) fn glob(pattern: &str) -> Result<Vec<PathBuf>, Error> {
    let (scheme, bucket, keys) = split(pattern).unwrap_or_default();
    let matcher = ::glob::Pattern::new(keys).map_err(|e| Error::Pattern {
        pattern: pattern.into(),
        at: pattern.len() - keys.len() + e.pos,
        what: e.msg,
    })?;
    let options = ::glob::MatchOptions {
        require_literal_separator: true,
        ..Default::default()
    };
    let wild = keys.find(['*', '?', '[']).unwrap_or(keys.len());
    let (dir, rest) = keys.split_at(keys[..wild].rfind('/').map_or(0, |slash| slash + 1));
    let is_deep = rest.contains('/');
    let list = || {
        let client = client(scheme, bucket)?;
        let dir = parse(dir.trim_end_matches('/'))?;
        let found: Vec<ObjectMeta> = wait({
            let client = client.clone();
            async move {
                let prefix = (!dir.as_ref().is_empty()).then_some(&dir);
                Ok(match is_deep {
                    true => client.list(prefix).try_collect().await?,
                    // A bucket may hold much else below.
                    false => client.list_with_delimiter(prefix).await?.objects,
                })
            }
        })?;
        let mut urls = Vec::new();
        for meta in found {
            if matcher.matches_with(meta.location.as_ref(), options) {
                let url = PathBuf::from(format!("{scheme}://{bucket}/{}", meta.location));
                urls.push(remember(Object::new(&client, url, meta)).url.clone());
            }
        }
        Ok(urls)
    };
    let mut urls = list()
        .map_err(|failure: Failure| failure.into_error("list the objects", Path::new(pattern)))?;
    if urls.is_empty() {
        return Err(Error::NoMatch {
            pattern: pattern.into(),
        });
    }
    urls.sort();
    Ok(urls)
}

/// Readers of objects that are open in this process.
static READERS: AtomicUsize = AtomicUsize::new(0);

/// Reads an object, asking for blocks ahead.
pub(crate) struct Blocks {
    object: Arc<Object>,
    cache: Option<Cache>,
    at: u64,
    current: Option<(u64, bytes::Bytes)>,
    ahead: VecDeque<Pending>,
}

/// A block that has been asked for.
struct Pending {
    block: u64,
    answer: Receiver<Result<bytes::Bytes, Failure>>,
    task: AbortHandle,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Blocks {
    /// Asks for the first blocks from the byte `at` on and does not wait for them.
    pub(crate) fn open(
        object: Arc<Object>,
        at: u64,
        cache: Option<Cache>,
    ) -> Result<Self, Failure> {
        READERS.fetch_add(1, Ordering::Relaxed);
        let mut blocks = Self {
            object,
            cache,
            at,
            current: None,
            ahead: VecDeque::new(),
        };
        blocks.request(at / BLOCK)?;
        Ok(blocks)
    }

    pub(crate) fn seek(&mut self, at: u64) {
        self.at = at;
    }

    pub(crate) fn size(&self) -> u64 {
        self.object.size
    }

    /// What the object's first bytes show.
    pub(crate) fn compression(&mut self) -> io::Result<Option<Compression>> {
        if let Some(known) = self.object.compression.get() {
            return Ok(*known);
        }
        let head = if self.at < BLOCK {
            let at = std::mem::take(&mut self.at);
            let mut head = Vec::new();
            self.by_ref().take(12).read_to_end(&mut head)?;
            self.at = at;
            head
        } else {
            // Elsewhere blocks are on their way already; this one is beside the row.
            let work = fetch(self.object.clone(), 0, self.cache.clone());
            let block = wait(work).map_err(io::Error::other)?;
            block[..block.len().min(12)].to_vec()
        };
        Ok(*self
            .object
            .compression
            .get_or_init(|| Compression::of(&head)))
    }

    /// Whether all that is left has been asked for.
    pub(crate) fn is_ending(&self) -> bool {
        let last = self.ahead.back().map(|pending| pending.block);
        let last = last.or(self.current.as_ref().map(|(block, _)| *block));
        last.is_some_and(|last| last + 1 >= self.object.blocks())
    }

    /// Asks for blocks from this one on, until enough are under way.
    fn request(&mut self, first: u64) -> Result<(), Failure> {
        if self.ahead.front().is_some_and(|front| front.block != first) {
            self.ahead.clear();
        }
        let depth = depth(READERS.load(Ordering::Relaxed));
        let mut block = self.ahead.back().map_or(first, |back| back.block + 1);
        while self.ahead.len() < depth && block < self.object.blocks() {
            let (sender, answer) = mpsc::sync_channel(1);
            let work = fetch(self.object.clone(), block, self.cache.clone());
            let task = runtime()?.spawn(async move {
                let _ = sender.send(work.await);
            });
            self.ahead.push_back(Pending {
                block,
                answer,
                task: task.abort_handle(),
            });
            block += 1;
        }
        Ok(())
    }

    /// The block that holds the byte `at`; none at the end.
    fn block(&mut self) -> Result<Option<&[u8]>, Failure> {
        if self.at >= self.object.size {
            return Ok(None);
        }
        let block = self.at / BLOCK;
        if self.current.as_ref().is_none_or(|(held, _)| *held != block) {
            self.current = None;
            self.request(block)?;
            let pending = self.ahead.pop_front().ok_or_else(stopped)?;
            let bytes = pending.answer.recv().unwrap_or_else(|_| Err(stopped()))?;
            self.current = Some((block, bytes));
            self.request(block + 1)?;
        }
        Ok(self.current.as_ref().map(|(_, bytes)| &bytes[..]))
    }
}

impl Read for Blocks {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let from = (self.at % BLOCK) as usize;
        let Some(block) = self.block().map_err(io::Error::other)? else {
            return Ok(0);
        };
        let rest = &block[from..];
        let count = rest.len().min(out.len());
        out[..count].copy_from_slice(&rest[..count]);
        self.at += count as u64;
        Ok(count)
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A block from the cache or from the store.
async fn fetch(
    object: Arc<Object>,
    block: u64,
    cache: Option<Cache>,
) -> Result<bytes::Bytes, Failure> {
    static UNDER_WAY: Semaphore = Semaphore::const_new(REQUESTS);
    let range = object.range(block);
    let length = range.end - range.start;
    let identity = object.identity();
    if let Some(cache) = cache.clone() {
        let identity = identity.clone();
        let held = spawn_blocking(move || cache.get(&identity, block)).await;
        if let Ok(Some(held)) = held
            && held.len() as u64 == length
        {
            return Ok(held.into());
        }
    }
    let bytes = {
        // Never closed, so the permit is there.
        let _permit = UNDER_WAY.acquire().await;
        let options = GetOptions {
            range: Some(range.into()),
            if_match: object.etag.clone(),
            ..GetOptions::default()
        };
        let answer = object.client.get_opts(&object.key, options).await?;
        answer.bytes().await?
    };
    if bytes.len() as u64 != length {
        return Err(Failure::own(
            format!("{} bytes came where {length} were asked for", bytes.len()),
            "start again",
        ));
    }
    if let Some(cache) = cache {
        let kept = bytes.clone();
        spawn_blocking(move || cache.put(&identity, block, &kept))
            .await
            .map_err(|_| stopped())?
            .map_err(|e| Failure::own(e.to_string(), "free space there or lower data.cache_gb"))?;
    }
    Ok(bytes)
}
