//! Tasks: what is asked of a row of a set, and how answers are judged. A task is a YAML file, of `tasks/` or a user's.

use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The tasks of this crate, one file each.
const OWN: [&str; 8] = [
    include_str!("tasks/hellaswag.yaml"),
    include_str!("tasks/openbookqa.yaml"),
    include_str!("tasks/winogrande.yaml"),
    include_str!("tasks/arc_easy.yaml"),
    include_str!("tasks/arc_challenge.yaml"),
    include_str!("tasks/boolq.yaml"),
    include_str!("tasks/piqa.yaml"),
    include_str!("tasks/mmlu.yaml"),
];

/// The suite of the original's EVAL.md.
const COMMONSENSE: [&str; 7] =
    ["hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa"];

/// A task as its file says it. Templates are minijinja's and see a row's fields as variables; so do expressions, which are
/// templates without braces.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TaskFile {
    /// Name.
    pub task: String,
    /// The harness's version of it.
    #[serde(default)]
    pub version: f64,
    /// Where the rows are.
    pub data: Data,
    /// As many tasks as names, each on a folder of its own; templates see the variable `subject`.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// Template: what stands before everything.
    #[serde(default)]
    pub description: String,
    /// Template of the question.
    #[serde(default)]
    pub query: String,
    /// Expression: a list of answers, one to be chosen.
    #[serde(default)]
    pub choices: String,
    /// Expression, in place of `query` and `choices`: a list of questions, one to be chosen ..
    #[serde(default)]
    pub queries: String,
    /// .. by what follows all of them; a template.
    #[serde(default)]
    pub continuation: String,
    /// Template that makes questions and answers clean; the variable is `text`.
    #[serde(default)]
    pub clean: String,
    /// Expression: which of the list is right, from 0.
    pub target: String,
    /// Which rows are shown as examples.
    #[serde(default)]
    pub sampler: Shots,
    /// Examples, unless the command says how many.
    #[serde(default)]
    pub num_fewshot: usize,
    /// What is reported.
    pub metrics: Vec<Metric>,
}

/// The folder of a set in the data folder, and its splits by use.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Below the data folder; of subjects, that of their folders.
    pub folder: String,
    /// Name on the Hub, for people.
    #[serde(default)]
    pub hub: String,
    /// Its configuration there.
    #[serde(default)]
    pub config: String,
    /// Name of the split to learn from: examples come from there.
    #[serde(default)]
    pub train: Option<String>,
    /// Judged where there is no `test`.
    #[serde(default)]
    pub validation: Option<String>,
    /// Judged.
    #[serde(default)]
    pub test: Option<String>,
    /// Where examples come from, if neither from `train` nor from what is judged.
    #[serde(default)]
    pub fewshot: Option<String>,
}

/// Which rows are shown as examples.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shots {
    /// Others for each question, by the seed.
    #[default]
    Random,
    /// The first of the split.
    FirstN,
}

/// A score of a question, of which the mean is reported.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The right answer is the likeliest.
    Acc,
    /// It is by log-likelihood a character.
    AccNorm,
}

impl Metric {
    /// As in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
        }
    }
}

/// A task with its templates compiled.
pub struct Task {
    /// Name; of a subject, with it behind.
    pub name: String,
    /// Its file.
    pub file: TaskFile,
    /// The folder of its rows in the data folder.
    pub folder: String,
    /// The task whose subject it is.
    pub group: Option<String>,
    subject: Option<String>,
    environment: Environment<'static>,
}

/// A question, in texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What may stand before the answer: one, or as many as there are choices.
    pub queries: Vec<String>,
    /// What is to be chosen among: answers, or where the queries differ, those.
    pub choices: Vec<String>,
    /// What follows each query, where the queries differ.
    pub continuation: Option<String>,
    /// Which is right.
    pub target: usize,
}

