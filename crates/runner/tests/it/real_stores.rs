//! Training from stores that others have written: S3 by moto, which ci/requirements.txt brings, Bigtable by its emulator, and Azure by Azurite,
//! whose `azurite-blob` the variable RUNNER_AZURITE names. Between them and the program sits a relay that breaks
//! connections in the middle.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::buckets::{assert_equal, digits, train};
use crate::{Home, runner, text};

/// A relay that breaks every second connection after so many bytes of answers.
struct Relay {
    address: SocketAddr,
    broken: Arc<AtomicUsize>,
}

const BYTES: usize = 150_000;

impl Relay {
    fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let broken = Arc::new(AtomicUsize::new(0));
        let count = broken.clone();
        std::thread::spawn(move || {
            for (i, client) in listener.incoming().flatten().enumerate() {
                let server = TcpStream::connect(server).unwrap();
                let (mut up, mut into) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut up, &mut into);
                    let _ = into.shutdown(Shutdown::Write);
                });
                let (mut from, mut down) = (server, client);
                let count = count.clone();
                std::thread::spawn(move || {
                    let mut left = if i.is_multiple_of(2) {
                        BYTES
                    } else {
                        usize::MAX
                    };
                    let mut buffer = [0; 16 << 10];
                    while let Ok(got @ 1..) = from.read(&mut buffer) {
                        if down.write_all(&buffer[..got.min(left)]).is_err() {
                            break;
                        }
                        left = left.saturating_sub(got);
                        if left == 0 {
                            count.fetch_add(1, Ordering::SeqCst);
                            break;
                        }
                    }
                    let _ = down.shutdown(Shutdown::Both);
                    let _ = from.shutdown(Shutdown::Both);
                });
            }
        });
        Self { address, broken }
    }
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts a server and waits until it listens.
fn start(command: &mut Command, port: u16) -> (Server, SocketAddr) {
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = Server(command.spawn().unwrap());
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    while TcpStream::connect(address).is_err() {
        assert!(server.0.try_wait().unwrap().is_none(), "{command:?} ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    (server, address)
}

fn put(address: SocketAddr, path: &str, body: &[u8]) {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "PUT {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.split(' ').nth(1) == Some("200"), "{answer}");
}

/// Two epochs of 359 digits from there and from files.
fn check(url: &str, relay: &Relay, environment: &[(&str, String)]) {
    let examples = "data.train_examples=359";
    let straight = Home::new();
    train(
        &straight,
        &["data.train=data/digits/train-00002-*", examples],
        &[],
    );
    let ours = Home::new();
    let shards = format!("data.train={url}/digits/train-00002-*");
    let eval = format!("data.eval={url}/digits/validation-*");
    train(&ours, &[&shards, &eval, examples], environment);
    assert_equal(&ours, &straight);
    let broken = relay.broken.load(Ordering::SeqCst);
    assert!(broken > 0, "no connection was broken");
}

/// The Python that has ci/requirements.txt.
fn python() -> Option<String> {
    let python = std::env::var("RUNNER_PYTHON")
        .ok()
        .filter(|p| !p.is_empty());
    if python.is_none() {
        println!("skipped: RUNNER_PYTHON names no Python with the packages of ci/requirements.txt");
    }
    python
}

#[test]
fn s3_by_moto() {
    let Some(python) = python() else { return };
    let port = free_port();
    let server = [
        "-m",
        "moto.server",
        "-H",
        "127.0.0.1",
        "-p",
        &port.to_string(),
    ];
    let (_server, address) = start(Command::new(python).args(server), port);
    put(address, "/bkt", &[]);
    for (name, bytes) in digits() {
        put(address, &format!("/bkt/digits/{name}"), &bytes);
    }
    let relay = Relay::to(address);
    let environment = [
        ("AWS_ENDPOINT_URL", format!("http://{}", relay.address)),
        ("AWS_ALLOW_HTTP", "true".into()),
        ("AWS_ACCESS_KEY_ID", "somebody".into()),
        ("AWS_SECRET_ACCESS_KEY", "secret".into()),
        ("AWS_REGION", "us-east-1".into()),
        ("NO_PROXY", "127.0.0.1".into()),
    ];
    check("s3://bkt", &relay, &environment);
}

#[test]
fn azure_by_azurite() {
    let Some(azurite) = std::env::var("RUNNER_AZURITE")
        .ok()
        .filter(|p| !p.is_empty())
    else {
        println!("skipped: RUNNER_AZURITE does not name azurite-blob (npm, azurite 3.37)");
        return;
    };
    let Some(python) = python() else { return };
    let port = free_port();
    let flags = [
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
        "--disableTelemetry", // or it tells its maker that it runs
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        &port.to_string(),
    ];
    let (_server, address) = start(Command::new(azurite).args(flags), port);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut fill = Command::new(python);
    fill.arg(root.join("tests/azurite.py"))
        .arg(format!("http://{address}"))
        .arg(root.join("../../data/digits"));
    assert!(fill.status().unwrap().success());
    let relay = Relay::to(address);
    let environment = [
        ("AZURE_STORAGE_USE_EMULATOR", "true".to_string()),
        ("NO_PROXY", "127.0.0.1".into()),
        (
            "AZURITE_BLOB_STORAGE_URL",
            format!("http://{}", relay.address),
        ),
    ];
    check("az://bkt", &relay, &environment);
}

/// Bigtable's emulator and its command line, which come with Google's packages google-cloud-cli-bigtable-emulator and
/// google-cloud-cli-cbt; RUNNER_CBTEMULATOR names another one.
fn emulator() -> Option<String> {
    let named = std::env::var("RUNNER_CBTEMULATOR")
        .ok()
        .filter(|path| !path.is_empty());
    let usual = "/usr/lib/google-cloud-sdk/platform/bigtable-emulator/cbtemulator";
    let path = named.or_else(|| Path::new(usual).exists().then(|| usual.into()));
    let has_cbt = Command::new("cbt").arg("help").output().is_ok();
    if path.is_none() || !has_cbt {
        println!("skipped: Bigtable's emulator (RUNNER_CBTEMULATOR) or cbt is not on this machine");
        return None;
    }
    path
}

/// The digits as rows of a table, written by `data load-bigtable` over connections that break; 1438 rows are two shards,
/// and so are the files that they are compared with.
#[test]
fn bigtable_by_its_emulator() {
    let Some(emulator) = emulator() else { return };
    let port = free_port();
    let flags = ["-host", "127.0.0.1", "-port", &port.to_string()];
    let (_server, address) = start(Command::new(emulator).args(flags), port);
    let relay = Relay::to(address);
    let environment = [
        ("BIGTABLE_EMULATOR_HOST", relay.address.to_string()),
        ("NO_PROXY", "127.0.0.1".into()),
    ];
    for arguments in [
        ["createtable", "digits", "families=tfexample"],
        ["createtable", "empty", "families=tfexample"],
    ] {
        let mut cbt = Command::new("cbt");
        cbt.args(["-project", "p", "-instance", "i"])
            .args(arguments)
            .env("BIGTABLE_EMULATOR_HOST", address.to_string());
        assert!(cbt.status().unwrap().success());
    }
    let envs = || environment.iter().map(|(k, v)| (*k, v.as_str()));
    for split in ["train", "validation"] {
        let args = [
            "data",
            "load-bigtable",
            &format!("data/digits/{split}-*"),
            &format!("bigtable://p/i/digits/{split}_"),
        ];
        let loaded = runner(&args).envs(envs()).output().unwrap();
        assert!(loaded.status.success(), "{}", text(&loaded.stderr));
        let rows = if split == "train" { 1438 } else { 359 };
        let said = text(&loaded.stdout);
        assert!(said.starts_with(&format!("{rows} rows, ")), "{said}");
    }

    let files = tempfile::tempdir().unwrap();
    let mut records = digits()
        .into_iter()
        .filter(|(name, _)| name.starts_with("train"))
        .flat_map(|(name, _)| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/digits");
            let mut reader = store::tfrecord::Reader::open(&path.join(name)).unwrap();
            std::iter::from_fn(move || reader.next().unwrap())
        });
    for name in ["train-0", "train-1"] {
        let mut shard = vec![];
        for record in records.by_ref().take(store::bigtable::SHARD) {
            store::tfrecord::write(&mut shard, &record.bytes).unwrap();
        }
        store::write_atomic(&files.path().join(name), &[&shard]).unwrap();
    }
    let straight = Home::new();
    let local = format!("data.train={}/train-*", files.path().display());
    train(&straight, &[&local, "data.train_examples=1438"], &[]);
    let ours = Home::new();
    let sets = [
        "data.source=bigtable",
        "data.train=bigtable://p/i/digits/train_",
        "data.eval=bigtable://p/i/digits/validation_",
        "data.train_examples=1438",
    ];
    train(&ours, &sets, &environment);
    assert_equal(&ours, &straight);
    let broken = relay.broken.load(Ordering::SeqCst);
    assert!(broken > 0, "no connection was broken");

    // What is not there.
    for (url, what) in [
        ("bigtable://p/i/nowhere/train_", "nowhere"),
        ("bigtable://p/i/empty/train_", "no row's key begins so"),
        (
            "bigtable://p/i/digits/train_?column=ds:d",
            "no row's key begins so",
        ),
    ] {
        let home = Home::new();
        let (train, eval) = (format!("data.train={url}"), format!("data.eval={url}"));
        let args = home.args(&["data.source=bigtable", &train, &eval]);
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let refused = runner(&args).envs(envs()).output().unwrap();
        let said = text(&refused.stderr);
        assert!(!refused.status.success() && said.contains(what), "{said}");
    }
}
