//! Ids to text as it comes: stop strings are found across token borders and never shown.

use super::engine::generate;
use super::network::NetworkRef;
use super::request::{FinishReason, GenerateOptions, Generation};
use crate::error::WithHint;
use crate::tokenizer::{DecodeStream, Tokenizer};
use anyhow::{Context, Result};

/// A generation and its text.
#[derive(Clone, Debug)]
pub struct TextGeneration {
    /// New text, up to a stop string; eos is no part of it.
    pub text: String,
    /// Tokens: all that were made, also those of the stop string and eos.
    pub generation: Generation,
}

/// [`generate`] with text: `on_text` gets each piece as soon as it is certain, that is, ends on a
/// whole character and cannot be the start of a stop string.
///
/// # Errors
/// As [`generate`]; an empty stop string; a token that cannot be decoded; errors of `on_text`.
pub fn generate_text<'m>(
    model: impl Into<NetworkRef<'m>>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    stop: &[String],
    on_text: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<TextGeneration> {
    let mut stream = TextStream::new(tokenizer, prompt, stop)?;
    let mut text = String::new();
    let mut emit = |piece: String| -> Result<()> {
        text.push_str(&piece);
        if piece.is_empty() { Ok(()) } else { on_text(&piece) }
    };
    let mut generation = generate(model, prompt, options, &mut |token| {
        if token.is_eos {
            return Ok(false);
        }
        emit(stream.push(token.id))?;
        Ok(!stream.stopped())
    })?;
    emit(stream.finish())?;
    if stream.stopped() {
        generation.finish_reason = FinishReason::Stop;
    }
    Ok(TextGeneration { text, generation })
}

/// The text of ids that come one at a time, up to a stop string.
#[derive(Clone)]
pub struct TextStream<'a> {
    /// `None` once it has ended.
    stream: Option<DecodeStream<'a>>,
    matcher: StopMatcher,
}

impl<'a> TextStream<'a> {
    /// The text behind `prompt`, which goes first so that the space before a word that continues it is kept.
    ///
    /// # Errors
    /// An empty stop string.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32], stop: &[String]) -> Result<Self> {
        let stream = Some(tokenizer.decode_stream_after(prompt));
        Ok(Self { stream, matcher: StopMatcher::new(stop)? })
    }

    /// Takes the next id; returns the text that is certain.
    pub fn push(&mut self, id: u32) -> String {
        let piece = self.stream.as_mut().and_then(|stream| stream.push(id));
        piece.map_or_else(String::new, |piece| self.matcher.push(&piece))
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.matcher.stopped()
    }

    /// What was held back, once no more can come: an incomplete character, the start of a stop string.
    pub fn finish(&mut self) -> String {
        let piece = self.stream.take().and_then(DecodeStream::finish).unwrap_or_default();
        self.matcher.push(&piece) + &self.matcher.finish()
    }
}

/// Finds stop strings in text that comes in pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// End of the text so far that may be the start of a stop string.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// # Errors
    /// An empty stop string.
    pub fn new(stops: &[String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(anyhow::anyhow!("a stop string is empty"))
                .usage("leave `--stop` out, or give it a text");
        }
        Ok(Self { stops: stops.to_vec(), held: String::new(), stopped: false })
    }

    /// Takes the next piece; returns the text that is certain. After a stop string nothing is.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text held back, once no more can come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that is the start of `stop`. The end begins at a character
/// border because `stop` does.
fn overlap(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

/// Ids from text such as `1, 15043 3186`: commas and white space separate.
///
/// # Errors
/// Anything that is no number of 32 bits.
pub fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    words.map(parse_id).collect()
}

fn parse_id(word: &str) -> Result<u32> {
    word.parse()
        .ok()
        .with_context(|| format!("`{word}` is no token id"))
        .usage("ids are whole numbers from 0, separated by commas or spaces: `1,15043,3186`")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown after each piece, and at the end.
    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops).unwrap();
        let shown = pieces.iter().map(|piece| matcher.push(piece)).collect();
        (shown, matcher.finish(), matcher.stopped())
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_never_shown() {
        let (pieces, end, stopped) = shown(&["\nUser:"], &["Hi", "\n", "Us", "er", ": no"]);
        assert_eq!(pieces, ["Hi", "", "", "", ""]);
        assert_eq!((end.as_str(), stopped), ("", true));
    }

    #[test]
    fn text_that_only_began_like_a_stop_string_is_shown_late_but_whole() {
        let (pieces, end, stopped) = shown(&["\nUser:"], &["Hi\nU", "nix\n", "Use"]);
        assert_eq!(pieces, ["Hi", "\nUnix", ""]);
        assert_eq!((end.as_str(), stopped), ("\nUse", false));
    }

    #[test]
    fn a_false_start_inside_a_stop_string_is_not_lost() {
        let (pieces, end, stopped) = shown(&["aab"], &["a", "a", "a", "b"]);
        assert_eq!(pieces, ["", "", "a", ""]);
        assert_eq!((end.as_str(), stopped), ("", true));
    }

    #[test]
    fn the_earliest_of_several_stop_strings_ends_the_text() {
        let (pieces, _, stopped) = shown(&["END", "e"], &["some END"]);
        assert_eq!((pieces[0].as_str(), stopped), ("som", true));
    }

    #[test]
    fn stop_strings_of_several_bytes_a_character_work() {
        let (pieces, end, stopped) = shown(&["ü!"], &["fü", "für ", "ü", "!"]);
        assert_eq!(pieces, ["f", "üfür ", "", ""]);
        assert_eq!((end.as_str(), stopped), ("", true));
        let (pieces, end, _) = shown(&["é"], &["è", "x"]); // same first byte, another character
        assert_eq!((pieces.concat() + &end).as_str(), "èx");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        assert!(StopMatcher::new(&[String::new()]).is_err());
    }

    #[test]
    fn ids_are_read_with_commas_or_spaces() {
        assert_eq!(parse_ids("1,15043, 3186\n7").unwrap(), [1, 15043, 3186, 7]);
        assert!(parse_ids("").unwrap().is_empty());
        for bad in ["1,x", "-1", "1.5", "4294967296"] {
            assert_eq!(crate::error::exit_code(&parse_ids(bad).unwrap_err()), 2, "{bad}");
        }
    }
}
