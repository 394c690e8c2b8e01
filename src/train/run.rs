//! Everything a run needs, put together in one visible order.

use super::backends::set_backends;
use super::flops::{self, FlopsPerToken};
use super::memory::{self, Share};
use super::metrics::{RunLog, StepRecord, ValRecord, unix_time};
use super::objective::{Dpo, Objective};
use super::optimizer::{AdamW, offload, weight_kind};
use super::pick_attention::pick_attention;
use super::ranks;
use super::schedule::lr_at;
use super::signals::StopSignal;
use super::step::{MicroStep, train_step};
use super::{data, evaluate, initial, out_dir, saver, validate};
use crate::config::{
    ActivationCheckpointing, BatchPlan, CudaGraph, DpoConfig, Precision, Reference, RunConfig,
};
use crate::data::{DataLoader, ValidationSet, prepare};
use crate::distributed::saver::Saver;
use crate::distributed::{Job, Ranks};
use crate::eval::question::Task;
use crate::ffi::ReadBack;
use crate::model::{Fp8, GPT};
use crate::tokenizer::{ChatTemplate, Tokenizer};
use crate::{checkpoint, device, ffi, guard, model};
use anyhow::Result;
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Counters that a checkpoint carries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Micro-batches done on this rank.
    pub iter: u64,
    /// Tokens seen over all ranks.
    pub tokens: u64,
    /// Seconds of training, over all resumes.
    pub elapsed: f64,
}

/// A step whose work was launched; on a GPU it may not have begun.
#[derive(Debug)]
pub struct LaunchedStep {
    progress: Progress,
    tokens: u64,
    lr: f64,
    numbers: Numbers,
}

/// Loss and gradient norm, and the scales in `fp8-mixed`.
#[derive(Debug)]
enum Numbers {
    Coming(ReadBack),
    Here(Vec<f64>),
}

/// Numbers of one optimizer step.
#[derive(Clone, Debug)]
pub struct TakenStep {
    /// Counters after it; `progress.step` is its own number, from 1.
    pub progress: Progress,
    /// Tokens of it over all ranks.
    pub tokens: u64,
    /// Learning rate.
    pub lr: f64,
    /// Mean loss over the step's targets, in nats a token.
    pub loss: f64,
    /// L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    /// What [`crate::model::Fp8::numbers`] stood at, in `fp8-mixed`; of preferences, mean margin of the rewards and part of
    /// the pairs in which it is above 0.
    pub more: Vec<f64>,
}

impl LaunchedStep {
    /// What came out.
    ///
    /// # Sync
    /// The CPU waits for the step's end.
    pub fn wait(self) -> Result<TakenStep> {
        let mut numbers = match self.numbers {
            Numbers::Here(numbers) => numbers,
            Numbers::Coming(numbers) => numbers.wait()?,
        };
        let more = numbers.split_off(2);
        let (progress, tokens, lr) = (self.progress, self.tokens, self.lr);
        Ok(TakenStep { progress, tokens, lr, loss: numbers[0], grad_norm: numbers[1], more })
    }
}

/// A run in progress, on this rank.
pub struct Run<'j> {
    /// Its configuration.
    pub config: RunConfig,
    /// Batch arithmetic.
    pub plan: BatchPlan,
    /// Where the model lives.
    pub device: Device,
    /// The network.
    pub model: GPT,
    /// Optimizer with the exact weights.
    pub optimizer: AdamW,
    /// Training batches.
    pub loader: DataLoader,
    /// Validation set, if any.
    pub val: Option<ValidationSet>,
    /// Tasks that are run with each validation.
    pub tasks: Vec<Task>,
    /// Tokenizer, if any.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// metrics.jsonl, TensorBoard, log lines, progress bar; on rank 0.
    pub log: Option<RunLog>,
    /// The other ranks, if there are any.
    pub job: Option<&'j Job>,
    /// What they share.
    pub ranks: Option<Ranks>,
    /// Writes the checkpoints of several ranks.
    pub saver: Option<Saver>,
    /// Counters.
    pub progress: Progress,
    /// Forward and backward of a micro-batch.
    pub micro: MicroStep,
    /// Newest checkpoint written or read.
    pub last_checkpoint: Option<PathBuf>,
    /// What makes a text of a conversation, of a finetuning run; saved with its checkpoints.
    pub template: Option<ChatTemplate>,
    /// What the data are.
    pub(super) data_told: Vec<String>,
    /// Why the data end the run, where they do.
    pub(super) ends_with: Option<String>,
    /// Of each source, by its last sample.
    epochs: Vec<u64>,
    flops: FlopsPerToken,
    pub(super) attention_told: Option<String>,
    pub(super) peak_flops: Option<f64>,
    started: Instant,
    elapsed_before: f64,
}

