//! Tables of Cloud Bigtable as shards: `bigtable://PROJECT/INSTANCE/TABLE/PREFIX?column=FAMILY:QUALIFIER`.
//!
//! A row is a record, the value of one column. The rows whose keys begin with the prefix are cut into shards of
//! [`SHARD`] rows in the order of their keys, whatever the tablets are, so that shards are the same at every start; a
//! shard is named by its first key. A stream of rows that breaks goes on behind the last row that came, later and later,
//! until nothing has come for three minutes.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bigtable_rs::bigtable::{BigTable, BigTableConnection};
use bigtable_rs::google::bigtable::v2::read_rows_response::CellChunk;
use bigtable_rs::google::bigtable::v2::read_rows_response::cell_chunk::RowStatus;
use bigtable_rs::google::bigtable::v2::row_filter::{Chain, Filter};
use bigtable_rs::google::bigtable::v2::row_range::{EndKey, StartKey};
use bigtable_rs::google::bigtable::v2::{
    MutateRowsRequest, Mutation, ReadRowsRequest, RowFilter, RowRange, RowSet,
    SampleRowKeysRequest, mutate_rows_request, mutation,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

use crate::Error;
use crate::bucket::{Failure, lock, runtime, wait};
use crate::tfrecord::Record;

/// Rows of a shard.
pub const SHARD: usize = 1024;
/// The column that the reference's loader writes.
const COLUMN: (&str, &str) = ("tfexample", "example");
/// Rows that all readers together hold ahead, unless each holding [`LEAST_AHEAD`] is more.
const AHEAD: usize = 512;
const LEAST_AHEAD: usize = 4;
const MOST_AHEAD: usize = 64;
/// Connections to an instance; requests take turns on them.
const CHANNELS: usize = 4;
/// Parts of a table that are listed at a time.
const SCANS: usize = 8;
/// How long the next row may take, and how long none may come in all.
const SILENCE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(180);
/// Rows and bytes of one request to write.
const WRITTEN_ROWS: usize = 256;
const WRITTEN_BYTES: usize = 8 << 20;
/// A row has at most 256 MiB.
const MESSAGE: usize = 300 << 20;

const SCHEME: &str = "bigtable://";

/// Whether this names rows of a table and no file.
pub(crate) fn is_url(path: &str) -> bool {
    path.starts_with(SCHEME)
}

/// The rows that a URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rows {
    project: String,
    instance: String,
    table: String,
    family: String,
    qualifier: String,
    prefix: Vec<u8>,
}

impl Rows {
    fn parse(url: &str) -> Result<Self, Failure> {
        let rest = url.strip_prefix(SCHEME).unwrap_or(url);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let column = match query {
            "" => Some(COLUMN),
            query => query
                .strip_prefix("column=")
                .and_then(|column| column.split_once(':')),
        };
        let parts: Vec<&str> = path.splitn(4, '/').collect();
        let (&[project, instance, table, prefix], Some((family, qualifier))) = (&parts[..], column)
        else {
            return Err(malformed());
        };
        if [project, instance, table, family].contains(&"") {
            return Err(malformed());
        }
        Ok(Self {
            project: project.into(),
            instance: instance.into(),
            table: table.into(),
            family: family.into(),
            qualifier: qualifier.into(),
            prefix: decoded(prefix).ok_or_else(malformed)?,
        })
    }

    fn table_name(&self) -> String {
        let Self {
            project,
            instance,
            table,
            ..
        } = self;
        format!("projects/{project}/instances/{instance}/tables/{table}")
    }

    /// The URL of the shard that begins with this key.
    fn shard(&self, key: &[u8]) -> PathBuf {
        let Self {
            project,
            instance,
            table,
            family,
            qualifier,
            ..
        } = self;
        let column = match (family.as_str(), qualifier.as_str()) {
            COLUMN => String::new(),
            (family, qualifier) => format!("?column={family}:{qualifier}"),
        };
        let key = encoded(key);
        PathBuf::from(format!(
            "{SCHEME}{project}/{instance}/{table}/{key}{column}"
        ))
    }
}

