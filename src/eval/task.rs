//! Tasks: what is asked of a row of a set, and how answers are judged. A task is a YAML file, of `tasks/` or a user's.

use super::question::Task;
use crate::bail_hint;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The tasks of this crate, one file each.
const OWN: [&str; 13] = [
    include_str!("tasks/hellaswag.yaml"),
    include_str!("tasks/openbookqa.yaml"),
    include_str!("tasks/winogrande.yaml"),
    include_str!("tasks/arc_easy.yaml"),
    include_str!("tasks/arc_challenge.yaml"),
    include_str!("tasks/boolq.yaml"),
    include_str!("tasks/piqa.yaml"),
    include_str!("tasks/mmlu.yaml"),
    include_str!("tasks/gsm8k.yaml"),
    include_str!("tasks/drop.yaml"),
    include_str!("tasks/bbh.yaml"),
    include_str!("tasks/humaneval.yaml"),
    include_str!("tasks/wikitext.yaml"),
];

/// The suite of the original's EVAL.md.
pub const COMMONSENSE: [&str; 7] =
    ["hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa"];

/// Where the fields are described.
const DESCRIBED: &str = "docs/EVAL.md describes the fields of a task";

/// A task as its file says it. Templates are minijinja's and see a row's fields as variables; so do expressions, which are
/// templates without braces. What is asked is one of four:
///
/// - `query`, `choices`, `target`: which of several texts follows a question;
/// - `queries`, `continuation`, `target`: after which of several questions a text follows;
/// - `query`, `answers`, `generate`: the model writes what follows;
/// - `text`: how likely a whole text is.
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
    /// As many tasks as names, each on a folder of its own; templates of `description` see the variable `subject`.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// Template: what stands before everything. It sees the list `examples` of the rows that examples come from.
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
    #[serde(default)]
    pub target: String,
    /// Expression: a list of right answers, each a text or a list of texts; examples show the first.
    #[serde(default)]
    pub answers: String,
    /// How the model writes.
    #[serde(default)]
    pub generate: Option<Generate>,
    /// What is taken of what it wrote, one score each.
    #[serde(default)]
    pub filters: Vec<Filter>,
    /// How texts are compared.
    #[serde(default)]
    pub exact_match: ExactMatch,
    /// Template of a Python program that passes or not; what was written is the variable `written`.
    #[serde(default)]
    pub program: String,
    /// Template of a text that is predicted as a whole.
    #[serde(default)]
    pub text: String,
    /// Template of the text whose words and bytes are counted, if not those of `text`.
    #[serde(default)]
    pub counted: String,
    /// Between a question and its answer.
    #[serde(default = "space")]
    pub delimiter: String,
    /// Which rows are shown as examples.
    #[serde(default)]
    pub sampler: Shots,
    /// Examples, unless the command says how many.
    #[serde(default)]
    pub num_fewshot: usize,
    /// What is reported.
    pub metrics: Vec<Metric>,
}

fn space() -> String {
    " ".into()
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

/// How the model writes: greedily, up to one of some texts.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    /// Texts that end an answer and are no part of it; the model's own end does, too.
    pub until: Vec<String>,
    /// Tokens at most.
    #[serde(default = "harness_tokens")]
    pub max_tokens: usize,
}

/// What the harness allows where a task says nothing.
fn harness_tokens() -> usize {
    256
}

/// What is taken of a text.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// As in results.
    pub name: String,
    /// Where it matches: its first group that holds something, or all of it where there are none. No match gives `[invalid]`, no
    /// expression the whole text.
    #[serde(default)]
    pub regex: Option<String>,
    /// Which match.
    #[serde(default)]
    pub take: Take,
}

/// Which of several matches.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Take {
    /// The first.
    #[default]
    First,
    /// The last.
    Last,
}

/// How texts are compared.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ExactMatch {
    /// Small and capital letters are equal.
    #[serde(default)]
    pub ignore_case: bool,
    /// Regular expressions: what they match counts as nothing, one after the other.
    #[serde(default)]
    pub ignore: Vec<String>,
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
    /// What was written is one of the answers.
    ExactMatch,
    /// The same by DROP's rules: no case, no articles, no punctuation, numbers as numbers.
    Em,
    /// By these rules, how many words are the same.
    F1,
    /// A program passes its tests.
    #[serde(rename = "pass@1")]
    PassAt1,
    /// exp(-log-likelihood / words) of all texts.
    WordPerplexity,
    /// exp(-log-likelihood / bytes) of all texts.
    BytePerplexity,
    /// log2 of that.
    BitsPerByte,
}

