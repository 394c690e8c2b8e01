//! The server over real connections, on a service that says what a script says.

use super::*;
use crate::generate::service::scripted::Script;
use crate::tokenizer::chat_template::SpecialTokens;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::channel;
use std::time::Instant;

/// A running server, stopped when dropped.
struct Server {
    app: Arc<App>,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<bool>>,
}

fn options() -> Options {
    let limits = Limits {
        body: 10_000,
        prompt_tokens: 200,
        new_tokens: 4_000_000,
        choices: 8,
        time: Duration::from_secs(20),
    };
    Options {
        host: "127.0.0.1".into(),
        port: 0,
        api_key: None,
        model: "org/tiny".into(),
        limits,
        drain: Duration::from_secs(10),
        log: false,
    }
}

fn template(text: &str) -> ChatTemplate {
    let eos = Some("</s>".to_string());
    ChatTemplate::new(text, "`test`", SpecialTokens { eos, ..Default::default() }).unwrap()
}

impl Server {
    fn new(script: Script) -> Self {
        let text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
        Self::with(script, Some(template(text)), options())
    }

    fn with(script: Script, template: Option<ChatTemplate>, options: Options) -> Self {
        let service = Arc::new(Service::scripted(script));
        let app = Arc::new(App::new(service, template, &options));
        let (stop, stopped) = watch::channel(false);
        let (ready, address) = channel();
        let theirs = app.clone();
        let thread = std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = bind(&options.host, options.port).await.unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                let router = router(&theirs);
                connections::serve(theirs, router, listener, stopped, options.drain).await
            })
        });
        Self { app, address: address.recv().unwrap(), stop, thread: Some(thread) }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends bytes and reads until the connection ends: status, headers, body (chunks joined).
    fn raw(&self, bytes: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        parsed(&all)
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        self.raw(&request(method, path, headers, body))
    }

    fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.send("GET", path, "", b"");
        (status, String::from_utf8(body).unwrap())
    }

    fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, _, body) = self.send("POST", path, JSON, body.to_string().as_bytes());
        (status, serde_json::from_slice(&body).unwrap())
    }

    fn complete(&self, body: Value) -> (u16, Value) {
        self.post("/v1/completions", body)
    }

    fn chat(&self, body: Value) -> (u16, Value) {
        self.post("/v1/chat/completions", body)
    }

    /// Events of a stream, without `data: `.
    fn events(&self, path: &str, body: Value) -> Vec<String> {
        let (status, head, body) = self.send("POST", path, JSON, body.to_string().as_bytes());
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        assert!(head.contains("text/event-stream"), "{head}");
        let text = String::from_utf8(body).unwrap();
        let events = text.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        events.map(|event| event.strip_prefix("data: ").unwrap().to_string()).collect()
    }

    /// Waits until a line of the metrics is there.
    fn wait_for_metric(&self, line: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let text = self.app.metrics.text(&self.app.service.status());
            if text.lines().any(|l| l == line) {
                return;
            }
            assert!(Instant::now() < end, "{line} never came:\n{text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.unwrap(), "requests were left");
        }
    }
}

const JSON: &str = "Content-Type: application/json\r\n";

fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\
         {headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

fn parsed(all: &[u8]) -> (u16, String, Vec<u8>) {
    let split = all.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(all.len());
    let head = String::from_utf8_lossy(&all[..split]).to_string();
    let status = head.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = &all[(split + 4).min(all.len())..];
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    (status, head, if chunked { joined(body) } else { body.to_vec() })
}

/// The chunks of a body; panics where the last, empty one is missing.
fn joined(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let line = body.windows(2).position(|w| w == b"\r\n").expect("a broken off body");
        let length = std::str::from_utf8(&body[..line]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            return out;
        }
        out.extend_from_slice(&body[line + 2..line + 2 + length]);
        body = &body[line + 4 + length..];
    }
}

fn endless() -> Value {
    json!({"prompt": "a", "max_tokens": 4_000_000, "ignore_eos": true, "stream": true})
}

fn wide() -> Script {
    Script { context: 5_000_000, step: Duration::ZERO, ..Default::default() }
}

fn error(answer: &Value) -> (&str, &str, &str) {
    let text = |key: &str| answer["error"][key].as_str().unwrap_or("-");
    (text("message"), text("param"), text("code"))
}