fn malformed() -> Failure {
    Failure::own(
        "not the name of rows",
        "write bigtable://PROJECT/INSTANCE/TABLE/PREFIX, with ?column=FAMILY:QUALIFIER unless it is tfexample:example",
    )
}

/// A key as part of a path: without slashes and question marks, which would end it.
fn encoded(key: &[u8]) -> String {
    key.iter().fold(String::new(), |mut text, &byte| {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'_' | b'-' | b'.' | b'#' | b':' => {
                text.push(byte.into());
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
        text
    })
}

fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut out = vec![];
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    Some(out)
}

/// The first key behind all that begin with the prefix; none if there is no such key.
fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|&byte| byte < 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// From a key, or behind it, to before another.
#[derive(Clone, Debug)]
struct Span {
    start: StartKey,
    end: Option<Vec<u8>>,
}

impl Span {
    fn range(&self) -> RowRange {
        RowRange {
            start_key: Some(self.start.clone()),
            end_key: self.end.clone().map(EndKey::EndKeyOpen),
        }
    }
}

/// A shard as it was listed.
#[derive(Debug)]
struct Shard {
    rows: Rows,
    span: Span,
    count: u64,
}

/// The shards that this process has listed.
static KNOWN: Mutex<Option<HashMap<PathBuf, Arc<Shard>>>> = Mutex::new(None);

fn shard(url: &Path) -> Result<Arc<Shard>, Error> {
    if let Some(known) = lock(&KNOWN).as_ref().and_then(|known| known.get(url)) {
        return Ok(known.clone());
    }
    let what = "it is not the first row of a shard";
    let hint = "name the rows by their prefix, as when the shards were listed";
    Err(Failure::own(what, hint).into_error("open", url))
}

/// Rows of a shard.
pub(crate) fn count(url: &Path) -> Result<u64, Error> {
    shard(url).map(|shard| shard.count)
}

/// Why a request failed, and whether to make it again.
struct Refusal {
    failure: Failure,
    may_pass: bool,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let code = status.code();
        let hint = match code {
            Code::NotFound => {
                "check project, instance and table; cbt -project P -instance I createtable TABLE families=tfexample makes one"
            }
            Code::PermissionDenied | Code::Unauthenticated => {
                "credentials come from GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or the machine's service account"
            }
            _ => "check the network, and project, instance and table",
        };
        let may_pass = matches!(
            code,
            Code::Unavailable
                | Code::DeadlineExceeded
                | Code::Aborted
                | Code::Internal
                | Code::Unknown
                | Code::Cancelled
                | Code::ResourceExhausted
        );
        // The emulator calls an unknown family Unknown.
        let may_pass = may_pass && !status.message().contains("unknown family");
        let what = match status.message() {
            "" => code.description().to_owned(),
            message => format!("{message} ({})", code.description()),
        };
        Self {
            failure: Failure::own(what, hint),
            may_pass,
        }
    }
}

fn garbled(what: &str) -> Refusal {
    Refusal {
        failure: Failure::own(
            format!("the answer is malformed: {what}"),
            "start again; if it stays, it is a bug",
        ),
        may_pass: true,
    }
}

/// Waits longer and longer between attempts, as long as something comes now and then.
struct Patience {
    since: Instant,
    pause: Duration,
}

impl Patience {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            pause: Duration::from_millis(100),
        }
    }

    /// Waits, or gives up.
    async fn after(&mut self, refusal: Refusal) -> Result<(), Failure> {
        if !refusal.may_pass || self.since.elapsed() > PATIENCE {
            return Err(refusal.failure);
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(Duration::from_secs(10));
        Ok(())
    }
}

/// By project, instance, and whether they may write.
type Connections = HashMap<(String, String, bool), BigTableConnection>;

