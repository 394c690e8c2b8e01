//! Orders of samples: the original's to the sample, ours once an epoch, for any number of ranks.

use proptest::prelude::*;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use tinyllama::config::{DataOrder, DataSource, Weight, WeightPoint};
use tinyllama::data::packed::{Access, PackedWriter};
use tinyllama::data::{DataLoader, LoaderOptions};

/// `tests/golden/packed/reader.json`, made by `scripts/golden/reader.py`.
#[derive(Deserialize)]
struct Golden {
    seed: u64,
    block: usize,
    chunk: u32,
    processes: u32,
    names: Vec<String>,
    files: Vec<u32>,
    base: Vec<u32>,
    weights: Vec<f64>,
    group: usize,
    runs: Vec<GoldenRun>,
}

#[derive(Deserialize)]
struct GoldenRun {
    world: usize,
    rank: usize,
    first: Vec<i64>,
    crc32: Vec<u32>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/packed/reader.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// One packed file of u16 tokens `first .. first + n`.
fn write_file(path: &Path, first: u32, n: u32) {
    let mut bytes = b"LITPKDS\x01\0\0\0\0\0\0\0\x08".to_vec();
    bytes.extend(u64::from(n).to_le_bytes());
    bytes.extend((first..first + n).flat_map(|token| (token as u16).to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

impl Golden {
    /// The set, by the formula of the generator.
    fn write(&self, dir: &Path) {
        for ((name, &files), &base) in self.names.iter().zip(&self.files).zip(&self.base) {
            let file =
                |i| format!("train_{name}_{}_{:010}.bin", i % self.processes, i / self.processes);
            let mut paths: Vec<PathBuf> = (0..files).map(|i| dir.join(file(i))).collect();
            paths.sort();
            for (f, path) in paths.iter().enumerate() {
                write_file(path, base + f as u32 * self.chunk, self.chunk);
            }
        }
    }

    fn options(&self, dir: &Path, rank: usize, world: usize) -> LoaderOptions {
        let source = |(name, weight): (&String, &f64)| DataSource {
            path: dir.join(format!("train_{name}")),
            weight: (*weight).into(),
        };
        LoaderOptions {
            sources: self.names.iter().zip(&self.weights).map(source).collect(),
            order: DataOrder::LitGpt,
            micro_batch_size: self.group,
            block_size: self.block - 1,
            rank,
            world,
            seed: self.seed,
            vocab_size: 60_000,
            prefetch: 2,
            access: Access::Mapped,
            borders: None,
        }
    }
}

/// First tokens of the next batch's rows; each row must run on from its own.
fn firsts(loader: &mut DataLoader) -> Vec<i64> {
    let batch = loader.next().unwrap();
    let (_, t) = batch.input.size2().unwrap();
    let first = batch.input.select(1, 0).contiguous();
    let steps = tch::Tensor::arange(t, (tch::Kind::Int64, tch::Device::Cpu));
    assert!((first.unsqueeze(1) + steps).equal(&batch.input));
    assert!((&batch.input + 1).equal(&batch.target));
    Vec::try_from(first).unwrap()
}

fn crc32(firsts: &[i64]) -> u32 {
    let mut crc = flate2::Crc::new();
    firsts.iter().for_each(|&first| crc.update(&(first as u32).to_le_bytes()));
    crc.sum()
}

#[test]
fn lit_gpt_gives_the_originals_first_10_000_samples_on_1_and_on_4_ranks() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    golden.write(dir.path());
    assert_eq!(golden.runs.len(), 1 + 4);
    for run in &golden.runs {
        let options = golden.options(dir.path(), run.rank, run.world);
        let mut loader = DataLoader::train(options).unwrap();
        for (i, want) in run.crc32.iter().enumerate() {
            let got = firsts(&mut loader);
            if i == 0 {
                assert_eq!(got[..run.first.len()], run.first);
            }
            let place = (run.world, run.rank, i);
            assert_eq!(crc32(&got), *want, "rank {place:?}: world, rank, hundred");
        }
        assert_eq!(loader.state().sample, 10_000 * run.world as u64);
        assert_eq!(loader.state().drawn.iter().sum::<u64>(), loader.state().sample);
    }
}

#[test]
fn a_position_in_lit_gpts_order_is_restored_at_window_borders_and_elsewhere() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    golden.write(dir.path());
    for (world, batch, stop) in [(1, 64, 1), (1, 1, 93), (2, 7, 40), (4, 3, 301)] {
        let rank = world - 1;
        let options =
            || LoaderOptions { micro_batch_size: batch, ..golden.options(dir.path(), rank, world) };
        let mut straight = DataLoader::train(options()).unwrap();
        (0..stop).for_each(|_| drop(straight.next().unwrap()));
        let json = serde_json::to_string(&straight.state()).unwrap();
        let mut resumed = DataLoader::train(options()).unwrap();
        resumed.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        for _ in 0..200 {
            assert_eq!(firsts(&mut straight), firsts(&mut resumed));
        }
        assert_eq!(straight.state(), resumed.state());
    }
    let one = DataLoader::train(golden.options(dir.path(), 0, 1)).unwrap();
    let mut two = DataLoader::train(golden.options(dir.path(), 0, 2)).unwrap();
    let error = two.restore(&one.state()).unwrap_err().to_string();
    assert!(error.contains("order lit-gpt on 1 rank(s), got"), "{error}");
    assert!(error.ends_with("order lit-gpt on 2 rank(s)"), "{error}");
    let ours = LoaderOptions { order: DataOrder::Global, ..golden.options(dir.path(), 0, 1) };
    let mut ours = DataLoader::train(ours).unwrap();
    assert!(ours.restore(&one.state()).is_err());
}

#[test]
fn what_lit_gpt_cannot_read_is_refused_and_what_it_never_reads_is_told() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    golden.write(dir.path());
    let loader = DataLoader::train(golden.options(dir.path(), 1, 4)).unwrap();
    let told = loader.describe();
    assert_eq!(
        told,
        [
            "train_slim: 75 file(s), 11.2k tokens, 512 blocks of 17, weight 0.693584",
            "train_slim: 11 of 75 files are never read, as lit-gpt never read them",
            "train_star: 35 file(s), 5.21k tokens, 256 blocks of 17, weight 0.306416",
            "train_star: 3 of 35 files are never read, as lit-gpt never read them",
        ]
    );
    let error = |options| format!("{:#}", DataLoader::train(options).err().unwrap());
    let few = error(golden.options(dir.path(), 0, 5));
    assert!(
        few.contains("train_star` has 35 files; `data.order: lit-gpt` needs at least 8 a rank, 40 for 5 rank(s)"),
        "{few}"
    );
    let short = error(LoaderOptions { block_size: 149, ..golden.options(dir.path(), 0, 1) });
    assert!(short.contains("files of 149 tokens"), "{short}");
    let mut schedule = golden.options(dir.path(), 0, 1);
    schedule.sources[0].weight = Weight::Schedule(vec![WeightPoint { tokens: 0, weight: 1.0 }]);
    assert!(error(schedule).contains("knows fixed weights only"));
    write_file(&dir.path().join("train_slim_0_0000000003.bin"), 7, 148);
    let odd = error(golden.options(dir.path(), 0, 1));
    assert!(odd.contains("reads files of one size and dtype"), "{odd}");
    assert!(odd.contains("has 148 of u16") || odd.contains("has 148 tokens of u16"), "{odd}");
}

/// A source of `n` distinct tokens from `first` on, in files of `chunk`, the last one short.
fn source(dir: &Path, first: u32, n: u32, chunk: u64, weight: Weight) -> DataSource {
    fs::create_dir_all(dir).unwrap();
    let mut writer = PackedWriter::new(dir, "train", chunk, 60_000);
    writer.add(&(first..first + n).collect::<Vec<_>>()).unwrap();
    writer.finish().unwrap();
    DataSource { path: dir.into(), weight }
}

fn options(sources: Vec<DataSource>, t: usize, order: DataOrder) -> LoaderOptions {
    LoaderOptions {
        sources,
        order,
        micro_batch_size: 1,
        block_size: t,
        rank: 0,
        world: 1,
        seed: 11,
        vocab_size: 60_000,
        prefetch: 4,
        access: Access::Mapped,
        borders: None,
    }
}

/// The first `n` global samples: rank r's i-th is number i W + r.
fn global_samples(options: &LoaderOptions, world: usize, n: usize) -> Vec<i64> {
    let mut ranks: Vec<_> = (0..world)
        .map(|rank| DataLoader::train(LoaderOptions { rank, world, ..options.clone() }).unwrap())
        .collect();
    let rounds = n.div_ceil(world);
    let all: Vec<i64> =
        (0..rounds).flat_map(|_| ranks.iter_mut().flat_map(firsts).collect::<Vec<_>>()).collect();
    assert!(ranks.iter().all(|r| r.state() == ranks[0].state()));
    all[..n].to_vec()
}

fn sorted(mut list: Vec<i64>) -> Vec<i64> {
    list.sort_unstable();
    list
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn an_epoch_in_global_order_has_each_block_once_on_any_number_of_ranks(
        t in 1usize..12, files in 1u32..6, chunk in 13u64..60, short in 1u64..13, seed in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let n = (files - 1) * chunk as u32 + (chunk.min(short + t as u64)) as u32;
        let sources = vec![source(dir.path(), 0, n, chunk, Weight::default())];
        let options = LoaderOptions { seed, ..options(sources, t, DataOrder::Global) };
        let blocks = n as usize / (t + 1);
        prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files as usize);
        let want: Vec<i64> = (0..blocks as i64).map(|b| b * (t as i64 + 1)).collect();
        let one = global_samples(&options, 1, 2 * blocks);
        prop_assert_eq!(sorted(one[..blocks].to_vec()), want.clone());
        prop_assert_eq!(sorted(one[blocks..].to_vec()), want);
        for world in [2, 3, 8] {
            prop_assert_eq!(&global_samples(&options, world, 2 * blocks), &one);
        }
    }

