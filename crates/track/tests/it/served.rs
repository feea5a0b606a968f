//! A real `mlflow server`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The server of one database, until dropped.
pub(crate) struct Server {
    /// A shell that leads a process group; the server and its workers are in it too.
    shell: Child,
    port: u16,
    log: PathBuf,
}

/// A port that nobody listens on.
pub(crate) fn free_port() -> u16 {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    free.local_addr().unwrap().port()
}

impl Server {
    /// Starts one with more arguments and waits until it answers.
    pub(crate) fn start(python: &str, db: &Path, more: &[&str]) -> Self {
        Self::start_at(python, db, free_port(), more)
    }

    pub(crate) fn start_at(python: &str, db: &Path, port: u16, more: &[&str]) -> Self {
        let dir = db.parent().unwrap();
        let log = dir.join("server.log");
        let output = File::create(&log).unwrap();
        // The shell ends its whole group when its standard input ends: when we drop it, and when we are killed.
        let mut command = Command::new("sh");
        command.args(["-c", r#""$@" & read -r line; kill -s KILL 0"#, "sh", python]);
        command.args(["-m", "mlflow", "server", "--workers", "1"]);
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        let uri = format!("sqlite:///{}", db.display());
        command.args(["--backend-store-uri", &uri]).args(more);
        command
            .current_dir(dir)
            .env("MLFLOW_DISABLE_TELEMETRY", "true")
            .env("DO_NOT_TRACK", "true")
            .env("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let shell = command.spawn().unwrap();
        let server = Self { shell, port, log };
        let begin = Instant::now();
        while server
            .get("/health")
            .is_none_or(|(status, _)| status != 200)
        {
            if begin.elapsed() > Duration::from_secs(180) {
                let said = fs::read_to_string(&server.log).unwrap();
                panic!("the server does not answer; it said\n{said}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Status and body; none if nobody answers.
    pub(crate) fn get(&self, path: &str) -> Option<(u16, String)> {
        self.ask("GET", path, "")
    }

    /// The same with another method and a body of JSON.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok()?;
        let (port, length) = (self.port, body.len());
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}
