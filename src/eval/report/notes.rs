//! What a reader must know before comparing rows.

use super::{Report, Series, Source, tokens};
use crate::eval::published;
use std::collections::{BTreeMap, BTreeSet};

/// One sentence each.
pub fn of(report: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    for series in &report.series {
        notes.extend(of_samples(series));
    }
    notes.extend(of_average(report));
    notes.extend(of_shots(report));
    notes.extend(of_sets(report));
    let unknown = report.rows().filter(|(_, row)| row.tokens.is_none());
    let unknown: Vec<String> =
        unknown.map(|(series, row)| format!("`{}`", series.row_label(row))).collect();
    if !unknown.is_empty() {
        let names = unique(unknown).join(", ");
        notes.push(format!(
            "Tokens of {names} are not known: `?` here, a level line in the picture."
        ));
    }
    notes
}

/// Parts of sets.
fn of_samples(series: &Series) -> Option<String> {
    let label = series.label();
    match series.source {
        Source::Evaluation(None) => None,
        Source::Evaluation(Some(n)) => Some(format!(
            "`{label}`: only the first {n} samples of larger sets, so not comparable with whole sets, nor with the published rows."
        )),
        Source::InTraining(_) => Some(format!(
            "`{label}`: of parts of the sets where those are larger, so not comparable with whole sets, nor with the published rows."
        )),
    }
}

/// What the average is of, and who has none.
fn of_average(report: &Report) -> Vec<String> {
    let basis = report.basis();
    let mut notes = Vec::new();
    if basis.is_published() {
        notes.push("The average is that of the published table: acc_norm of HellaSwag, OpenBookQA, ARC and PIQA, acc of WinoGrande and BoolQ.".into());
    } else if basis.columns.len() > 1 {
        let names: Vec<String> = basis.columns.iter().map(|c| format!("`{c}`")).collect();
        let beside = match published::ROWS.iter().any(|row| basis.published(row).is_some()) {
            true => "published rows have it where their tasks are known one by one",
            false => "the published ones have others",
        };
        notes.push(format!("The average is of {}; {beside}.", names.join(", ")));
    }
    let without = report.rows().filter(|(_, row)| basis.of(row).is_none());
    let without: Vec<String> =
        without.map(|(series, row)| format!("`{}`", series.row_label(row))).collect();
    if !without.is_empty() && !basis.columns.is_empty() {
        notes.push(format!(
            "{}: rows without some of the averaged tasks have no average.",
            unique(without).join(", ")
        ));
    }
    notes
}

/// Examples where the published have none.
fn of_shots(report: &Report) -> Option<String> {
    let columns = report.columns();
    let other =
        columns.iter().filter(|c| c.shots > 0 && published::TASKS.contains(&c.task.as_str()));
    let names: Vec<String> = other.map(|c| format!("`{c}`")).collect();
    (!names.is_empty())
        .then(|| format!("{}: with examples; the published rows are zero-shot.", names.join(", ")))
}

/// Tasks whose sets have different sizes in different files.
fn of_sets(report: &Report) -> Vec<String> {
    let mut sizes: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    let whole = report.series.iter().filter(|s| s.source == Source::Evaluation(None));
    for (column, score) in whole.flat_map(|s| &s.rows).flat_map(|row| &row.scores) {
        sizes.entry(column.to_string()).or_default().extend(score.samples);
    }
    let differ = sizes.into_iter().filter(|(_, sizes)| sizes.len() > 1);
    let note = |(name, sizes): (String, BTreeSet<u64>)| {
        let sizes: Vec<String> = sizes.iter().map(u64::to_string).collect();
        format!("`{name}`: sets of {} samples, so not all rows compare.", sizes.join(" and "))
    };
    differ.map(note).collect()
}

fn unique(mut names: Vec<String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// What stands beside the published numbers.
pub fn source() -> String {
    let known: Vec<String> = published::ROWS
        .iter()
        .filter(|row| row.tasks.is_some())
        .map(|row| format!("{} at {}", row.name, tokens(row.tokens)))
        .collect();
    format!(
        "Published rows: EVAL.md of TinyLlama, zero-shot, fp32, lm-evaluation-harness of 2023; known here task by task: {}.",
        known.join(", ")
    )
}