    #[test]
    fn an_epoch_in_lit_gpts_order_has_each_block_of_its_windows_once_and_ranks_share_none(
        t in 1usize..8, more in 0u32..20, chunk in 9u64..40, seed in any::<u64>(),
        world in proptest::sample::select(vec![1usize, 2, 3, 8]),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let files = 8 * world as u32 + more;
        let n = files * chunk as u32;
        let sources = vec![source(dir.path(), 0, n, chunk, Weight::default())];
        let options = LoaderOptions { seed, ..options(sources, t, DataOrder::LitGpt) };
        let blocks_of_file = chunk as usize / (t + 1);
        let windows = files as usize / world / 8;
        let epoch = windows * 8 * blocks_of_file;
        let mut seen = BTreeSet::new();
        for rank in 0..world {
            let mut loader =
                DataLoader::train(LoaderOptions { rank, world, ..options.clone() }).unwrap();
            let read = |loader: &mut DataLoader| {
                sorted((0..epoch).flat_map(|_| firsts(loader)).collect())
            };
            let (first, second) = (read(&mut loader), read(&mut loader));
            prop_assert_eq!(&first, &second);
            seen.extend(first);
            prop_assert_eq!(loader.state().blocks, vec![(epoch * world) as u64]);
        }
        prop_assert_eq!(seen.len(), epoch * world);
        let at_block = |first: &i64| (*first as u64 % chunk).is_multiple_of(t as u64 + 1);
        prop_assert!(seen.iter().all(at_block));
    }

