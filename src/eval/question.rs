//! A task's templates, and the question that they make of a row.

use super::rows::Row;
use super::task::{Form, TaskFile};
use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context};
use regex::Regex;
use std::collections::HashSet;

/// A task with its templates and expressions compiled.
pub struct Task {
    /// Name; of a subject, with it behind.
    pub name: String,
    /// Its file.
    pub file: TaskFile,
    /// Which kind of task it is.
    pub form: Form,
    /// The folder of its rows in the data folder.
    pub folder: String,
    /// The task whose subject it is.
    pub group: Option<Group>,
    /// What named it: itself, a group of tasks, or the path of its file.
    pub argument: String,
    /// One a filter: `None` takes all.
    pub(super) filters: Vec<Option<Regex>>,
    /// What counts as nothing in `exact_match`.
    pub(super) ignored: Vec<Regex>,
    subject: Option<String>,
    environment: Environment<'static>,
}

/// A task of several subjects, each of which is a task of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Name.
    pub name: String,
    /// How many subjects it has.
    pub size: usize,
}

impl Group {
    fn of(file: &TaskFile) -> Self {
        let subjects: HashSet<&String> = file.subjects.iter().collect();
        Self { name: file.task.clone(), size: subjects.len() }
    }
}

/// A question, in texts.
#[derive(Clone, Debug, PartialEq)]
pub enum Question {
    /// One of several is to be found the likeliest.
    Choice(Choice),
    /// An answer is to be written.
    Written {
        /// What stands before it.
        query: String,
        /// Right ones; of several parts in DROP.
        answers: Vec<Vec<String>>,
    },
    /// A text is to be predicted.
    Text {
        /// The text.
        text: String,
        /// Its words, between white space.
        words: usize,
        /// Its bytes.
        bytes: usize,
    },
}

/// What is to be chosen among.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// What may stand before the answer: one, or as many as there are choices.
    pub queries: Vec<String>,
    /// Answers, or where the queries differ, those.
    pub choices: Vec<String>,
    /// What follows each query, where the queries differ.
    pub continuation: Option<String>,
    /// Which is right.
    pub target: usize,
}

/// Context and continuation.
pub type Request = (String, String);

impl Question {
    /// What is asked of the model behind `before`: pairs to be judged; one of nothing and a text; or a context whose
    /// continuation is to be written, and is empty here.
    pub fn requests(&self, before: &str, delimiter: &str) -> Vec<Request> {
        match self {
            Self::Choice(Choice { queries, continuation: Some(text), .. }) => {
                let pair = |query| (format!("{before}{query}"), format!("{delimiter}{text}"));
                queries.iter().map(pair).collect()
            }
            Self::Choice(Choice { queries, choices, .. }) => {
                let pair = |c| (format!("{before}{}", queries[0]), format!("{delimiter}{c}"));
                choices.iter().map(pair).collect()
            }
            Self::Written { query, .. } => vec![(format!("{before}{query}"), String::new())],
            Self::Text { text, .. } => vec![(String::new(), text.clone())],
        }
    }

    /// The question with its answer, as an example.
    pub fn shot(&self, delimiter: &str) -> String {
        let (query, answer) = match self {
            Self::Choice(Choice { queries, continuation: Some(text), target, .. }) => {
                (&queries[*target], text.clone())
            }
            Self::Choice(Choice { queries, choices, target, .. }) => {
                (&queries[0], choices[*target].clone())
            }
            Self::Written { query, answers } => {
                (query, answers.first().map_or(String::new(), |parts| parts.join(",")))
            }
            Self::Text { text, .. } => (text, String::new()),
        };
        format!("{query}{delimiter}{answer}\n\n")
    }

    /// What is right, as in the log of samples.
    pub fn target(&self) -> serde_json::Value {
        match self {
            Self::Choice(choice) => choice.target.into(),
            Self::Written { answers, .. } => match answers.as_slice() {
                [one] if one.len() == 1 => one[0].clone().into(),
                several => serde_json::json!(several),
            },
            Self::Text { text, .. } => text.clone().into(),
        }
    }
}

