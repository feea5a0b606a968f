//! Where an MLflow server is, and how it is spoken to: a URL and MLflow's own environment variables.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// An MLflow server.
#[derive(Clone, Debug, PartialEq)]
pub struct Access {
    /// `http://host:port` or `https://..`, with a path if it has one, without a slash at the end.
    pub url: String,
    /// Who we are.
    pub credentials: Credentials,
    /// Whether a server whose certificate proves nothing is spoken to all the same.
    pub is_unverified: bool,
    /// PEM file of the authorities to believe instead of the usual ones.
    pub authorities: Option<PathBuf>,
    /// PEM file of our own certificate and its key.
    pub certificate: Option<PathBuf>,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How often a request is tried again where somebody waits for it.
    pub retries: u32,
    /// Seconds before the second retry; each further one waits twice as long.
    pub backoff: f64,
    /// The run to go on with, instead of one of our own.
    pub run_id: Option<String>,
    /// The experiment, instead of one by name.
    pub experiment_id: Option<String>,
}

/// Who we are to a server.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nobody.
    None,
    /// A user and a password.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A bearer's token.
    Token(String),
}

/// Without the secret.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Basic { user, .. } => write!(f, "Basic({user})"),
            Self::Token(_) => f.write_str("Token"),
        }
    }
}

impl Access {
    /// The server at `url`, which may hold `user:password@`, with what MLflow's environment variables say about it;
    /// `variable` looks one up.
    ///
    /// # Errors
    /// If the URL or a variable makes no sense: what, and a line `hint: ..`.
    pub fn new(url: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let variable = |name: &str| variable(name).filter(|text| !text.is_empty());
        let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
        let rest = rest.trim_end_matches('/');
        let end = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (login, host) = match authority.rsplit_once('@') {
            Some((login, host)) => (Some(login), host),
            None => (None, authority),
        };
        if path.contains('@') {
            return Err(format!(
                "{}: a URL has its login before the host, and no @ after it\nhint: write / in a password as %2F, and @ \
                 as %40",
                without_login(url)
            ));
        }
        let url = format!("{scheme}://{host}{path}");
        let is_plain = |c: char| c.is_ascii() && !c.is_ascii_control() && !" \"<>?#\\".contains(c);
        if !["http", "https"].contains(&scheme) || host.is_empty() || !url.chars().all(is_plain) {
            let url = url.trim_start_matches("://");
            return Err(format!(
                "{url:?} is no MLflow server\nhint: write http://host:port or https://host"
            ));
        }
        let port = host.rsplit_once(':').filter(|_| !host.ends_with(']'));
        if let Some((_, port)) = port
            && port.parse::<u16>().is_err()
        {
            return Err(format!(
                "{url}: {port:?} is no port\nhint: a port is a number up to 65535, such as http://host:5000"
            ));
        }

        let credentials = match (login, variable("MLFLOW_TRACKING_USERNAME")) {
            (Some(login), _) => {
                let (user, password) = login.split_once(':').unwrap_or((login, ""));
                let [user, password] = [user, password].map(decoded);
                Credentials::Basic { user, password }
            }
            (None, Some(user)) => Credentials::Basic {
                user,
                password: variable("MLFLOW_TRACKING_PASSWORD").unwrap_or_default(),
            },
            (None, None) => match variable("MLFLOW_TRACKING_TOKEN") {
                Some(token) => Credentials::Token(token),
                None => Credentials::None,
            },
        };
        let number = |name: &str, default: f64| match variable(name) {
            None => Ok(default),
            Some(text) => match text.trim().parse::<f64>() {
                Ok(number) if (0.0..=1e6).contains(&number) => Ok(number),
                _ => Err(format!(
                    "environment variable {name}: expected a number from 0 to 1000000, not {text:?}\n\
                     hint: unset it for MLflow's default, {default}"
                )),
            },
        };
        let is_unverified = match variable("MLFLOW_TRACKING_INSECURE_TLS").as_deref() {
            None => false,
            Some(text) if ["true", "1"].contains(&&*text.to_lowercase()) => true,
            Some(text) if ["false", "0"].contains(&&*text.to_lowercase()) => false,
            Some(text) => {
                return Err(format!(
                    "environment variable MLFLOW_TRACKING_INSECURE_TLS: expected true or false, not {text:?}\n\
                     hint: unset it to check the server's certificate"
                ));
            }
        };
        let timeout = number("MLFLOW_HTTP_REQUEST_TIMEOUT", 120.0)?.max(0.1);
        Ok(Self {
            url,
            credentials,
            is_unverified,
            authorities: variable("MLFLOW_TRACKING_SERVER_CERT_PATH").map(PathBuf::from),
            certificate: variable("MLFLOW_TRACKING_CLIENT_CERT_PATH").map(PathBuf::from),
            timeout: Duration::from_secs_f64(timeout),
            retries: number("MLFLOW_HTTP_REQUEST_MAX_RETRIES", 7.0)? as u32,
            backoff: number("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", 2.0)?,
            run_id: variable("MLFLOW_RUN_ID"),
            experiment_id: variable("MLFLOW_EXPERIMENT_ID"),
        })
    }

    /// How long to wait before a retry, counted from 0: none at first, then `backoff` seconds, doubled each time, a
    /// minute at most (as urllib3 does, which MLflow's client uses, but for the minute).
    pub(crate) fn pause(&self, retry: u32) -> Duration {
        let seconds = match retry {
            0 => 0.0,
            _ => self.backoff * 2.0_f64.powi((retry - 1).min(30) as i32),
        };
        Duration::from_secs_f64(seconds.min(60.0))
    }
}

