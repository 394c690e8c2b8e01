//! Chat templates against `transformers`, on the conversations of `scripts/golden/chat_templates.py`.

use serde::Deserialize;
use std::path::Path;
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