impl<'j> Run<'j> {
    /// Prepares data where the configuration says so, builds model, optimizer and readers, and resumes. `job`: as one of
    /// several ranks.
    pub fn assemble(config: &RunConfig, job: Option<&'j Job>) -> Result<Self> {
        ffi::configure_allocator()?;
        let model_config = config.model()?;
        let device =
            job.map_or_else(|| device::resolve(&config.device.0), |job| Ok(job.device()))?;
        if let Device::Cuda(card) = device {
            ffi::cuda_set_device(card)?; // where graphs and events are made
        }
        let sequence = config.sequence_length(&model_config);
        let mut plan = BatchPlan::new(config, sequence, job.map_or(1, |job| job.size() as u64))?;
        set_backends(config, device)?;
        if config.precision == Precision::Fp8Mixed {
            model::require_fp8(&model_config, device)?; // before data is prepared
        }
        if config.optimizer.cpu_offload {
            offload::require(device, config.precision.is_mixed(), config.fused)?;
        }
        if let Device::Cuda(index) = device {
            let share = match job {
                Some(job) => ranks::share(job, config, &model_config)?,
                None => Share::ALONE,
            };
            let card = ffi::cuda_device(index)?.total_memory as u64;
            let memory = config.memory_limit_bytes().map_or(card, |limit| limit.min(card));
            memory::check_fits(config, &model_config, share, sequence as u64, memory)?;
        }

        // 1. Which checkpoint, before anything is prepared; tokenizer and data.
        let resume_from = match job {
            Some(job) => ranks::find_resume(job, || out_dir::find_resume(config))?,
            None => out_dir::find_resume(config)?,
        };
        let tokenizer = config.tokenizer_dir.as_deref().map(Tokenizer::load).transpose()?;
        if let Some(tokenizer) = &tokenizer {
            crate::generate::check_vocabulary(tokenizer, &model_config)?;
        }
        // What may fail at once does so before data are prepared, which may take a day.
        let tasks = evaluate::tasks(config, &model_config, job.map_or(1, Job::size))?;
        if let (Some(dir), None) = (&config.initial_checkpoint_dir, &resume_from) {
            checkpoint::resolve(dir)?;
        }
        out_dir::check(&config.out_dir)?;
        let prepare_listed = || prepare::prepare_missing(&config.data.prepare, tokenizer.as_ref());
        let prepare_raw = || prepare::with_raw_prepared(&config.data, tokenizer.as_ref());
        match job {
            Some(job) => ranks::one_after_another(job, || {
                prepare_listed()?;
                prepare_raw().map(drop)
            })?,
            None => prepare_listed()?,
        }
        let packed = prepare_raw()?;
        let place = job.map_or((0, 1), |job| (job.rank(), job.size()));
        let data::Opened { mut loader, val, told, template } = {
            let tokenizer = tokenizer.as_ref();
            data::open(config, &packed, &model_config, tokenizer, sequence, place)?
        };
        let mut ends_with = match &resume_from {
            Some(_) => None, // known when it is known what was read
            None => data::end_with(config, &mut plan, &loader, 0)?,
        };

        // 2. Kernels of attention, by measurement; model: random, or from a checkpoint's weights.
        let pick = || pick_attention(config, &model_config, sequence, device);
        let attention = match job {
            Some(job) => ranks::pick_attention(job, pick)?,
            None => pick()?,
        };
        tch::manual_seed(config.seed as i64);
        let lora = config.lora();
        let resumed = resume_from.as_deref();
        let rank = job.map(Job::rank);
        let (mut model, fill) = initial::model(config, &model_config, resumed, device, rank)?;
        model.attention = attention.backend;
        model.fused = config.fused;
        model.recompute_norms =
            config.train.activation_checkpointing == ActivationCheckpointing::Selective;
        model.recomputed_blocks = config.train.recomputed_blocks(model_config.n_layer) as usize;

        // What preferences are compared with, while this rank has all weights.
        let dpo =
            config.dpo().map(|dpo| reference(config, dpo, &model, &resume_from)).transpose()?;

        // 3. Optimizer: takes the fp32 weights over as masters.
        let (ranks, mut optimizer) = match job {
            Some(job) => {
                let (ranks, optimizer) =
                    ranks::parallelize(job, &mut model, config, fill.as_deref())?;
                (Some(ranks), optimizer)
            }
            None => (None, AdamW::new(&mut model, config.precision, &config.optimizer)?),
        };
        let saver = match (job, &ranks) {
            (Some(job), Some(ranks)) if lora.is_none() => {
                Some(ranks::new_saver(job, ranks, &optimizer, config)?)
            }
            _ => None,
        };
        optimizer.seed = config.seed;
        if config.precision == Precision::Fp8Mixed {
            model.enable_fp8()?;
        }

        // 4. Resume: optimizer, random generators, data cursor, counters.
        let (progress, has_scales) = match &resume_from {
            Some(dir) => saver::restore(dir, config, &model, &mut optimizer, &mut loader, device)?,
            None => (Progress::default(), false),
        };
        if resume_from.is_some() {
            plan.go_on_from(config, progress.step, progress.tokens, loader.consumed());
            ends_with = data::end_with(config, &mut plan, &loader, progress.step)?;
        }
        if let (Some(job), Some(_)) = (job.filter(|job| job.rank() > 0), lora) {
            // Not what rank 0 drops out of other rows.
            tch::manual_seed(
                config.seed as i64 + progress.step as i64 + ((job.rank() as i64) << 32),
            );
        }

        // 5. The run's folder and its log.
        let log = match job {
            Some(job) if job.rank() > 0 => None,
            _ => Some(out_dir::open_log(
                config,
                &plan,
                resume_from.is_some().then_some(progress.step),
            )?),
        };

        // Neither hooks that bring weights are part of a graph, nor a scale that is another in each step: conversations have
        // unlike numbers of targets.
        let repeats = job.is_none() && config.finetune.is_none();
        let mut micro = MicroStep::new(
            repeats && device.is_cuda() && config.fused && config.cuda_graph == CudaGraph::Auto,
        );
        if let Some(dpo) = dpo {
            micro.objective = Objective::Dpo(Box::new(dpo));
        }
        micro.find_scales = model.fp8.is_some() && !has_scales;
        let width = model_config.n_head * model_config.head_size;
        let adapters = model.adapters().iter().map(|(_, t)| t.numel() as u64).sum::<u64>();
        let frozen = if lora.is_some() { model_config.n_matmul_params() } else { 0 };
        let n_matmul = model_config.n_matmul_params() + adapters;
        let flops = flops::flops_per_token(
            n_matmul,
            n_matmul - frozen,
            model_config.n_layer as u64,
            width as u64,
            sequence as u64,
        );
        let mut run = Self {
            peak_flops: peak_flops(device),
            elapsed_before: progress.elapsed,
            last_checkpoint: resume_from,
            started: Instant::now(),
            config: config.clone(),
            plan,
            device,
            model,
            optimizer,
            epochs: loader.epochs(),
            loader,
            val,
            tasks,
            tokenizer: tokenizer.map(Arc::new),
            log,
            job,
            ranks,
            saver,
            progress,
            micro,
            template,
            data_told: told,
            ends_with,
            flops,
            attention_told: attention.told,
        };
        run.announce()?;
        saver::warn_of_space(&mut run);
        Ok(run)
    }

