//! Bandwidth between ranks: all-gather and reduce-scatter over sizes, in the terms of NVIDIA's nccl-tests.
//!
//! For a whole of `S` bytes on W ranks that takes `t` seconds, the algorithm bandwidth is `S / t`, and the bus bandwidth
//! `S / t * (W - 1) / W`: the bytes that a link must carry, to be compared with the link's own speed. `t` is the mean
//! over the ranks of the time of one call, out of place, of `repeats` calls in a row.

use crate::ffi::{Backend, ProcessGroup, ReduceOp, TcpStore, cuda_device, nccl_versions};
use crate::guard;
use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use std::thread;
use std::time::{Duration, Instant};
use tch::{Cuda, Device, Kind, Tensor};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the whole.
    pub sizes: Vec<u64>,
    /// Its dtype: fp32, bf16 or fp16.
    pub kind: Kind,
    /// Timed calls of a size, after a fifth as many and at least two to warm up.
    pub repeats: usize,
}

/// One operation at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `all_gather` or `reduce_scatter`.
    pub op: &'static str,
    /// Bytes of the whole, made a multiple of the ranks.
    pub bytes: u64,
    /// Microseconds of a call.
    pub us: f64,
    /// Algorithm bandwidth, GB/s.
    pub algorithm_gb_s: f64,
    /// Bus bandwidth, GB/s.
    pub bus_gb_s: f64,
    /// Elements on this rank that are not what they should be.
    pub wrong: i64,
}

/// All measurements of a group, the same on every rank but for `wrong`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// W.
    pub ranks: usize,
    /// `Gloo` or `NCCL`.
    pub backend: String,
    /// NCCL's version in this process.
    pub nccl: Option<String>,
    /// This rank's card, or `CPU`.
    pub device: String,
    /// Of the elements.
    pub dtype: String,
    /// Timed calls of a size.
    pub repeats: usize,
    /// In order of measurement.
    pub rows: Vec<Row>,
}

/// Measures a group. All its ranks must call this with the same options.
pub fn run(group: &ProcessGroup, options: &Options) -> Result<Report> {
    let mut rows = vec![];
    for op in [Op::AllGather, Op::ReduceScatter] {
        for &bytes in &options.sizes {
            rows.push(measure(group, op, bytes, options).with_context(|| {
                format!("{} of {bytes} bytes on {} ranks", op.name(), group.size())
            })?);
        }
    }
    let device = match group.device() {
        Device::Cuda(index) => cuda_device(index)?.name,
        _ => "CPU".into(),
    };
    let nccl = group.backend() == Backend::Nccl;
    Ok(Report {
        ranks: group.size(),
        backend: group.backend().to_string(),
        nccl: if nccl { Some(nccl_versions()?.running) } else { None },
        device,
        dtype: dtype_name(options.kind).into(),
        repeats: options.repeats,
        rows,
    })
}

/// The same with all ranks as threads of this process: Gloo on the CPU, or NCCL with a card each.
pub fn run_threads(devices: &[Device], options: &Options) -> Result<Report> {
    let timeout = Duration::from_secs(120);
    let store = TcpStore::serve(0, timeout)?;
    let one = |rank: usize, device: Device| -> Result<Report> {
        let backend = Backend::of(device);
        let (size, here) = (devices.len(), Some("127.0.0.1"));
        let group = ProcessGroup::new(&store, "bench", backend, rank, size, device, here, timeout)?;
        let lower = "give smaller `--sizes`";
        let report = guard::catch("the benchmark", device, lower, || run(&group, options))?;
        group.barrier()?;
        group.finish()?;
        Ok(report)
    };
    let one = &one;
    let mut reports = thread::scope(|scope| {
        let ranks = devices.iter().enumerate();
        let threads: Vec<_> = ranks.map(|(r, &d)| scope.spawn(move || one(r, d))).collect();
        let join = |(rank, thread): (usize, thread::ScopedJoinHandle<Result<Report>>)| {
            let report = thread.join().map_err(|_| anyhow!("its thread panicked"));
            report.and_then(|report| report).with_context(|| format!("rank {rank}"))
        };
        threads.into_iter().enumerate().map(join).collect::<Result<Vec<Report>>>()
    })?;
    ensure!(!reports.is_empty(), "a group needs at least one rank");
    let mut first = reports.remove(0);
    for (i, row) in first.rows.iter_mut().enumerate() {
        row.wrong += reports.iter().map(|report| report.rows[i].wrong).sum::<i64>();
    }
    Ok(first)
}

#[derive(Clone, Copy)]
enum Op {
    AllGather,
    ReduceScatter,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
        }
    }
}

fn measure(group: &ProcessGroup, op: Op, bytes: u64, options: &Options) -> Result<Row> {
    let (ranks, size) = (group.size() as i64, options.kind.elt_size_in_bytes() as i64);
    let n = (bytes as i64 / size / ranks).max(1); // elements of a shard
    // Whole numbers, exact in 16 bits for 256 ranks.
    let own = match op {
        Op::AllGather => group.rank() as f64 + 1.0,
        Op::ReduceScatter => 1.0,
    };
    let shard = Tensor::full([n], own, (options.kind, group.device()));
    let whole = Tensor::full([n * ranks], own, (options.kind, group.device()));
    let call = || match op {
        Op::AllGather => group.all_gather_into(&whole, &shard)?.wait(),
        Op::ReduceScatter => group.reduce_scatter_into(&shard, &whole, ReduceOp::Sum)?.wait(),
    };
    (0..(options.repeats / 5).max(2)).try_for_each(|_| call())?;
    let wrong = match op {
        Op::AllGather => {
            let want = Tensor::arange(ranks, (Kind::Double, group.device())) + 1.0;
            whole.view([ranks, n]).not_equal_tensor(&want.to_kind(options.kind).unsqueeze(1))
        }
        Op::ReduceScatter => shard.not_equal_tensor(&shard.full_like(ranks as f64)),
    };
    let wrong = wrong.sum(Kind::Int64).int64_value(&[]);

    group.barrier()?;
    let began = Instant::now();
    (0..options.repeats).try_for_each(|_| call())?;
    if let Device::Cuda(index) = group.device() {
        Cuda::synchronize(index as i64);
    }
    let seconds = began.elapsed().as_secs_f64() / options.repeats as f64;
    group.check()?;
    let mean = Tensor::full([1], seconds, (Kind::Double, group.device()));
    group.all_reduce(&mean, ReduceOp::Avg)?.wait()?;
    let seconds = mean.double_value(&[0]);

    let bytes = (n * ranks * size) as u64;
    let algorithm_gb_s = bytes as f64 / seconds / 1e9;
    let bus_gb_s = algorithm_gb_s * (ranks - 1) as f64 / ranks as f64;
    Ok(Row { op: op.name(), bytes, us: 1e6 * seconds, algorithm_gb_s, bus_gb_s, wrong })
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        _ => "fp32",
    }
}
