//! Exact weights and moments in page-locked memory of the host (`optimizer.cpu_offload`): a step streams them through
//! the card, where the kernel that updates them is the one that it would be without.
//!
//! Each kind of state (master, both moments, their scales) is one flat buffer on the host, all parameters one behind
//! the other. The buffers are cut into groups, and a step takes one after the other:
//!
//! ```text
//! to the card      load 0   load 1    load 2    load 3 ..
//! current stream            update 0  update 1  update 2 ..
//! to the host                         store 0   store 1 ..
//! ```
//!
//! Both directions of PCIe are busy at once. Streams and events: `csrc/torch_cuda/offload.cpp`. The first three groups of a
//! step are loaded beside its micro-batches, the last three of the step before are stored beside them.
//!
//! # Cost
//! `bytes of state a parameter x parameters / bytes a second of PCIe one way`, once a step. With `state: fp32` and
//! `master: fp32` those are 12 bytes; 1.1e9 parameters over 25 GB/s take 0.53 s.
//!
//! # Numerics
//! Bit for bit those of the step without. The update is elementwise, the scales of `state: int8` belong to 256
//! elements that lie together, and a slice draws the random bits of its place ([`slice_key`]).

use super::low_memory::BLOCK;
use crate::bail_hint;
use crate::config::{MasterFormat, OptimizerConfig, StateFormat};
use crate::doctor;
use crate::error::WithHint;
use crate::ffi::{self, AdamWScalars, AdamWTensors, HostLink};
use anyhow::{Context, Result, anyhow};
use tch::{Device, Kind, Tensor};

/// Places on the card for groups: one is loaded, one updated, one stored. With two, loading would stand still during
/// each update.
const SLOTS: usize = 3;

/// Most elements of a group: at 12 bytes each 96 MiB, 4 ms of PCIe at 25 GB/s.
const GROUP: i64 = 1 << 23;

/// Most elements of a slice of a tensor; a power of two ([`slice_key`]).
const SLICE: i64 = 1 << 21;

/// Parameters begin at multiples of so many elements, so that their scales begin at multiples of 16 bytes.
const ALIGN: i64 = 4 * BLOCK;

// ---- who lies where --------------------------------------------------------------------------------------

/// Elements `first .. first + len` of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    /// The parameter.
    pub tensor: usize,
    /// A multiple of the largest length of a slice.
    pub first: i64,
    /// How many elements.
    pub len: i64,
    /// Where it begins in its group.
    pub at: i64,
}

/// Elements `start .. start + len` of the flat buffers, both multiples of [`ALIGN`].
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// First element.
    pub start: i64,
    /// How many elements, those between parameters included.
    pub len: i64,
    /// Parts of parameters in it.
    pub slices: Vec<Slice>,
}

/// Parameters in flat buffers, and the buffers in groups.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Where each parameter begins.
    pub starts: Vec<i64>,
    /// Length of the buffers.
    pub total: i64,
    /// In order, without gaps.
    pub groups: Vec<Group>,
}

impl Layout {
    /// Places parameters of these sizes, cuts them into slices of at most `slice` elements, and puts slices together
    /// to groups of at most `group` elements. `slice` is a power of two, `group` no less, both multiples of [`ALIGN`].
    pub fn new(sizes: &[i64], slice: i64, group: i64) -> Self {
        assert!(slice.count_ones() == 1 && slice % ALIGN == 0 && slice <= group, "slice {slice}");
        let mut layout = Self { starts: Vec::new(), total: 0, groups: Vec::new() };
        for (tensor, &size) in sizes.iter().enumerate() {
            layout.starts.push(layout.total);
            for first in (0..size).step_by(slice as usize) {
                let len = slice.min(size - first);
                layout.place(tensor, first, len, group);
            }
        }
        layout
    }