impl Task {
    /// Compiles a task that `argument` named, of a subject if it has several.
    pub(super) fn new(file: TaskFile, subject: Option<String>, argument: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build()?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("regex_replace", regex_replace);
        environment.add_filter("index", index);
        let templates = [
            ("description", &file.description),
            ("query", &file.query),
            ("continuation", &file.continuation),
            ("clean", &file.clean),
            ("program", &file.program),
            ("text", &file.text),
            ("counted", &file.counted),
        ];
        for (name, text) in templates {
            let of = || format!("`{name}` of the task `{}`", file.task);
            environment.add_template_owned(name, text.clone()).with_context(of)?;
        }
        let expressions = [
            ("choices", &file.choices),
            ("queries", &file.queries),
            ("target", &file.target),
            ("answers", &file.answers),
        ];
        for (name, text) in expressions.into_iter().filter(|(_, text)| !text.is_empty()) {
            let of = || format!("`{name}` of the task `{}`", file.task);
            environment.compile_expression(text).with_context(of)?;
        }
        let (name, folder, group) = match &subject {
            Some(subject) => (
                format!("{}_{subject}", file.task),
                format!("{}/{subject}", file.data.folder),
                Some(Group::of(&file)),
            ),
            None => (file.task.clone(), file.data.folder.clone(), None),
        };
        let form = file.form()?;
        let filters = file.filters.iter().map(|filter| filter.regex.as_ref());
        let filters = filters.map(|text| text.map(|text| regex_of("filters", text)).transpose());
        let filters = filters.collect::<Result<_>>()?;
        let ignored = file.exact_match.ignore.iter();
        let ignored =
            ignored.map(|text| regex_of("exact_match.ignore", text)).collect::<Result<_>>()?;
        let argument = argument.to_owned();
        Ok(Self {
            name,
            file,
            form,
            folder,
            group,
            argument,
            filters,
            ignored,
            subject,
            environment,
        })
    }

    /// The question of a row.
    ///
    /// # Errors
    /// A row without the fields that the templates name: those it has are told.
    pub fn question(&self, row: &Row) -> Result<Question> {
        self.question_of(&Value::from(Serde(row))).with_context(|| fields(row))
    }

    fn question_of(&self, row: &Value) -> Result<Question> {
        let (queries, choices, continuation);
        match self.form {
            Form::Text => {
                let text = self.text("text", row)?;
                let counted = match self.file.counted.is_empty() {
                    true => text.clone(),
                    false => self.text("counted", row)?,
                };
                // As Python's re.split: white space at an end has an empty word beyond it.
                let is_space = char::is_whitespace;
                let ends = [counted.starts_with(is_space), counted.ends_with(is_space)];
                let beyond: usize = ends.map(usize::from).iter().sum();
                let words = (counted.split_whitespace().count() + beyond).max(1);
                return Ok(Question::Text { text, words, bytes: counted.len() });
            }
            Form::Written => {
                let query = self.clean(self.text("query", row)?)?;
                return Ok(Question::Written { query, answers: self.answers(row)? });
            }
            Form::Choices => {
                queries = vec![self.clean(self.text("query", row)?)?];
                choices = self.list("choices", &self.file.choices, row)?;
                continuation = None;
            }
            Form::Queries => {
                queries = self.list("queries", &self.file.queries, row)?;
                choices = queries.clone();
                continuation = Some(self.clean(self.text("continuation", row)?)?);
            }
        }
        let target = self.target(row)?;
        if target >= choices.len() {
            bail_hint!(
                "`target` says which choice is right, from 0";
                "`target` of the task `{}` is {target}, of {} choices", self.file.task, choices.len()
            );
        }
        Ok(Question::Choice(Choice { queries, choices, continuation, target }))
    }