impl Metric {
    /// As in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::ExactMatch => "exact_match",
            Self::Em => "em",
            Self::F1 => "f1",
            Self::PassAt1 => "pass@1",
            Self::WordPerplexity => "word_perplexity",
            Self::BytePerplexity => "byte_perplexity",
            Self::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether it is a share of the samples, and not a perplexity.
    pub fn is_share(self) -> bool {
        !matches!(self, Self::WordPerplexity | Self::BytePerplexity | Self::BitsPerByte)
    }
}

/// Which of the four kinds of [`TaskFile`] it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `query` and `choices`.
    Choices,
    /// `queries` and `continuation`.
    Queries,
    /// `query`, `answers` and `generate`.
    Written,
    /// `text`.
    Text,
}

impl Form {
    fn metrics(self) -> &'static [Metric] {
        use Metric::*;
        match self {
            Self::Choices | Self::Queries => &[Acc, AccNorm],
            Self::Written => &[ExactMatch, Em, F1, PassAt1],
            Self::Text => &[WordPerplexity, BytePerplexity, BitsPerByte],
        }
    }
}

/// The tasks of a list of names, groups (`commonsense`, `mmlu`), and files. One that is named again is there once.
///
/// # Errors
/// A name that is none, with those most like it; a file with a fault; two tasks of one name.
pub fn find(names: &[String]) -> Result<Vec<Task>> {
    let own = own()?;
    let mut tasks: Vec<Task> = Vec::new();
    for argument in names {
        for task in named(argument, &own)? {
            match tasks.iter().find(|other| other.name == task.name) {
                None => tasks.push(task),
                Some(other) if file_of(&other.argument) == file_of(&task.argument) => {}
                Some(other) => {
                    return Err(anyhow!(
                        "expected one task `{}`, got that of `{}` and that of `{}`",
                        task.name,
                        other.argument,
                        task.argument
                    ))
                    .usage("give one of them another name: the field `task` of its file");
                }
            }
        }
    }
    Ok(tasks)
}

/// The tasks of this crate.
fn own() -> Result<Vec<TaskFile>> {
    OWN.iter().map(|text| parse(text)).collect()
}

/// The subjects of a task of this crate; of another, none.
///
/// # Errors
/// None are.
pub fn subjects(name: &str) -> Result<Vec<String>> {
    let file = own()?.into_iter().find(|file| file.task == name);
    Ok(file.map_or_else(Vec::new, |file| file.subjects))
}

/// Whether an argument names a task by its file.
pub fn is_file(argument: &str) -> bool {
    argument.ends_with(".yaml") || argument.ends_with(".yml")
}

/// The file that an argument names, however it is written; `None` of other arguments.
fn file_of(argument: &str) -> Option<PathBuf> {
    is_file(argument)
        .then(|| Path::new(argument).canonicalize().unwrap_or_else(|_| argument.into()))
}