    /// Puts a slice behind all others: into the last group, or where that is full into a new one.
    fn place(&mut self, tensor: usize, first: i64, len: i64, most: i64) {
        let room = aligned(len);
        if self.groups.last().is_none_or(|g| g.len + room > most) {
            self.groups.push(Group { start: self.total, len: 0, slices: Vec::new() });
        }
        if let Some(g) = self.groups.last_mut() {
            g.slices.push(Slice { tensor, first, len, at: g.len });
            g.len += room;
        }
        self.total += room;
    }

    /// Elements of the longest group.
    fn longest(&self) -> i64 {
        self.groups.iter().map(|g| g.len).max().unwrap_or(0)
    }
}

fn aligned(n: i64) -> i64 {
    (n + ALIGN - 1) / ALIGN * ALIGN
}

/// The key under which elements `0, 1, ..` of a slice draw the random bits that elements `first, first + 1, ..` draw
/// under the tensor's key.
///
/// The bits of element i are a hash of `i ^ (low half of the key)` ([`super::low_memory::Noise`]). A slice begins at a
/// multiple of a power of two and is no longer than that, so that `first + i = first ^ i`.
pub fn slice_key(key: u64, first: i64) -> u64 {
    key ^ (first as u64 & 0xffff_ffff)
}

// ---- what is kept ----------------------------------------------------------------------------------------

/// A kind of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// What the exact weights have beside the bf16 ones.
    Master,
    /// First moments.
    ExpAvg,
    /// Second moments.
    ExpAvgSq,
    /// Scales of the first moments' codes.
    Scale,
    /// Scales of the second moments' codes.
    ScaleSq,
}

/// Kinds, their dtypes, and how many values each has for a block of [`BLOCK`] elements.
fn kinds(config: &OptimizerConfig) -> Vec<(Kept, Kind, i64)> {
    let mut kinds = match config.master {
        MasterFormat::Fp32 => vec![(Kept::Master, Kind::Float, BLOCK)],
        MasterFormat::Split => vec![(Kept::Master, Kind::Int16, BLOCK)],
        MasterFormat::Bf16 => vec![],
    };
    let (first, second) = match config.state {
        StateFormat::Fp32 => (Kind::Float, Kind::Float),
        StateFormat::Bf16 => (Kind::BFloat16, Kind::BFloat16),
        StateFormat::Int8 => (Kind::Int8, Kind::Uint8),
    };
    kinds.extend([(Kept::ExpAvg, first, BLOCK), (Kept::ExpAvgSq, second, BLOCK)]);
    if config.state == StateFormat::Int8 {
        kinds.extend([(Kept::Scale, Kind::Float, 1), (Kept::ScaleSq, Kind::Float, 1)]);
    }
    kinds
}

/// Bytes of all kinds for a block of [`BLOCK`] elements.
fn block_bytes(config: &OptimizerConfig) -> u64 {
    let bytes = |(_, kind, each): (Kept, Kind, i64)| kind.elt_size_in_bytes() as u64 * each as u64;
    kinds(config).into_iter().map(bytes).sum()
}

/// Bytes of staging memory on the card for a model of so many parameters.
pub fn staging_bytes(config: &OptimizerConfig, n_params: u64) -> u64 {
    let elements = n_params.min(GROUP as u64);
    SLOTS as u64 * elements.div_ceil(BLOCK as u64) * block_bytes(config)
}

/// Refuses what has no streamed update.
///
/// # Errors
/// No GPU, or no fused kernels in mixed precision.
pub fn require(device: Device, mixed: bool, fused: bool) -> Result<()> {
    if device.is_cuda() && mixed && fused {
        return Ok(());
    }
    let yes = |yes| if yes { "yes" } else { "no" };
    bail_hint!(
        "set `optimizer.cpu_offload: false`, or train on a GPU (`tinyllama doctor` says whether one is visible)";
        "`optimizer.cpu_offload` needs a GPU, `precision: bf16-mixed` or `fp8-mixed`, and `fused: true`; got a GPU: \
         {}, mixed precision: {}, fused: {}",
        yes(device.is_cuda()),
        yes(mixed),
        yes(fused)
    )
}

// ---- the streamed step -----------------------------------------------------------------------------------

