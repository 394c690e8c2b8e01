//! What an answer is worth.

use super::question::{Choice, Question};
use super::score::Likelihood;
use super::task::{Metric, Take};
use regex::Regex;
use std::collections::HashSet;

/// 1 where the choice is right, else 0. Of equal ones the first is chosen.
pub fn choice(metric: Metric, choice: &Choice, likelihoods: &[Likelihood]) -> f64 {
    let of = |(i, l): (usize, &Likelihood)| match metric {
        Metric::AccNorm => l.log_likelihood / choice.choices[i].chars().count().max(1) as f64,
        _ => l.log_likelihood,
    };
    let scores: Vec<f64> = likelihoods.iter().enumerate().map(of).collect();
    f64::from(u8::from(first_largest(&scores) == choice.target))
}

/// Where the largest value is; of equal ones the first.
fn first_largest(values: &[f64]) -> usize {
    let larger = |best: usize, i: usize| if values[i] > values[best] { i } else { best };
    (0..values.len()).reduce(larger).unwrap_or(0)
}

/// A perplexity over all texts, from the sum of their log-likelihoods in nats.
pub fn perplexity(metric: Metric, log_likelihood: f64, questions: &[&Question]) -> f64 {
    let count = |question: &&Question| match (question, metric) {
        (Question::Text { words, .. }, Metric::WordPerplexity) => *words,
        (Question::Text { bytes, .. }, _) => *bytes,
        _ => 0,
    };
    let each = -log_likelihood / questions.iter().map(count).sum::<usize>() as f64;
    if metric == Metric::BitsPerByte { each / std::f64::consts::LN_2 } else { each.exp() }
}

/// What a filter takes of a text: all of it without an expression.
pub fn extract(regex: Option<&Regex>, take: Take, text: &str) -> String {
    const NOTHING: &str = "[invalid]";
    let Some(regex) = regex else { return text.to_owned() };
    let mut found = regex.captures_iter(text);
    let captures = match take {
        Take::First => found.next(),
        Take::Last => found.last(),
    };
    let Some(captures) = captures else { return NOTHING.to_owned() };
    let part = match captures.len() {
        1 => captures.get(0).map(|all| all.as_str()),
        2 => Some(captures.get(1).map_or("", |group| group.as_str())),
        _ => captures.iter().skip(1).flatten().map(|g| g.as_str()).find(|part| !part.is_empty()),
    };
    part.unwrap_or(NOTHING).trim().to_owned()
}

/// 1 where a text is one of the answers, else 0. What `ignored` matches counts as nothing.
pub fn exact_match(
    ignored: &[Regex],
    ignore_case: bool,
    text: &str,
    answers: &[Vec<String>],
) -> f64 {
    let bare = |text: &str| {
        let mut text = text.to_owned();
        for pattern in ignored {
            text = pattern.replace_all(&text, "").into_owned();
        }
        if ignore_case { text.to_lowercase() } else { text }
    };
    let text = bare(text);
    f64::from(u8::from(answers.iter().any(|parts| bare(&parts.join(",")) == text)))
}

/// DROP's exact match and F1 of a text, of the answer that it fits best. An answer has one or several parts, a text is one:
/// it stands for the part that it fits best, and the others are missing. F1 is rounded to two digits.
pub fn drop_scores(text: &str, answers: &[Vec<String>]) -> (f64, f64) {
    let written = normalised(text);
    let words = bag(&written);
    let (mut em, mut f1) = (0.0_f64, 0.0_f64);
    for parts in answers.iter().filter(|parts| parts.first().is_some_and(|p| !p.trim().is_empty()))
    {
        let parts: Vec<String> = parts.iter().map(|part| normalised(part)).collect();
        if parts.len() == 1 && parts[0] == written {
            em = 1.0;
        }
        let fits = parts.iter().map(|part| overlap(&words, &bag(part))).fold(0.0, f64::max);
        f1 = f1.max((fits / parts.len() as f64 * 100.0).round_ties_even() / 100.0);
    }
    (em, f1)
}

fn bag(text: &str) -> HashSet<&str> {
    text.split_whitespace().collect()
}

