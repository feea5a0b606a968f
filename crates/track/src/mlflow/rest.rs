//! MLflow's REST API, typed: what MLflow's own client asks, in the same words (tested with 2.22 and 3.17).
//!
//! Bodies go as JSON to `/api/2.0/mlflow/..`, artifacts as they are to `/api/2.0/mlflow-artifacts/..`, the server's
//! proxy. One connection is kept open.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::http::{Method, Response};
use ureq::tls::{Certificate, ClientCert, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::access::{Access, Credentials};
use super::journal::Number;

/// Most metrics, parameters and tags that a request may have together.
pub(crate) const ENTITIES: usize = 1000;
/// Most parameters of a request.
pub(crate) const PARAMS: usize = 100;
/// Most of an answer that is read.
const ANSWER: u64 = 64 << 20;

/// Why a request came to nothing.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Nobody answered: the same request may succeed later.
    Unavailable(String),
    /// The server cannot do this now (408, 425, 429, 5xx); something else it may.
    Failing(String),
    /// We are not let in, or what we were writing to is gone: nothing that follows will succeed either.
    Denied(String),
    /// The request is wrong in itself, by the server's words.
    Rejected {
        /// MLflow's name of the error.
        code: String,
        /// What it says.
        message: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(what) | Self::Failing(what) | Self::Denied(what) => f.write_str(what),
            Self::Rejected { code, message } => write!(f, "{code}: {message}"),
        }
    }
}

impl Refusal {
    /// Whether the same request may succeed later.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Failing(_))
    }

    /// Whether it is MLflow's error of that name.
    pub(crate) fn is(&self, name: &str) -> bool {
        matches!(self, Self::Rejected { code, .. } if code == name)
    }
}

/// A value of a metric at a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Metric {
    pub(crate) key: String,
    pub(crate) value: Number,
    /// Milliseconds since 1970.
    pub(crate) timestamp: i64,
    pub(crate) step: u64,
}

/// A name and a text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Pair {
    pub(crate) key: String,
    #[serde(default)]
    pub(crate) value: String,
}

impl Pair {
    pub(crate) fn new(key: &str, value: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            value: value.into(),
        }
    }
}

/// What a run was trained or evaluated on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dataset {
    /// What it is called: the glob.
    pub name: String,
    /// At most 36 characters that change when the data does.
    pub digest: String,
    /// `training` or `evaluation`.
    pub context: String,
    /// Where it comes from.
    pub source: String,
    /// Number of examples.
    pub examples: u64,
}

/// A run as the server has it.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) id: String,
    pub(crate) experiment: String,
    pub(crate) artifacts: String,
    pub(crate) params: BTreeMap<String, String>,
    /// Deleted runs stay for a while, but take nothing.
    pub(crate) is_deleted: bool,
}

/// What a new run is.
pub(crate) struct NewRun<'a> {
    pub(crate) experiment: &'a str,
    pub(crate) user: &'a str,
    pub(crate) name: &'a str,
    /// Milliseconds since 1970.
    pub(crate) start: i64,
    pub(crate) tags: &'a [Pair],
}

/// One server.
pub(crate) struct Client {
    agent: Agent,
    url: String,
    authorization: Option<String>,
}