/// One kind of state of all parameters.
#[derive(Debug)]
struct Buffer {
    kept: Kept,
    /// Values for a block of [`BLOCK`] elements: as many, or one.
    each: i64,
    /// Page-locked, `(blocks, each)`.
    host: Tensor,
    /// Staging memory, `(SLOTS, blocks of the longest group, each)`.
    card: Tensor,
}

impl Buffer {
    /// Values `at .. at + len` in elements of the flat buffer (`Scale`: those of their blocks), of a flat tensor.
    fn range(&self, flat: &Tensor, at: i64, len: i64) -> Tensor {
        let per_value = BLOCK / self.each;
        flat.view([-1]).narrow(0, at / per_value, (len + per_value - 1) / per_value)
    }
}

/// State of all parameters on the host, and the way to the card and back.
#[derive(Debug)]
pub struct Offload {
    /// Waits for its copies before it lets go of the buffers.
    link: HostLink,
    layout: Layout,
    buffers: Vec<Buffer>,
}

/// A slice's state on the card, its gradient and weight: flat views of `len` elements.
struct OnCard {
    param: Option<Tensor>,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Option<[Tensor; 2]>,
    weight: Option<Tensor>,
}

impl Offload {
    /// State of zeros for parameters of these sizes, and staging memory on the card; as many as `sharers` ranks have on
    /// this host.
    ///
    /// # Errors
    /// Not enough memory on the host.
    pub fn new(
        sizes: &[i64],
        config: &OptimizerConfig,
        device: Device,
        sharers: usize,
    ) -> Result<Self> {
        let layout = Layout::new(sizes, SLICE, GROUP);
        let (blocks, staged) = (layout.total / BLOCK, layout.longest() / BLOCK);
        let needed = blocks as u64 * block_bytes(config);
        let memory = |bytes| ffi::page_locked(bytes, device);
        check_memory(needed, doctor::available_memory().map(|free| free / sharers.max(1) as u64))?;
        let buffer = |(kept, kind, each): (Kept, Kind, i64)| -> Result<Buffer> {
            let bytes = blocks * each * kind.elt_size_in_bytes() as i64;
            let context = || format!("{}, which the system did not give", needs(needed));
            let mut host = memory(bytes).with_context(context).hint(SMALLER)?;
            let host = host.zero_().view_dtype(kind).view([blocks, each]);
            let card = Tensor::zeros([SLOTS as i64, staged, each], (kind, device));
            Ok(Buffer { kept, each, host, card })
        };
        let buffers = kinds(config).into_iter().map(buffer).collect::<Result<Vec<_>>>()?;
        let host: Vec<&Tensor> = buffers.iter().map(|b| &b.host).collect();
        let card: Vec<&Tensor> = buffers.iter().map(|b| &b.card).collect();
        let link = HostLink::new(device, SLOTS, &host, &card)?;
        Ok(Self { link, layout, buffers })
    }

    /// A parameter's state of one kind on the host, in this shape; `None` where there is no such kind.
    pub fn part(&self, kept: Kept, tensor: usize, shape: &[i64]) -> Option<Tensor> {
        let buffer = self.buffers.iter().find(|b| b.kept == kept)?;
        let n: i64 = shape.iter().product();
        let at = self.layout.starts[tensor];
        Some(buffer.range(&buffer.host, at, n * (BLOCK / buffer.each)).view(shape))
    }

    /// The exact weights of a parameter, fp32, whose weights are about to become bf16: with `master: fp32` where they will
    /// stay, else in ordinary memory of the host for the time being.
    ///
    /// # Sync
    /// The CPU waits for the copy.
    pub fn take_over(&self, tensor: usize, weight: &Tensor) -> Tensor {
        match self.part(Kept::Master, tensor, &weight.size()) {
            Some(mut exact) if exact.kind() == Kind::Float => {
                tch::no_grad(|| exact.copy_(weight));
                exact
            }
            _ => weight.detach().to_device(Device::Cpu),
        }
    }