/// A URL, or what was meant as one, without what may be a password: all up to the last `@` but the scheme.
pub fn without_login(url: &str) -> String {
    let Some((login, rest)) = url.rsplit_once('@') else {
        return url.into();
    };
    match login.split_once("://") {
        Some((scheme, _)) => format!("{scheme}://..@{rest}"),
        None => format!("..@{rest}"),
    }
}

/// Undoes percent-encoding; what is not encoded as it should be stays.
fn decoded(text: &str) -> String {
    let mut bytes = vec![];
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).filter(|_| *first == b'%');
        let byte = hex.and_then(|hex| u8::from_str_radix(str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(url: &str, variables: &[(&str, &str)]) -> Result<Access, String> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        Access::new(url, |name| find(name).map(|(_, value)| value.to_string()))
    }

    fn basic(user: &str, password: &str) -> Credentials {
        Credentials::Basic {
            user: user.into(),
            password: password.into(),
        }
    }

    #[test]
    fn a_url_is_a_server() {
        for (url, expected) in [
            ("http://localhost:5000", "http://localhost:5000"),
            ("http://localhost:5000/", "http://localhost:5000"),
            ("https://ml.example/a/b//", "https://ml.example/a/b"),
            ("http://[::1]:5000", "http://[::1]:5000"),
            ("http://[::1]", "http://[::1]"),
        ] {
            let found = access(url, &[]).unwrap();
            assert_eq!(found.url, expected);
            assert_eq!(found.credentials, Credentials::None);
            assert!(!found.is_unverified);
            assert_eq!(found.timeout, Duration::from_secs(120));
            assert_eq!(found.retries, 7);
        }
        for url in [
            "databricks",
            "file:///tmp",
            "http://",
            "http://a b",
            "http://a?b",
            "http://a:b",
            "http://a:65536",
        ] {
            let error = access(url, &[]).unwrap_err();
            assert!(error.contains("\nhint: "), "{error}");
        }
    }

    #[test]
    fn a_login_is_no_part_of_the_url() {
        let found = access("http://me:p%40ss@host:1/x", &[]).unwrap();
        assert_eq!(found.url, "http://host:1/x");
        assert_eq!(found.credentials, basic("me", "p@ss"));
        assert_eq!(format!("{:?}", found.credentials), "Basic(me)");
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(decoded("%zz%41"), "%zzA");
    }

    #[test]
    fn a_password_is_in_no_message() {
        for url in [
            "http://me:secret@",
            "http://me:secret@host:port",
            "me:secret@host:5000",
            "postgresql://me:secret@host/db",
            "http://me:se/secret@host:5000",
            "http://me:5/secret@host:5000",
            "http://me:secret@a b",
        ] {
            let error = access(url, &[]).unwrap_err();
            assert!(!error.contains("secret"), "{url}: {error}");
            assert!(error.contains("\nhint: "), "{error}");
            assert!(!without_login(url).contains("secret"));
        }
        assert_eq!(without_login("http://me:a@b@host/x"), "http://..@host/x");
        assert_eq!(without_login("http://host/x"), "http://host/x");
    }

    #[test]
    fn the_environment_says_who_we_are() {
        let user = ("MLFLOW_TRACKING_USERNAME", "me");
        let password = ("MLFLOW_TRACKING_PASSWORD", "secret");
        let token = ("MLFLOW_TRACKING_TOKEN", "t");
        let check = |variables: &[(&str, &str)], expected| {
            let found = access("http://host", variables).unwrap();
            assert_eq!(found.credentials, expected);
            assert!(!format!("{found:?}").contains("secret"));
        };
        check(&[user, password], basic("me", "secret"));
        check(&[user, password, token], basic("me", "secret"));
        check(&[user], basic("me", ""));
        check(&[token], Credentials::Token("t".into()));
        check(&[("MLFLOW_TRACKING_USERNAME", "")], Credentials::None);
    }

    #[test]
    fn the_environment_says_how() {
        let found = access(
            "https://host",
            &[
                ("MLFLOW_TRACKING_INSECURE_TLS", "True"),
                ("MLFLOW_TRACKING_SERVER_CERT_PATH", "ca.pem"),
                ("MLFLOW_TRACKING_CLIENT_CERT_PATH", "me.pem"),
                ("MLFLOW_HTTP_REQUEST_TIMEOUT", "3"),
                ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
                ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.5"),
                ("MLFLOW_RUN_ID", "abc"),
                ("MLFLOW_EXPERIMENT_ID", "7"),
            ],
        );
        let found = found.unwrap();
        assert!(found.is_unverified);
        assert_eq!(found.authorities, Some("ca.pem".into()));
        assert_eq!(found.certificate, Some("me.pem".into()));
        assert_eq!(found.timeout, Duration::from_secs(3));
        assert_eq!(found.retries, 2);
        assert_eq!(found.run_id.as_deref(), Some("abc"));
        assert_eq!(found.experiment_id.as_deref(), Some("7"));
        let pauses = [0, 1, 2, 3, 20, u32::MAX].map(|n| found.pause(n).as_secs_f64());
        assert_eq!(pauses, [0.0, 0.5, 1.0, 2.0, 60.0, 60.0]);

        let error = access("http://host", &[("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")]);
        assert_eq!(
            error.unwrap_err(),
            "environment variable MLFLOW_HTTP_REQUEST_TIMEOUT: expected a number from 0 to 1000000, not \"soon\"\n\
             hint: unset it for MLflow's default, 120"
        );
        let error = access(
            "http://host",
            &[("MLFLOW_TRACKING_INSECURE_TLS", "perhaps")],
        );
        assert!(error.unwrap_err().contains("expected true or false"));
    }
}