impl Client {
    /// A client; nothing is asked yet.
    ///
    /// # Errors
    /// If a certificate cannot be read.
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        let mut tls = TlsConfig::builder().disable_verification(access.is_unverified);
        if let Some(path) = &access.authorities {
            let (certificates, _) = pem(path, "MLFLOW_TRACKING_SERVER_CERT_PATH")?;
            tls = tls.root_certs(RootCerts::from(certificates));
        }
        if let Some(path) = &access.certificate {
            let name = "MLFLOW_TRACKING_CLIENT_CERT_PATH";
            let (certificates, key) = pem(path, name)?;
            let Some(key) = key else {
                let what = "has no private key\nhint: put certificate and key into one PEM file";
                return Err(format!("{name}: {} {what}", path.display()));
            };
            tls = tls.client_cert(Some(ClientCert::new_with_certs(&certificates, key)));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .tls_config(tls.build())
            .user_agent(concat!("runner/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(access.timeout.min(Duration::from_secs(10))))
            // Of a request's answer; a large artifact may take as long as it needs while bytes flow.
            .timeout_recv_response(Some(access.timeout))
            .timeout_per_read(Some(access.timeout))
            .timeout_per_write(Some(access.timeout))
            // An idle connection may have died with the server.
            .max_idle_age(Duration::from_secs(15))
            .build();
        let authorization = match &access.credentials {
            Credentials::None => None,
            Credentials::Token(token) => Some(format!("Bearer {token}")),
            Credentials::Basic { user, password } => {
                let engine = base64::engine::general_purpose::STANDARD;
                Some(format!(
                    "Basic {}",
                    engine.encode(format!("{user}:{password}"))
                ))
            }
        };
        Ok(Self {
            agent: config.new_agent(),
            url: access.url.clone(),
            authorization,
        })
    }

    /// The active experiment of that name, made if it is missing.
    pub(crate) fn experiment(&self, name: &str) -> Result<String, Refusal> {
        #[derive(Deserialize)]
        struct Found {
            experiment: Experiment,
        }
        #[derive(Deserialize)]
        struct Experiment {
            experiment_id: String,
            #[serde(default)]
            lifecycle_stage: String,
        }
        #[derive(Deserialize)]
        struct Made {
            experiment_id: String,
        }
        let query = format!("experiments/get-by-name?experiment_name={}", encoded(name));
        match self.get::<Found>(&query) {
            Ok(found) if found.experiment.lifecycle_stage == "deleted" => {
                let id = found.experiment.experiment_id;
                Err(Refusal::Denied(format!(
                    "the experiment {name:?} is deleted\nhint: name another with track.experiment, or \
                     `mlflow experiments restore -x {id}`"
                )))
            }
            Ok(found) => Ok(found.experiment.experiment_id),
            Err(refusal) if refusal.is("RESOURCE_DOES_NOT_EXIST") => {
                match self.post::<Made>("experiments/create", &json!({ "name": name })) {
                    Ok(made) => Ok(made.experiment_id),
                    // Another run was faster.
                    Err(refusal) if refusal.is("RESOURCE_ALREADY_EXISTS") => {
                        Ok(self.get::<Found>(&query)?.experiment.experiment_id)
                    }
                    Err(refusal) => Err(refusal),
                }
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// The runs of an experiment with a tag, the oldest first.
    pub(crate) fn runs_tagged(
        &self,
        experiment: &str,
        tag: &str,
        value: &str,
    ) -> Result<Vec<Run>, Refusal> {
        #[derive(Deserialize)]
        struct Found {
            #[serde(default)]
            runs: Vec<RunMessage>,
        }
        let filter = format!("tags.`{tag}` = '{value}'");
        let body = json!({
            "experiment_ids": [experiment],
            "filter": filter,
            "max_results": 1000,
            "order_by": ["attributes.start_time ASC"],
            "run_view_type": "ALL",
        });
        let found: Found = self.post("runs/search", &body)?;
        Ok(found.runs.into_iter().map(Run::from).collect())
    }

    /// A run by its identifier.
    pub(crate) fn run(&self, id: &str) -> Result<Run, Refusal> {
        let found: OneRun = self.get(&format!("runs/get?run_id={}", encoded(id)))?;
        Ok(found.run.into())
    }

    pub(crate) fn create_run(&self, new: &NewRun<'_>) -> Result<Run, Refusal> {
        let body = json!({
            "experiment_id": new.experiment,
            "user_id": new.user,
            "run_name": new.name,
            "start_time": new.start,
            "tags": new.tags,
        });
        let made: OneRun = self.post("runs/create", &body)?;
        Ok(made.run.into())
    }

    /// Sets the status, and the end or that there is none yet.
    pub(crate) fn update_run(
        &self,
        run: &str,
        status: &str,
        end: Option<i64>,
    ) -> Result<(), Refusal> {
        let mut body = json!({ "run_id": run, "run_uuid": run, "status": status });
        if let Some(end) = end {
            body["end_time"] = end.into();
        }
        self.tell("runs/update", &body)
    }

    /// At most [`ENTITIES`] together, [`PARAMS`] parameters and as many tags.
    pub(crate) fn log_batch(
        &self,
        run: &str,
        metrics: &[Metric],
        params: &[Pair],
        tags: &[Pair],
    ) -> Result<(), Refusal> {
        let body = json!({ "run_id": run, "metrics": metrics, "params": params, "tags": tags });
        self.tell("runs/log-batch", &body)
    }

    pub(crate) fn log_inputs(&self, run: &str, datasets: &[Dataset]) -> Result<(), Refusal> {
        let dataset = |d: &Dataset| {
            let source = json!({ "uri": d.source }).to_string();
            let profile = json!({ "num_rows": d.examples }).to_string();
            json!({
                "tags": [Pair::new("mlflow.data.context", d.context.as_str())],
                "dataset": {
                    "name": d.name,
                    "digest": d.digest,
                    "source_type": "local",
                    "source": source,
                    "profile": profile,
                },
            })
        };
        let datasets: Vec<Value> = datasets.iter().map(dataset).collect();
        let body = json!({ "run_id": run, "datasets": datasets });
        self.tell("runs/log-inputs", &body)
    }

    /// Sends a file to `path` below what `uri`, as the server gave it, stands for.
    pub(crate) fn upload(&self, uri: &str, path: &str, file: &Path) -> Result<(), Refusal> {
        let unreadable =
            |error: std::io::Error| rejected("FILE", format!("{}: {error}", file.display()));
        let source = File::open(file).map_err(unreadable)?;
        self.put(uri, path, &source)
    }

    /// Sends a text, as [`Client::upload`].
    pub(crate) fn upload_text(&self, uri: &str, path: &str, text: &str) -> Result<(), Refusal> {
        self.put(uri, path, text)
    }

    fn put(&self, uri: &str, path: &str, body: impl ureq::AsSendBody) -> Result<(), Refusal> {
        let Some(root) = uri.strip_prefix("mlflow-artifacts:") else {
            return Err(rejected(
                "NO_PROXY",
                format!(
                    "the server keeps artifacts at {uri} and does not take them itself\n\
                     hint: start it with `mlflow server --serve-artifacts --artifacts-destination ..`"
                ),
            ));
        };
        // With two slashes a host follows, which is the server's own.
        let root = match root.strip_prefix("//") {
            Some(rest) => rest.split_once('/').map_or("", |(_, path)| path),
            None => root.trim_start_matches('/'),
        };
        let path = path.split('/').map(encoded).collect::<Vec<_>>().join("/");
        let url = format!(
            "{}/api/2.0/mlflow-artifacts/artifacts/{root}/{path}",
            self.url
        );
        let mut request = self
            .agent
            .put(&url)
            .content_type("application/octet-stream");
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let answer = request
            .send(body)
            .map_err(|error| self.unanswered(&error))?;
        self.read::<Value>(answer).map(drop)
    }

    /// The logged model (MLflow 3) of a run by its name, if there is one.
    pub(crate) fn logged_model(
        &self,
        experiment: &str,
        run: &str,
        name: &str,
    ) -> Result<Option<Model>, Refusal> {
        #[derive(Deserialize)]
        struct Found {
            #[serde(default)]
            models: Vec<ModelMessage>,
        }
        let body = json!({
            "experiment_ids": [experiment],
            "filter": format!("source_run_id = '{run}' AND name = '{name}'"),
            "max_results": 50,
        });
        let found: Found = self.post("logged-models/search", &body)?;
        Ok(found.models.into_iter().next().map(|m| m.info))
    }

    pub(crate) fn create_logged_model(
        &self,
        experiment: &str,
        run: &str,
        name: &str,
        tags: &[Pair],
    ) -> Result<Model, Refusal> {
        #[derive(Deserialize)]
        struct Made {
            model: ModelMessage,
        }
        let body = json!({
            "experiment_id": experiment,
            "name": name,
            "source_run_id": run,
            "tags": tags,
        });
        let made: Made = self.post("logged-models", &body)?;
        Ok(made.model.info)
    }

    /// Says that all files of a model are there, and that the run put it out.
    pub(crate) fn finish_logged_model(
        &self,
        run: &str,
        model: &str,
        step: u64,
    ) -> Result<(), Refusal> {
        let body = json!({ "model_id": model, "status": "LOGGED_MODEL_READY" });
        let _: Value = self.ask(
            Method::PATCH,
            &format!("logged-models/{}", encoded(model)),
            Some(&body),
        )?;
        let body = json!({ "run_id": run, "models": [{ "model_id": model, "step": step }] });
        self.tell("runs/outputs", &body)
    }

    /// Makes a version of a registered model, and the model if it is missing; the version's number. A version that the
    /// run already has is that one.
    pub(crate) fn register(&self, name: &str, run: &str, model: &Model) -> Result<String, Refusal> {
        #[derive(Deserialize)]
        struct Versions {
            #[serde(default)]
            model_versions: Vec<Version>,
        }
        #[derive(Deserialize)]
        struct Made {
            model_version: Version,
        }
        #[derive(Deserialize)]
        struct Version {
            version: String,
            #[serde(default)]
            name: String,
        }
        match self.tell("registered-models/create", &json!({ "name": name })) {
            Err(refusal) if !refusal.is("RESOURCE_ALREADY_EXISTS") => return Err(refusal),
            _ => {}
        }
        let filter = encoded(&format!("run_id='{run}'"));
        let known: Versions = self.get(&format!("model-versions/search?filter={filter}"))?;
        if let Some(known) = known.model_versions.into_iter().find(|v| v.name == name) {
            return Ok(known.version);
        }
        let body = json!({
            "name": name,
            "source": format!("models:/{}", model.model_id),
            "run_id": run,
            "model_id": model.model_id,
        });
        let made: Made = self.post("model-versions/create", &body)?;
        let version = made.model_version.version;
        let versions = json!([{ "name": name, "version": version.parse::<u64>().unwrap_or(0) }]);
        let body = json!({ "tags": [Pair::new("mlflow.modelVersions", versions.to_string())] });
        let path = format!("logged-models/{}/tags", encoded(&model.model_id));
        let _: Value = self.ask(Method::PATCH, &path, Some(&body))?;
        Ok(version)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Refusal> {
        self.ask(Method::GET, path, None)
    }

    fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, Refusal> {
        self.ask(Method::POST, path, Some(body))
    }

    /// A request whose answer says nothing.
    fn tell(&self, path: &str, body: &Value) -> Result<(), Refusal> {
        self.post::<Value>(path, body).map(drop)
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, Refusal> {
        let url = format!("{}/api/2.0/mlflow/{path}", self.url);
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let no_request = |error: ureq::http::Error| rejected("REQUEST", error.to_string());
        let answer = match body {
            Some(body) => {
                let request = request.header("Content-Type", "application/json");
                let request = request.body(body.to_string()).map_err(no_request)?;
                self.agent.run(request)
            }
            None => self.agent.run(request.body(()).map_err(no_request)?),
        };
        self.read(answer.map_err(|error| self.unanswered(&error))?)
    }

    fn unanswered(&self, error: &ureq::Error) -> Refusal {
        Refusal::Unavailable(format!("{}: {error}", self.url))
    }

    fn read<T: DeserializeOwned>(&self, answer: Response<Body>) -> Result<T, Refusal> {
        let status = answer.status();
        let mut body = answer.into_body();
        let text = body
            .with_config()
            .limit(ANSWER)
            .lossy_utf8(true)
            .read_to_string();
        let text = text.map_err(|error| self.unanswered(&error))?;
        if status.is_success() {
            // An upload is answered by `{}` or by nothing.
            let text = if text.trim().is_empty() { "{}" } else { &text };
            return serde_json::from_str(text).map_err(|error| {
                let url = &self.url;
                Refusal::Denied(format!(
                    "{url}: the answer is not MLflow's: {error}\nhint: is {url} the root of an MLflow server?"
                ))
            });
        }
        #[derive(Default, Deserialize)]
        struct Told {
            #[serde(default)]
            error_code: String,
            #[serde(default)]
            message: String,
        }
        let told: Told = serde_json::from_str(&text).unwrap_or_default();
        let message = match told.message.as_str() {
            "" => first_line(&text),
            message => message,
        };
        let what = format!("{}: {status}: {message}", self.url);
        Err(match status.as_u16() {
            401 | 403 => Refusal::Denied(format!(
                "{what}\nhint: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )),
            408 | 425 | 429 | 500.. => Refusal::Failing(what),
            404 if told.error_code.is_empty() => Refusal::Denied(format!(
                "{what}\nhint: is {} the root of an MLflow server?",
                self.url
            )),
            _ => Refusal::Rejected {
                code: told.error_code,
                message: message.into(),
            },
        })
    }
}

fn rejected(code: &str, message: String) -> Refusal {
    Refusal::Rejected {
        code: code.into(),
        message,
    }
}

fn first_line(text: &str) -> &str {
    let line = text.trim().lines().next().unwrap_or_default();
    super::first(line, 200)
}

/// A model that a run put out.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Model {
    pub(crate) model_id: String,
    pub(crate) artifact_uri: String,
    #[serde(default)]
    pub(crate) status: String,
}

#[derive(Deserialize)]
struct ModelMessage {
    info: Model,
}

#[derive(Deserialize)]
struct OneRun {
    run: RunMessage,
}

#[derive(Deserialize)]
struct RunMessage {
    info: InfoMessage,
    #[serde(default)]
    data: DataMessage,
}

#[derive(Deserialize)]
struct InfoMessage {
    run_id: String,
    experiment_id: String,
    #[serde(default)]
    artifact_uri: String,
    #[serde(default)]
    lifecycle_stage: String,
}

#[derive(Default, Deserialize)]
struct DataMessage {
    #[serde(default)]
    params: Vec<Pair>,
}

impl From<RunMessage> for Run {
    fn from(message: RunMessage) -> Self {
        let RunMessage { info, data } = message;
        let params = data.params.into_iter();
        Self {
            id: info.run_id,
            experiment: info.experiment_id,
            artifacts: info.artifact_uri,
            is_deleted: info.lifecycle_stage == "deleted",
            params: params.map(|pair| (pair.key, pair.value)).collect(),
        }
    }
}

type Pem = (
    Vec<Certificate<'static>>,
    Option<ureq::tls::PrivateKey<'static>>,
);

/// The certificates in a PEM file, and a key if there is one.
fn pem(path: &Path, name: &str) -> Result<Pem, String> {
    let wrong = |what: String| {
        format!(
            "environment variable {name}: {}: {what}\nhint: it has to be a file of PEM certificates",
            path.display()
        )
    };
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let (mut certificates, mut key) = (vec![], None);
    for item in parse_pem(&bytes) {
        match item.map_err(|error| wrong(error.to_string()))? {
            PemItem::Certificate(certificate) => certificates.push(certificate),
            PemItem::PrivateKey(found) => key = Some(found),
            _ => {}
        }
    }
    if certificates.is_empty() {
        return Err(wrong("it has no certificate".into()));
    }
    Ok((certificates, key))
}

/// A part of a URL: everything but letters, digits and `-._~` percent-encoded (RFC 3986, section 2.3).
pub(crate) fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(byte as char);
            }
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// A name as MLflow takes it: of letters, digits, `_ - . : /` and spaces, 250 at most; others become `_`.
pub(crate) fn plain_key(key: &str) -> String {
    let plain = |c: char| match c.is_alphanumeric() || "_-.:/ ".contains(c) {
        true => c,
        false => '_',
    };
    super::first(key, 250).chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_url_are_encoded() {
        assert_eq!(encoded("a b/ä'"), "a%20b%2F%C3%A4%27");
        assert_eq!(encoded("A-z_0.~"), "A-z_0.~");
    }

    #[test]
    fn names_are_those_that_mlflow_takes() {
        assert_eq!(
            plain_key("data.train (names and sizes)"),
            "data.train _names and sizes_"
        );
        assert_eq!(plain_key("system/cpu:0 ä"), "system/cpu:0 ä");
        assert_eq!(plain_key(&"x".repeat(300)).len(), 250);
    }

    #[test]
    fn numbers_are_those_of_mlflow() {
        let metric = |value: f64| {
            let metric = Metric {
                key: "k".into(),
                value: Number(value),
                timestamp: 5,
                step: 7,
            };
            serde_json::to_string(&metric).unwrap()
        };
        assert_eq!(
            metric(0.5),
            r#"{"key":"k","value":0.5,"timestamp":5,"step":7}"#
        );
        assert!(metric(f64::NAN).contains(r#""value":"NaN""#));
        assert!(metric(f64::INFINITY).contains(r#""value":"Infinity""#));
        assert!(metric(f64::NEG_INFINITY).contains(r#""value":"-Infinity""#));
    }

    #[test]
    fn a_certificate_that_is_none_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let read = |path: &Path| pem(path, "X").err().unwrap();
        assert!(read(&path).starts_with("environment variable X: "));
        std::fs::write(&path, "nothing").unwrap();
        assert!(read(&path).contains("it has no certificate\nhint: "));
    }
}