    /// Whether one of the stopping criteria is met.
    pub fn finished(&self) -> bool {
        let max_time = self.config.train.max_time;
        self.plan.total_steps.is_some_and(|n| self.progress.step >= n)
            || max_time.is_some_and(|limit| self.elapsed_before >= limit)
            || self.job.is_none() && self.time_is_up() // clocks differ: ranks agree on it as on a signal
    }

    /// Whether the run that goes on here had ended, and left its last checkpoint.
    pub fn was_through(&self) -> bool {
        let last = self.config.out_dir.join("final");
        self.finished() && self.last_checkpoint.as_ref() == Some(&last)
    }

    /// Whether `train.max_time` has passed on this rank.
    pub fn time_is_up(&self) -> bool {
        self.config.train.max_time.is_some_and(|limit| self.elapsed() >= limit)
    }

    /// Why the run is at its end, where its data are.
    pub fn out_of_data(&self) -> Option<&str> {
        let why = self.ends_with.as_deref();
        why.filter(|_| self.plan.total_steps.is_some_and(|n| self.progress.step >= n))
    }

    /// A line for the user.
    pub fn note(&mut self, text: &str) {
        if let Some(log) = &mut self.log {
            log.note(text);
        }
    }

    /// Tells the watch of a job what this rank is at.
    fn tick(&self, stage: &'static str) {
        if let Some(job) = self.job {
            job.tick(self.progress.step + 1, stage);
        }
    }

