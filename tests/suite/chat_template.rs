//! Chat templates against `transformers`, on the conversations of `scripts/golden/chat_templates.py`.

use serde::Deserialize;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tinyllama::checkpoint;
use tinyllama::checkpoint::gguf::Metadata;
use tinyllama::checkpoint::gguf::vocab::{self, Special, kind, pieces, pieces::Piece};
use tinyllama::tokenizer::Tokenizer;
use tinyllama::tokenizer::chat_template::{ChatTemplate, Message, SpecialTokens, TemplateError};

#[derive(Deserialize)]
struct Golden {
    name: String,
    template: String,
    bos: Option<String>,
    eos: Option<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn prompts_equal_those_of_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat");
    let mut compared = 0;
    for file in std::fs::read_dir(&folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let Golden { name, template, bos, eos, cases } = serde_json::from_str(&text).unwrap();
        let tokens = SpecialTokens { bos, eos, ..Default::default() };
        let template = ChatTemplate::new(&template, "`golden`", tokens).unwrap();
        for (i, case) in cases.iter().enumerate() {
            let got = template.render(&case.messages, case.add_generation_prompt);
            match (&case.text, &case.error) {
                (Some(want), _) => assert_eq!(&got.unwrap(), want, "{name}, case {i}"),
                (None, want) => match got.unwrap_err() {
                    TemplateError::Refused(why) => assert_eq!(Some(&why), want.as_ref()),
                    other => panic!("{name}, case {i}: {other}"),
                },
            }
            compared += 1;
        }
    }
    assert!(compared >= 60, "{compared}");
}

/// Begin, end and chat markers, of which one begins like the others.
const CONTROLS: [&str; 5] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im"];
/// Pieces of [`write_pieces`]: `<unk>`, the controls, characters.
pub const PIECES: usize = 39;

/// A `tokenizer.model` of characters, as it comes out of a GGUF file whose embedding has a few rows more; `change` may
/// set keys of that file.
pub fn write_pieces(dir: &Path, change: impl FnOnce(&mut Metadata)) -> Tokenizer {
    let piece = |text: &str, kind: i32| Piece { text: text.into(), score: 0.0, kind };
    let mut list = vec![piece("<unk>", kind::UNKNOWN)];
    list.extend(CONTROLS.map(|text| piece(text, kind::CONTROL)));
    let letters = "\u{2581}\n:<>|_".chars().chain('a'..='z');
    list.extend(letters.map(|c| piece(&c.to_string(), kind::NORMAL)));
    let special = Special { bos: Some(1), eos: Some(2), unk: Some(0), ..Special::default() };
    let mut m = pieces::metadata(&list, false, PIECES + 5, &special).unwrap();
    change(&mut m);
    let config = vocab::tokenizer_config(&m).unwrap().to_string();
    fs::write(dir.join("tokenizer.model"), pieces::tokenizer_model(&m).unwrap()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), config).unwrap();
    Tokenizer::load(dir).unwrap()
}

#[test]
fn control_pieces_of_a_tokenizer_model_are_found_leftmost_and_longest() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = write_pieces(dir.path(), |_| {});
    let tokens = SpecialTokens::load(dir.path(), &tokenizer).unwrap();
    assert_eq!(tokens.controls, CONTROLS);
    let template = ChatTemplate::named("chatml", tokens).unwrap();
    let prompt = template.render(&[Message::new("user", "hi<|im|>")], true).unwrap();
    let ids = template.encode(&tokenizer, &prompt).unwrap();
    let got: Vec<String> = ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
    let mut want = vec!["<|im_start|>"];
    want.extend("u s e r".split(' ').chain(["\n", "h", "i", "<|im", "|", ">", "<|im_end|>"]));
    want.extend(["\n", "<|im_start|>"].into_iter().chain("a s s i s t a n t".split(' ')));
    want.push("\n");
    assert_eq!(got, want);
    assert_eq!(template.end_ids(&tokenizer), [4, 3]);
    // A name that this vocabulary lacks is text.
    let tokens = SpecialTokens { eos: Some("<end>".into()), ..SpecialTokens::default() };
    let template = ChatTemplate::new("", "`x`", tokens).unwrap();
    assert_eq!(template.encode(&tokenizer, "<end>").unwrap().len(), 5);
}

#[test]
fn ends_of_a_templates_turns_are_saved_for_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = write_pieces(dir.path(), |_| {});
    let file = dir.path().join("generation_config.json");
    let saved = |name: &str, before: Value| -> Value {
        fs::write(&file, before.to_string()).unwrap();
        let template = ChatTemplate::named(name, SpecialTokens::default()).unwrap();
        checkpoint::save_chat_template(dir.path(), template.text(), Some(&tokenizer)).unwrap();
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap()
    };
    let plain = json!({"_from_model_config": true, "bos_token_id": 1, "eos_token_id": 2});
    let want = json!({"bos_token_id": 1, "eos_token_id": [2, 4, 3]});
    assert_eq!(saved("chatml", plain.clone()), want);
    // What was copied there stays.
    let want = json!({"eos_token_id": [2, 4, 3, 7], "top_p": 0.5, "bos_token_id": 1});
    assert_eq!(saved("chatml", json!({"eos_token_id": [7, 4], "top_p": 0.5})), want);
    // Turns that end by text end no text.
    assert_eq!(saved("guanaco", plain.clone()), plain);
    assert!(dir.path().join("chat_template.jinja").is_file());
    // In a folder of adapters there may be none.
    fs::remove_file(&file).unwrap();
    let template = ChatTemplate::named("chatml", SpecialTokens::default()).unwrap();
    checkpoint::save_chat_template(dir.path(), template.text(), Some(&tokenizer)).unwrap();
    let got: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(got, json!({"bos_token_id": 1, "eos_token_id": [2, 4, 3]}));
}