#[test]
fn completions_have_openais_fields() {
    let server = Server::new(Script::default());
    let (status, answer) = server.complete(json!({"prompt": "Hi", "seed": 0, "max_tokens": 100}));
    assert_eq!(status, 200);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "org/tiny");
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "Llamas eat grass.");
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("stop")));
    assert_eq!(choice["logprobs"], Value::Null);
    // bos, two letters; 17 letters, eos
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 18, "total_tokens": 21});
    assert_eq!(answer["usage"], usage);
    let (_, answer) = server.complete(json!({"prompt": "Hi", "seed": 0}));
    assert_eq!(answer["choices"][0]["text"], "Llamas eat grass"); // 16 tokens by default
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn several_prompts_samples_stops_and_echoes_are_told_apart() {
    let server = Server::new(Script::default());
    let body = json!({"prompt": ["One", [2, 3]], "n": 2, "seed": 0, "stop": [" eat", "stly"],
        "max_tokens": 50, "echo": true});
    let (status, answer) = server.complete(body);
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(status, 200);
    assert_eq!(texts, ["OneLlamas", "OneHay, mo", "\0\u{1}Llamas", "\0\u{1}Hay, mo"]);
    assert!(choices.iter().all(|choice| choice["finish_reason"] == "stop"));
}

#[test]
fn log_probabilities_come_in_both_shapes() {
    let server = Server::new(Script::default());
    let body = json!({"prompt": "x", "seed": 0, "max_tokens": 3, "logprobs": 2});
    let logprobs = server.complete(body).1["choices"][0]["logprobs"].clone();
    let want = json!({"tokens": ["L", "l", "a"], "token_logprobs": [-0.25, -0.25, -0.25],
        "top_logprobs": [{"L": -0.25, "M": -1.25}, {"l": -0.25, "m": -1.25}, {"a": -0.25, "b": -1.25}],
        "text_offset": [0, 1, 2]});
    assert_eq!(logprobs, want);
    let body = json!({"messages": [{"role": "user", "content": "x"}], "seed": 0, "max_tokens": 1,
        "logprobs": true, "top_logprobs": 1});
    let token = server.chat(body).1["choices"][0]["logprobs"]["content"][0].clone();
    let likely = json!({"token": "L", "logprob": -0.25, "bytes": [76]});
    assert_eq!(token["top_logprobs"], json!([likely]));
    assert_eq!((&token["token"], &token["bytes"]), (&json!("L"), &json!([76])));
}

