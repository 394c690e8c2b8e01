//! The report as Markdown.

use super::notes;
use super::{Basis, Column, Form, Report, Row, Score, Series, Source};
use crate::eval::published::{self, Published};
use crate::train::progress::count;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Columns before the average.
const HEAD: [&str; 3] = ["model", "step", "tokens"];

/// Title, picture, table, how it was made, notes.
pub fn page(report: &Report, picture: &str) -> String {
    let mut out = format!("# Scores over tokens\n\n![{}]({picture})\n\n", report.basis().name());
    out += &table(report);
    out += "\nPer cent, with one standard error where it is known.";
    if published::ROWS.iter().any(|row| compares(report, row)) {
        out += &format!(" {}", notes::source());
    }
    out += "\n\n## How it was made\n\n";
    let dirs: Vec<String> =
        report.dirs.iter().map(|dir| quoted(&dir.display().to_string())).collect();
    let _ = writeln!(out, "```bash\ntinyllama report {}", dirs.join(" "));
    for series in &report.series {
        out += &commands(series);
    }
    out += "```\n\n";
    out += &made(report);
    let all = report.notes.iter().cloned();
    let all = all.chain(report.warnings.iter().map(|bad| format!("{bad}; left out.")));
    for (i, note) in all.enumerate() {
        out += if i == 0 { "\n## Notes\n\n" } else { "" };
        let _ = writeln!(out, "- {}", plain(&note));
    }
    out
}

/// A row a checkpoint, then the published ones that have something to compare.
pub fn table(report: &Report) -> String {
    let (columns, basis) = (report.columns(), report.basis());
    // The average of one task would be its column again.
    let averaged = basis.columns.len() > 1;
    let mut head: Vec<String> = HEAD.map(str::to_owned).to_vec();
    head.extend(averaged.then(|| basis.name()));
    head.extend(columns.iter().map(Column::to_string));
    let mut out = line(&head);
    let rule = (0..head.len()).map(|i| if i == 0 { "---".into() } else { "---:".into() });
    out += &line(&rule.collect::<Vec<String>>());
    for (series, row) in report.rows() {
        out += &line(&cells(series, row, &columns, averaged.then_some(&basis)));
    }
    for row in published::ROWS {
        let average = basis.published(&row).filter(|_| averaged);
        let scores: Vec<Option<f64>> = columns.iter().map(|c| c.published(&row)).collect();
        if compares(report, &row) {
            let mut cells = vec![format!("{}, published", row.name), String::new()];
            cells.push(row.tokens.map_or_else(String::new, count));
            cells.extend(averaged.then(|| share(average, None)));
            cells.extend(scores.into_iter().map(|score| share(score, None)));
            out += &line(&cells);
        }
    }
    out
}

/// Whether a published row has anything that the report has.
fn compares(report: &Report, row: &Published) -> bool {
    report.basis().published(row).is_some()
        || report.columns().iter().any(|column| column.published(row).is_some())
}

fn cells(series: &Series, row: &Row, columns: &[Column], basis: Option<&Basis>) -> Vec<String> {
    let mut cells = vec![series.row_label(row)];
    cells.push(row.step.map_or_else(String::new, |step| step.to_string()));
    cells.push(row.tokens.map_or("?".into(), |n| count(n as f64)));
    if let Some(basis) = basis {
        let average = basis.of(row);
        cells.push(share(average.map(|a| a.0), average.and_then(|a| a.1)));
    }
    let of = |column: &Column| {
        let score = row.scores.get(column);
        share(score.map(|s| s.mean), score.and_then(|s| s.stderr))
    };
    cells.extend(columns.iter().map(of));
    cells
}

/// `59.20 ± 0.49`, nothing where there is none.
fn share(mean: Option<f64>, stderr: Option<f64>) -> String {
    let error = stderr.map_or_else(String::new, |error| format!(" ± {error:.2}"));
    mean.map_or_else(String::new, |mean| format!("{mean:.2}{error}"))
}