/// What one argument names.
fn named(argument: &str, own: &[TaskFile]) -> Result<Vec<Task>> {
    if is_file(argument) {
        let in_file = || format!("in the task `{argument}`");
        let tasks = read(Path::new(argument))?.into_tasks(argument).with_context(in_file);
        return tasks.hint(DESCRIBED);
    }
    let names = match argument {
        "commonsense" => COMMONSENSE.to_vec(),
        one => vec![one],
    };
    let mut tasks = Vec::new();
    for name in names {
        let subject = |file: &TaskFile| {
            let rest = name.strip_prefix(&file.task)?.strip_prefix('_')?;
            file.subjects.contains(&rest.to_owned()).then(|| rest.to_owned())
        };
        if let Some(file) = own.iter().find(|file| file.task == name) {
            tasks.extend(file.clone().into_tasks(argument)?);
        } else if let Some((file, subject)) = own.iter().find_map(|f| Some((f, subject(f)?))) {
            tasks.push(Task::new(file.clone(), Some(subject), argument)?);
        } else {
            return unknown(name, own);
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
    let file: TaskFile = serde_saphyr::from_str(text).hint(DESCRIBED)?;
    let form = file.form()?;
    if file.metrics.is_empty() {
        bail_hint!("say `metrics: [acc]`"; "`metrics`: needs at least one");
    }
    if let Some(metric) = file.metrics.iter().find(|metric| !form.metrics().contains(metric)) {
        let names: Vec<&str> = form.metrics().iter().map(|metric| metric.name()).collect();
        bail_hint!(
            DESCRIBED;
            "`metrics`: expected of `{}`, got `{}`", names.join("`, `"), metric.name()
        );
    }
    if file.metrics.contains(&Metric::PassAt1) != file.runs_programs() {
        bail_hint!(DESCRIBED; "`program` and the metric `pass@1` go together");
    }
    if file.data.validation.is_none() && file.data.test.is_none() {
        bail_hint!("say `validation: validation`"; "`data`: needs `test` or `validation`, which is judged");
    }
    Ok(file)
}

impl TaskFile {
    /// Names of its filters; of none, `none`.
    pub fn filter_names(&self) -> Vec<&str> {
        match self.filters.is_empty() {
            true => vec!["none"],
            false => self.filters.iter().map(|filter| filter.name.as_str()).collect(),
        }
    }

    /// Whether it runs programs that the model writes.
    pub fn runs_programs(&self) -> bool {
        !self.program.is_empty()
    }

    /// Which of the four kinds it is.
    ///
    /// # Errors
    /// Fields of several kinds, or not all of one.
    pub fn form(&self) -> Result<Form> {
        let fields = [
            ("query", !self.query.is_empty()),
            ("choices", !self.choices.is_empty()),
            ("queries", !self.queries.is_empty()),
            ("continuation", !self.continuation.is_empty()),
            ("target", !self.target.is_empty()),
            ("answers", !self.answers.is_empty()),
            ("generate", self.generate.is_some()),
            ("text", !self.text.is_empty()),
        ];
        let given = fields.iter().filter(|(_, given)| *given).map(|(name, _)| *name);
        match given.collect::<Vec<_>>().as_slice() {
            ["query", "choices", "target"] => Ok(Form::Choices),
            ["queries", "continuation", "target"] => Ok(Form::Queries),
            ["query", "answers", "generate"] => Ok(Form::Written),
            ["text"] => Ok(Form::Text),
            got => bail_hint!(
                DESCRIBED;
                "expected `query`, `choices` and `target`; or `queries`, `continuation` and `target`; or `query`, `answers` and \
                 `generate`; or `text`; got `{}`", got.join("`, `")
            ),
        }
    }

    /// The task, or one for each subject, that an argument named.
    fn into_tasks(self, argument: &str) -> Result<Vec<Task>> {
        if self.subjects.is_empty() {
            return Ok(vec![Task::new(self, None, argument)?]);
        }
        let task = |subject: &String| Task::new(self.clone(), Some(subject.clone()), argument);
        self.subjects.iter().map(task).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error;
    use crate::eval::question::Group;

    fn tasks(names: &[&str]) -> Result<Vec<Task>> {
        find(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_task_that_is_named_twice_is_there_once() {
        let names = ["hellaswag", "commonsense", "mmlu_anatomy", "mmlu", "mmlu_anatomy"];
        let found = tasks(&names).unwrap();
        assert_eq!(found.len(), 7 + 57);
        let of = |name: &str| found.iter().find(|task| task.name == name).unwrap();
        let arguments = ["hellaswag", "piqa", "mmlu_anatomy", "mmlu_virology"]
            .map(|name| of(name).argument.as_str());
        assert_eq!(arguments, ["hellaswag", "commonsense", "mmlu_anatomy", "mmlu"]);
        for name in ["mmlu_anatomy", "mmlu_virology"] {
            assert_eq!(of(name).group, Some(Group { name: "mmlu".into(), size: 57 }));
        }
        assert_eq!((of("piqa").group.as_ref(), subjects("mine").unwrap().len()), (None, 0));
    }

    #[test]
    fn of_two_files_with_a_task_of_one_name_both_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, more: &str| {
            let text = format!("task: mine\ndata: {{ folder: mine, test: test }}\n{more}");
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name).display().to_string()
        };
        let yaml = "query: q\nchoices: a\ntarget: b\nmetrics: [acc]\n";
        let (a, b) = (file("a.yaml", yaml), file("b.yml", yaml));
        let again = dir.path().join(".").join("a.yaml").display().to_string();
        assert_eq!(tasks(&[&a, &again]).unwrap().len(), 1);
        let error = tasks(&[&a, &b]).err().unwrap();
        assert!(error.to_string().contains("one task `mine`, got that of"), "{error}");
        assert!(error.to_string().contains("b.yml"), "{error}");
        assert_eq!(error::exit_code(&error), 2);
        let twice = file("c.yaml", &format!("{yaml}subjects: [x, y, x]\n"));
        let found = tasks(&[&twice]).unwrap();
        let sizes = found.iter().map(|task| task.group.as_ref().map(|group| group.size));
        assert_eq!(sizes.collect::<Vec<_>>(), [Some(2), Some(2)]);
    }
}
