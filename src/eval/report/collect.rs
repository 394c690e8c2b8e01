//! Finds the files below folders and sorts what they say into series.

use super::{Column, Form, Report, Row, Series, Source, notes, read};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Reads every `results.json` and `metrics.jsonl` below the folders. Symbolic links are not followed;
/// a file that is below two of them counts for the first.
///
/// # Errors
/// A folder that is none; no scores anywhere. A bad file is left out and is in `warnings`.
pub fn collect(dirs: &[PathBuf]) -> Result<Report> {
    let mut report = Report { dirs: dirs.to_vec(), ..Default::default() };
    let (mut seen, mut files) = (BTreeSet::new(), 0);
    for (dir, label) in dirs.iter().zip(labels(dirs)) {
        require_folder(dir)?;
        let mut found = Found::default();
        for path in walk(dir, &mut report.warnings) {
            if seen.insert(canonical(&path)) {
                files += 1;
                found.read(&path, &mut report.warnings);
            }
        }
        report.series.extend(found.series(&label, &mut report.notes));
    }
    if report.series.is_empty() {
        return Err(nothing(dirs, files, &report.warnings)).usage(format!(
            "evaluate a checkpoint: `tinyllama evaluate --checkpoint {0} --tasks commonsense --out {0}/evaluate`",
            dirs[0].display()
        ));
    }
    let all = notes::of(&report);
    report.notes.extend(all);
    Ok(report)
}