    #[test]
    fn the_end_of_the_epochs_comes_where_a_source_would_begin_another(
        tokens in prop::collection::vec(300u32..900, 1..4), epochs in 1u64..4,
        order in proptest::sample::select(vec![DataOrder::Global, DataOrder::LitGpt]),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let sources: Vec<_> = tokens.iter().enumerate().map(|(i, n)| {
            let (folder, first) = (dir.path().join(i.to_string()), 1000 * i as u32);
            source(&folder, first, n / 30 * 30, 30, (1.0 + i as f64).into())
        }).collect();
        let mut loader = DataLoader::train(options(sources, 4, order)).unwrap();
        let end = loader.end(epochs, u64::MAX).unwrap();
        prop_assert_eq!(loader.end(epochs, end.samples), None);
        prop_assert_eq!(loader.end(epochs, end.samples + 1), Some(end));
        (0..end.samples).for_each(|_| drop(loader.next().unwrap()));
        prop_assert!(loader.epochs().iter().all(|&epoch| epoch <= epochs));
        prop_assert_eq!(loader.epochs()[end.source], epochs);
        loader.next().unwrap();
        prop_assert_eq!(loader.epochs()[end.source], epochs + 1);
    }
}

#[test]
fn a_schedule_moves_the_mixture_and_a_cursor_within_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let line = |from: f64, to: f64| {
        let end = 4000 * 7; // tokens of 4,000 samples
        Weight::Schedule(vec![
            WeightPoint { tokens: 0, weight: from },
            WeightPoint { tokens: end, weight: to },
        ])
    };
    let sources = vec![
        source(&dir.path().join("a"), 0, 400, 50, line(1.0, 0.0)),
        source(&dir.path().join("b"), 10_000, 400, 50, line(0.0, 3.0)),
    ];
    let options = options(sources, 7, DataOrder::Global);
    let mut loader = DataLoader::train(options.clone()).unwrap();
    let mut drawn = vec![0];
    let mut middle = None;
    for k in 1..=5000 {
        loader.next().unwrap();
        if k % 1000 == 0 {
            drawn.push(loader.state().drawn[0]);
        }
        if k == 1500 {
            middle = Some(loader.state());
        }
    }
    // Share of `a` at x of the way: (1 - x) / (1 - x + 3 x); its mean over each quarter, and 0 after the end.
    let want = [716.0, 363.0, 169.0, 47.0, 0.0];
    for (i, want) in want.iter().enumerate() {
        let got = (drawn[i + 1] - drawn[i]) as f64;
        assert!((got - want).abs() <= 50.0, "{i}: {got}, expected {want}");
    }
    assert_eq!(drawn[5] - drawn[4], 0);
    let mut resumed = DataLoader::train(options).unwrap();
    resumed.restore(&middle.unwrap()).unwrap();
    (0..3500).for_each(|_| drop(resumed.next().unwrap()));
    assert_eq!(resumed.state(), loader.state());
}