#[test]
fn a_chat_answer_has_openais_fields() {
    let server = Server::new(Script::default());
    let body =
        json!({"model": "org/tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 1});
    let (status, answer) = server.chat(body);
    assert_eq!(status, 200);
    assert_eq!(answer["object"], "chat.completion");
    let message = json!({"role": "assistant", "content": "Hay, mostly.", "refusal": null});
    assert_eq!(answer["choices"][0]["message"], message);
    // bos, "user: Hi\nassistant:"
    assert_eq!(answer["usage"]["prompt_tokens"], 20);
}

#[test]
fn a_stream_is_events_that_add_up_to_the_answer() {
    let server = Server::new(Script::default());
    let body = json!({"messages": [{"role": "user", "content": "Hi"}], "seed": 0, "stream": true,
        "n": 2, "stream_options": {"include_usage": true}});
    let mut events = server.events("/v1/chat/completions", body);
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let (usage, events) = events.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 18 + 13);
    let mut texts = [String::new(), String::new()];
    let mut ends = Vec::new();
    for event in events {
        assert_eq!(
            (&event["object"], &event["usage"]),
            (&json!("chat.completion.chunk"), &Value::Null)
        );
        assert_eq!(event["id"], events[0]["id"]);
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        ends.extend(choice["finish_reason"].as_str());
    }
    assert_eq!(texts, ["Llamas eat grass.", "Hay, mostly."]);
    assert_eq!(ends, ["stop", "stop"]);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
}

#[test]
fn a_template_that_adds_a_space_has_it_taken_off() {
    let texts = vec![" \n Hi there ".to_string()];
    let template = ChatTemplate::named("guanaco", SpecialTokens::default()).unwrap();
    let server = Server::with(Script { texts, ..Default::default() }, Some(template), options());
    let body = json!({"messages": [{"role": "user", "content": "x"}]});
    assert_eq!(server.chat(body).1["choices"][0]["message"]["content"], "Hi there ");
}

#[test]
fn wrong_requests_name_the_field_what_was_expected_and_what_came() {
    let server = Server::new(Script::default());
    let talk = json!([{"role": "user", "content": "x"}]);
    let with = |key: &str, value: Value| {
        let mut body = json!({"messages": talk});
        body[key] = value;
        server.chat(body)
    };
    for (key, value, message) in [
        (
            "temperature",
            json!("hot"),
            "`temperature`: expected a number from 0 to 2, got the string \"hot\"",
        ),
        ("max_tokens", json!(-1), "`max_tokens`: expected a whole number from 1 to 4000000"),
        ("max_completion_tokens", json!(9_000_000), "`max_completion_tokens`: expected a whole"),
        ("n", json!(0), "`n`: expected a whole number from 1 to 8"),
        ("stream", json!("yes"), "`stream`: expected true or false, got the string \"yes\""),
        ("messages", json!([]), "`messages`: expected a list of messages that is not empty"),
        ("tools", json!([{}]), "`tools`: not supported here; these models call no tools"),
        ("top_logprobs", json!(2), "`top_logprobs`: only goes with `logprobs`: true"),
        (
            "temprature",
            json!(1),
            "`temprature`: there is no such field; did you mean `temperature`?",
        ),
    ] {
        let (status, answer) = with(key, value);
        let (text, param, _) = error(&answer);
        assert_eq!((status, param), (400, key), "{answer}");
        assert!(text.starts_with(message), "{text}");
    }
    let (status, answer) = with("model", json!("gpt-4"));
    assert_eq!((status, error(&answer).2), (404, "model_not_found"));
    let (status, answer) = server.complete(json!({"prompt": [[1, 258]]}));
    let want = "`prompt[0][1]`: expected a token id from 0 to 257, got the number 258";
    assert_eq!((status, error(&answer).0), (400, want));
    let (status, answer) = server.complete(json!({"max_tokens": 1}));
    assert_eq!((status, error(&answer).1), (400, "prompt"));
    let (status, answer) = server.complete(json!({"prompt": ["a", "b", "c"], "n": 3}));
    assert_eq!((status, error(&answer).0.contains("are 9 answers, more than 8")), (400, true));
}

#[test]
fn a_prompt_that_is_too_long_is_refused() {
    let server = Server::new(Script::default());
    let (status, answer) = server.complete(json!({"prompt": "x".repeat(200)}));
    let want = "`prompt`: expected a prompt of up to 200 tokens (`--max-prompt-tokens`), got 201";
    assert_eq!((status, error(&answer)), (400, (want, "prompt", "context_length_exceeded")));
    let content = "x".repeat(300);
    let (status, answer) = server.chat(json!({"messages": [{"role": "user", "content": content}]}));
    let (text, param, code) = error(&answer);
    assert_eq!((status, param, code), (400, "messages", "context_length_exceeded"));
    assert!(text.contains("the context is 256"), "{text}");
}

#[test]
fn bodies_that_are_no_json_leave_the_server_well() {
    let server = Server::new(Script::default());
    let post = |headers: &str, body: &[u8]| server.send("POST", "/v1/completions", headers, body);
    for (headers, body, want) in [
        (JSON, &b"{\"prompt\": "[..], 400),
        (JSON, b"{\"prompt\": \"\xff\xfe\"}", 400),
        (JSON, b"", 400),
        (JSON, b"[]", 400),
        ("Content-Type: text/plain\r\n", b"{\"prompt\": \"a\"}", 415),
        ("", b"{\"prompt\": \"a\"}", 415),
    ] {
        let (status, _, answer) = post(headers, body);
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(status, want, "{answer}");
        assert!(answer["error"]["message"].is_string());
    }
    let (status, head, _) = post(JSON, &vec![b' '; 10_000_000]);
    assert_eq!(status, 413);
    assert!(head.to_lowercase().contains("connection: close"));
    assert_eq!(server.raw(b"\x16\x03\x01 no http at all\r\n\r\n").0, 400);
    assert_eq!(server.complete(json!({"prompt": "a"})).0, 200);
}

#[test]
fn paths_and_methods_that_do_not_exist_are_told_in_the_same_shape() {
    let server = Server::new(Script::default());
    for (method, path, want, code) in [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/files/../../etc/passwd", 404, "unknown_url"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404, "model_not_found"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
    ] {
        let (status, _, body) = server.send(method, path, JSON, b"{}");
        let answer: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((status, error(&answer).2), (want, code), "{method} {path}: {answer}");
    }
    let (status, text) = server.get("/v1/models/org/tiny");
    assert_eq!((status, text.contains("\"max_model_len\":256")), (200, true), "{text}");
    let (status, text) = server.get("/v1/models");
    assert_eq!((status, text.contains("\"object\":\"list\"")), (200, true), "{text}");
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn the_page_comes_with_a_policy_that_fits_it() {
    let server = Server::new(Script::default());
    let (status, head, body) = server.send("GET", "/", "", b"");
    assert_eq!(status, 200);
    assert!(String::from_utf8(body).unwrap().starts_with("<!doctype html>"));
    let head = head.to_lowercase();
    assert!(head.contains("content-security-policy: default-src 'none'; script-src 'sha256-"));
    assert!(head.contains("x-content-type-options: nosniff"), "{head}");
}

#[test]
fn the_key_opens_the_api_and_nothing_else_does() {
    let options = Options { api_key: Some("secret".into()), ..options() };
    let server = Server::with(Script::default(), None, options);
    let get = |path: &str, headers: &str| server.send("GET", path, headers, b"").0;
    assert_eq!(get("/v1/models", ""), 401);
    assert_eq!(get("/v1/models", "Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(get("/v1/models", "Authorization: Bearer secret\r\n"), 200);
    assert_eq!((get("/metrics", ""), get("/health", ""), get("/", "")), (401, 200, 200));
}

#[test]
fn templates_that_refuse_fail_or_are_missing_have_statuses_of_their_own() {
    let talk = || json!({"messages": [{"role": "user", "content": "x"}]});
    for (template, want, code) in [
        (Some(template("{{ raise_exception('no') }}")), 400, "refused_by_template"),
        (Some(template("{{ messages.x.y }}")), 500, "template_failed"),
        (None, 400, "no_chat_template"),
    ] {
        let server = Server::with(Script::default(), template, options());
        let (status, answer) = server.chat(talk());
        assert_eq!((status, error(&answer).2), (want, code), "{answer}");
        assert_eq!(server.complete(json!({"prompt": "a"})).0, 200);
    }
}

#[test]
fn an_engine_that_fails_is_told_by_status_or_by_the_last_event() {
    let server = Server::new(Script { fails_after: Some(0), ..Default::default() });
    let (status, answer) = server.complete(json!({"prompt": "a", "stream": true}));
    assert_eq!((status, error(&answer).2), (500, "engine_failed"));
    let server = Server::new(Script { fails_after: Some(3), ..Default::default() });
    assert_eq!(server.complete(json!({"prompt": "a"})).0, 500);
    let events = server.events("/v1/completions", json!({"prompt": "a", "stream": true}));
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(error(&last).2, "engine_failed", "{events:?}");
}

#[test]
fn a_full_queue_is_429_and_empties_again() {
    let script =
        Script { max_running: 1, max_waiting: 2, step: Duration::from_millis(20), ..wide() };
    let server = Server::new(script);
    let mut held: Vec<TcpStream> = Vec::new();
    for _ in 0..3 {
        let mut stream = server.connect();
        stream
            .write_all(&request("POST", "/v1/completions", JSON, endless().to_string().as_bytes()))
            .unwrap();
        held.push(stream);
    }
    server.wait_for_metric("tinyllama_waiting 2");
    let (status, head, body) = server.send("POST", "/v1/completions", JSON, br#"{"prompt": "a"}"#);
    let answer: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, error(&answer).2), (429, "queue_full"));
    assert!(head.to_lowercase().contains("retry-after: 1"), "{head}");
    // A list is taken whole or not at all.
    drop(held);
    server.wait_for_metric("tinyllama_running 0");
    assert_eq!(server.complete(json!({"prompt": ["a", "b"], "n": 2})).0, 429);
    server.wait_for_metric("tinyllama_engine_cancelled_total 4"); // three were held
    assert_eq!(server.complete(json!({"prompt": "a", "max_tokens": 1})).0, 200);
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let server = Server::new(Script { step: Duration::from_millis(1), ..wide() });
    // In the middle of a stream, and while it waits for a whole answer.
    for stream in [true, false] {
        let mut body = endless();
        body["stream"] = json!(stream);
        let mut client = server.connect();
        client
            .write_all(&request("POST", "/v1/completions", JSON, body.to_string().as_bytes()))
            .unwrap();
        server.wait_for_metric("tinyllama_running 1");
        if stream {
            let mut some = [0; 300];
            client.read_exact(&mut some).unwrap();
        }
        client.shutdown(Shutdown::Both).unwrap();
        server.wait_for_metric("tinyllama_running 0");
    }
    server.wait_for_metric("tinyllama_generations_total{end=\"disconnected\"} 2");
    server.wait_for_metric("tinyllama_engine_cancelled_total 2");
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_others_are_not_held_up() {
    let server = Server::new(wide());
    let mut client = server.connect();
    client
        .write_all(&request("POST", "/v1/completions", JSON, endless().to_string().as_bytes()))
        .unwrap();
    server.wait_for_metric("tinyllama_engine_cancelled_total 1");
    assert_eq!(server.complete(json!({"prompt": "a"})).0, 200);
    // When it reads at last, the stream does not end as if it were whole.
    let mut all = Vec::new();
    let _ = client.read_to_end(&mut all);
    assert!(!String::from_utf8_lossy(&all).contains("[DONE]"));
    assert!(!all.ends_with(b"0\r\n\r\n"));
    server.wait_for_metric("tinyllama_generations_total{end=\"too_slow\"} 1");
}

#[test]
fn time_runs_out_for_whole_answers_and_for_streams() {
    let limits = Limits { time: Duration::from_millis(200), ..options().limits };
    let script = Script { step: Duration::from_millis(5), ..wide() };
    let server = Server::with(script, None, Options { limits, ..options() });
    let mut body = endless();
    let events = server.events("/v1/completions", body.clone());
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(error(&last).2, "request_timeout", "{last}");
    body["stream"] = json!(false);
    let (status, answer) = server.complete(body);
    assert_eq!(status, 504, "{answer}");
    server.wait_for_metric("tinyllama_running 0");
    server.wait_for_metric("tinyllama_generations_total{end=\"out_of_time\"} 2");
}

#[test]
fn running_requests_are_finished_at_the_end_and_new_ones_refused() {
    let server = Server::new(Script { step: Duration::from_millis(30), ..Default::default() });
    let mut client = server.connect();
    let body = json!({"prompt": "a", "seed": 0, "max_tokens": 50}).to_string();
    client.write_all(&request("POST", "/v1/completions", JSON, body.as_bytes())).unwrap();
    server.wait_for_metric("tinyllama_running 1");
    server.app.service.stop_accepting();
    assert_eq!(server.complete(json!({"prompt": "b"})).0, 503);
    server.stop.send(true).unwrap();
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    let (status, _, body) = parsed(&all);
    assert_eq!(status, 200);
    assert!(String::from_utf8(body).unwrap().contains("Llamas eat grass."));
    let refused = (0..50).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        TcpStream::connect(server.address).is_err()
    });
    assert!(refused, "the server still takes connections");
}

#[test]
fn many_streams_at_a_time_are_all_whole() {
    let server =
        Server::new(Script { max_waiting: 200, step: Duration::ZERO, ..Default::default() });
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                let body = json!({"prompt": "a", "seed": 0, "max_tokens": 50, "stream": true});
                let mut events = server.events("/v1/completions", body);
                assert_eq!(events.pop().unwrap(), "[DONE]");
                let text = |event: &String| {
                    let event: Value = serde_json::from_str(event).unwrap();
                    event["choices"][0]["text"].as_str().unwrap().to_string()
                };
                assert_eq!(events.iter().map(text).collect::<String>(), "Llamas eat grass.");
            });
        }
    });
}