/// The connections to an instance; there is one set in a process.
async fn client(rows: &Rows, writes: bool) -> Result<BigTable, Failure> {
    static CONNECTIONS: Mutex<Option<Connections>> = Mutex::new(None);
    let key = (rows.project.clone(), rows.instance.clone(), writes);
    if let Some(connection) = lock(&CONNECTIONS).as_ref().and_then(|all| all.get(&key)) {
        return Ok(connection.client());
    }
    let made = BigTableConnection::new(&rows.project, &rows.instance, !writes, CHANNELS, None);
    let mut connection = made.await.map_err(|e| {
        let hint = "credentials come from GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or the machine's service account";
        Failure::own(e.to_string(), hint)
    })?;
    connection.configure_inner_client(|client| client.max_decoding_message_size(MESSAGE));
    let client = connection.client();
    lock(&CONNECTIONS)
        .get_or_insert_default()
        .insert(key, connection);
    Ok(client)
}

/// Key and value.
type Row = (Vec<u8>, Vec<u8>);

/// Puts the chunks of rows of one column together.
#[derive(Default)]
struct Assembler {
    /// Of the row that has begun.
    key: Option<Vec<u8>>,
    value: Vec<u8>,
}

impl Assembler {
    /// The row that ends with this chunk, if one does.
    fn add(&mut self, chunk: CellChunk) -> Result<Option<Row>, Refusal> {
        let CellChunk {
            row_key,
            mut value,
            row_status,
            value_size,
            ..
        } = chunk;
        if let Some(RowStatus::ResetRow(true)) = row_status {
            *self = Self::default();
            return Ok(None);
        }
        if !row_key.is_empty() {
            match &self.key {
                Some(key) if *key != row_key => return Err(garbled("a row without an end")),
                _ => self.key = Some(row_key),
            }
        }
        if self.value.is_empty() {
            self.value = value;
            // The size of the whole cell, of which this is a part.
            self.value
                .reserve(value_size.clamp(0, MESSAGE as i32) as usize);
        } else {
            self.value.append(&mut value);
        }
        if let Some(RowStatus::CommitRow(true)) = row_status {
            let row = std::mem::take(self);
            let key = row.key.ok_or_else(|| garbled("a row without a key"))?;
            return Ok(Some((key, row.value)));
        }
        Ok(None)
    }
}

/// One column, its newest value, with or without what it holds.
fn filter(rows: &Rows, only_keys: bool) -> RowFilter {
    let of = |filter| RowFilter {
        filter: Some(filter),
    };
    let mut filters = vec![
        of(Filter::FamilyNameRegexFilter(escaped(&rows.family))),
        of(Filter::ColumnQualifierRegexFilter(
            escaped(&rows.qualifier).into(),
        )),
        of(Filter::CellsPerColumnLimitFilter(1)),
    ];
    if only_keys {
        filters.push(of(Filter::StripValueTransformer(true)));
    }
    of(Filter::Chain(Chain { filters }))
}

/// A pattern of RE2 that matches the text and nothing else.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        if c.is_ascii() && !c.is_ascii_alphanumeric() && c != '_' {
            out.push('\\');
        }
        out.push(c);
        out
    })
}

/// A request of a table, which the service finds by a header.
fn addressed<T>(rows: &Rows, request: T) -> Result<Request<T>, Refusal> {
    let name = rows.table_name().replace('/', "%2F");
    let value = MetadataValue::try_from(format!("table_name={name}&app_profile_id="));
    let value = value.map_err(|_| Refusal {
        failure: malformed(),
        may_pass: false,
    })?;
    let mut request = Request::new(request);
    request
        .metadata_mut()
        .insert("x-goog-request-params", value);
    Ok(request)
}