    /// [`ffi::adamw`] of parameters whose state lies here, in groups. The CPU does not wait: before it reads or writes
    /// the state, call [`Offload::wait`].
    pub fn adamw(&self, tensors: &[AdamWTensors], clip: &Tensor, s: AdamWScalars) -> Result<()> {
        // Group i has the same slot in every step, so that it is loaded after it was stored.
        for (i, group) in self.layout.groups.iter().enumerate() {
            let slot = i % SLOTS;
            let (start, blocks) = (group.start / BLOCK, group.len / BLOCK);
            self.link.load(slot, start, blocks)?;
            let here = |slice: &Slice| self.on_card(slot, slice, &tensors[slice.tensor]);
            let here: Vec<OnCard> = group.slices.iter().map(here).collect();
            let pieces = here.iter().zip(&group.slices).map(|(here, slice)| {
                let whole = tensors[slice.tensor];
                here.tensors(whole, slice_key(whole.key, slice.first))
            });
            ffi::adamw(&pieces.collect::<Vec<_>>(), clip, s)?;
            self.link.store(slot, start, blocks)?;
        }
        Ok(())
    }

    /// Makes the CPU wait until the state here is that of the last step.
    pub fn wait(&self) -> Result<()> {
        self.link.wait()
    }

    fn on_card(&self, slot: usize, slice: &Slice, whole: &AdamWTensors) -> OnCard {
        let staged = |kept: Kept| {
            let buffer = self.buffers.iter().find(|b| b.kept == kept)?;
            Some(buffer.range(&buffer.card.get(slot as i64), slice.at, slice.len))
        };
        let part = |t: &Tensor| t.view([-1]).narrow(0, slice.first, slice.len);
        let moment = |kept| staged(kept).expect("every format has moments");
        OnCard {
            param: staged(Kept::Master),
            grad: part(whole.grad),
            exp_avg: moment(Kept::ExpAvg),
            exp_avg_sq: moment(Kept::ExpAvgSq),
            scales: staged(Kept::Scale).zip(staged(Kept::ScaleSq)).map(|(m, v)| [m, v]),
            weight: whole.weight.map(part),
        }
    }
}

impl OnCard {
    /// What the kernel takes, with all else as the whole parameter has it.
    fn tensors<'a>(&'a self, whole: AdamWTensors<'a>, key: u64) -> AdamWTensors<'a> {
        let mut t = whole;
        (t.grad, t.weight, t.key) = (&self.grad, self.weight.as_ref(), key);
        t.param = self.param.as_ref();
        (t.exp_avg, t.exp_avg_sq) = (&self.exp_avg, &self.exp_avg_sq);
        t.scales = self.scales.as_ref().map(|[m, v]| (m, v));
        t
    }
}

// ---- memory of the host ----------------------------------------------------------------------------------

const SMALLER: &str = "set `optimizer.state: int8` or `bf16`, `optimizer.master: split` or `bf16`, which need less, or \
                       `optimizer.cpu_offload: false`; `pretrain --dry-run` prints both plans";

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn needs(bytes: u64) -> String {
    format!("`optimizer.cpu_offload` needs {:.2} GiB of page-locked memory on the host", gib(bytes))
}

