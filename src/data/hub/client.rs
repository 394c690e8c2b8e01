//! Requests to the Hub: where it is, who asks, what is tried again, and what a refusal means.

use super::cache;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// Where the Hub is, unless `HF_ENDPOINT` names a mirror.
const ENDPOINT: &str = "https://huggingface.co";
/// Longest wait that the Hub may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// The largest page of a listing; one of 1000 files has some 300 KB.
const MAX_PAGE: u64 = 64 << 20;

/// Asks for one dataset.
pub struct Client {
    /// URL of the Hub, without a slash at its end.
    pub endpoint: String,
    /// `OWNER/NAME`.
    pub repository: String,
    /// The Hub's cache.
    pub cache: PathBuf,
    /// How often a request is made that fails for a passing reason, one after the other without any byte in between.
    pub tries: u32,
    /// Wait after the first failure; twice as long after each further one.
    pub pause: Duration,
    token: Option<Token>,
    agent: Agent,
}

struct Token {
    value: String,
    /// `HF_TOKEN`, or the file's path.
    origin: String,
}

/// Why a request brought nothing.
pub(super) struct Failure {
    pub error: anyhow::Error,
    /// Whether the same request may succeed later.
    pub passing: bool,
    /// Whether some bytes came nevertheless.
    pub advanced: bool,
    /// Whether the dataset is there, and the file or folder is not.
    pub no_entry: bool,
    /// The wait that the Hub asks for.
    pub wait: Option<Duration>,
}

impl Failure {
    pub fn passing(error: anyhow::Error) -> Self {
        Self { passing: true, ..error.into() }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { error, passing: false, advanced: false, no_entry: false, wait: None }
    }
}

/// An error with the next action for the user.
pub(super) fn with_hint(error: anyhow::Error, hint: impl Into<String>) -> anyhow::Error {
    match Err::<Infallible, _>(error).hint(hint) {
        Ok(never) => match never {},
        Err(hinted) => hinted,
    }
}

