//! As much of an object store as the program asks for: the XML interface that Google Cloud Storage and S3 share.
//!
//! Keys are plain; buckets need not be made. It can break connections in the middle of a body, refuse everybody, and
//! replace what it holds, which real stores do when nobody is watching.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Objects on a page of a listing.
const PAGE: usize = 2;

#[derive(Default)]
pub(crate) struct State {
    /// Bytes and version by bucket and key.
    pub(crate) objects: Mutex<BTreeMap<String, (Vec<u8>, usize)>>,
    versions: AtomicUsize,
    parts: Mutex<BTreeMap<(String, usize), Vec<u8>>>,
    /// Bodies that were sent or begun.
    pub(crate) bodies: AtomicUsize,
    /// Bodies that were broken off.
    pub(crate) cuts: AtomicUsize,
    /// Every so many bodies are; none if 0.
    pub(crate) cut_every: AtomicUsize,
    /// Whether every object has been replaced since it was listed.
    pub(crate) is_stale: AtomicBool,
    /// What everybody is answered; 0 if the truth.
    pub(crate) refusal: AtomicU16,
}

/// A store on a port of its own; its threads end with the process.
pub(crate) struct Fake {
    address: SocketAddr,
    pub(crate) state: Arc<State>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || serve(&state, &stream));
            }
        });
        Self { address, state }
    }

    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        self.state.put(name.into(), bytes);
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.state.objects.lock().unwrap().keys().cloned().collect()
    }

    pub(crate) fn get(&self, name: &str) -> Vec<u8> {
        self.state.objects.lock().unwrap()[name].0.clone()
    }

    /// What tells the program of it, under both of its names.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        let url = format!("http://{}", self.address);
        vec![
            ("STORAGE_EMULATOR_HOST", self.address.to_string()),
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_ACCESS_KEY_ID", "somebody".into()),
            ("AWS_SECRET_ACCESS_KEY", "secret".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("NO_PROXY", "127.0.0.1".into()),
        ]
    }
}

impl State {
    fn put(&self, name: String, bytes: Vec<u8>) -> usize {
        let version = self.versions.fetch_add(1, Ordering::SeqCst) + 1;
        self.objects.lock().unwrap().insert(name, (bytes, version));
        version
    }
}

struct Request {
    verb: String,
    /// Bucket, slash, key.
    name: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

/// Percent-encoded bytes become what they stand for.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at(2);
        bytes.push(u8::from_str_radix(code, 16).unwrap());
        bytes.extend(rest.as_bytes());
    }
    String::from_utf8(bytes).unwrap()
}

fn request(input: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    input.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (verb, target) = (words.next()?.to_string(), words.next()?.to_string());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    let length = headers
        .get("content-length")
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    input.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key.to_string(), decoded(value))
    });
    Some(Request {
        verb,
        name: decoded(path.trim_matches('/')),
        query: query.collect(),
        headers,
        body,
    })
}

