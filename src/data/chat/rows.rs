//! Rows of JSON or Parquet as conversations.

use crate::config::ChatFormat;
use crate::data::documents::{self, Schema, Selection, objects};
use crate::error::WithHint;
use crate::tokenizer::chat_template::Message;
use anyhow::{Result, anyhow};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Turns of one conversation, in order.
pub type Conversation = Vec<Message>;

/// What a path holds.
#[derive(Debug)]
pub struct Found<T> {
    /// Conversations or preferences, in the files' order.
    pub items: Vec<T>,
    /// Rows that are none.
    pub skipped: u64,
    /// The first three of them, in words.
    pub examples: Vec<String>,
}

impl<T> Found<T> {
    /// Reads every row of all files at a path: a file, a folder or a pattern.
    ///
    /// # Errors
    /// No such files; a damaged file; not one row that `of` takes, which `expected` then describes.
    pub(super) fn read(
        path: &Path,
        what: &str,
        expected: &str,
        of: impl Fn(&Map<String, Value>) -> Result<T, String>,
    ) -> Result<Self> {
        let mut found = Self { items: Vec::new(), skipped: 0, examples: Vec::new() };
        for file in &files(path)? {
            for (row, object) in objects(file)?.into_iter().enumerate() {
                match object.map_err(|e| e.why).and_then(|object| of(&object)) {
                    Ok(item) => found.items.push(item),
                    Err(why) => {
                        found.skipped += 1;
                        if found.examples.len() < 3 {
                            let (file, row) = (file.display(), row + 1);
                            found.examples.push(format!("`{file}`, row {row}: {why}"));
                        }
                    }
                }
            }
        }
        if found.items.is_empty() {
            let (source, examples) = (path.display(), found.examples.join("; "));
            return Err(anyhow!("no {what} in `{source}`: {examples}")).usage(expected);
        }
        Ok(found)
    }
}

/// Reads all conversations at a path: a file, a folder or a pattern.
///
/// # Errors
/// No such files; a damaged file; not one conversation in them.
pub fn read(path: &Path, format: ChatFormat) -> Result<Found<Conversation>> {
    const EXPECTED: &str = "expected rows with `messages` (`role`, `content`), `conversations` (`from`, `value`), \
                            `instruction` and `output`, or `text` as `### Human: ..### Assistant: ..`";
    Found::read(path, "conversation", EXPECTED, |row| conversation(row, format))
}

/// The files that a path names.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let (source, selection) = (path.to_string_lossy(), Selection::all(Schema::Sft, None));
    match documents::files(&source, &selection, "train") {
        // `.parquet` files of a folder are taken where there is no JSON.
        Err(_) if path.is_dir() => {
            documents::files(&source, &Selection::all(Schema::Parquet, None), "train")
        }
        found => found,
    }
}

/// The conversation of a row, or why it has none.
pub fn conversation(row: &Map<String, Value>, format: ChatFormat) -> Result<Conversation, String> {
    let format = match format {
        ChatFormat::Auto => layout_of(row)?,
        format => format,
    };
    let mut turns = match format {
        ChatFormat::Messages => list(row, "messages", "role", "content")?,
        ChatFormat::Sharegpt => list(row, "conversations", "from", "value")?,
        ChatFormat::Alpaca => alpaca(row)?,
        ChatFormat::Guanaco | ChatFormat::Auto => guanaco(text(row, "text")?)?,
    };
    // As many sets have it in rows without one.
    turns.retain(|turn| turn.role != "system" || !turn.content.trim().is_empty());
    let is = |role: &str| turns.iter().any(|turn| turn.role == role);
    if !is("assistant") {
        return Err("no turn of the assistant".into());
    }
    if let Some(turn) = turns.iter().position(|turn| turn.content.trim().is_empty()) {
        return Err(format!("turn {} of the {} is empty", turn + 1, turns[turn].role));
    }
    Ok(turns)
}

/// The layout that a row's fields suggest.
fn layout_of(row: &Map<String, Value>) -> Result<ChatFormat, String> {
    for (field, format) in [
        ("messages", ChatFormat::Messages),
        ("conversations", ChatFormat::Sharegpt),
        ("instruction", ChatFormat::Alpaca),
        ("text", ChatFormat::Guanaco),
    ] {
        if row.contains_key(field) {
            return Ok(format);
        }
    }
    let there: Vec<&str> = row.keys().map(String::as_str).collect();
    Err(format!(
        "no `messages`, `conversations`, `instruction` or `text` among `{}`",
        there.join("`, `")
    ))
}

fn text<'a>(row: &'a Map<String, Value>, field: &str) -> Result<&'a str, String> {
    match row.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("`{field}` is no text")),
        None => Err(format!("no `{field}`")),
    }
}

/// The list of turns under `key`.
fn list(
    row: &Map<String, Value>,
    key: &str,
    who: &str,
    what: &str,
) -> Result<Conversation, String> {
    turns_of(row.get(key).unwrap_or(&Value::Null), key, who, what)
}

