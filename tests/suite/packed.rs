//! Packed files against golden bytes, and what must hold of the loader for any sizes.

use proptest::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tinyllama::config::{DataOrder, DataSource};
use tinyllama::data::packed::{Access, PackedError, PackedSet, PackedWriter};
use tinyllama::data::{DataLoader, LoaderOptions, ValidationSet};

const ANY_ID: usize = 1 << 41;

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/packed/packed.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn hex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn get<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

/// Writes documents into `dir`, in files of `chunk` tokens.
fn write(dir: &Path, documents: &[Vec<u32>], chunk: u64, vocab_size: usize) {
    fs::create_dir_all(dir).unwrap();
    let mut writer = PackedWriter::new(dir, "train", chunk, vocab_size);
    documents.iter().for_each(|d| writer.add(d).unwrap());
    writer.finish().unwrap();
}

fn written(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_writer_makes_the_golden_bytes_and_a_short_last_file_has_its_true_length() {
    for case in golden()["ours"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let (chunk, vocab) = (get(&case["chunk"]), get(&case["vocab_size"]));
        write(dir.path(), &get::<Vec<Vec<u32>>>(&case["documents"]), chunk, vocab);
        let files = written(dir.path());
        let want: Vec<Vec<u8>> = case["files"].as_array().unwrap().iter().map(hex).collect();
        assert_eq!(files.iter().map(|f| fs::read(f).unwrap()).collect::<Vec<_>>(), want);
        assert!(files[0].ends_with("train_0000000000.bin"), "{files:?}");
    }
}

#[test]
fn files_of_the_original_give_its_very_blocks() {
    for case in golden()["original"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        for (i, file) in case["files"].as_array().unwrap().iter().enumerate() {
            fs::write(dir.path().join(format!("train_slim_0_{i:010}.bin")), hex(file)).unwrap();
        }
        let set = PackedSet::open(&dir.path().join("train_slim")).unwrap();
        let block: u64 = get(&case["block"]);
        let ours: Vec<Vec<i64>> =
            (0..set.len() / block).map(|i| set.read(i * block, block, ANY_ID).unwrap()).collect();
        assert_eq!(ours, get::<Vec<Vec<i64>>>(&case["blocks"]));
    }
}

#[test]
fn every_integer_dtype_is_read() {
    for case in golden()["dtypes"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x.bin"), hex(&case["file"])).unwrap();
        let set = PackedSet::open(dir.path()).unwrap();
        let want: Vec<i64> = get(&case["tokens"]);
        assert_eq!(set.read(0, set.len(), ANY_ID).unwrap(), want);
    }
}

#[test]
fn every_fault_of_a_file_is_a_variant_with_expected_and_got() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.bin");
    let open = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        PackedSet::open(dir.path()).err().unwrap()
    };
    let good = hex(&golden()["ours"][0]["files"][0]);
    let with = |at: usize, byte: u8| [&good[..at], &[byte], &good[at + 1..]].concat();
    assert!(matches!(open(b"LITPKDS"), PackedError::Header { got: 7, .. }));
    assert!(matches!(open(&with(0, b'X')), PackedError::Magic { got, .. } if got == "XITPKDS"));
    assert!(matches!(open(&with(7, 3)), PackedError::Version { got: 3, .. }));
    assert!(matches!(open(&with(15, 7)), PackedError::Dtype { got: 7, .. }));
    let cut = open(&good[..good.len() - 1]);
    assert!(matches!(cut, PackedError::Size { tokens: 5, expected: 34, got: 33, .. }), "{cut:?}");
    assert!(cut.to_string().contains("truncated?"));
    let long = open(&[&good[..], &[0]].concat());
    assert!(long.to_string().ends_with("expected 34 bytes for 5 tokens, got 35"), "{long}");
    // A header that claims 2^64 - 1 tokens.
    let claims = [&good[..16], &[0xff; 8], &good[24..]].concat();
    assert!(matches!(open(&claims), PackedError::Size { expected: u64::MAX, .. }));

    fs::remove_file(&file).unwrap();
    assert!(matches!(PackedSet::open(dir.path()), Err(PackedError::NoFiles { .. })));
    std::os::unix::fs::symlink("/no/such/file", &file).unwrap();
    let error = PackedSet::open(dir.path()).err().unwrap();
    assert!(matches!(error, PackedError::Io { action: "open", .. }), "{error:?}");
}

#[test]
fn a_folder_of_both_splits_and_an_unfinished_one_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("a.unfinished"), &[vec![1; 9]], 4, 10);
    assert!(matches!(PackedSet::open(dir.path()), Err(PackedError::NoFiles { .. })));
    write(&dir.path().join("a"), &[vec![1; 9]], 4, 10);
    assert_eq!(PackedSet::open(dir.path()).unwrap().n_files(), 3);
    fs::copy(dir.path().join("a/train_0000000000.bin"), dir.path().join("a/validation_0.bin"))
        .unwrap();
    let error = PackedSet::open(dir.path()).err().unwrap();
    assert!(matches!(error, PackedError::MixedSplits { .. }), "{error:?}");
    assert_eq!(PackedSet::open(&dir.path().join("a/validation")).unwrap().len(), 4);
}

