//! Pretraining and finetuning: the loop, from top to bottom.

use super::metrics::{self, RunLog};
use super::ranks::{self, TIME_IS_UP};
use super::run::{LaunchedStep, Run, TakenStep};
use super::signals::{self, StopSignal};
use super::{LOWER, saver};
use crate::config::{OnSaveError, RunConfig, with_commas};
use crate::data::ValidationSet;
use crate::distributed::Job;
use crate::error::{WithHint, exit};
use crate::generate::{GenerateOptions, generate_text};
use crate::guard;
use anyhow::{Result, anyhow};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Trains until `max_steps`, `max_tokens`, `max_time`, the end of the data's epochs, or a signal. Returns the exit code: 0, or
/// 130/143 where SIGINT/SIGTERM stopped it; both after a checkpoint was written. `job`: as one of several ranks, which all
/// call this.
///
/// # Errors
/// Bad data, a full disk, CUDA out of memory, a loss or gradient that is not finite.
///
/// # Sync
/// The CPU waits for the GPU once a step, for the loss and gradient norm of the step before, while the card has work.
pub fn pretrain(config: &RunConfig, job: Option<&Job>) -> Result<u8> {
    let mut run = Run::assemble(config, job)?;
    let stop = StopSignal::install(job.is_none())?;
    let (train, eval) = (&config.train, &config.eval);
    if run.was_through() {
        return tell_finished(&mut run, &stop);
    }

    if eval.initial_validation && run.progress.step == 0 {
        validate(&mut run, &stop)?;
    }
    let due = |interval: Option<u64>, step: u64| interval.is_some_and(|n| step.is_multiple_of(n));

    let mut in_flight: Option<LaunchedStep> = None;
    let mut clock = Instant::now();
    while !run.finished() {
        // ---- one optimizer step ----------------------------------------------------------------
        let launched = run.launch_step()?;
        let step = run.progress.step;
        // While the card works on this step, the CPU looks at the one before.
        if let Some(before) = in_flight.replace(launched) {
            conclude(&mut run, before, &mut clock)?;
        }
        let stops = ranks::stop_for(&run, &stop);
        let goes_on = stops.is_none() && !run.finished();
        let validates = goes_on && due(eval.interval, step);
        let saves = goes_on && due(train.save_interval, step);
        let pause = validates || saves || stops.is_some() || run.finished();
        if (pause || !run.runs_ahead())
            && let Some(last) = in_flight.take()
        {
            conclude(&mut run, last, &mut clock)?;
        }

        // ---- save, validate --------------------------------------------------------------------
        if saves {
            save_periodic(&mut run, step)?; // first: a validation may take long
        }
        if validates {
            validate(&mut run, &stop)?;
        }
        if ranks::leads_a_save_that_is_done(&run) {
            conclude_save(&mut run)?;
        }
        if pause {
            clock = Instant::now();
        }
        if stops == Some(TIME_IS_UP) {
            break;
        }
        if let Some(signal) = stops {
            conclude_save(&mut run)?;
            let path = saver::save(&mut run, &format!("step-{step:08}"))?;
            close_log(&mut run)?;
            eprintln!("stopped by signal {signal}; saved {}", path.display());
            eprintln!("continue with the same command and `--resume auto`");
            return Ok(if signal == 2 { exit::INTERRUPTED } else { exit::TERMINATED });
        }
    }
    finish(&mut run, &stop)
}

/// Validation of the length that the configuration says, and the tasks, unless a signal came meanwhile: the loop sees it.
fn validate(run: &mut Run, stop: &StopSignal) -> Result<()> {
    run.validate(run.config.eval.max_iters, stop)?;
    if run.job.is_none() && stop.requested().is_some() {
        return Ok(());
    }
    run.run_tasks()
}

/// Waits for a step's numbers, looks at them and logs them. `clock` started when the step before was concluded.
fn conclude(run: &mut Run, step: LaunchedStep, clock: &mut Instant) -> Result<()> {
    let taken = step.wait()?; // the CPU waits for the GPU here, once a step
    if let Some(ranks) = &run.ranks {
        ranks.check()?; // numbers of a collective that failed are garbage
    }
    let seconds = std::mem::replace(clock, Instant::now()).elapsed().as_secs_f64();
    check_finite(run, &taken)?;
    let is_last = taken.progress.step == run.progress.step && run.finished();
    if taken.progress.step.is_multiple_of(run.config.train.log_interval) || is_last {
        run.log_step(&taken, seconds)?;
    }
    Ok(())
}