fn require_folder(dir: &Path) -> Result<()> {
    let problem = match fs::metadata(dir) {
        Ok(about) if about.is_dir() => return Ok(()),
        Ok(_) => "is a file, expected a folder".into(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => "does not exist".into(),
        Err(e) => format!("cannot be read: {e}"),
    };
    Err(anyhow!("`{}` {problem}", dir.display()))
        .usage("name the `out_dir` of a run, or the folder that `evaluate --out` wrote")
}

/// What was looked for, and what there was.
fn nothing(dirs: &[PathBuf], files: usize, warnings: &[String]) -> anyhow::Error {
    let dirs: Vec<String> = dirs.iter().map(|dir| format!("`{}`", dir.display())).collect();
    let mut told = format!(
        "no scores below {}: expected a `results.json` of `evaluate` or a `metrics.jsonl` with scores of tasks, got ",
        dirs.join(", ")
    );
    told += &match files {
        0 => "no file of these names".to_owned(),
        n => format!("{n} file(s) of these names without any"),
    };
    if let Some(first) = warnings.first() {
        told += &format!(" ({first}{})", if warnings.len() > 1 { "; .." } else { "" });
    }
    anyhow!(told)
}

/// The folders' names; paths where names are alike.
fn labels(dirs: &[PathBuf]) -> Vec<String> {
    let name = |dir: &PathBuf| canonical(dir).file_name().map(|n| n.to_string_lossy().into_owned());
    let names: Vec<String> =
        dirs.iter().map(|dir| name(dir).unwrap_or_else(|| dir.display().to_string())).collect();
    let alone = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
    let or_path = |(dir, name): (&PathBuf, &String)| match alone(name) {
        true => name.clone(),
        false => dir.display().to_string(),
    };
    dirs.iter().zip(&names).map(or_path).collect()
}

/// The path without links and `..`, if it leads somewhere.
fn canonical(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// All files of the two names, by path.
fn walk(dir: &Path, warnings: &mut Vec<String>) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![dir.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) => {
                warnings.push(format!("`{}`: cannot be read: {e}", folder.display()));
                continue;
            }
        };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file()
                && (entry.file_name() == "results.json" || entry.file_name() == "metrics.jsonl")
            {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    files
}

/// What one folder has.
#[derive(Default)]
struct Found {
    /// With the file and when it was written.
    evaluations: Vec<(SystemTime, PathBuf, read::Results)>,
    /// By the run's folder.
    runs: Vec<(PathBuf, Vec<Row>)>,
}

impl Found {
    fn read(&mut self, path: &Path, warnings: &mut Vec<String>) {
        let read = match path.file_name().is_some_and(|name| name == "metrics.jsonl") {
            true => read::metrics(path).context("cannot be read").map(|rows| {
                let run = path.parent().unwrap_or(path);
                if !rows.is_empty() {
                    self.runs.push((run.to_owned(), rows));
                }
            }),
            false => read::results(path).map(|results| {
                let modified = fs::metadata(path).and_then(|about| about.modified());
                let modified = modified.unwrap_or(SystemTime::UNIX_EPOCH);
                self.evaluations.push((modified, path.to_owned(), results));
            }),
        };
        if let Err(e) = read {
            warnings.push(format!("`{}`: {e:#}", path.display()));
        }
    }

    /// The run's folder here, where its checkpoints were evaluated in another place.
    fn at_hand(&self, run: PathBuf) -> PathBuf {
        let same = |here: &&PathBuf| !run.exists() && here.file_name() == run.file_name();
        self.runs
            .iter()
            .map(|(here, _)| here)
            .find(same)
            .map_or(run.clone(), |here| canonical(here))
    }

    /// A series for each run and way of evaluation.
    fn series(mut self, label: &str, notes: &mut Vec<String>) -> Vec<Series> {
        self.evaluations.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        let mut all: BTreeMap<Way, Vec<Row>> = BTreeMap::new();
        let mut groups: BTreeMap<Way, Vec<Origin>> = BTreeMap::new();
        for (_, path, results) in std::mem::take(&mut self.evaluations) {
            let run = run_of(&results.row).map(|run| self.at_hand(run));
            let key = (run, Source::Evaluation(results.first), results.form);
            groups.entry(key).or_default().push((path, results.row));
        }
        for (key, files) in groups {
            all.insert(key, merged(files, notes));
        }
        for (run, mut rows) in self.runs {
            let samples = rows.iter().flat_map(|row| row.scores.values().map(|s| s.samples)).max();
            rows.iter_mut().for_each(|row| row.checkpoint = run.display().to_string());
            let source = Source::InTraining(samples.flatten());
            all.insert((Some(canonical(&run)), source, Form::default()), rows);
        }
        let runs: BTreeSet<PathBuf> = all.keys().filter_map(|(run, ..)| run.clone()).collect();
        let named = |run: Option<PathBuf>| match run {
            Some(run) if runs.len() > 1 => below(label, &run, &runs),
            _ => label.to_owned(),
        };
        let series = all.into_iter().map(|((run, source, form), mut rows)| {
            rows.sort_by_key(|row| (row.tokens.is_none(), row.tokens, row.step));
            Series { run: named(run), source, form, rows }
        });
        let mut series: Vec<Series> = series.collect();
        series.sort_by(|a, b| (&a.run, a.source, &a.form).cmp(&(&b.run, b.source, &b.form)));
        series
    }
}

/// A run, and how and in what form its checkpoints were evaluated.
type Way = (Option<PathBuf>, Source, Form);

/// A file and what it says.
type Origin = (PathBuf, Row);

/// The run of a checkpoint: the folder of `step-00001000` and `final`, else the checkpoint itself.
/// `None`: some model, of which nothing is known.
fn run_of(row: &Row) -> Option<PathBuf> {
    let path = canonical(Path::new(&row.checkpoint));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match path.parent() {
        Some(run) if name == "final" || name.starts_with("step-") => Some(run.to_owned()),
        _ => row.tokens.map(|_| path),
    }
}

/// The name of one of several runs below a folder; its path where names are alike.
fn below(label: &str, run: &Path, runs: &BTreeSet<PathBuf>) -> String {
    let name = |run: &Path| run.file_name().map(|name| name.to_string_lossy().into_owned());
    let alone = runs.iter().filter(|other| name(other) == name(run)).count() == 1;
    match name(run).filter(|_| alone) {
        Some(name) if name == label => name,
        Some(name) => format!("{label}/{name}"),
        None => run.display().to_string(),
    }
}

/// One row a checkpoint, of files from old to new: of scores that two files have the newer counts.
fn merged(files: Vec<Origin>, notes: &mut Vec<String>) -> Vec<Row> {
    type Key = (PathBuf, Option<u64>, Option<u64>);
    let mut rows: BTreeMap<Key, (Row, BTreeMap<Column, PathBuf>)> = BTreeMap::new();
    for (file, row) in files {
        let key = (canonical(Path::new(&row.checkpoint)), row.tokens, row.step);
        let (kept, origins) = rows.entry(key).or_default();
        let mut replaced: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
        for (column, score) in row.scores {
            if let Some(old) = origins.insert(column.clone(), file.clone()) {
                replaced.entry(old).or_default().push(format!("`{column}`"));
            }
            kept.scores.insert(column, score);
        }
        for (old, columns) in replaced {
            notes.push(format!(
                "{} of `{}`: in `{}` and in `{}`, which is newer and counts.",
                columns.join(", "),
                row.checkpoint,
                old.display(),
                file.display()
            ));
        }
        (kept.checkpoint, kept.tokens, kept.step) = (row.checkpoint, row.tokens, row.step);
    }
    rows.into_values().map(|(row, _)| row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error;
    use serde_json::json;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
            fs::write(self.path(name), text).unwrap();
        }

        fn results(&self, file: &str, checkpoint: &str, tokens: Option<u64>, task: &str, acc: f64) {
            let json = json!({
                "results": {task: {"acc,none": acc}},
                "config": {"model_args": checkpoint, "tokens": tokens, "step": tokens.map(|n| n / 10)},
            });
            self.write(file, &json.to_string());
        }

        fn collect(&self, names: &[&str]) -> Result<Report> {
            collect(&names.iter().map(|name| self.path(name)).collect::<Vec<_>>())
        }
    }

    fn told(report: &Report) -> Vec<String> {
        let row = |(series, row): (&Series, &Row)| {
            let scores: Vec<String> =
                row.scores.iter().map(|(c, s)| format!("{c} {}", s.mean)).collect();
            format!("{} | {:?} | {}", series.row_label(row), row.tokens, scores.join(", "))
        };
        report.rows().map(row).collect()
    }

    #[test]
    fn checkpoints_of_a_run_are_one_series_and_tasks_of_several_files_one_row() {
        let dir = Folder::new();
        dir.results("mine/b/results.json", "gone/mine/step-00000002", Some(20), "piqa", 0.5);
        dir.results("mine/a/results.json", "gone/mine/final", Some(30), "piqa", 0.75);
        dir.results("mine/c/results.json", "gone/mine/step-00000002", Some(20), "boolq", 0.25);
        dir.results("mine/d/results.json", "gone/pythia", None, "piqa", 0.625);
        let line = r#"{"step": 1, "tokens": 10, "task": "piqa", "samples": 8, "acc": 0.125}"#;
        dir.write("mine/metrics.jsonl", &format!("{line}\n{{\"step\""));
        let report = dir.collect(&["mine"]).unwrap();
        // The checkpoints were evaluated elsewhere; the run's folder has the name that theirs had.
        assert_eq!(
            told(&report),
            [
                "mine: pythia | None | piqa 62.5",
                "mine | Some(20) | boolq 25, piqa 50",
                "mine | Some(30) | piqa 75",
                "mine, in training, 8 samples | Some(10) | piqa 12.5",
            ]
        );
        dir.results("mine/e/results.json", "gone/yours/final", Some(30), "piqa", 0.75);
        let told = told(&dir.collect(&["mine"]).unwrap());
        assert_eq!(told[4], "mine/yours | Some(30) | piqa 75");
    }

    #[test]
    fn forms_of_one_checkpoint_are_rows_of_their_own() {
        let dir = Folder::new();
        dir.results("a/old/results.json", "m/final", Some(20), "piqa", 0.25);
        for (i, (precision, quantize, cache)) in [
            (Some("bf16-true"), None, "auto"),
            (None, Some("int4:64"), "auto"),
            (None, Some("int8:32"), "auto"),
            (None, Some("int8:32"), "int8"),
        ]
        .into_iter()
        .enumerate()
        {
            let config = json!({
                "model_args": "m/final", "tokens": 20, "step": 2,
                "precision": precision, "quantize": quantize, "kv_cache_dtype": cache,
            });
            let results = json!({"piqa": {"acc,none": (i + 2) as f64 / 8.0}});
            let json = json!({"results": results, "config": config});
            dir.write(&format!("a/{i}/results.json"), &json.to_string());
        }
        let report = dir.collect(&["a"]).unwrap();
        assert_eq!(
            told(&report),
            [
                "a | Some(20) | piqa 25",
                "a, int4:64 | Some(20) | piqa 37.5",
                "a, int8:32 | Some(20) | piqa 50",
                "a, int8:32, int8 cache | Some(20) | piqa 62.5",
                "a, bf16-true | Some(20) | piqa 25",
            ]
        );
        let colours: BTreeSet<String> = report.series.iter().map(Series::coloured).collect();
        assert_eq!(Vec::from_iter(colours), ["a", "a, int4:64", "a, int8:32"]);
        assert!(report.notes.iter().all(|note| !note.contains("newer")), "{:?}", report.notes);
    }

    #[test]
    fn of_two_files_with_a_score_the_newer_counts_and_a_note_says_so() {
        let dir = Folder::new();
        dir.results("z/old/results.json", "m/final", Some(20), "piqa", 0.5);
        std::thread::sleep(std::time::Duration::from_millis(20));
        dir.results("z/new/results.json", "m/final", Some(20), "piqa", 0.75);
        let report = dir.collect(&["z", "z/new"]).unwrap();
        assert_eq!(told(&report), ["z | Some(20) | piqa 75"]);
        let note = &report.notes[0];
        assert!(
            note.contains("`piqa` of `m/final`")
                && note.contains("new/results.json`, which is newer"),
            "{note}"
        );
    }

    #[test]
    fn a_bad_file_is_left_out_and_named() {
        let dir = Folder::new();
        dir.results("a/results.json", "m/final", Some(20), "piqa", 0.5);
        dir.write("a/other/results.json", "{\"tests\": 3}");
        let report = dir.collect(&["a"]).unwrap();
        assert_eq!((report.series.len(), report.warnings.len()), (1, 1));
        assert!(report.warnings[0].contains("other/results.json`: field `results`"));
        fs::remove_file(dir.path("a/results.json")).unwrap();
        let error = format!("{:#}", dir.collect(&["a"]).unwrap_err());
        assert!(error.contains("1 file(s)") && error.contains("other/results.json"), "{error}");
    }

    #[test]
    fn folders_that_have_nothing_or_are_none_are_usage_errors_with_a_next_action() {
        let dir = Folder::new();
        dir.write("file", "");
        dir.write("run/metrics.jsonl", "{\"step\": 1, \"loss\": 2.0}\n");
        fs::create_dir(dir.path("empty")).unwrap();
        for (name, said) in [
            ("absent", "absent` does not exist"),
            ("file", "is a file, expected a folder"),
            ("empty", "got no file of these names"),
            ("run", "got 1 file(s) of these names without any"),
        ] {
            let error = dir.collect(&[name]).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
            assert_eq!(error::exit_code(&error), 2);
            assert!(error::hint(&error).is_some());
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed() {
        let dir = Folder::new();
        dir.results("a/results.json", "m/final", Some(20), "piqa", 0.5);
        fs::create_dir(dir.path("b")).unwrap();
        std::os::unix::fs::symlink(dir.path("a"), dir.path("b/loop")).unwrap();
        assert!(dir.collect(&["b"]).is_err());
    }
}