impl Client {
    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN` or the file of `hf auth login`, `HF_HOME`, proxies
    /// (`HTTPS_PROXY`, `NO_PROXY`), certificates instead of Mozilla's (`SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`).
    pub fn from_env(repository: &str) -> Result<Self> {
        let said = |name: &str| {
            let value = env::var(name).ok().map(|value| value.trim().to_owned());
            value.filter(|value| !value.is_empty())
        };
        let token = match said("HF_TOKEN") {
            Some(value) => Some(Token { value, origin: "HF_TOKEN".into() }),
            None => {
                let file = cache::token_file()?;
                let value = std::fs::read_to_string(&file).unwrap_or_default().trim().to_owned();
                let origin = file.display().to_string();
                (!value.is_empty()).then_some(Token { value, origin })
            }
        };
        let certificates = match said("SSL_CERT_FILE").or(said("REQUESTS_CA_BUNDLE")) {
            Some(file) => certificates(Path::new(&file))?.into(),
            None => RootCerts::WebPki,
        };
        Ok(Self {
            endpoint: said("HF_ENDPOINT").unwrap_or(ENDPOINT.into()).trim_end_matches('/').into(),
            repository: repository.into(),
            cache: cache::folder()?,
            tries: 6,
            pause: Duration::from_secs(1),
            token,
            agent: agent(certificates),
        })
    }

    /// The URL of something of the dataset: `/api/datasets/OWNER/NAME/tree/...` or `/datasets/OWNER/NAME/resolve/...`.
    pub(super) fn url(&self, base: &str, verb: &str, revision: &str, path: &str) -> String {
        let mut url = format!("{}{base}/datasets/{}/{verb}/", self.endpoint, self.repository);
        url += &encoded(revision, "");
        if !path.is_empty() {
            url += "/";
            url += &encoded(path, "/");
        }
        url
    }

    /// Asks for a JSON document; also gives the address of the next page, where there is one.
    pub(super) fn json<T: DeserializeOwned>(
        &self,
        url: &str,
        tries: u32,
    ) -> Result<(T, Option<String>), Failure> {
        self.retrying(
            tries,
            || false,
            || {
                let answer = self.request(url, 0)?;
                let next = next_page(answer.headers());
                let body = answer.into_body().into_with_config().limit(MAX_PAGE).read_to_vec();
                let body = body.map_err(|e| Failure::passing(self.broken(url, e)))?;
                let value = serde_json::from_slice(&body)
                .with_context(|| format!("`{url}` gave no answer of the Hub"))
                .hint(
                    "check `HF_ENDPOINT`, and that no log-in page of the network stands between",
                )?;
                Ok((value, next))
            },
        )
    }

    /// Asks for the bytes from `from` on. The token goes to the Hub alone, not to where it redirects to.
    pub(super) fn request(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(url);
        let is_hub = url.strip_prefix(&self.endpoint).is_some_and(|rest| rest.starts_with('/'));
        if let Some(token) = self.token.as_ref().filter(|_| is_hub) {
            request = request.header("Authorization", format!("Bearer {}", token.value));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let answer = request.call().map_err(|e| {
            // A certificate that is refused comes as invalid data.
            let passing = match &e {
                ureq::Error::Io(io) => io.kind() != io::ErrorKind::InvalidData,
                ureq::Error::BadUri(_) | ureq::Error::Tls(_) | ureq::Error::Rustls(_) => false,
                _ => true,
            };
            Failure { passing, ..Failure::passing(self.broken(url, e)) }
        })?;
        match answer.status().as_u16() {
            200 | 206 | 416 => Ok(answer),
            status => Err(self.refused(url, status, answer.headers())),
        }
    }

    /// Makes an attempt until one succeeds, fails for good, or `tries` have failed without any byte in between; gives
    /// up waiting when `stopped`.
    pub(super) fn retrying<T>(
        &self,
        tries: u32,
        stopped: impl Fn() -> bool,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let (mut left, mut pause) = (tries, self.pause);
        loop {
            let failure = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if failure.advanced {
                (left, pause) = (tries, self.pause);
            }
            left = left.saturating_sub(1);
            if !failure.passing || left == 0 {
                return Err(failure);
            }
            if let Some(wait) = failure.wait {
                eprintln!("the Hub asks to wait {} s ({})", wait.as_secs(), failure.error);
            }
            let until = Instant::now() + failure.wait.unwrap_or(pause);
            while Instant::now() < until && !stopped() {
                sleep(Duration::from_millis(50));
            }
            if stopped() {
                return Err(failure);
            }
            pause *= 2;
        }
    }

    fn broken(&self, url: &str, error: ureq::Error) -> anyhow::Error {
        let what = anyhow!(error).context(format!("no answer from `{url}`"));
        let hint = "check the network, its proxy (`HTTPS_PROXY`, `SSL_CERT_FILE`) and `HF_ENDPOINT`; \
                    what was downloaded is kept. Without network, copy the files by other means and \
                    name them with `--source`";
        with_hint(what, hint)
    }

    /// What a status other than success means, and what to do.
    fn refused(&self, url: &str, status: u16, headers: &HeaderMap) -> Failure {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let said = header("x-error-message").map(|m| format!(" ({m})")).unwrap_or_default();
        let Self { endpoint, repository, .. } = self;
        let page = format!("{endpoint}/datasets/{repository}");
        let (what, hint) = match (status, header("x-error-code").unwrap_or_default()) {
            (401, _) => (
                format!("the Hub gives no access to `{repository}`"),
                format!("check owner and name; {}", self.who_asks()), // it tells nobody what is private
            ),
            (403, _) => (
                format!("the Hub gives no access to `{repository}`"),
                format!("accept the dataset's conditions at {page}; {}", self.who_asks()),
            ),
            (404, "RevisionNotFound") => (
                format!("`{repository}` has no such revision on the Hub"),
                "name a branch, a tag or a commit with `--revision`".into(),
            ),
            (404, "EntryNotFound") => (
                format!("`{repository}` has no such file on the Hub"),
                "start again: the files are listed anew".into(),
            ),
            (404, _) => (
                format!("the Hub has no dataset `{repository}`"),
                format!(
                    "check owner and name (models and spaces are not read); {}",
                    self.who_asks()
                ),
            ),
            _ => (
                "the Hub does not serve this".into(),
                "start again later: what was downloaded is kept".into(),
            ),
        };
        let error = anyhow!("`{url}` answered {status}{said}").context(what);
        let wait = header("retry-after").and_then(|seconds| seconds.parse().ok());
        Failure {
            error: with_hint(error, hint),
            passing: matches!(status, 408 | 425 | 429 | 500..),
            advanced: false,
            no_entry: header("x-error-code") == Some("EntryNotFound"),
            wait: wait.map(|seconds| Duration::from_secs(seconds).min(LONGEST_WAIT)),
        }
    }

    /// Which token is in use, or how to give one.
    fn who_asks(&self) -> String {
        match &self.token {
            Some(token) => {
                format!("the token of `{}` must be valid and allowed to read it", token.origin)
            }
            None => "a private or gated dataset needs a token: set `HF_TOKEN`, or log in with \
                     `hf auth login`"
                .into(),
        }
    }
}

fn agent(certificates: RootCerts) -> Agent {
    let seconds = |n| Some(Duration::from_secs(n));
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("tinyllama/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity") // bytes as they are hashed
        .redirect_auth_headers(RedirectAuthHeaders::SameHost) // a renamed dataset
        .tls_config(TlsConfig::builder().root_certs(certificates).build())
        .timeout_connect(seconds(20))
        .timeout_recv_response(seconds(60))
        .timeout_per_read(seconds(60))
        .build();
    config.into()
}

/// Mozilla's roots do not know a company's own: its file takes their place.
fn certificates(file: &Path) -> Result<Vec<Certificate<'static>>> {
    let named = || format!("cannot read certificates from `{}`", file.display());
    let hint =
        "set `SSL_CERT_FILE` to a file of PEM certificates, or unset it and `REQUESTS_CA_BUNDLE`";
    let pem = std::fs::read(file).with_context(named).hint(hint)?;
    let items = parse_pem(&pem).map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let found: Vec<_> = items.flatten().collect();
    if found.is_empty() {
        return Err(anyhow!("there is none in it").context(named())).hint(hint);
    }
    Ok(found)
}

/// The address in `Link: <...>; rel="next"`.
fn next_page(headers: &HeaderMap) -> Option<String> {
    let links = headers.get("link")?.to_str().ok()?;
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_owned())
}

/// Text in a URL: all but letters, digits, `-._~` and `keep` in hexadecimal.
fn encoded(text: &str, keep: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        match c.is_ascii_alphanumeric() || "-._~".contains(c) || keep.contains(c) {
            true => out.push(c),
            false => out += &format!("%{byte:02X}"),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_encoded() {
        assert_eq!(encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b/#\u{e9}?.x", "/"), "a%20b/%23%C3%A9%3F.x");
    }

    #[test]
    fn the_next_page_is_in_a_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(next_page(&headers), None);
        let link = "<http://x/a?cursor=1>; rel=\"prev\", <http://x/a?cursor=b>; rel=\"next\"";
        headers.insert("link", link.parse().unwrap());
        assert_eq!(next_page(&headers).as_deref(), Some("http://x/a?cursor=b"));
    }
}
