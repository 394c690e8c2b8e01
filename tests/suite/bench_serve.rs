//! `bench serve`: counts and errors; its times are the machine's.

use crate::small_models::{EOS, alphabet, checkpoint, tiny, write_tokenizer};
use assert_cmd::Command;
use serde_json::Value;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tinyllama::bench::serve::{self, Load, Pace};
use tinyllama::bench::serve_client::Server;
use tinyllama::generate::Network;
use tinyllama::generate::engine::EngineOptions;
use tinyllama::generate::load::Loaded;
use tinyllama::generate::service::Service;
use tinyllama::serve::{Background, Limits, Options};
use tinyllama::tokenizer::Tokenizer;

/// A server over the alphabet with a context of 64 that lets `waiting` samples wait behind the 2 that run.
fn server(key: Option<&str>, waiting: usize) -> Background {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path(), 0);
    let tokenizer = Some(Tokenizer::load(dir.path()).unwrap());
    let network = Network::Dense(Box::new(alphabet()));
    let loaded = Loaded { network, tokenizer, eos: vec![EOS] };
    let sizes = EngineOptions { blocks: 64, max_sequences: 2, ..Default::default() };
    let service = Arc::new(Service::start(loaded, sizes, waiting).unwrap());
    let options = Options {
        host: "127.0.0.1".into(),
        port: 0,
        api_key: key.map(Into::into),
        model: "alphabet".into(),
        limits: Limits::within(64),
        drain: Duration::ZERO,
        log: false,
    };
    Background::start(service, &options).unwrap()
}

fn url(server: &Background) -> String {
    format!("http://{}", server.address())
}