/// F1 of two sets of words; 0 where the right one has numbers and the other none of them.
fn overlap(written: &HashSet<&str>, right: &HashSet<&str>) -> f64 {
    let mut numbers = right.iter().filter(|word| number(word).is_some()).peekable();
    if numbers.peek().is_some() && !numbers.any(|word| written.contains(word)) {
        return 0.0;
    }
    let both = written.intersection(right).count() as f64;
    let share = |of: &HashSet<&str>| if of.is_empty() { 1.0 } else { both / of.len() as f64 };
    let (precision, recall) = (share(written), share(right));
    if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
}

/// Small letters, no articles, no punctuation but of numbers, which are all written alike.
fn normalised(text: &str) -> String {
    let words = text.split([' ', '-']).map(|word| {
        let word = word.to_lowercase();
        let bare = match number(&word) {
            Some(_) => word,
            None => word.chars().filter(|c| !c.is_ascii_punctuation()).collect(),
        };
        match number(&bare) {
            Some(x) => format!("{x:?}"),
            None => without_articles(&bare),
        }
    });
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Without `a`, `an` and `the`, and with one space between words.
fn without_articles(text: &str) -> String {
    let mut out = String::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (run, behind) = rest.split_at(end);
        out += if matches!(run, "a" | "an" | "the") { " " } else { run };
        rest = behind;
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn number(text: &str) -> Option<f64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(regex: &str, take: Take, text: &str) -> String {
        extract(Some(&Regex::new(regex).unwrap()), take, text)
    }

    #[test]
    fn filters_take_what_the_harness_takes() {
        let flexible = |text| take("(-?[$0-9.,]{2,})|(-?[0-9]+)", Take::Last, text);
        assert_eq!(flexible("He has 3 and $1,200.50 and 7"), "7");
        assert_eq!(flexible("so 12 of them."), "12");
        assert_eq!(flexible("none"), "[invalid]");
        let strict = r"#### (\-?[0-9\.\,]+)";
        assert_eq!(take(strict, Take::First, "a\n#### -1,234 \n#### 5"), "-1,234");
        let answer = "the answer is (.*).";
        assert_eq!(take(answer, Take::First, "So the answer is (B).\n"), "(B)");
        assert_eq!(take("b+", Take::Last, " a bb b "), "b");
        assert_eq!(extract(None, Take::First, " as it is\n"), " as it is\n");
    }

    #[test]
    fn texts_are_equal_by_the_rules_of_the_task() {
        let ignored = [",", r"\$", "(?s).*#### ", r"\.$"].map(|text| Regex::new(text).unwrap());
        let right = vec![vec!["steps\nand #### 1,234".to_owned()]];
        assert_eq!(exact_match(&ignored, true, "$1234.", &right), 1.0);
        assert_eq!(exact_match(&ignored, true, "1235", &right), 0.0);
        assert_eq!(exact_match(&[], false, "Yes", &[vec!["yes".into()]]), 0.0);
        assert_eq!(exact_match(&[], false, "b", &[vec!["a".into()], vec!["b".into()]]), 1.0);
    }

    /// Wanted values are the harness's `drop/utils.py`'s.
    #[test]
    fn drop_is_scored_as_the_harness_scores_it() {
        let cases: &[(&str, &[&[&str]], f64, f64)] = &[
            (" The Swedish", &[&["swedish"]], 1.0, 1.0),
            (" 1,507 men", &[&["1507"], &["1477"]], 0.0, 0.67),
            ("50", &[&["50.0"]], 1.0, 1.0),
            ("twenty-five", &[&["25"]], 0.0, 0.0),
            ("Tom Brady and a friend", &[&["Tom Brady", "Joe"]], 0.0, 0.33),
            ("", &[&["x"]], 0.0, 0.0),
            ("anything", &[&[" "]], 0.0, 0.0),
        ];
        for (text, answers, em, f1) in cases {
            let answers: Vec<Vec<String>> = answers
                .iter()
                .map(|parts| parts.iter().map(|part| part.to_string()).collect())
                .collect();
            assert_eq!(drop_scores(text, &answers), (*em, *f1), "{text}");
        }
    }
}
