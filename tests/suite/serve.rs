//! `serve` and `chat` on a real engine; what a scripted one can show is tested beside the code in src/serve.

use crate::small_models::{EOS, alphabet, checkpoint, run_program, write_tokenizer};
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tinyllama::generate::Network;
use tinyllama::generate::engine::EngineOptions;
use tinyllama::generate::load::Loaded;
use tinyllama::generate::service::Service;
use tinyllama::serve::{App, Limits, Options, router};
use tinyllama::tokenizer::Tokenizer;
use tinyllama::tokenizer::chat_template::{ChatTemplate, SpecialTokens};
use tower::ServiceExt;

/// A server over the alphabet: after byte b comes b + 1, after `m` the end.
fn app(blocks: usize) -> (Arc<Service>, Arc<App>) {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path(), 0);
    let tokenizer = Some(Tokenizer::load(dir.path()).unwrap());
    let network = Network::Dense(Box::new(alphabet()));
    let loaded = Loaded { network, tokenizer, eos: vec![EOS] };
    let sizes = EngineOptions { blocks, ..Default::default() };
    let service = Arc::new(Service::start(loaded, sizes, 64).unwrap());
    let options = Options {
        host: "127.0.0.1".into(),
        port: 0,
        api_key: None,
        model: "alphabet".into(),
        limits: Limits {
            body: 1 << 20,
            prompt_tokens: 64,
            new_tokens: 64,
            choices: 8,
            time: Duration::from_secs(60),
        },
        drain: Duration::from_secs(5),
        log: false,
    };
    let template = ChatTemplate::new(
        "{{ messages[-1].content }}",
        "`the last message`",
        SpecialTokens::default(),
    );
    let app = Arc::new(App::new(service.clone(), Some(template.unwrap()), &options));
    (service, app)
}

/// Status and body.
fn post(app: &Arc<App>, path: &str, body: &str) -> (StatusCode, String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let request = Request::post(path)
            .header("content-type", "application/json")
            .body(Body::from(body.to_owned()))
            .unwrap();
        let response = router(app).oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    })
}

fn ok(app: &Arc<App>, path: &str, body: Value) -> Value {
    let (status, text) = post(app, path, &body.to_string());
    assert_eq!(status, StatusCode::OK, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn completions_come_from_the_model() {
    let (service, app) = app(64);
    let body = json!({"model": "alphabet", "prompt": "a", "max_tokens": 4, "temperature": 0});
    let answer = ok(&app, "/v1/completions", body);
    assert_eq!(answer["choices"][0]["text"], "bcde");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 4);

    let body = json!({"prompt": ["c", "i"], "n": 2, "stop": ["gh"], "max_tokens": 30, "temperature": 0,
        "logprobs": 2});
    let answer = ok(&app, "/v1/completions", body);
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["def", "def", "jklm", "jklm"]);
    assert!(choices.iter().all(|choice| choice["finish_reason"] == "stop"));
    assert_eq!(choices[2]["logprobs"]["tokens"], json!(["j", "k", "l", "m"]));
    assert!(service.wait_until_idle(Duration::from_secs(60)));
    assert_eq!(service.status().free_blocks, 64);
}

#[test]
fn a_stream_holds_the_same_text_as_the_whole_answer() {
    let (_, app) = app(64);
    let body = json!({"messages": [{"role": "user", "content": "e"}], "temperature": 0, "stream": true,
        "stream_options": {"include_usage": true}});
    let (status, text) = post(&app, "/v1/chat/completions", &body.to_string());
    assert_eq!(status, StatusCode::OK, "{text}");
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (last, events) = events.split_last().unwrap();
    assert_eq!(*last, "[DONE]");
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let piece = |event: &Value| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
    assert_eq!(events.iter().filter_map(piece).collect::<String>(), "fghijklm");
    let reasons = events.iter().filter_map(|e| e["choices"][0]["finish_reason"].as_str());
    assert_eq!(reasons.collect::<Vec<_>>(), ["stop"]);
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 9, "eos counts");
}

#[test]
fn what_the_engine_cannot_take_is_an_error_of_the_api_and_the_server_goes_on() {
    let (service, app) = app(2);
    let refused = |path: &str, body: &str, expected: u16| {
        let (status, text) = post(&app, path, body);
        assert_eq!(status.as_u16(), expected, "{body}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        assert!(error["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{text}");
    };
    let long = json!({"prompt": "a".repeat(64), "max_tokens": 4}).to_string();
    refused("/v1/completions", &long, 400);
    // The cache holds 32 tokens, half of the model's context.
    refused(
        "/v1/completions",
        &json!({"prompt": "a".repeat(32), "max_tokens": 9}).to_string(),
        400,
    );
    let fills = ok(&app, "/v1/completions", json!({"prompt": "a".repeat(28), "max_tokens": 9}));
    assert_eq!(fills["choices"][0]["finish_reason"], "length");
    assert_eq!(fills["usage"]["completion_tokens"], 3, "bos is one of the prompt's 29");
    refused("/v1/completions", "{\"prompt\": ", 400);
    refused("/v1/completions", &json!({"prompt": "a", "model": "gpt"}).to_string(), 404);
    refused("/v1/completions", &json!({"prompt": "a", "max_tokens": -1}).to_string(), 400);
    refused("/v1/completions", &json!({"prompt": [999]}).to_string(), 400);
    let body = json!({"prompt": "a", "max_tokens": 2, "temperature": 0});
    assert_eq!(ok(&app, "/v1/completions", body)["choices"][0]["text"], "bc");
    assert!(service.wait_until_idle(Duration::from_secs(60)));
    assert_eq!(service.status().free_blocks, 2);
}

#[test]
fn chat_answers_line_by_line_and_saves_the_conversation() {
    let dir = checkpoint(&alphabet());
    let file = dir.path().join("talk.json");
    let stdin = format!("hello k\n/system Be brief.\nf\n/save {}\n/nonsense\n", file.display());
    let args = ["--temperature", "0", "--max-new-tokens", "4", "--chat-template", "llama-2"];
    let (code, out, err) = run_program("chat", dir.path(), &args, &stdin);
    assert_eq!(code, 0, "{err}");
    assert_eq!(out.lines().count(), 2, "an answer a line: {out:?}");
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let roles = saved.as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap());
    assert_eq!(roles.collect::<Vec<_>>(), ["system", "user", "assistant"]);
    assert_eq!(saved[2]["content"], out.lines().nth(1).unwrap());
    assert!(err.contains("/help"), "{err}");

    let (code, _, err) = run_program("chat", dir.path(), &[], "hi\n");
    assert!(code == 2 && err.contains("no chat template"), "{code}: {err}");
    let (code, _, err) = run_program("chat", dir.path(), &["--chat-template", "vicuna"], "hi\n");
    assert!(code == 2 && err.contains("guanaco, chatml"), "{code}: {err}");
}