/// A list of turns, each with its role and text; `key` names it.
pub(super) fn turns_of(
    list: &Value,
    key: &str,
    who: &str,
    what: &str,
) -> Result<Conversation, String> {
    let turns = list.as_array().ok_or_else(|| format!("`{key}` is no list"))?;
    let turn = |(i, turn): (usize, &Value)| {
        let of = |field: &str| {
            let text = turn.get(field).and_then(Value::as_str);
            text.ok_or_else(|| format!("`{key}`, turn {}: no text under `{field}`", i + 1))
        };
        Ok(Message::new(role(of(who)?), of(what)?))
    };
    turns.iter().enumerate().map(turn).collect()
}

/// The usual names of the three roles; others stay, for the template to judge.
fn role(name: &str) -> &str {
    match name {
        "human" | "prompter" => "user",
        "gpt" | "bot" | "model" | "chatgpt" => "assistant",
        other => other,
    }
}

fn alpaca(row: &Map<String, Value>) -> Result<Conversation, String> {
    let (instruction, output) = (text(row, "instruction")?, text(row, "output")?);
    let question = match row.get("input").and_then(Value::as_str).filter(|text| !text.is_empty()) {
        Some(input) => format!("{instruction}\n\n### Input:\n{input}"),
        None => instruction.to_owned(),
    };
    Ok(vec![Message::new("user", question), Message::new("assistant", output)])
}

/// `### Human: question### Assistant: answer`, turn after turn.
fn guanaco(text: &str) -> Result<Conversation, String> {
    const ROLES: [(&str, &str); 3] =
        [("### Human:", "user"), ("### Assistant:", "assistant"), ("### System:", "system")];
    let next = |text: &str| {
        let found = ROLES.iter().filter_map(|(mark, role)| Some((text.find(mark)?, *mark, *role)));
        found.min_by_key(|(at, ..)| *at)
    };
    let mut turns = Vec::new();
    let Some((start, ..)) = next(text) else {
        return Err("no `### Human:` and `### Assistant:` in `text`".into());
    };
    let before = text[..start].trim();
    if !before.is_empty() {
        turns.push(Message::new("system", before));
    }
    let mut rest = &text[start..];
    while let Some((_, mark, role)) = next(rest) {
        let said = &rest[mark.len()..];
        let end = next(said).map_or(said.len(), |(at, ..)| at);
        turns.push(Message::new(role, said[..end].trim()));
        rest = &said[end..];
    }
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn turns(row: Value, format: ChatFormat) -> Result<Vec<(String, String)>, String> {
        let turns = conversation(row.as_object().unwrap(), format)?;
        Ok(turns.into_iter().map(|turn| (turn.role, turn.content)).collect())
    }

    fn said(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(role, text)| (role.to_string(), text.to_string())).collect()
    }

    #[test]
    fn each_layout_gives_the_same_turns() {
        let want = said(&[("user", "Hi"), ("assistant", "Hello")]);
        for (row, format) in [
            (json!({"text": "### Human: Hi### Assistant: Hello"}), ChatFormat::Guanaco),
            (json!({"instruction": "Hi", "input": "", "output": "Hello"}), ChatFormat::Alpaca),
            (
                json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
                ChatFormat::Messages,
            ),
            (
                json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
                ChatFormat::Sharegpt,
            ),
        ] {
            assert_eq!(turns(row.clone(), format), Ok(want.clone()), "{row}");
            assert_eq!(turns(row.clone(), ChatFormat::Auto), Ok(want.clone()), "{row}");
        }
    }

    #[test]
    fn guanacos_text_has_many_turns_and_perhaps_a_beginning() {
        let row = json!({"text": "Be brief.\n\n### Human: a ### b\n### Assistant: c### Human: d### Assistant: e"});
        let want = said(&[
            ("system", "Be brief."),
            ("user", "a ### b"),
            ("assistant", "c"),
            ("user", "d"),
            ("assistant", "e"),
        ]);
        assert_eq!(turns(row, ChatFormat::Auto), Ok(want));
    }

    #[test]
    fn an_input_of_alpaca_goes_behind_its_instruction() {
        let row = json!({"instruction": "Add", "input": "1, 2", "output": "3"});
        let want = said(&[("user", "Add\n\n### Input:\n1, 2"), ("assistant", "3")]);
        assert_eq!(turns(row, ChatFormat::Auto), Ok(want));
    }

    #[test]
    fn a_row_that_is_no_conversation_says_why() {
        for (row, words) in [
            (
                json!({"prompt": "x"}),
                "no `messages`, `conversations`, `instruction` or `text` among `prompt`",
            ),
            (json!({"messages": "x"}), "`messages` is no list"),
            (json!({"messages": [{"role": "user", "content": "x"}]}), "no turn of the assistant"),
            (
                json!({"messages": [{"role": "user"}]}),
                "`messages`, turn 1: no text under `content`",
            ),
            (json!({"text": "plain"}), "no `### Human:` and `### Assistant:`"),
            (json!({"text": 3}), "`text` is no text"),
            (json!({"instruction": "x"}), "no `output`"),
            (json!({"text": "### Human: a### Assistant: "}), "turn 2 of the assistant is empty"),
        ] {
            let error = turns(row.clone(), ChatFormat::Auto).unwrap_err();
            assert!(error.contains(words), "{row}: {error}");
        }
    }
}