#[test]
fn the_writer_refuses_an_id_that_would_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = PackedWriter::new(dir.path(), "train", 8, 300);
    let error = writer.add(&[299, 300]).unwrap_err();
    assert!(matches!(error, PackedError::NewId { got: 300, vocab_size: 300, .. }), "{error:?}");
    writer.finish().unwrap();
    assert_eq!(written(dir.path()).len(), 0);
}

/// Sizes of a loader's world.
#[derive(Clone, Debug)]
struct Sizes {
    t: usize,
    micro_batch: usize,
    tokens: Vec<u32>,
    chunk: u64,
    seed: u64,
}

fn sizes() -> impl Strategy<Value = Sizes> {
    (1usize..9, 1usize..4, prop::collection::vec(10u32..120, 1..4), 9u64..40, any::<u64>())
        .prop_map(|(t, micro_batch, tokens, chunk, seed)| Sizes {
            t,
            micro_batch,
            tokens,
            chunk,
            seed,
        })
}

impl Sizes {
    /// Source i holds the distinct tokens 1000*i, 1000*i + 1, ...
    fn write(&self, dir: &Path) {
        for (i, &n) in self.tokens.iter().enumerate() {
            let first = 1000 * i as u32;
            let tokens: Vec<u32> = (first..first + n).collect();
            write(&dir.join(i.to_string()), &[tokens], self.chunk, 5000);
        }
    }

    fn loader(&self, dir: &Path, rank: usize, world: usize) -> DataLoader {
        DataLoader::train(self.options(dir, rank, world)).unwrap()
    }

    fn options(&self, dir: &Path, rank: usize, world: usize) -> LoaderOptions {
        let sources = (0..self.tokens.len())
            .map(|i| DataSource { path: dir.join(i.to_string()), weight: (1.0 + i as f64).into() });
        LoaderOptions {
            sources: sources.collect(),
            micro_batch_size: self.micro_batch,
            block_size: self.t,
            rank,
            world,
            seed: self.seed,
            vocab_size: 5000,
            prefetch: 2,
            order: DataOrder::Global,
            access: Access::Mapped,
            borders: None,
        }
    }

    fn blocks(&self) -> Vec<u64> {
        self.tokens.iter().map(|&n| n as u64 / (self.t as u64 + 1)).collect()
    }
}