/// Runs `bench serve`; exit code, stdout, stderr.
fn bench(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("tinyllama").unwrap();
    command.env_remove("TINYLLAMA_API_KEY").args(["bench", "serve"]).args(args);
    let out = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

fn on_checkpoint<'a>(dir: &'a Path, args: &[&'a str]) -> (i32, String, String) {
    let sizes = ["--requests", "10", "--prompt-tokens", "20", "--new-tokens", "6"];
    let place = ["--checkpoint", dir.to_str().unwrap(), "--device", "cpu"];
    bench(&[&place[..], &sizes, args].concat())
}

#[test]
fn every_request_is_counted_with_all_its_tokens() {
    let server = server(None, 64);
    let target = Arc::new(Server::new(&url(&server), None).unwrap());
    for pace in [Pace::Clients(5), Pace::Rate(500.0)] {
        let (prompt_tokens, new_tokens) = (30, 7);
        let load =
            Load { requests: 12, pace, prompt_tokens, new_tokens, temperature: 1.0, seed: 3 };
        let report = serve::run(&target, &load).unwrap();
        assert_eq!((report.whole, report.failed), (12, 0), "{:?}", report.failures);
        assert_eq!((report.prompt_tokens, report.new_tokens), (12 * 30, 12 * 7));
        assert_eq!(report.model, "alphabet");
        let [first, token, whole] = [report.first_token_ms, report.per_token_ms, report.whole_ms];
        assert!(token.unwrap().p50 >= 0.0);
        let (first, whole) = (first.unwrap(), whole.unwrap());
        assert!(0.0 < first.p50 && first.p50 <= first.p90 && first.p90 <= first.p99);
        assert!(first.p99 <= whole.p99);
    }
}

#[test]
fn requests_that_a_full_server_refuses_have_failed() {
    let server = server(None, 1);
    let target = Arc::new(Server::new(&url(&server), None).unwrap());
    let pace = Pace::Clients(24);
    let load =
        Load { requests: 24, pace, prompt_tokens: 8, new_tokens: 50, temperature: 0.0, seed: 0 };
    let report = serve::run(&target, &load).unwrap();
    assert_eq!(report.whole + report.failed, 24);
    assert!(report.whole > 0 && report.failed > 0, "{} and {}", report.whole, report.failed);
    assert_eq!(report.failures["status 429: queue_full"], report.failed);
    assert_eq!(report.new_tokens, 50 * report.whole);
}

#[test]
fn the_program_serves_a_checkpoint_itself_and_tells_people_and_programs() {
    let dir = checkpoint(&tiny("tiny-llama-1.1b", 2));
    let (code, out, err) = on_checkpoint(dir.path(), &["--clients", "4", "--json"]);
    assert_eq!(code, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    for (name, want) in [("whole", 10), ("failed", 0), ("prompt_tokens", 200), ("new_tokens", 60)] {
        assert_eq!(report[name], want, "{name} in {out}");
    }
    assert!(report["peak_memory"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{out}");
    assert!(report["first_token_ms"]["p99"].as_f64().is_some_and(|time| time > 0.0), "{out}");

    let (code, out, err) = on_checkpoint(dir.path(), &["--rate", "200", "--temperature", "0.7"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("10 requests of 20 + 6 tokens, 200 a second"), "{out}");
    for row in ["first token", "between tokens", "between pieces", "whole answer"] {
        assert!(out.lines().any(|line| line.starts_with(row)), "{row} in {out}");
    }
}

/// The program's one error, with its exit code.
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let (got, out, err) = bench(args);
    assert_eq!((got, out.as_str()), (code, ""), "{args:?}: {err}");
    assert_eq!(err.matches("error: ").count(), 1, "{err}");
    for word in words {
        assert!(err.contains(word), "{args:?}: {word} in {err}");
    }
}

#[test]
fn what_cannot_be_measured_is_one_error_with_a_way_out() {
    let one = "expected one of `--checkpoint` and `--url`, got ";
    refused(&[], 2, &[&format!("{one}neither"), "hint: `--checkpoint DIR` serves"]);
    let both = ["--checkpoint", "out", "--url", "http://127.0.0.1:1"];
    refused(&both, 2, &[&format!("{one}both"), "hint: "]);
    for name in ["--requests", "--clients", "--prompt-tokens", "--new-tokens"] {
        refused(&[name, "0"], 2, &[name, "expected at least 1"]);
    }
    for rate in ["-1", "inf"] {
        refused(&[&format!("--rate={rate}")], 2, &["--rate", "expected a number above 0"]);
    }
    refused(&["--rate", "1", "--clients", "2"], 2, &["cannot be used with"]);
    refused(&["--url", "http://a", "--quantize", "int4"], 2, &["cannot be used with"]);
    refused(&["--url", "https://a"], 2, &["expected http://HOST:PORT, got `https://a`", "hint: "]);

    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // closed again
    let words = [&format!("cannot reach a server at http://{free}"), "refused", "hint: start one"];
    refused(&["--url", &format!("http://{free}")], 1, &words);
}

#[test]
fn a_server_that_refuses_is_told_as_it_refuses() {
    let server = server(Some("secret"), 8);
    let address = url(&server);
    let words = ["expected its API key, got none", "hint: give the server's key by `--key`"];
    refused(&["--url", &address], 1, &words);
    refused(&["--url", &address, "--key", "open"], 1, &["expected its API key, got another one"]);
    let sizes = ["--prompt-tokens", "60", "--new-tokens", "5"];
    let args = [&["--url", &address, "--key", "secret"][..], &sizes].concat();
    refused(&args, 2, &["up to 64 tokens together", "got 60 + 5", "hint: lower"]);
    let hot = ["--url", &address, "--key", "secret", "--temperature", "9"];
    let sizes = ["--prompt-tokens", "20", "--new-tokens", "5"];
    refused(&[&hot[..], &sizes].concat(), 1, &["`temperature`: expected", "hint: change"]);
    let sizes = [&sizes[..], &["--requests", "3", "--json"]].concat();
    let (code, out, err) = bench(&[&["--url", &address, "--key", "secret"][..], &sizes].concat());
    assert_eq!(code, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["whole"], &report["peak_memory"]), (&3.into(), &Value::Null), "{out}");
}