fn line(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| plain(cell).replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Text that stays on its line and makes no tags.
fn plain(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.replace('<', "\\<")
}

/// A path as a shell takes it.
fn quoted(path: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    match !path.is_empty() && path.chars().all(is_plain) {
        true => path.to_owned(),
        false => format!("'{}'", plain(path).replace('\'', "'\\''")),
    }
}

/// The command that makes the first row, and how many are like it.
fn commands(series: &Series) -> String {
    let Some(row) = series.rows.first() else { return String::new() };
    let rest = match series.rows.len() {
        1 => String::new(),
        n => format!("   # and {} more", n - 1),
    };
    let Source::Evaluation(limit) = series.source else {
        let run = plain(&row.checkpoint);
        return format!("# `{}`: scores in {run}/metrics.jsonl{rest}\n", plain(&series.label()));
    };
    let mut out = String::new();
    let shots: BTreeSet<u64> = row.scores.keys().map(|column| column.shots).collect();
    for shots in shots {
        let of_these = row.scores.iter().filter(|(column, _)| column.shots == shots);
        let mut tasks: Vec<&str> = Vec::new();
        for (column, score) in of_these {
            let task = score.file.as_deref().unwrap_or(&column.task);
            if !tasks.contains(&task) {
                tasks.push(task);
            }
        }
        let tasks = if tasks == published::TASKS { "commonsense".into() } else { tasks.join(",") };
        let _ = write!(
            out,
            "tinyllama evaluate --checkpoint {} --tasks {} --num-fewshot {shots}",
            quoted(&row.checkpoint),
            quoted(&tasks)
        );
        let Form { precision, quantize, kv_cache_dtype } = &series.form;
        for (name, value) in
            [("precision", precision), ("quantize", quantize), ("kv-cache-dtype", kv_cache_dtype)]
        {
            if let Some(value) = value {
                out += &format!(" --{name} {}", quoted(value));
            }
        }
        out += &limit.map_or_else(String::new, |n| format!(" --limit {n}"));
        out += &format!("{rest}\n");
    }
    out
}

/// Metric, examples and samples of each task.
fn made(report: &Report) -> String {
    let mut out = line(&["task", "score", "examples", "samples", "chance"].map(str::to_owned));
    out += &line(&["---", "---", "---:", "---:", "---:"].map(str::to_owned));
    for column in report.columns() {
        let scores: Vec<&Score> =
            report.rows().filter_map(|(_, row)| row.scores.get(&column)).collect();
        let metrics: BTreeSet<&str> = scores.iter().map(|score| score.metric.as_str()).collect();
        let samples: BTreeSet<u64> = scores.iter().filter_map(|score| score.samples).collect();
        let samples: Vec<String> = samples.iter().map(u64::to_string).collect();
        out += &line(&[
            column.task.clone(),
            metrics.into_iter().collect::<Vec<_>>().join(", "),
            column.shots.to_string(),
            if samples.is_empty() { "?".into() } else { samples.join(", ") },
            share(column.chance(), None),
        ]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_checkpoint_and_the_published_rows_that_compare() {
        let score =
            |mean| Score { metric: "acc".into(), mean, stderr: None, samples: Some(9), file: None };
        let hellaswag = Score { stderr: Some(0.4949), ..score(59.204) };
        let scores = [
            (Column::new("hellaswag", 0, false), hellaswag),
            (Column::new("mine|<b>", 5, false), score(1.0)),
        ];
        let row = Row {
            checkpoint: "out/my run/final".into(),
            step: Some(1430512),
            tokens: Some(2_999_999_954_944),
            scores: scores.into(),
        };
        let bare = Row { checkpoint: "hf/pythia".into(), tokens: None, step: None, ..row.clone() };
        let series = Series {
            run: "mine".into(),
            source: Source::Evaluation(Some(9)),
            form: Form::default(),
            rows: vec![row, bare],
        };
        let mut report = Report { series: vec![series], ..Default::default() };
        let want = "\
| model | step | tokens | average of 2 tasks | hellaswag | mine\\|\\<b>, 5-shot |
| --- | ---: | ---: | ---: | ---: | ---: |
| mine, first 9 samples | 1430512 | 3.00T | 30.10 | 59.20 ± 0.49 | 1.00 |
| mine, first 9 samples: pythia |  | ? | 30.10 | 59.20 ± 0.49 | 1.00 |
| TinyLlama-1.1B, published |  | 3.00T |  | 59.20 |  |
";
        assert_eq!(table(&report), want);
        report.notes = notes::of(&report);
        let page = page(&report, "report.png");
        for said in [
            "--checkpoint 'out/my run/final' --tasks hellaswag --num-fewshot 0 --limit 9   # and 1 more",
            "| hellaswag | acc | 0 | 9 | 25.00 |",
            "- Tokens of `mine, first 9 samples: pythia` are not known",
            "only the first 9 samples of larger sets",
        ] {
            assert!(page.contains(said), "{said}: {page}");
        }
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn a_command_names_the_form_of_the_model_and_files_of_tasks() {
        let score = |file: Option<&str>| Score {
            metric: "acc".into(),
            file: file.map(str::to_owned),
            ..Default::default()
        };
        let of = |tasks: &[(&str, Option<&str>)]| {
            let of = tasks.iter();
            of.map(|(task, file)| (Column::new(task, 0, false), score(*file))).collect()
        };
        let mine = Some("my tasks/own.yaml");
        let scores = of(&[("piqa", None), ("own_a", mine), ("mmlu", None), ("own_b", mine)]);
        let row = Row { checkpoint: "out/mine/final".into(), scores, ..Default::default() };
        let (quantize, kv_cache_dtype) = (Some("int4:64".to_owned()), Some("int8".to_owned()));
        let mut series = Series {
            run: "mine".into(),
            source: Source::Evaluation(None),
            form: Form { precision: None, quantize, kv_cache_dtype },
            rows: vec![row],
        };
        assert_eq!(
            commands(&series),
            "tinyllama evaluate --checkpoint out/mine/final --tasks 'piqa,mmlu,my tasks/own.yaml' \
             --num-fewshot 0 --quantize int4:64 --kv-cache-dtype int8\n"
        );
        series.form = Form { precision: Some("32-true".into()), ..Default::default() };
        series.rows[0].scores = of(&published::TASKS.map(|task| (task, None)));
        assert_eq!(
            commands(&series),
            "tinyllama evaluate --checkpoint out/mine/final --tasks commonsense --num-fewshot 0 \
             --precision 32-true\n"
        );
    }
}