/// First tokens of the rows of the next batch; every row must be a whole block with shifted targets.
fn rows(loader: &mut DataLoader) -> Vec<i64> {
    let batch = loader.next().unwrap();
    let (b, t) = batch.input.size2().unwrap();
    assert_eq!((batch.target.size2().unwrap(), batch.n_targets), ((b, t), b * t));
    assert!((&batch.input + 1).equal(&batch.target));
    let first = batch.input.select(1, 0).contiguous();
    let steps = tch::Tensor::arange(t, (tch::Kind::Int64, tch::Device::Cpu));
    assert!((first.unsqueeze(1) + steps).equal(&batch.input));
    Vec::try_from(first).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_documents_come_back_whole_from_any_chunks(
        documents in prop::collection::vec(prop::collection::vec(0u32..300, 0..40), 1..12),
        chunk in 1u64..50,
        wide in any::<bool>(),
        (a, b) in (0.0..1.0f64, 0.0..1.0f64),
    ) {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &documents, chunk, if wide { 100_000 } else { 300 });
        let all: Vec<i64> = documents.concat().iter().map(|&t| t.into()).collect();
        prop_assert_eq!(written(dir.path()).len(), all.len().div_ceil(chunk as usize));
        if !all.is_empty() {
            let set = PackedSet::open(dir.path()).unwrap();
            let at = |x: f64| (x * all.len() as f64) as usize;
            let (from, to) = (at(a.min(b)), at(a.max(b)));
            let read = set.read(from as u64, (to - from) as u64, 300).unwrap();
            prop_assert_eq!(read, all[from..to].to_vec());
        }
    }

    #[test]
    fn each_source_gives_every_block_once_an_epoch_for_any_sizes(sizes in sizes()) {
        let dir = tempfile::tempdir().unwrap();
        sizes.write(dir.path());
        let mut loader = sizes.loader(dir.path(), 0, 1);
        let mut seen: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        while loader.state().drawn.iter().zip(sizes.blocks()).any(|(&drawn, n)| drawn < 2 * n) {
            for first in rows(&mut loader) {
                seen.entry(first / 1000).or_default().push(first % 1000);
            }
        }
        for (i, n) in sizes.blocks().into_iter().enumerate() {
            let want: Vec<i64> = (0..n as i64).map(|b| b * (sizes.t as i64 + 1)).collect();
            for epoch in seen[&(i as i64)].chunks_exact(n as usize).take(2) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                prop_assert_eq!(&epoch, &want);
            }
        }
    }

    #[test]
    fn ranks_share_the_samples_of_one_rank_and_a_cursor_fits_every_world(
        sizes in sizes(),
        world in 1usize..5,
        steps in 1usize..12,
    ) {
        let dir = tempfile::tempdir().unwrap();
        sizes.write(dir.path());
        let mut one = sizes.loader(dir.path(), 0, 1);
        let mut ranks: Vec<_> = (0..world).map(|r| sizes.loader(dir.path(), r, world)).collect();
        for _ in 0..steps {
            // In global order: sample k is row k / world of rank k mod world.
            let of_ranks: Vec<Vec<i64>> = ranks.iter_mut().map(rows).collect();
            let interleaved = (0..sizes.micro_batch).flat_map(|i| of_ranks.iter().map(move |r| r[i]));
            let straight = (0..world).flat_map(|_| rows(&mut one));
            prop_assert_eq!(interleaved.collect::<Vec<_>>(), straight.collect::<Vec<_>>());
        }
        prop_assert!(ranks.iter().all(|r| r.state() == one.state()));
        let mut resumed = sizes.loader(dir.path(), 0, 1);
        resumed.restore(&ranks[0].state()).unwrap();
        prop_assert_eq!(resumed.state(), one.state());
        for _ in 0..3 {
            prop_assert_eq!(rows(&mut resumed), rows(&mut one));
        }
    }

    #[test]
    fn validation_scores_each_token_but_the_first_once(
        n in 2u32..200, t in 1usize..12, micro_batch in 1usize..5, chunk in 9u64..50,
    ) {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &[(0..n).collect()], chunk, 5000);
        let set = ValidationSet::open(dir.path(), t, micro_batch, 5000).unwrap();
        let (mut scored, mut n_targets) = (Vec::new(), 0);
        for batch in set.batches() {
            let batch = batch.unwrap();
            let is_scored = batch.target.ne(-100);
            let masked = |x: &tch::Tensor| Vec::<i64>::try_from(x.masked_select(&is_scored)).unwrap();
            let (input, target) = (masked(&batch.input), masked(&batch.target));
            prop_assert!(input.iter().zip(&target).all(|(i, t)| i + 1 == *t));
            prop_assert_eq!(batch.n_targets, target.len() as i64);
            n_targets += batch.n_targets;
            scored.extend(target);
        }
        prop_assert_eq!(n_targets as u64, set.n_targets());
        prop_assert_eq!(scored, (1..n as i64).collect::<Vec<_>>());
    }
}

#[test]
fn a_cursor_of_another_seed_length_or_corpus_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = Sizes { t: 7, micro_batch: 2, tokens: vec![100, 80], chunk: 30, seed: 1 };
    sizes.write(dir.path());
    let state = sizes.loader(dir.path(), 0, 1).state();
    for other in [
        Sizes { seed: 2, ..sizes.clone() },
        Sizes { t: 8, ..sizes.clone() },
        Sizes { tokens: vec![100], ..sizes.clone() },
    ] {
        let error = other.loader(dir.path(), 0, 1).restore(&state).unwrap_err().to_string();
        assert!(error.contains("data changed: expected [12, 10] blocks of 7"), "{error}");
    }
}

#[test]
fn a_file_that_is_cut_or_goes_away_under_a_running_job_is_an_error_that_names_it() {
    let cut = "expected 84 bytes as when it was opened, got 7; was it cut";
    for (access, removed, want) in [
        (Access::Mapped, false, cut),
        (Access::Opened, false, "cannot read `"),
        (Access::Mapped, true, "cannot read `"),
        (Access::Opened, true, "cannot open `"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let sizes = Sizes { t: 7, micro_batch: 2, tokens: vec![100], chunk: 30, seed: 1 };
        sizes.write(dir.path());
        let options = LoaderOptions { access, ..sizes.options(dir.path(), 0, 1) };
        let mut loader = DataLoader::train(options).unwrap();
        rows(&mut loader);
        // Until the thread has read ahead and waits: it must not be in the map while the file is cut.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let file = dir.path().join("0/train_0000000001.bin");
        match removed {
            true => fs::remove_file(&file).unwrap(),
            false => fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(7).unwrap(),
        }
        let error = (0..30).find_map(|_| loader.next().err()).unwrap();
        assert!(format!("{error:#}").contains(want), "{error:#}");
        assert!(format!("{error:#}").contains("train_0000000001.bin"), "{error:#}");
        assert!(loader.next().unwrap_err().to_string().contains("the data thread ended"));
    }
}