/// A loss or gradient that is not finite ends the run; it has not touched the weights.
fn check_finite(run: &Run, taken: &TakenStep) -> Result<()> {
    let (step, loss, grad_norm) = (taken.progress.step, taken.loss, taken.grad_norm);
    if loss.is_finite() && grad_norm.is_finite() {
        return Ok(());
    }
    let names = run.optimizer.non_finite();
    if let (true, Some(job)) = (names.is_empty(), run.job) {
        ranks::let_others_tell(job, &run.config.distributed);
    }
    let shown = match names.as_slice() {
        [] => "no parameter alone (their sum overflows)".to_owned(),
        [one] => format!("`{one}`"),
        [first, .., last] => format!("{} parameters, from `{first}` to `{last}`", names.len()),
    };
    let last = match &run.last_checkpoint {
        Some(path) => format!("the last good checkpoint is `{}`", path.display()),
        None => "no checkpoint was written yet".to_owned(),
    };
    let error =
        anyhow!("step {step}: loss {loss}, gradient norm {grad_norm}; not finite in {shown}");
    Err(error)
        .hint(format!("{last}; resume from it with a lower `optimizer.lr`, or look at the data"))
}

/// A periodic checkpoint; a failure ends the run or not, as `train.on_save_error` says. Earlier
/// checkpoints are untouched either way.
///
/// Several ranks write it beside training, which waits for copies in host memory alone.
fn save_periodic(run: &mut Run, step: u64) -> Result<()> {
    let name = format!("step-{step:08}");
    if run.saver.is_none() {
        let saved = saver::save(run, &name);
        return told_save(run, saved.map(Some), &format!("of step {step} "));
    }
    conclude_save(run)?;
    match ranks::begin_save(run, &name) {
        Ok(stall) => {
            run.note(&format!("saving {name} beside training, which waited {stall:.2} s"));
            Ok(())
        }
        Err(e) => told_save(run, Err(e), &format!("of step {step} ")),
    }
}

/// Waits for the checkpoint that is being written beside training, if one is.
fn conclude_save(run: &mut Run) -> Result<()> {
    let saved = ranks::finish_save(run);
    told_save(run, saved, "")
}

/// `which`: `of step N `, where it is known.
fn told_save(run: &mut Run, saved: Result<Option<PathBuf>>, which: &str) -> Result<()> {
    match (saved, run.config.train.on_save_error) {
        (Ok(None), _) => {}
        (Ok(Some(path)), _) => run.note(&format!("saved {}", path.display())),
        (Err(e), OnSaveError::Stop) => return Err(e),
        (Err(e), OnSaveError::Continue) => {
            run.note(&format!("warning: checkpoint {which}not written: {e:#}"));
        }
    }
    Ok(())
}

/// Says the mean speed and draws the loss curve, on rank 0; the curve's file.
fn close_log(run: &mut Run) -> Result<Option<PathBuf>> {
    run.log.as_mut().map(RunLog::finish).transpose()
}

/// Final checkpoint and validation, loss curve, sample, and what to do next.
fn finish(run: &mut Run, stop: &StopSignal) -> Result<u8> {
    if let Some(why) = run.out_of_data().map(str::to_owned) {
        run.note(&format!("data        at an end after step {}: {why}", run.progress.step));
    }
    conclude_save(run)?;
    // Not less than `max_time`, where that ended the run by another rank's clock.
    let at_least = run.config.train.max_time.filter(|_| !run.finished()).unwrap_or(0.0);
    run.progress.elapsed = run.elapsed().max(at_least);
    let path = saver::save(run, "final")?; // first: what follows may take long, and a job's time may be up
    run.note(&format!("saved {}", path.display()));
    if run.config.eval.final_validation
        && let Some(signal) = last_validation(run, stop)?
    {
        return leave_validation(run, signal);
    }
    let curve = close_log(run)?;
    print_sample(run)?; // by all ranks together: the weights are shared
    if let Some(curve) = curve {
        next_steps(run, &path, &curve);
    }
    leave(run)
}