/// Serves until a signal comes, for the scripts that drive the server by hand:
/// `TL_PORT=8123 cargo test fake_server -- --ignored --nocapture`.
#[test]
#[ignore = "runs until it is stopped"]
fn fake_server() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
    };
    let texts = [
        "Llamas eat **grass**, hay and leaves.\n\n1. Grass, which they graze for most of the day\n\
         2. Hay in winter\n3. Shrubs, where `grass` is rare\n\n```python\nfor food in [\"grass\", \"hay\"]:\n    \
         print(f\"<b>{food}</b> & more\")\n```\n\nThey chew it twice: like cows, they are ruminants. \u{1f999}",
        "A plain answer: <script>alert(1)</script> hay, mostly, and whatever else grows where they live; a \
         grown llama eats about two percent of its weight a day, and drinks when it finds water.",
        "They eat what they find.\n\n- in the Andes: *ichu*, a hard grass\n- on farms: hay\n- in gardens: \
         your roses\n\nAnd they drink little.",
    ];
    let script = Script {
        texts: texts.map(String::from).to_vec(),
        step: Duration::from_micros(number("TL_STEP_US", 15_000)),
        context: 4096,
        ..Default::default()
    };
    let text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ";
    let limits = Limits { new_tokens: 4096, prompt_tokens: 4096, ..options().limits };
    let options = Options {
        port: number("TL_PORT", 8123) as u16,
        model: "tiny-llama-scripted".into(),
        limits: Limits { body: 1 << 20, time: Duration::from_secs(120), ..limits },
        api_key: std::env::var("TL_KEY").ok(),
        log: number("TL_LOG", 0) == 1,
        ..options()
    };
    run(Arc::new(Service::scripted(script)), Some(template(text)), &options).unwrap();
}