    /// Whether a step may be launched before the numbers of the one before are known.
    pub fn runs_ahead(&self) -> bool {
        self.optimizer.is_fused()
    }

    /// Seconds of training so far, over all resumes.
    pub fn elapsed(&self) -> f64 {
        self.elapsed_before + self.started.elapsed().as_secs_f64()
    }

    /// Model FLOPs utilisation at this many tokens a second over all ranks: full attention, causal attention; `None`
    /// where the device's peak is not known.
    pub fn utilisation(&self, tokens_per_sec: f64) -> (Option<f64>, Option<f64>) {
        let a_rank = tokens_per_sec / self.plan.world as f64;
        let of_peak = |flops: f64| self.peak_flops.map(|peak| a_rank * flops / peak);
        (of_peak(self.flops.full), of_peak(self.flops.causal))
    }

    /// Reads the batches of the next optimizer step, launches forward, backward and update, and counts the step.
    ///
    /// A step whose gradient norm is not finite changes no weight, nor do the steps after it where
    /// [`Run::runs_ahead`], since the fused update leaves such gradients as they are. There the caller may look at a
    /// step's numbers after the next one's launch.
    ///
    /// # Errors
    /// Bad data; CUDA out of memory.
    ///
    /// # Sync
    /// None on a GPU with fused kernels, but where a CUDA graph is captured or a matrix product is searched.
    pub fn launch_step(&mut self) -> Result<LaunchedStep> {
        let step = self.progress.step + 1;
        self.tick("reading data");
        let batches =
            (0..self.plan.accumulation).map(|_| self.loader.next()).collect::<Result<Vec<_>>>()?;
        self.note_epochs(step);
        // Rows of conversations may be shorter than the plan's; on several ranks this takes all to be as long as here.
        let tokens: usize = batches.iter().map(|batch| batch.input.numel()).sum();
        let tokens = tokens as u64 * self.plan.world;
        self.tick("the step");
        let train = &self.config.train;
        // A finetuning run, which may have few steps and ends at 0, learns in the last one too.
        let more = u64::from(self.config.finetune.is_some());
        let total = self.plan.total_steps.map(|n| n + more);
        let lr = lr_at(step, total, train, self.config.optimizer.lr);
        let (model, optimizer, micro) = (&self.model, &mut self.optimizer, &mut self.micro);
        let ranks = self.ranks.as_ref();
        let numbers = guard::catch("the training step", self.device, super::LOWER, || {
            optimizer.zero_grad();
            let out = train_step(model, optimizer, micro, &batches, lr, train, ranks)?;
            let mut numbers = vec![out.loss.view([1]), out.grad_norm.view([1])];
            numbers.extend(model.fp8.as_ref().map(Fp8::numbers));
            numbers.extend(out.rewards);
            let numbers = Tensor::cat(&numbers, 0); // (2 + scales or rewards,)
            Ok(match numbers.device() {
                Device::Cuda(_) => Numbers::Coming(ReadBack::start(&numbers)?),
                _ => Numbers::Here(Vec::try_from(&numbers.to_kind(Kind::Double))?),
            })
        })?;
        self.progress.step += 1;
        self.progress.iter += self.plan.accumulation;
        self.progress.tokens += tokens;
        self.progress.elapsed = self.elapsed();
        Ok(LaunchedStep { progress: self.progress, tokens, lr, numbers })
    }

    /// Says which sources began another epoch with the batches of a step.
    fn note_epochs(&mut self, step: u64) {
        let before = std::mem::replace(&mut self.epochs, self.loader.epochs());
        for (source, before) in before.into_iter().enumerate() {
            let epoch = self.epochs[source];
            if epoch > before.max(1) {
                let name = self.loader.name(source);
                self.note(&format!(
                    "data        {name} begins epoch {epoch} in step {step}, in another order"
                ));
            }
        }
    }