#[test]
fn mapped_and_opened_files_give_the_same_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let sources = vec![source(dir.path(), 0, 999, 70, Weight::default())];
    let options = options(sources, 9, DataOrder::Global);
    let read = |access| {
        let mut loader = DataLoader::train(LoaderOptions { access, ..options.clone() }).unwrap();
        (0..250).flat_map(|_| firsts(&mut loader)).collect::<Vec<_>>()
    };
    assert_eq!(read(Access::Mapped), read(Access::Opened));
}

#[test]
#[ignore = "prints how long a cursor's restore and the search for the data's end take"]
fn time_of_a_restore_and_of_the_search_for_an_end() {
    const SAMPLES: u64 = 100_000_000;
    let dir = tempfile::tempdir().unwrap();
    // Windows of 8,192 blocks, as published.
    let sources = vec![source(dir.path(), 0, 16 * 2048, 2048, Weight::default())];
    for order in [DataOrder::LitGpt, DataOrder::Global] {
        let mut loader = DataLoader::train(options(sources.clone(), 1, order)).unwrap();
        let mut state = loader.state();
        (state.sample, state.drawn) = (SAMPLES, vec![SAMPLES]);
        let start = std::time::Instant::now();
        loader.restore(&state).unwrap();
        loader.next().unwrap();
        eprintln!("{order:?}: restored in {:?}", start.elapsed());
        let start = std::time::Instant::now();
        assert_eq!(loader.end(u64::MAX, SAMPLES), None);
        eprintln!("{order:?}: {SAMPLES} draws in {:?}", start.elapsed());
    }
}