impl Question {
    /// Pairs of context and continuation to be judged, behind `before`.
    pub fn requests(&self, before: &str) -> Vec<(String, String)> {
        match &self.continuation {
            Some(text) => {
                let pair = |query: &String| (format!("{before}{query}"), format!(" {text}"));
                self.queries.iter().map(pair).collect()
            }
            None => {
                let pair = |c: &String| (format!("{before}{}", self.queries[0]), format!(" {c}"));
                self.choices.iter().map(pair).collect()
            }
        }
    }

    /// The question with its answer, as an example.
    pub fn shot(&self) -> String {
        let (query, answer) = match &self.continuation {
            Some(text) => (&self.queries[self.target], text),
            None => (&self.queries[0], &self.choices[self.target]),
        };
        format!("{query} {answer}\n\n")
    }
}

/// The tasks of a list of names, groups (`commonsense`, `mmlu`), and files.
///
/// # Errors
/// A name that is none, with those most like it; a file with a fault.
pub fn find(names: &[String]) -> Result<Vec<Task>> {
    let own: Vec<TaskFile> = OWN.iter().map(|text| parse(text)).collect::<Result<_>>()?;
    let mut tasks = Vec::new();
    for name in names {
        let names: Vec<&str> = match name.as_str() {
            "commonsense" => COMMONSENSE.to_vec(),
            other => vec![other],
        };
        for name in names {
            let is_file = name.ends_with(".yaml") || name.ends_with(".yml");
            if is_file {
                tasks.extend(read(Path::new(name))?.into_tasks()?);
                continue;
            }
            let subject = |file: &TaskFile| {
                let rest = name.strip_prefix(&file.task)?.strip_prefix('_')?;
                file.subjects.contains(&rest.to_owned()).then(|| rest.to_owned())
            };
            if let Some(file) = own.iter().find(|file| file.task == *name) {
                tasks.extend(file.clone().into_tasks()?);
            } else if let Some((file, subject)) =
                own.iter().find_map(|file| Some((file, subject(file)?)))
            {
                let file = TaskFile { subjects: vec![subject], ..file.clone() };
                tasks.extend(file.into_tasks()?);
            } else {
                return unknown(name, &own);
            }
        }
    }
    Ok(tasks)
}

fn unknown(name: &str, own: &[TaskFile]) -> Result<Vec<Task>> {
    let all = own.iter().flat_map(|file| {
        let subjects = file.subjects.iter().map(|subject| format!("{}_{subject}", file.task));
        std::iter::once(file.task.clone()).chain(subjects)
    });
    let mut near: Vec<String> = all.chain(["commonsense".to_owned()]).collect();
    near.sort_by(|a, b| strsim::jaro(b, name).total_cmp(&strsim::jaro(a, name)));
    Err(anyhow!("`{name}` is no task; near are `{}`", near[..3].join("`, `")))
        .usage("a task of your own is a file: name one that ends with `.yaml`")
}

/// Reads a task's file.
///
/// # Errors
/// No such file; a field that is unknown, missing or of another type, with its line.
pub fn read(path: &Path) -> Result<TaskFile> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the task `{}`", path.display()))?;
    let in_file = || format!("in the task `{}`", path.display());
    let mut file = parse(&text).with_context(in_file)?;
    // Its rows may lie beside it.
    let beside = path.parent().map(|dir| dir.join(&file.data.folder)).filter(|dir| dir.exists());
    if let Some(dir) = beside {
        file.data.folder = dir.canonicalize()?.to_string_lossy().into_owned();
    }
    Ok(file)
}

fn parse(text: &str) -> Result<TaskFile> {
    let file: TaskFile =
        serde_saphyr::from_str(text).hint("docs/EVAL.md describes the fields of a task")?;
    let (one, other) = (!file.query.is_empty(), !file.queries.is_empty());
    let fits =
        one != other && one != file.choices.is_empty() && other != file.continuation.is_empty();
    if !fits {
        bail_hint!(
            "docs/EVAL.md describes the fields of a task";
            "expected `query` and `choices`, or `queries` and `continuation`"
        );
    }
    if file.metrics.is_empty() {
        bail_hint!("say `metrics: [acc]`"; "`metrics`: needs at least one");
    }
    if file.data.validation.is_none() && file.data.test.is_none() {
        bail_hint!("say `validation: validation`"; "`data`: needs `test` or `validation`, which is judged");
    }
    Ok(file)
}