    /// Logs a step that took `seconds`.
    pub fn log_step(&mut self, taken: &TakenStep, seconds: f64) -> Result<()> {
        let TakenStep { progress, tokens, lr, loss, grad_norm, .. } = *taken;
        let fp8 = self.model.fp8.as_ref().map(|fp8| fp8.records(&taken.more));
        let rewards = self.config.dpo().and_then(|_| <[f64; 2]>::try_from(&taken.more[..]).ok());
        let rate = tokens as f64 / seconds;
        let (mfu, mfu_causal) = self.utilisation(rate);
        let peak_memory = match self.device {
            Device::Cuda(i) => {
                Some(ffi::cuda_memory(i)?.peak_allocated as f64 / (1u64 << 30) as f64)
            }
            _ => None,
        };
        let Some(log) = &mut self.log else { return Ok(()) };
        log.step(&StepRecord {
            step: progress.step,
            iter: progress.iter,
            tokens: progress.tokens,
            loss,
            lr,
            grad_norm,
            tokens_per_sec: rate,
            tokens_per_sec_per_gpu: rate / self.plan.world as f64,
            mfu,
            mfu_causal,
            peak_memory_gib: peak_memory,
            iter_time_ms: seconds * 1e3 / self.plan.accumulation as f64,
            time: unix_time(),
            fp8,
            reward_margin: rewards.map(|[margin, _]| margin),
            reward_accuracy: rewards.map(|[_, accuracy]| accuracy),
        })
    }

    /// Validates and logs the result, where there is a validation set. A process alone gives it up for a signal.
    ///
    /// # Sync
    /// As [`validate::validate`].
    pub fn validate(&mut self, max_iters: Option<u64>, stop: &StopSignal) -> Result<()> {
        let alone = self.job.is_none();
        self.validate_while(max_iters, &|_| !alone || stop.requested().is_none())
    }

    /// The last validation, over the whole set: given up, and not logged, for a signal, which is returned.
    ///
    /// # Sync
    /// As [`validate::validate`].
    pub fn validate_whole(&mut self, stop: &StopSignal) -> Result<Option<i32>> {
        let (job, step) = (self.job, self.progress.step);
        let signal = Cell::new(None);
        let goes_on = |batch: u64| {
            signal.set(ranks::signal_for(job, stop, step + 1 + batch));
            signal.get().is_none()
        };
        self.validate_while(None, &goes_on)?;
        Ok(signal.get())
    }

    fn validate_while(
        &mut self,
        max_iters: Option<u64>,
        goes_on: &dyn Fn(u64) -> bool,
    ) -> Result<()> {
        let Some(set) = &self.val else { return Ok(()) };
        let (model, ranks) = (&self.model, self.ranks.as_ref());
        let objective = &self.micro.objective;
        let loss = guard::catch("validation", self.device, super::LOWER, || {
            let each = |batch: u64| {
                self.tick("validation");
                goes_on(batch)
            };
            validate::validate(model, objective, set, max_iters, ranks, &each)
        })?;
        if let (Some(loss), Some(log)) = (loss, &mut self.log) {
            let record = ValRecord::new(self.progress.step, self.progress.tokens, loss);
            log.validation(&ValRecord { whole: max_iters.is_none(), ..record })?;
        }
        Ok(())
    }
}

/// The loss of preferences, with the weights that the run began from where they are to be kept.
fn reference(
    config: &RunConfig,
    dpo: &DpoConfig,
    model: &GPT,
    resumed: &Option<PathBuf>,
) -> Result<Dpo> {
    if dpo.reference == Reference::Adapters {
        return Ok(Dpo::new(dpo.beta, None));
    }
    let copy = model.frozen_copy(weight_kind(config.precision));
    if let (Some(dir), Some(_)) = (&config.initial_checkpoint_dir, resumed) {
        checkpoint::load_initial_weights(&copy, &checkpoint::resolve(dir)?)?;
    }
    Ok(Dpo::new(dpo.beta, Some(copy)))
}

/// Dense bf16 peak of the device in FLOP/s, where known.
fn peak_flops(device: Device) -> Option<f64> {
    match device {
        Device::Cuda(i) => flops::peak_bf16_flops(&ffi::cuda_device(i).ok()?.name),
        _ => None,
    }
}