/// Reads the rows of a span, at most `limit` if it is not 0, and hands each to `take` until it says that it has enough.
async fn scan<F, W>(
    rows: &Rows,
    mut span: Span,
    only_keys: bool,
    limit: usize,
    mut take: F,
) -> Result<(), Failure>
where
    F: FnMut(Vec<u8>, Vec<u8>) -> W,
    W: Future<Output = bool>,
{
    let mut client = client(rows, false).await?;
    let (mut patience, mut left) = (Patience::new(), limit);
    loop {
        let request = ReadRowsRequest {
            table_name: rows.table_name(),
            rows: Some(RowSet {
                row_keys: vec![],
                row_ranges: vec![span.range()],
            }),
            filter: Some(filter(rows, only_keys)),
            rows_limit: left as i64,
            ..ReadRowsRequest::default()
        };
        let read = async {
            let request = addressed(rows, request)?;
            let mut answers = client.get_client().read_rows(request).await?.into_inner();
            let mut row = Assembler::default();
            loop {
                let answer = timeout(SILENCE, answers.message()).await;
                let answer = answer.map_err(|_| Status::deadline_exceeded("no row came"))??;
                let Some(answer) = answer else {
                    return match row.key {
                        None => Ok(true),
                        Some(_) => Err(garbled("it ends within a row")),
                    };
                };
                patience = Patience::new();
                for chunk in answer.chunks {
                    let Some((key, value)) = row.add(chunk)? else {
                        continue;
                    };
                    span.start = StartKey::StartKeyOpen(key.clone());
                    let is_last = left == 1;
                    left = left.saturating_sub(1);
                    if !take(key, value).await || is_last {
                        return Ok(true);
                    }
                }
            }
        };
        let read: Result<bool, Refusal> = read.await;
        match read {
            Ok(_) => return Ok(()),
            Err(refusal) => patience.after(refusal).await?,
        }
    }
}

/// Cuts a span where the service would cut it, so that parts can be read side by side.
async fn parts(rows: &Rows, whole: Span) -> Result<Vec<Span>, Failure> {
    let mut client = client(rows, false).await?;
    let mut patience = Patience::new();
    let keys: Vec<Vec<u8>> = loop {
        let ask = async {
            let request = SampleRowKeysRequest {
                table_name: rows.table_name(),
                ..SampleRowKeysRequest::default()
            };
            let request = addressed(rows, request)?;
            let answers = client.get_client().sample_row_keys(request).await?;
            let keys = answers.into_inner().map_ok(|sample| sample.row_key);
            Ok(keys.try_collect().await?)
        };
        let asked: Result<_, Refusal> = ask.await;
        match asked {
            Ok(keys) => break keys,
            Err(refusal) => patience.after(refusal).await?,
        }
    };
    let inside = |key: &Vec<u8>| key.starts_with(&rows.prefix) && *key > rows.prefix;
    let mut spans = vec![];
    let mut start = whole.start;
    for key in keys.into_iter().filter(inside) {
        spans.push(Span {
            start,
            end: Some(key.clone()),
        });
        start = StartKey::StartKeyClosed(key);
    }
    spans.push(Span {
        start,
        end: whole.end,
    });
    Ok(spans)
}

/// The first key of every shard, and how many rows there are.
async fn first_keys(rows: &Rows) -> Result<(Vec<Vec<u8>>, u64), Failure> {
    let whole = Span {
        start: StartKey::StartKeyClosed(rows.prefix.clone()),
        end: after_prefix(&rows.prefix),
    };
    let spans = parts(rows, whole).await?;
    let listed = spans.into_iter().map(|span| async {
        let mut keys = vec![];
        scan(rows, span, true, 0, |key, _| {
            keys.push(key);
            std::future::ready(true)
        })
        .await?;
        Ok::<_, Failure>(keys)
    });
    let mut listed = stream::iter(listed).buffered(SCANS);
    let (mut firsts, mut count) = (vec![], 0);
    while let Some(keys) = listed.try_next().await? {
        for key in keys {
            if count % SHARD as u64 == 0 {
                firsts.push(key);
            }
            count += 1;
        }
    }
    Ok((firsts, count))
}

