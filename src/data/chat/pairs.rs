//! Preferences: a prompt with a chosen and a rejected answer.

use super::rows::{Conversation, Found, turns_of};
use crate::tokenizer::chat_template::Message;
use anyhow::Result;
use serde_json::{Map, Value};
use std::path::Path;

/// Two conversations that differ in how they end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The better one.
    pub chosen: Conversation,
    /// The other.
    pub rejected: Conversation,
}

/// Reads all preferences at a path: a file, a folder or a pattern.
///
/// # Errors
/// No such files; a damaged file; not one pair in them.
pub fn read_pairs(path: &Path) -> Result<Found<Pair>> {
    const EXPECTED: &str = "expected rows with `prompt`, `chosen` and `rejected`, each a text or a list of `role` and \
                            `content`";
    Found::read(path, "preference", EXPECTED, pair)
}

/// The pair of a row, or why it has none.
fn pair(row: &Map<String, Value>) -> Result<Pair, String> {
    let prompt = match row.get("prompt") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) => vec![Message::new("user", text.trim())],
        Some(list) => turns_of(list, "prompt", "role", "content")?,
    };
    let answer = |key: &str| -> Result<Conversation, String> {
        let turns = match row.get(key) {
            None => return Err(format!("no `{key}`")),
            Some(Value::String(text)) => vec![Message::new("assistant", text.trim())],
            Some(list) => turns_of(list, key, "role", "content")?,
        };
        // A list may hold the prompt as well.
        let whole = match !turns.is_empty()
            && turns.first().map(|turn| turn.role.as_str()) != Some("assistant")
        {
            true => turns,
            false => prompt.iter().cloned().chain(turns).collect(),
        };
        let (Some(first), Some(last)) = (whole.first(), whole.last()) else {
            return Err(format!("`{key}` is empty"));
        };
        if first.role == "assistant" {
            return Err(format!("`{key}` answers no prompt"));
        }
        if last.role != "assistant" || last.content.trim().is_empty() {
            return Err(format!("`{key}` does not end with what the assistant says"));
        }
        Ok(whole)
    };
    let (chosen, rejected) = (answer("chosen")?, answer("rejected")?);
    if chosen == rejected {
        return Err("`chosen` and `rejected` are the same".into());
    }
    Ok(Pair { chosen, rejected })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(row: Value) -> Result<Pair, String> {
        pair(row.as_object().unwrap())
    }

    #[test]
    fn texts_and_lists_give_the_same_pair() {
        let want = of(json!({"prompt": "Hi", "chosen": "Hello", "rejected": "No"})).unwrap();
        assert_eq!(want.chosen, [Message::new("user", "Hi"), Message::new("assistant", "Hello")]);
        assert_eq!(want.rejected[1], Message::new("assistant", "No"));
        let user = json!({"role": "user", "content": "Hi"});
        let [yes, no] = ["Hello", "No"].map(|text| json!({"role": "assistant", "content": text}));
        for row in [
            json!({"prompt": [user], "chosen": [yes], "rejected": [no]}),
            json!({"chosen": [user, yes], "rejected": [user, no]}),
            json!({"prompt": "Hi", "chosen": [user, yes], "rejected": [user, no]}),
        ] {
            assert_eq!(of(row.clone()), Ok(want.clone()), "{row}");
        }
    }

    #[test]
    fn a_row_that_is_no_pair_says_why() {
        for (row, words) in [
            (json!({"prompt": "a", "chosen": "b"}), "no `rejected`"),
            (json!({"chosen": "b", "rejected": "c"}), "`chosen` answers no prompt"),
            (json!({"prompt": "a", "chosen": "b", "rejected": "b"}), "are the same"),
            (json!({"prompt": "a", "chosen": " ", "rejected": "b"}), "`chosen` does not end with"),
            (json!({"prompt": "a", "chosen": 1, "rejected": "b"}), "`chosen` is no list"),
        ] {
            let error = of(row.clone()).unwrap_err();
            assert!(error.contains(words), "{row}: {error}");
        }
    }
}