/// Refuses before the system kills a process for want of memory. `available`: bytes, where they are known.
fn check_memory(needed: u64, available: Option<u64>) -> Result<()> {
    match available {
        Some(bytes) if bytes < needed => {
            Err(anyhow!("{}, {:.2} GiB are available to a rank", needs(needed), gib(bytes)))
                .hint(SMALLER)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::optimizer::low_memory::Noise;

    /// Sizes around those of slices and groups of 4,096 and 8,192 elements.
    const SIZES: [i64; 11] = [1, 4096, 8192, 5000, 3, 12_289, 1024, 100_003, 2048, 256, 4095];

    #[test]
    fn groups_hold_every_element_once_in_order_and_are_no_longer_than_asked() {
        let layout = Layout::new(&SIZES, 4096, 8192);
        let mut next = 0;
        let mut seen = [0; SIZES.len()];
        for group in &layout.groups {
            assert!(group.start == next && group.len <= 8192, "{group:?}");
            next += group.len;
            let mut end = 0;
            for s in &group.slices {
                assert!(s.first == seen[s.tensor] && s.first % 4096 == 0 && s.len <= 4096, "{s:?}");
                assert!(s.at % ALIGN == 0 && s.at >= end && s.at + s.len <= group.len, "{s:?}");
                assert_eq!(group.start + s.at, layout.starts[s.tensor] + s.first, "{s:?}");
                (end, seen[s.tensor]) = (s.at + s.len, s.first + s.len);
            }
        }
        assert_eq!((seen, next), (SIZES, layout.total));
    }

    #[test]
    fn slices_fill_most_of_a_group_of_tiny_llamas_parameters() {
        let (c, f) = (2048, 5632);
        let mut sizes = vec![32_000 * c];
        for _ in 0..22 {
            sizes.extend([c, 2560 * c, c * c, c, f * c, f * c, c * f]);
        }
        sizes.extend([c, 32_000 * c]);
        let layout = Layout::new(&sizes, SLICE, GROUP);
        let n: i64 = sizes.iter().sum();
        assert_eq!(n, 1_100_048_384);
        assert!(layout.total - n < 50_000);
        assert_eq!(layout.longest(), GROUP);
        let fill = layout.total as f64 / (layout.groups.len() as i64 * GROUP) as f64;
        println!("{} groups, {fill:.3} full", layout.groups.len());
        assert!(fill > 0.8, "{fill}");
    }

    #[test]
    fn a_slice_draws_the_random_bits_of_its_place_in_the_tensor() {
        let key = 0x0123_4567_89ab_cdef;
        let whole = Noise::new(key, &[10_000], Device::Cpu);
        let layout = Layout::new(&[10_000], 4096, 4096);
        for s in layout.groups.iter().flat_map(|g| &g.slices) {
            let slice = Noise::new(slice_key(key, s.first), &[s.len], Device::Cpu);
            for (got, want) in [
                (&slice.weight, &whole.weight),
                (&slice.exp_avg, &whole.exp_avg),
                (&slice.exp_avg_sq, &whole.exp_avg_sq),
            ] {
                assert!(got.equal(&want.narrow(0, s.first, s.len)), "{s:?}");
            }
        }
        // The index of an element is taken modulo 2^32.
        assert_eq!(slice_key(key, 3 << 32), key);
    }

    #[test]
    fn staging_memory_is_that_of_three_groups_in_each_format() {
        let bytes = |master, state| {
            let config = OptimizerConfig { master, state, ..Default::default() };
            staging_bytes(&config, 1 << 30)
        };
        let group = GROUP as u64;
        assert_eq!(bytes(MasterFormat::Fp32, StateFormat::Fp32), 3 * 12 * group); // 288 MiB
        assert_eq!(bytes(MasterFormat::Split, StateFormat::Bf16), 3 * 6 * group);
        assert_eq!(bytes(MasterFormat::Bf16, StateFormat::Int8), 3 * (2 * group + group / 32));
        assert_eq!(staging_bytes(&OptimizerConfig::default(), 1000), 3 * 4 * 256 * 12);
    }

    #[test]
    fn a_host_with_too_little_memory_is_told_how_much_is_needed_and_what_needs_less() {
        check_memory(3 << 30, Some(3 << 30)).unwrap();
        check_memory(3 << 30, None).unwrap();
        let error = check_memory(3 << 30, Some(2 << 30)).unwrap_err().to_string();
        assert!(error.contains("needs 3.00 GiB") && error.contains("2.00 GiB are"), "{error}");
    }

    #[test]
    fn a_run_without_a_gpu_or_fused_kernels_is_refused() {
        for (device, mixed, fused) in [
            (Device::Cpu, true, true),
            (Device::Cuda(0), false, true),
            (Device::Cuda(0), true, false),
        ] {
            let error = require(device, mixed, fused).unwrap_err().to_string();
            assert!(error.contains("`optimizer.cpu_offload` needs a GPU"), "{error}");
        }
        require(Device::Cuda(1), true, true).unwrap();
    }
}