/// Lists the shards of the rows that a URL names, in the order of their keys.
///
/// # Errors
/// A malformed URL, a table that cannot be read, or no row at all.
pub(crate) fn shards(url: &str) -> Result<Vec<PathBuf>, Error> {
    let list = || {
        let rows = Rows::parse(url)?;
        let (firsts, count) = wait({
            let rows = rows.clone();
            async move { first_keys(&rows).await }
        })?;
        let end = after_prefix(&rows.prefix);
        let ends = firsts.iter().skip(1).cloned().map(Some).chain([end]);
        let mut urls = vec![];
        for (i, (first, end)) in firsts.iter().zip(ends).enumerate() {
            let url = rows.shard(first);
            let shard = Shard {
                rows: rows.clone(),
                span: Span {
                    start: StartKey::StartKeyClosed(first.clone()),
                    end,
                },
                count: (count - (i * SHARD) as u64).min(SHARD as u64),
            };
            lock(&KNOWN)
                .get_or_insert_default()
                .insert(url.clone(), Arc::new(shard));
            urls.push(url);
        }
        Ok(urls)
    };
    let urls =
        list().map_err(|failure: Failure| failure.into_error("list the rows", Path::new(url)))?;
    if urls.is_empty() {
        return Err(Error::NoMatch {
            pattern: url.into(),
        });
    }
    Ok(urls)
}

/// Readers that are open in this process.
static READERS: AtomicUsize = AtomicUsize::new(0);

/// Rows that each of so many readers holds ahead.
fn depth(readers: usize) -> usize {
    (AHEAD / readers.max(1)).clamp(LEAST_AHEAD, MOST_AHEAD)
}

/// Rows that so many open readers hold, at most.
pub fn held_rows(readers: usize) -> usize {
    readers * (1 + depth(readers))
}

/// Reads the rows of one shard in order.
pub struct Reader {
    url: PathBuf,
    rows: Receiver<Result<Vec<u8>, Failure>>,
    /// Whether all that is left has come.
    is_ending: Arc<AtomicBool>,
    record: u64,
    task: AbortHandle,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.url.display(), self.record)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
        self.task.abort();
    }
}

impl Reader {
    /// Asks for the rows of a listed shard from number `record` on, and does not wait for them.
    ///
    /// # Errors
    /// The shard was not listed.
    pub fn open_at(url: &Path, record: u64) -> Result<Self, Error> {
        let shard = shard(url)?;
        let is_ending = Arc::new(AtomicBool::new(false));
        let ended = is_ending.clone();
        let readers = READERS.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, rows) = channel(depth(readers));
        let runtime = runtime().map_err(|failure| failure.into_error("open", url))?;
        let task = runtime.spawn(async move {
            let read = async {
                let mut span = shard.span.clone();
                if record > 0 {
                    // Keys are much smaller than rows.
                    let limit = record as usize;
                    scan(&shard.rows, span.clone(), true, limit, |key, _| {
                        span.start = StartKey::StartKeyOpen(key);
                        std::future::ready(true)
                    })
                    .await?;
                }
                scan(&shard.rows, span, false, 0, |_, value| {
                    let sender = sender.clone();
                    async move { sender.send(Ok(value)).await.is_ok() }
                })
                .await
            };
            let read = read.await;
            ended.store(true, Ordering::Release);
            if let Err(failure) = read {
                // Nobody listens any more if the reader has gone.
                let _ = sender.send(Err(failure)).await;
            }
        });
        Ok(Self {
            url: url.into(),
            rows,
            is_ending,
            record,
            task: task.abort_handle(),
        })
    }

    /// Number of the next row in the shard.
    pub fn record(&self) -> u64 {
        self.record
    }

    /// Whether it is time to open the shard after this one.
    pub fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Acquire)
    }

    /// The next row; its offset is its number, for rows have no bytes before them.
    ///
    /// # Errors
    /// The table cannot be read, or rows have gone since the shard was listed.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would go on after an error"
    )]
    pub fn next(&mut self) -> Result<Option<Record>, Error> {
        let error = |failure: Failure| failure.into_error("read", &self.url);
        let Some(row) = self.rows.blocking_recv() else {
            let (found, listed) = (self.record, count(&self.url)?);
            if found != listed {
                let what = format!("{found} rows where there were {listed} when it was listed");
                let hint = "rows were removed or added since; start again, and leave the rows of a run alone";
                return Err(error(Failure::own(what, hint)));
            }
            return Ok(None);
        };
        let bytes = row.map_err(error)?;
        let record = Record::unframed(self.record, bytes);
        self.record += 1;
        Ok(Some(record))
    }
}