impl TaskFile {
    /// The task, or one for each subject.
    fn into_tasks(self) -> Result<Vec<Task>> {
        if self.subjects.is_empty() {
            return Ok(vec![Task::new(self, None)?]);
        }
        let subjects = self.subjects.clone();
        subjects.into_iter().map(|subject| Task::new(self.clone(), Some(subject))).collect()
    }
}

impl Task {
    fn new(file: TaskFile, subject: Option<String>) -> Result<Self> {
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
        ];
        for (name, text) in templates {
            let of = || format!("`{name}` of the task `{}`", file.task);
            environment.add_template_owned(name, text.clone()).with_context(of)?;
        }
        for (name, text) in
            [("choices", &file.choices), ("queries", &file.queries), ("target", &file.target)]
        {
            let of = || format!("`{name}` of the task `{}`", file.task);
            if !text.is_empty() {
                environment.compile_expression(text).with_context(of)?;
            }
        }
        let (name, folder, group) = match &subject {
            Some(subject) => (
                format!("{}_{subject}", file.task),
                format!("{}/{subject}", file.data.folder),
                Some(file.task.clone()),
            ),
            None => (file.task.clone(), file.data.folder.clone(), None),
        };
        Ok(Self { name, file, folder, group, subject, environment })
    }

    /// The question of a row.
    ///
    /// # Errors
    /// A row without the fields that the templates name: those it has are told.
    pub fn question(&self, row: &serde_json::Map<String, serde_json::Value>) -> Result<Question> {
        let fields = || {
            let names: Vec<&str> = row.keys().map(String::as_str).collect();
            format!("a row has the fields `{}`", names.join("`, `"))
        };
        self.question_of(&Value::from(Serde(row))).with_context(fields)
    }

    fn question_of(&self, row: &Value) -> Result<Question> {
        let target = self.expression("target", &self.file.target, row)?;
        let target = match (target.kind(), i64::try_from(target.clone())) {
            (ValueKind::Bool, _) => usize::from(target.is_true()),
            (_, Ok(n)) if n >= 0 => n as usize,
            _ => bail_hint!(
                "`target` says which choice is right, from 0";
                "`target` of the task `{}`: expected a number, got {target}", self.file.task
            ),
        };
        let (queries, choices, continuation);
        if self.file.queries.is_empty() {
            queries = vec![self.clean(self.text("query", row)?)?];
            choices = self.list("choices", &self.file.choices, row)?;
            continuation = None;
        } else {
            queries = self.list("queries", &self.file.queries, row)?;
            choices = queries.clone();
            continuation = Some(self.clean(self.text("continuation", row)?)?);
        }
        if target >= choices.len() {
            bail_hint!(
                "`target` says which choice is right, from 0";
                "`target` of the task `{}` is {target}, of {} choices", self.file.task, choices.len()
            );
        }
        Ok(Question { queries, choices, continuation, target })
    }

    /// What stands before everything.
    pub fn description(&self) -> Result<String> {
        let subject = self.subject.as_deref().unwrap_or_default();
        self.text("description", &minijinja::context! { subject })
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
            false => self.text("clean", &minijinja::context! { text }),
        }
    }
}

type Rendered<T> = std::result::Result<T, minijinja::Error>;

fn invalid(error: impl std::fmt::Display) -> minijinja::Error {
    minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, error.to_string())
}

/// Filter `regex_replace(pattern, with)`, as Python's `re.sub`.
fn regex_replace(text: &str, pattern: &str, with: &str) -> Rendered<String> {
    let pattern = regex::Regex::new(pattern).map_err(invalid)?;
    Ok(pattern.replace_all(text, regex::NoExpand(with)).into_owned())
}

/// Filter `index(item)`: where an item stands in a list.
fn index(list: &Value, item: &Value) -> Rendered<usize> {
    list.try_iter()?
        .position(|other| other == *item)
        .ok_or_else(|| invalid(format!("{item} is not in {list}")))
}
