//! Conversations as text: the template of the original's chat models (guanaco).
//!
//! `### Human: question### Assistant: answer`, turn after turn, as openassistant-guanaco writes it. The loss
//! is on every token then, as in the original.

use serde_json::{Map, Value};

/// The conversation of a row: `messages` (`role`, `content`), `conversations` (ShareGPT's `from`, `value`),
/// or Alpaca's `instruction`, `input` and `output`. `None` where it is none of these.
pub(super) fn text(row: &Map<String, Value>) -> Option<String> {
    let turns = |key: &str, who: &str, what: &str| {
        let list = row.get(key)?.as_array()?;
        let turn = |turn: &Value| Some(said(turn[who].as_str()?, turn[what].as_str()?));
        list.iter().map(turn).collect::<Option<Vec<_>>>().filter(|turns| !turns.is_empty())
    };
    if let Some(turns) =
        turns("messages", "role", "content").or_else(|| turns("conversations", "from", "value"))
    {
        return Some(turns.concat());
    }
    let field = |key: &str| row.get(key).and_then(Value::as_str);
    let (instruction, output) = (field("instruction")?, field("output")?);
    let question = match field("input").filter(|input| !input.is_empty()) {
        Some(input) => format!("{instruction}\n{input}"),
        None => instruction.into(),
    };
    Some(said("user", &question) + &said("assistant", output))
}

fn said(who: &str, what: &str) -> String {
    let name = match who {
        "user" | "human" | "prompter" => "Human",
        "assistant" | "gpt" | "bot" | "model" => "Assistant",
        "system" => "System",
        other => other,
    };
    format!("### {name}: {what}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_usual_layout_gives_guanacos_text() {
        let want = "### Human: Hi### Assistant: Hello";
        for row in [
            json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
            json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
            json!({"instruction": "Hi", "input": "", "output": "Hello"}),
        ] {
            assert_eq!(text(row.as_object().unwrap()).as_deref(), Some(want));
        }
        let with_input = json!({"instruction": "Add", "input": "1, 2", "output": "3"});
        let got = text(with_input.as_object().unwrap());
        assert_eq!(got.as_deref(), Some("### Human: Add\n1, 2### Assistant: 3"));
        for row in [json!({"messages": []}), json!({"messages": [{"role": "user"}]}), json!({})] {
            assert_eq!(text(row.as_object().unwrap()), None, "{row}");
        }
    }
}