/// Writes rows: keys are the URL's prefix and a number of ten digits, as the reference's loader has them.
pub struct Writer {
    url: PathBuf,
    rows: Rows,
    next: u64,
    waiting: Vec<mutate_rows_request::Entry>,
    bytes: usize,
}

impl Writer {
    /// Rows that a URL names; its column family has to be there.
    ///
    /// # Errors
    /// A malformed URL.
    pub fn new(url: &str) -> Result<Self, Error> {
        let rows = Rows::parse(url).map_err(|f| f.into_error("write", Path::new(url)))?;
        Ok(Self {
            url: url.into(),
            rows,
            next: 0,
            waiting: vec![],
            bytes: 0,
        })
    }

    /// Number of the next row.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Writes a row, or keeps it until there are more.
    ///
    /// # Errors
    /// The table cannot be written.
    pub fn write(&mut self, value: Vec<u8>) -> Result<(), Error> {
        let mut key = self.rows.prefix.clone();
        key.extend(format!("{:010}", self.next).bytes());
        self.next += 1;
        self.bytes += value.len();
        let cell = mutation::SetCell {
            family_name: self.rows.family.clone(),
            column_qualifier: self.rows.qualifier.clone().into(),
            timestamp_micros: -1, // the server's time
            value,
        };
        self.waiting.push(mutate_rows_request::Entry {
            row_key: key,
            mutations: vec![Mutation {
                mutation: Some(mutation::Mutation::SetCell(cell)),
            }],
            ..mutate_rows_request::Entry::default()
        });
        match self.waiting.len() >= WRITTEN_ROWS || self.bytes >= WRITTEN_BYTES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Writes what is kept.
    ///
    /// # Errors
    /// The table cannot be written.
    pub fn flush(&mut self) -> Result<(), Error> {
        let entries = std::mem::take(&mut self.waiting);
        self.bytes = 0;
        if entries.is_empty() {
            return Ok(());
        }
        let rows = self.rows.clone();
        let written = wait(async move { mutate(&rows, entries).await });
        written.map_err(|failure| failure.into_error("write", &self.url))
    }
}

/// Writes rows, and those again that were refused for now.
async fn mutate(rows: &Rows, mut entries: Vec<mutate_rows_request::Entry>) -> Result<(), Failure> {
    let mut client = client(rows, true).await?;
    let mut patience = Patience::new();
    while !entries.is_empty() {
        let request = MutateRowsRequest {
            table_name: rows.table_name(),
            entries: entries.clone(),
            ..MutateRowsRequest::default()
        };
        let mut is_written = vec![false; entries.len()];
        let mut refused = None;
        let write = async {
            let request = addressed(rows, request)?;
            let answers = client.get_client().mutate_rows(request).await?;
            let mut answers = answers.into_inner();
            while let Some(answer) = answers.message().await? {
                for entry in answer.entries {
                    let status = entry.status.unwrap_or_default();
                    match (status.code, is_written.get_mut(entry.index as usize)) {
                        (0, Some(is_written)) => *is_written = true,
                        _ => refused = Some(Status::new(status.code.into(), status.message)),
                    }
                }
            }
            Ok(())
        };
        let written: Result<(), Refusal> = write.await;
        let mut is_written = is_written.into_iter();
        let before = entries.len();
        entries.retain(|_| is_written.next() == Some(false));
        if entries.len() < before {
            patience = Patience::new();
        }
        let refusal = match (written, refused) {
            (Err(refusal), _) => refusal,
            (Ok(()), Some(status)) => status.into(),
            (Ok(()), None) if entries.is_empty() => return Ok(()),
            (Ok(()), None) => garbled("rows without an answer"),
        };
        patience.after(refusal).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Option<Rows> {
        Rows::parse(url).ok()
    }

    #[test]
    fn urls_name_rows() {
        let rows = parse("bigtable://p/i/imagenet/train_").unwrap();
        assert_eq!(rows.table_name(), "projects/p/instances/i/tables/imagenet");
        assert_eq!((&*rows.family, &*rows.qualifier), COLUMN);
        assert_eq!(rows.prefix, b"train_");
        let other = parse("bigtable://p/i/t/a%2Fb?column=ds:d").unwrap();
        assert_eq!((&*other.family, &*other.qualifier), ("ds", "d"));
        assert_eq!(other.prefix, b"a/b");
        let shard = other.shard(b"a/b0?");
        assert_eq!(
            shard.to_str(),
            Some("bigtable://p/i/t/a%2Fb0%3F?column=ds:d")
        );
        // All rows of a table.
        assert_eq!(parse("bigtable://p/i/t/").unwrap().prefix, b"");
        for wrong in [
            "bigtable://p/i/t",
            "bigtable://p//t/x",
            "bigtable://p/i/t/x?column=y",
            "bigtable://p/i/t/x?family=y",
            "bigtable://p/i/t/%2",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn prefixes_end_before_the_next_key() {
        assert_eq!(after_prefix(b"train_"), Some(b"train`".to_vec()));
        assert_eq!(after_prefix(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(after_prefix(b"\xff"), None);
        assert_eq!(after_prefix(b""), None);
    }

    #[test]
    fn patterns_match_one_column() {
        assert_eq!(escaped("tf_example.v2"), "tf_example\\.v2");
    }

    fn chunk(key: &str, value: &str, size: i32, status: Option<RowStatus>) -> CellChunk {
        CellChunk {
            row_key: key.into(),
            value: value.into(),
            value_size: size,
            row_status: status,
            ..CellChunk::default()
        }
    }

    #[test]
    fn rows_come_in_chunks() {
        let mut row = Assembler::default();
        let commit = Some(RowStatus::CommitRow(true));
        let mut add = |chunk| {
            row.add(chunk)
                .map_err(|refusal| refusal.failure.to_string())
        };
        assert_eq!(add(chunk("a", "one", 7, None)), Ok(None));
        assert_eq!(
            add(chunk("", "-two", 0, commit)),
            Ok(Some((b"a".to_vec(), b"one-two".to_vec())))
        );
        // What was sent before a reset does not count.
        assert_eq!(add(chunk("b", "half", 9, None)), Ok(None));
        let reset = Some(RowStatus::ResetRow(true));
        assert_eq!(add(chunk("", "", 0, reset)), Ok(None));
        assert_eq!(
            add(chunk("b", "whole", 0, commit)),
            Ok(Some((b"b".to_vec(), b"whole".to_vec())))
        );
        assert_eq!(add(chunk("c", "", 0, None)), Ok(None));
        assert!(
            add(chunk("d", "", 0, commit))
                .unwrap_err()
                .contains("without an end")
        );
    }

    #[test]
    fn readers_hold_few_rows() {
        assert_eq!(held_rows(1), 65);
        assert_eq!(held_rows(64), 64 * 9);
        assert_eq!(held_rows(1024), 1024 * 5);
    }
}