    fn target(&self, row: &Value) -> Result<usize> {
        let target = self.expression("target", &self.file.target, row)?;
        match (target.kind(), i64::try_from(target.clone())) {
            (ValueKind::Bool, _) => Ok(usize::from(target.is_true())),
            (_, Ok(n)) if n >= 0 => Ok(n as usize),
            _ => bail_hint!(
                "`target` says which choice is right, from 0";
                "`target` of the task `{}`: expected a number, got {target}", self.file.task
            ),
        }
    }

    fn answers(&self, row: &Value) -> Result<Vec<Vec<String>>> {
        let no_list = || format!("`answers` of the task `{}` is no list", self.file.task);
        let list = self.expression("answers", &self.file.answers, row)?;
        let parts = |answer: Value| -> Result<Vec<String>> {
            match answer.kind() {
                ValueKind::Seq | ValueKind::Iterable => {
                    Ok(answer.try_iter().with_context(no_list)?.map(|x| x.to_string()).collect())
                }
                _ => Ok(vec![answer.to_string()]),
            }
        };
        if !matches!(list.kind(), ValueKind::Seq | ValueKind::Iterable) {
            return Err(anyhow::anyhow!(no_list()));
        }
        list.try_iter().with_context(no_list)?.map(parts).collect()
    }

    /// What stands before everything, given the rows that examples come from.
    pub fn description(&self, examples: &[Row]) -> Result<String> {
        let subject = self.subject.as_deref().unwrap_or_default();
        let examples: Vec<Value> = match self.wants_examples() {
            true => examples.iter().map(|row| Value::from(Serde(row.clone()))).collect(),
            false => Vec::new(),
        };
        self.text("description", &context! { subject, examples })
    }

    /// Whether the description is made of the rows that examples come from.
    pub fn wants_examples(&self) -> bool {
        self.file.description.contains("examples")
    }

    /// The program that `written` makes of a row.
    pub fn program(&self, row: &Row, written: &str) -> Result<String> {
        let values = context! { written, ..Value::from(Serde(row.clone())) };
        self.text("program", &values).with_context(|| fields(row))
    }

    fn text(&self, name: &str, row: &Value) -> Result<String> {
        let template = self.environment.get_template(name)?;
        template.render(row).with_context(|| format!("`{name}` of the task `{}`", self.file.task))
    }

    fn expression(&self, name: &str, text: &str, row: &Value) -> Result<Value> {
        let of = || format!("`{name}` of the task `{}`", self.file.task);
        self.environment.compile_expression(text)?.eval(row).with_context(of)
    }

    fn list(&self, name: &str, text: &str, row: &Value) -> Result<Vec<String>> {
        let list = self.expression(name, text, row)?;
        let items = list
            .try_iter()
            .with_context(|| format!("`{name}` of the task `{}` is no list", self.file.task))?;
        items.map(|item| self.clean(item.to_string())).collect()
    }

    fn clean(&self, text: String) -> Result<String> {
        match self.file.clean.is_empty() {
            true => Ok(text),
            false => self.text("clean", &context! { text }),
        }
    }
}

/// A regular expression of a field.
fn regex_of(field: &str, text: &str) -> Result<Regex> {
    let compiled = Regex::new(text).with_context(|| format!("`{field}`"));
    compiled.hint("expressions are the crate regex's: no look-around, no references")
}

/// What a row has.
fn fields(row: &Row) -> String {
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    format!("a row has the fields `{}`", names.join("`, `"))
}

type Rendered<T> = std::result::Result<T, minijinja::Error>;

fn invalid(error: impl std::fmt::Display) -> minijinja::Error {
    minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, error.to_string())
}

/// Filter `regex_replace(pattern, with)`, as Python's `re.sub`; `$1` in `with` is the first group.
fn regex_replace(text: &str, pattern: &str, with: &str) -> Rendered<String> {
    let pattern = Regex::new(pattern).map_err(invalid)?;
    Ok(pattern.replace_all(text, with).into_owned())
}

/// Filter `index(item)`: where an item stands in a list.
fn index(list: &Value, item: &Value) -> Rendered<usize> {
    list.try_iter()?
        .position(|other| other == *item)
        .ok_or_else(|| invalid(format!("{item} is not in {list}")))
}