/// Validation over the whole set, and the tasks; the signal that ended it before, if one did.
fn last_validation(run: &mut Run, stop: &StopSignal) -> Result<Option<i32>> {
    let batches = run.val.as_ref().map_or(0, ValidationSet::n_batches);
    if run.config.eval.max_iters.is_some_and(|n| n < batches) {
        run.note(&format!("validation  over the whole set: {} batches", with_commas(batches)));
    }
    if let Some(signal) = run.validate_whole(stop)? {
        return Ok(Some(signal));
    }
    run.run_tasks()?;
    Ok(None)
}

fn leave_validation(run: &mut Run, signal: i32) -> Result<u8> {
    close_log(run)?;
    eprintln!("stopped by signal {signal} in the last validation; all steps are done and saved");
    eprintln!("validate with the same command and `--resume auto`");
    Ok(signals::exit_code(signal))
}

/// Of a run that was at its end before it began: nothing to do, but for a last validation that was stopped.
fn tell_finished(run: &mut Run, stop: &StopSignal) -> Result<u8> {
    let step = run.progress.step;
    if run.config.eval.final_validation
        && run.val.is_some()
        && !ranks::as_rank_0(run.job, "validated", || {
            metrics::holds_validation(&run.config.out_dir, step)
        })?
        && let Some(signal) = last_validation(run, stop)?
    {
        return leave_validation(run, signal);
    }
    let curve = close_log(run)?;
    if let (Some(curve), Some(path)) = (curve, &run.last_checkpoint) {
        eprintln!(
            "finished    step {step} was the last; for more, raise `train.max_steps` or what else ends it"
        );
        next_steps(run, path, &curve);
    }
    leave(run)
}

/// Nobody leaves a group that another still uses.
fn leave(run: &Run) -> Result<u8> {
    run.job.map_or(Ok(()), |job| job.host_group().barrier())?;
    Ok(exit::OK)
}

/// The continuation of `train.sample_prompt`, as a taste of the model.
fn print_sample(run: &Run) -> Result<()> {
    let (Some(prompt), Some(tokenizer)) = (&run.config.train.sample_prompt, &run.tokenizer) else {
        return Ok(());
    };
    let options = GenerateOptions {
        max_new_tokens: 60,
        // Ranks that differ in a last digit may draw unlike tokens, but must go through the model equally often.
        eos: tokenizer.eos_id().filter(|_| run.job.is_none()).into_iter().collect(),
        vocab_size: Some(tokenizer.vocab_size()),
        ..GenerateOptions::default()
    };
    let ids = tokenizer.encode(prompt, tokenizer.use_bos(), false)?;
    eprintln!("\nsample:");
    print!("{prompt}");
    let mut show = |piece: &str| -> Result<()> {
        print!("{piece}");
        Ok(())
    };
    guard::catch("generation", run.device, LOWER, || {
        generate_text(&run.model, tokenizer, &ids, &options, &[], &mut show)
    })?;
    println!();
    Ok(())
}

fn next_steps(run: &Run, checkpoint: &Path, curve: &Path) {
    let dir = checkpoint.display();
    eprintln!("\ncheckpoint  {dir}");
    eprintln!("loss curve  {}", curve.display());
    eprintln!("\ntry next:");
    match run.config.finetune.is_some() {
        true => {
            eprintln!("  ./scripts/run.sh chat --checkpoint {dir}");
            eprintln!("  ./scripts/run.sh serve --checkpoint {dir}");
        }
        false => {
            eprintln!("  ./scripts/run.sh generate --checkpoint {dir} --prompt \"We the people\"");
            eprintln!(
                "  ./scripts/run.sh score --checkpoint {dir} --text \"The state of the union is strong.\""
            );
        }
    }
    match run.config.lora().is_some() {
        true => {
            eprintln!(
                "  ./scripts/run.sh convert {dir} MERGED --to hf    # one model of base and adapters"
            );
            eprintln!("  python: peft.AutoPeftModelForCausalLM.from_pretrained(\"{dir}\")");
        }
        false => {
            eprintln!("  python: transformers.AutoModelForCausalLM.from_pretrained(\"{dir}\")")
        }
    }
}