fn serve(state: &State, stream: &TcpStream) {
    let mut input = BufReader::new(stream);
    while let Some(request) = request(&mut input) {
        let (status, headers, body) = answer(state, &request);
        let mut head = format!("HTTP/1.1 {status} -\r\n");
        let is_head = request.verb == "HEAD";
        if !headers.contains("content-length") {
            write!(head, "content-length: {}\r\n", body.len()).unwrap();
        }
        head += &headers;
        head += "\r\n";
        let is_object = request.verb == "GET" && request.name.contains('/') && status < 300;
        let mut sent = if is_head { &[][..] } else { &body[..] };
        let mut is_cut = false;
        if is_object {
            let nth = state.bodies.fetch_add(1, Ordering::SeqCst) + 1;
            let every = state.cut_every.load(Ordering::SeqCst);
            is_cut = every > 0 && nth.is_multiple_of(every) && sent.len() > 1;
            if is_cut {
                state.cuts.fetch_add(1, Ordering::SeqCst);
                sent = &sent[..sent.len() / 2];
            }
        }
        let mut stream = stream;
        let written = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(sent));
        if written.is_err() || is_cut {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

fn error(status: u16, code: &str) -> (u16, String, Vec<u8>) {
    let body = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
    (status, String::new(), body.into())
}

fn answer(state: &State, request: &Request) -> (u16, String, Vec<u8>) {
    match state.refusal.load(Ordering::SeqCst) {
        0 => {}
        status => return error(status, "Refused"),
    }
    let Request {
        verb,
        name,
        query,
        headers,
        body,
    } = request;
    let Some((bucket, key)) = name.split_once('/') else {
        return list(state, name, query);
    };
    assert!(!bucket.is_empty() && !key.is_empty(), "{name}");
    let done = |version| {
        (
            200,
            format!("etag: \"{version}\"\r\nx-goog-generation: {version}\r\n"),
            vec![],
        )
    };
    match verb.as_str() {
        "PUT" => match query.get("partNumber") {
            Some(number) => {
                let place = (query["uploadId"].clone(), number.parse().unwrap());
                state.parts.lock().unwrap().insert(place, body.clone());
                done(0)
            }
            None => done(state.put(name.clone(), body.clone())),
        },
        "POST" if query.contains_key("uploads") => {
            let id = state.versions.fetch_add(1, Ordering::SeqCst);
            let xml = format!(
                "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            );
            (200, String::new(), xml.into())
        }
        "POST" => {
            let parts = state.parts.lock().unwrap();
            let id = &query["uploadId"];
            let whole = parts.iter().filter(|((of, _), _)| of == id);
            let version = state.put(
                name.clone(),
                whole.flat_map(|(_, part)| part.clone()).collect(),
            );
            let xml = format!(
                "<CompleteMultipartUploadResult><ETag>\"{version}\"</ETag></CompleteMultipartUploadResult>"
            );
            (200, format!("x-goog-generation: {version}\r\n"), xml.into())
        }
        "DELETE" => {
            let removed = state.objects.lock().unwrap().remove(name);
            (
                if removed.is_some() { 204 } else { 404 },
                String::new(),
                vec![],
            )
        }
        "GET" | "HEAD" => get(state, name, verb == "HEAD", headers),
        other => panic!("nobody asks for {other}"),
    }
}

fn get(
    state: &State,
    name: &str,
    is_head: bool,
    headers: &BTreeMap<String, String>,
) -> (u16, String, Vec<u8>) {
    let objects = state.objects.lock().unwrap();
    let Some((bytes, version)) = objects.get(name) else {
        return error(404, "NoSuchKey");
    };
    let tag = format!("\"{version}\"");
    let is_stale = state.is_stale.load(Ordering::SeqCst);
    if headers
        .get("if-match")
        .is_some_and(|wanted| *wanted != tag || is_stale)
    {
        return error(412, "PreconditionFailed");
    }
    let mut out = format!(
        "etag: {tag}\r\nx-goog-generation: {version}\r\nlast-modified: Sat, 28 Nov 2026 12:00:00 GMT\r\n"
    );
    if is_head {
        write!(out, "content-length: {}\r\n", bytes.len()).unwrap();
        return (200, out, vec![]);
    }
    let Some(range) = headers.get("range") else {
        return (200, out, bytes.clone());
    };
    let (first, last) = range
        .strip_prefix("bytes=")
        .unwrap()
        .split_once('-')
        .unwrap();
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let last = last.min(bytes.len() - 1);
    write!(
        out,
        "content-range: bytes {first}-{last}/{}\r\n",
        bytes.len()
    )
    .unwrap();
    (206, out, bytes[first..=last].to_vec())
}

fn list(state: &State, bucket: &str, query: &BTreeMap<String, String>) -> (u16, String, Vec<u8>) {
    let objects = state.objects.lock().unwrap();
    let root = format!("{bucket}/");
    let mut keys = objects
        .iter()
        .filter_map(|(name, object)| Some((name.strip_prefix(&root)?, object)))
        .peekable();
    if keys.peek().is_none() {
        return error(404, "NoSuchBucket");
    }
    let of = |name: &str| query.get(name).map_or("", String::as_str);
    let (prefix, delimiter, after) = (of("prefix"), of("delimiter"), of("continuation-token"));
    let found: Vec<_> = keys
        .filter(|(key, _)| key.starts_with(prefix) && *key > after)
        .filter(|(key, _)| delimiter.is_empty() || !key[prefix.len()..].contains(delimiter))
        .collect();
    let mut xml = String::from("<ListBucketResult>");
    for (key, (bytes, version)) in found.iter().take(PAGE) {
        write!(
            xml,
            "<Contents><Key>{key}</Key><Size>{}</Size><ETag>\"{version}\"</ETag>\
             <LastModified>2026-11-28T12:00:00.000Z</LastModified></Contents>",
            bytes.len()
        )
        .unwrap();
    }
    let is_more = found.len() > PAGE;
    write!(xml, "<IsTruncated>{is_more}</IsTruncated>").unwrap();
    if is_more {
        let last = found[PAGE - 1].0;
        write!(xml, "<NextContinuationToken>{last}</NextContinuationToken>").unwrap();
    }
    xml += "</ListBucketResult>";
    (200, String::new(), xml.into())
}
